"""The page beside the run that shows how it goes: what is on it, and when it is written."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

import lightning.pytorch as pl

from mda_lightning.analysis.charts import Track
from mda_lightning.analysis.live import (
    Event,
    HeadsView,
    LiveView,
    RunState,
    ScalarView,
    WindowMark,
    live_page,
)
from mda_lightning.callbacks.allowance import Allowance
from mda_lightning.callbacks.metric_keys import ScalarKeys
from mda_lightning.callbacks.metric_table import MetricTable
from mda_lightning.files import atomic_path
from mda_lightning.units import Head
from mda_lightning.window import Window

PAGE_NAME = "live.html"
_REFRESH_SECONDS = 10


class Follower(Protocol):
    """What follows a monitor's heads and knows of windows, as ``CriticalWindow`` does."""

    mechanism: str

    @property
    def asks(self) -> bool: ...

    @property
    def window(self) -> tuple[Head, Window] | None: ...


class LiveReport:
    """Writes ``live.html`` every ``every_n_steps`` steps or 10 seconds, whichever comes first, but
    never so often that it takes more than 0.3% of the wall time.

    Args:
        every_n_steps: see there.
    """

    def __init__(self, every_n_steps: int) -> None:
        self._every = every_n_steps
        self._allowance = Allowance()
        self._began = 0.0
        self._written = 0.0
        self._first_step = self._written_step = 0
        self._title = self._subtitle = ""

    @property
    def seconds(self) -> float:
        """Spent on the page since :meth:`begin`."""
        return self._allowance.seconds

    def begin(self, title: str, subtitle: str, *, step: int) -> None:
        """Count steps and time from now."""
        self._title, self._subtitle = title, subtitle
        self._first_step = self._written_step = step
        self._began = self._written = time.monotonic()
        self._allowance.begin()

    def is_due(self, step: int) -> bool:
        """Whether the page is to be written after ``step``."""
        late = time.monotonic() - self._written >= _REFRESH_SECONDS
        return (late or step - self._written_step >= self._every) and self._allowance.is_due()

    def write(
        self,
        trainer: pl.Trainer,
        folder: Path,
        *,
        table: MetricTable,
        keys: ScalarKeys,
        chances: Mapping[str, float],
        followers: Iterable[Follower],
        events: Sequence[Event],
        rate: str,
        measuring_seconds: float,
        state: RunState = "training",
        detail: str = "",
    ) -> None:
        """Write the page."""
        step = trainer.global_step
        self._written, self._written_step = time.monotonic(), step
        passed = self._written - self._began
        new_steps = step - self._first_step
        with self._allowance.spending():
            marks = list(_marks(followers))
            view = LiveView(
                title=self._title,
                subtitle=self._subtitle,
                state=state,
                detail=detail,
                step=step,
                n_steps=planned_steps(trainer),
                steps_per_second=new_steps / passed if new_steps and passed else None,
                measured_step=table.last_step if table.metrics else None,
                written_at=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
                measuring_share=measuring_seconds / passed if new_steps and passed else None,
                rate=rate,
                refresh_seconds=_REFRESH_SECONDS,
                heads=[
                    _heads(table, metric, keys, chances.get(metric), marks)
                    for metric in table.metrics
                    if table.shape(metric)
                ],
                scalars=[
                    ScalarView(
                        metric, Track(metric, *table.curves(metric), errors=table.errors(metric))
                    )
                    for metric in table.metrics
                    if not table.shape(metric)
                ],
                events=events,
            )
            with atomic_path(folder / PAGE_NAME) as part:
                part.write_text(live_page(view), "utf-8")


def planned_steps(trainer: pl.Trainer) -> int | None:
    """Optimizer steps of the whole fit, or None where only its end will tell.

    Asks nothing of the Trainer that would set up its data.
    """
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    batches = trainer.num_training_batches
    if trainer.max_epochs and trainer.max_epochs > 0 and batches != float("inf"):
        steps_per_epoch = -(-int(batches) // trainer.accumulate_grad_batches)
        limits.append(steps_per_epoch * trainer.max_epochs)
    return min(limits, default=None)


def _marks(followers: Iterable[Follower]) -> Iterable[tuple[str, WindowMark]]:
    for one in followers:
        if one.window is not None:
            head, window = one.window
            yield one.mechanism, WindowMark(str(head), window.start, window.end)


def _heads(
    table: MetricTable,
    metric: str,
    keys: ScalarKeys,
    chance: float | None,
    marks: Iterable[tuple[str, WindowMark]],
) -> HeadsView:
    steps, values = table.curves(metric)
    mine = [mark for mechanism, mark in marks if mechanism == metric]
    return HeadsView(
        metric=metric,
        step=int(steps[-1]),
        now=values[-1],
        se=table.errors(metric)[-1],
        tracks=[
            Track(f"L{layer}H{head}", steps, values[:, layer, head])
            for layer, head in keys.chosen(metric)
        ],
        chance=chance,
        windows=mine,
    )
