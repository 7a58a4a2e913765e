"""What a person sees while a study runs: a bar with an ETA per process, or plain lines."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mda_lightning.recipes.studies.jobs import Job
from mda_lightning.recipes.studies.jobs import Progress as JobProgress

_LINE_SECONDS = 15.0


class StudyDisplay:
    """Progress of a study on a console; use as a context manager.

    On a terminal every running process has a bar with elapsed and remaining time; elsewhere (a log
    file, CI) a line is printed now and then.

    Args:
        console: where to show it.
        quiet: show nothing but errors.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[remark]}"),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._expected, self._kept, self._finished = 0, 0, 0
        self._began = time.monotonic()
        self._all: TaskID | None = None
        self._started: dict[str, float] = {}
        self._printed: dict[str, float] = {}

    def __enter__(self) -> StudyDisplay:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def preparing(self, what: str, share: float) -> None:
        """Show the corpus being built: ``share`` from 0 to 1."""
        self._update("corpus", f"corpus: {what}", share, 1.0, "", ended=share >= 1)

    def expect(self, n_jobs: int) -> None:
        """Show a bar for all jobs together, of which there will be about so many."""
        self._expected, self._began = n_jobs, time.monotonic()
        if self._console.is_terminal and not self._quiet:
            self._all = self._bars.add_task("all runs", total=n_jobs, remark="")

    def watch(self, job: Job, progress: JobProgress | None, state: str) -> None:
        """Show a job; see :data:`mda_lightning.recipes.studies.jobs.Watch`."""
        if state == "kept":
            self._kept += 1
            self._line(f"{job.title}: kept from before")
            self._count()
        elif state == "finished":
            self._finished += 1
            self._update(job.title, job.title, 1, 1, "", ended=True)
            self._count()
        elif progress is not None:
            label = job.title
            if progress.phase != "training":
                label = f"{job.title}, {progress.phase}"
            elif job.kind == "base" and job.spec.get("branch") is None:
                label = f"{job.title}, until its window closes"
            self._update(
                job.title, label, progress.done, progress.total, progress.remark, ended=False
            )
        else:
            self._update(job.title, f"{job.title}: starting", 0, 1, "", ended=False)

    def _count(self) -> None:
        """How many of all jobs have ended, and how long the others take at this rate."""
        done = self._kept + self._finished
        if not self._expected or done > self._expected:
            return
        remark = ""
        if self._finished:
            each = (time.monotonic() - self._began) / self._finished
            remark = f"about {each * (self._expected - done) / 60:.0f} min left"
        if self._all is not None:
            self._bars.update(self._all, completed=done, remark=remark)
        elif remark:
            self._line(f"{done} of about {self._expected} runs, {remark}")

    def _update(
        self, key: str, label: str, done: float, total: float, remark: str, *, ended: bool
    ) -> None:
        now = time.monotonic()
        started = self._started.setdefault(key, now)
        if self._console.is_terminal and not self._quiet:
            if key not in self._tasks:
                self._tasks[key] = self._bars.add_task(label, total=total, remark=remark)
            self._bars.update(
                self._tasks[key], description=label, completed=done, total=total, remark=remark
            )
            if ended:
                self._bars.remove_task(self._tasks.pop(key))
                self._line(f"{label}: done in {now - started:.0f} s")
            return
        if ended:
            self._line(f"{label}: done in {now - started:.0f} s")
        elif done >= 0.01 * total and now - self._printed.get(key, started) >= _LINE_SECONDS:
            self._printed[key] = now
            left = (now - started) * (total / done - 1)
            remark = f", {remark}" if remark else ""
            self._line(f"{label}: {done / total:.0%}, at most {left:.0f} s left{remark}")

    def say(self, text: str) -> None:
        """Show a line, whatever bars there are."""
        self._line(text)

    def _line(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, highlight=False)
