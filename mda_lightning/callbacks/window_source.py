"""Where a window's values come from: a monitor's table, or a metric that the user's code logs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterator
from typing import Any, Literal, Protocol

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray

from mda_lightning.callbacks.unit_monitor import UnitMonitor

On = Literal["train", "validation"]
Values = NDArray[np.float64]

_PATIENCE = {"train": 20, "validation": 2}
"""Readings without a metric after which it is taken for one that nobody logs."""


class WindowSource(Protocol):
    """One metric of some units, evaluation by evaluation."""

    @property
    def units(self) -> list[Hashable]:
        """Heads, or the metric's name where it is one number; none before that is known.

        Raises:
            ValueError: there is no such metric.
        """
        ...

    def read(self, trainer: pl.Trainer, hook: On) -> None:
        """Look for a new value at the end of a training batch or of a validation; on all ranks.

        Raises:
            ValueError: there is no such metric.
        """
        ...

    def since(self, step: int) -> Iterator[tuple[int, Values]]:
        """(step, values) of the evaluations after ``step``, the same on all ranks."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What nobody else keeps."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class MonitorSource:
    """A mechanism of a monitor, or a key of one of its measures: its table is the record."""

    def __init__(self, monitor: UnitMonitor, key: str) -> None:
        self._monitor, self._key = monitor, key

    @property
    def units(self) -> list[Hashable]:
        monitor, key = self._monitor, self._key
        assert monitor.layout is not None
        kind = "heads" if monitor.mechanism(key) is not None else self._kind()
        if kind == "not yet measured":
            return []
        return list(monitor.layout.heads) if kind == "heads" else [key]

    def _kind(self) -> Literal["heads", "number", "not yet measured"]:
        table, key = self._monitor.table, self._key
        if key in table.metrics:
            return "heads" if table.shape(key) else "number"
        names = [one.name for one in self._monitor.measures]
        name = next(name for name in names if is_key_of(name, key))
        if others := [metric for metric in table.metrics if is_key_of(name, metric)]:
            raise ValueError(
                f"CriticalWindow({key!r}): the measure {name!r} has no such key; it gives "
                + ", ".join(map(repr, others))
            )
        return "not yet measured"

    def read(self, trainer: pl.Trainer, hook: On) -> None:
        """The monitor has measured already: it acts first."""

    def since(self, step: int) -> Iterator[tuple[int, Values]]:
        if self._monitor.table.count(self._key) == 0:
            return
        steps, values = self._monitor.table.curves(self._key)
        for i in range(int(np.searchsorted(steps, step, side="right")), len(steps)):
            yield int(steps[i]), values[i].reshape(-1).astype(np.float64)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The table is the monitor's."""


class LoggedSource:
    """A number in ``trainer.callback_metrics``, read every ``every_n_steps`` optimizer steps, or
    after every validation.

    What is not logged anew is read again as it was, as Lightning shows it.
    """

    def __init__(self, key: str, *, on: On, every_n_steps: int) -> None:
        self._key, self._on, self._every = key, on, every_n_steps
        self._steps: list[int] = []
        self._values: list[float] = []
        # As it stands now, a tensor that nobody waits for; None as long as nobody has logged it.
        self._latest: Any = None

    @property
    def units(self) -> list[Hashable]:
        return [self._key]

    def read(self, trainer: pl.Trainer, hook: On) -> None:
        # After a resume Lightning's own metrics are empty until they are logged again.
        self._latest = trainer.callback_metrics.get(self._key, self._latest)
        step = trainer.global_step
        due = step > 0 and step % self._every == 0 if self._on == "train" else True
        if hook != self._on or not due or (self._steps and step <= self._steps[-1]):
            return
        mine = None if self._latest is None else float(self._latest)
        # Decisions follow from it, so every rank has rank 0's.
        value = trainer.strategy.broadcast(mine)
        self._steps.append(step)
        self._values.append(float("nan") if value is None else value)
        if value is None and len(self._steps) >= _PATIENCE[self._on]:
            known = sorted(m for m in trainer.callback_metrics if not is_key_of(self._key, m))
            raise ValueError(
                f"CriticalWindow({self._key!r}): no UnitMonitor measures it, and in "
                f"{len(self._steps)} readings (on={self._on!r}) nothing was logged under that "
                f"name. Logged are: {', '.join(known) or 'none'}"
            )

    @property
    def is_absent(self) -> bool:
        """Whether nobody has logged it so far."""
        return self._latest is None

    def since(self, step: int) -> Iterator[tuple[int, Values]]:
        for i in range(bisect_right(self._steps, step), len(self._steps)):
            yield self._steps[i], np.array([self._values[i]], np.float64)

    def state_dict(self) -> dict[str, Any]:
        latest = None if self._latest is None else float(self._latest)
        return {"steps": list(self._steps), "values": list(self._values), "latest": latest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps, self._values = list(state["steps"]), list(state["values"])
        self._latest = state["latest"]


def is_key_of(name: str, metric: str) -> bool:
    """Whether ``metric`` is what a mechanism or measure of that name gives."""
    return metric == name or metric.startswith(f"{name}/")
