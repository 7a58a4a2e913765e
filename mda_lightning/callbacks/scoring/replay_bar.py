"""The bar that a person sees while a window is replayed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_SECONDS = 15.0


@contextmanager
def replay_bar(
    trainer: pl.Trainer, mechanism: str
) -> Iterator[Callable[[str, int, int], None] | None]:
    """Samples scored of all, with the time left; on rank 0, where the Trainer shows bars at all.

    Without a terminal a line now and then.
    """
    if not trainer.is_global_zero or trainer.progress_bar_callback is None:
        yield None
        return
    console = Console(stderr=True)
    started = printed = time.monotonic()
    columns = (BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}"),
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(f"scoring {mechanism}", total=None)

        def show(where: str, done: int, total: int) -> None:
            nonlocal printed
            what = f"scoring {mechanism} at {where}"
            bar.update(task, description=what, completed=done, total=total)
            now = time.monotonic()
            if not console.is_terminal and now - printed >= _LINE_SECONDS:
                printed = now
                left = (now - started) / max(done, 1) * (total - done)
                console.print(f"{what}: {done:,} of {total:,} samples, about {left:.0f} s left")

        yield show
