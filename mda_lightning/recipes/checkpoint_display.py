"""What a person sees while a command goes through checkpoints."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mda_lightning.recipes.checkpoint_choice import CheckpointProgress

_LINE_SECONDS = 15.0


class CheckpointDisplay:
    """Progress over checkpoints; use as a context manager.

    On a terminal a bar, taken away while the hub's library shows its own; elsewhere a line now and
    then.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._silent = quiet
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task("checkpoints", total=None, left="")
        self._printed = time.monotonic()

    def __enter__(self) -> CheckpointDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.live.stop()

    def watch(self, now: CheckpointProgress) -> None:
        """Show where the call is."""
        if self._silent:
            return
        left = "" if now.seconds_left is None else f"about {_duration(now.seconds_left)} left"
        if self._console.is_terminal:
            if now.remote and now.doing == "loading":
                self._bar.live.stop()
            else:
                self._bar.start()
            self._bar.update(
                self._task,
                description=f"{now.doing} {now.label}".strip(),
                completed=now.done,
                total=now.total,
                left=left,
            )
        elif time.monotonic() - self._printed >= _LINE_SECONDS:
            self._printed = time.monotonic()
            said = f"{now.doing} {now.label}: {now.done:,} of {now.total:,} done"
            text = f"{said}, {left}" if left else said
            self._console.print(text, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
