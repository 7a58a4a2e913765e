"""Training runs in parallel processes of one thread each, resumable, with live progress.

A job is a folder with a ``job.json``; its process writes ``progress.json`` now and then, its output
to ``log.txt``, and at the end ``done.json``. A finished job with the same identity is not run
again; an unfinished one starts over in an emptied folder, so nothing half-written is read back,
unless it knows how to go on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mda_lightning.files import read_json, sha256_of, write_json

_POLL_SECONDS = 0.2
_LOG_TAIL = 25
# glibc gives freed memory back and faults it in again at every step; keeping it is some percent
# faster at these sizes. Other C libraries ignore the names.
_KEEP_MEMORY = {
    "MALLOC_TOP_PAD_": str(2**26),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}
_STOP_SECONDS = 10
WAITING = "MDA_LIGHTNING_WAITING_PROCESS"
"""Environment variable: the process that waits for a job, without which it is to end."""


class JobError(RuntimeError):
    """A job's process failed; the message holds the end of its log."""


@dataclass(frozen=True)
class Job:
    """One process to run.

    Attributes:
        kind: a name that :mod:`mda_lightning.recipes.studies.job` knows.
        title: for people.
        folder: where it works; nothing else writes there.
        spec: JSON values, all that the job needs to know.
        identity: the part of it that determines the result, JSON values. Where files lie and how a
            run is logged is no part of it, so that neither makes a finished job run again.
        resumable: whether an interrupted job goes on in its folder; others begin in an empty one.
    """

    kind: str
    title: str
    folder: Path
    spec: dict[str, Any]
    identity: dict[str, Any]
    resumable: bool = False

    @property
    def content_hash(self) -> str:
        """SHA-256 over the kind and the identity."""
        return sha256_of(self.kind, json.dumps(self.identity, sort_keys=True))

    def result(self) -> dict[str, Any] | None:
        """What the job returned, or None if it has not finished with this identity."""
        path = self.folder / "done.json"
        if not path.is_file():
            return None
        done = read_json(path)
        if done.get("job_hash") != self.content_hash:
            return None
        result: dict[str, Any] = done["result"]
        return result


@dataclass(frozen=True)
class Progress:
    """Where a running job is: ``done`` of ``total`` in a named phase, with a short remark."""

    phase: str
    done: int
    total: int
    remark: str = ""


Watch = Callable[[Job, Progress | None, str], None]
"""Called with (job, progress, state); state is "running", "finished" or "kept" from before."""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)


def run_jobs(
    jobs: Iterable[Job],
    *,
    max_parallel: int,
    then: Callable[[Job, dict[str, Any]], Iterable[Job]] | None = None,
    watch: Watch | None = None,
) -> dict[Path, dict[str, Any]]:
    """Run jobs, ``max_parallel`` at a time, and those that ``then`` adds when one has finished.

    Returns:
        Each job's result by folder.

    Raises:
        JobError: a process failed; the others are stopped first.
        KeyboardInterrupt: as it came, after the processes have been stopped. Calling again with the
            same jobs goes on with those that had not finished.
    """
    waiting, running = list(jobs), list[_Running]()
    results: dict[Path, dict[str, Any]] = {}

    def finished(job: Job, result: dict[str, Any], state: str) -> None:
        results[job.folder] = result
        if watch is not None:
            watch(job, None, state)
        # First: a seed's arms before the next seed's base run, so that a study is of whole seeds.
        waiting[:0] = then(job, result) if then is not None else ()

    try:
        while waiting or running:
            while waiting and len(running) < max_parallel:
                job = waiting.pop(0)
                if (kept := job.result()) is not None:
                    finished(job, kept, "kept")
                else:
                    running.append(_Running(job, _start(job)))
            for item in list(running):
                if item.process.poll() is None:
                    if watch is not None:
                        watch(item.job, _progress(item.job), "running")
                    continue
                running.remove(item)
                result = item.job.result()
                if item.process.returncode != 0 or result is None:
                    raise JobError(_failure(item))
                finished(item.job, result, "finished")
            if running:
                time.sleep(_POLL_SECONDS)
    finally:
        _stop([item.process for item in running])
    return results


def stop_if_alone() -> None:
    """End this job's process where the one that waits for it is gone.

    Raises:
        SystemExit: it is.
    """
    waiting = os.environ.get(WAITING)
    if waiting is not None and os.getppid() != int(waiting):
        raise SystemExit("the process that waits for this one is gone")


def _start(job: Job) -> subprocess.Popen[bytes]:
    if job.folder.exists() and not (job.resumable and _began(job)):
        shutil.rmtree(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    spec = {"kind": job.kind, "title": job.title, "hash": job.content_hash, "spec": job.spec}
    write_json(job.folder / "job.json", spec)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with (job.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "mda_lightning.recipes.studies.job", str(job.folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={
                **_KEEP_MEMORY,
                **os.environ,
                **threads,
                "TOKENIZERS_PARALLELISM": "false",
                WAITING: str(os.getpid()),
            },
            # Ctrl-C reaches the parent alone, which then stops its jobs in order.
            start_new_session=True,
        )


def _began(job: Job) -> bool:
    """Whether the folder holds the beginning of this very job."""
    path = job.folder / "job.json"
    return path.is_file() and read_json(path).get("hash") == job.content_hash


def _progress(job: Job) -> Progress | None:
    path = job.folder / "progress.json"
    return Progress(**read_json(path)) if path.is_file() else None


def _failure(item: _Running) -> str:
    log = item.job.folder / "log.txt"
    lines = log.read_text("utf-8", errors="replace").splitlines() if log.is_file() else []
    code = item.process.returncode
    ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    tail = "\n".join(f"  | {line}" for line in lines[-_LOG_TAIL:]) or "  | (nothing was printed)"
    return f"{item.job.title} {ended}; the end of {log}:\n{tail}"


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
