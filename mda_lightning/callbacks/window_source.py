"""Where a window's values come from: a monitor's table, or a metric that the user's code logs."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, Literal, Protocol

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray

from mda_lightning.callbacks.attachment import callbacks_before
from mda_lightning.callbacks.unit_monitor import UnitMonitor

On = Literal["train", "validation"]
Values = NDArray[np.float32]

_N_PATIENT = 20


class WindowSource(Protocol):
    """One metric of some units, evaluation by evaluation."""

    @property
    def units(self) -> list[Hashable]:
        """Heads, or the metric's name where it is one number."""
        ...

    def read(self, trainer: pl.Trainer, hook: On) -> None:
        """Look for a new value at the end of a training batch or of a validation; on all ranks."""
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
        assert self._monitor.layout is not None
        if self._monitor.mechanism(self._key) is None and not self._monitor.table.shape(self._key):
            return [self._key]
        return list(self._monitor.layout.heads)

    def read(self, trainer: pl.Trainer, hook: On) -> None:
        """The monitor has measured already: it acts first."""

    def since(self, step: int) -> Iterator[tuple[int, Values]]:
        steps, values = self._monitor.table.curves(self._key)
        for i in range(int(np.searchsorted(steps, step, side="right")), len(steps)):
            yield int(steps[i]), values[i].reshape(-1)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The table is the monitor's."""


class LoggedSource:
    """A number in ``trainer.callback_metrics``, read every ``every_n_steps`` optimizer steps, or
    after every validation."""

    def __init__(self, key: str, *, on: On, every_n_steps: int) -> None:
        self._key, self._on, self._every = key, on, every_n_steps
        self._steps: list[int] = []
        self._values: list[float] = []

    @property
    def units(self) -> list[Hashable]:
        return [self._key]

    def read(self, trainer: pl.Trainer, hook: On) -> None:
        step = trainer.global_step
        due = step % self._every == 0 if self._on == "train" else not trainer.sanity_checking
        if hook != self._on or not due or (self._steps and step <= self._steps[-1]):
            return
        value = trainer.callback_metrics.get(self._key)
        number = float("nan") if value is None else float(value)
        # Decisions follow from it, so every rank has rank 0's.
        self._steps.append(step)
        self._values.append(trainer.strategy.broadcast(number))

    def check(self, trainer: pl.Trainer) -> None:
        """Raise ValueError where the metric has been read and was never there."""
        if len(self._steps) == _N_PATIENT and np.isnan(self._values).all():
            known = sorted(trainer.callback_metrics)
            raise ValueError(
                f"CriticalWindow({self._key!r}): no monitor measures it, and after "
                f"{_N_PATIENT} readings (on={self._on!r}) nothing has been logged under that name; "
                f"logged are: {', '.join(known) or 'none'}"
            )

    def since(self, step: int) -> Iterator[tuple[int, Values]]:
        for at, value in zip(self._steps, self._values, strict=True):
            if at > step:
                yield at, np.array([value], np.float32)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self._steps), "values": list(self._values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps, self._values = list(state["steps"]), list(state["values"])


def monitor_of(trainer: pl.Trainer, me: pl.Callback, metric: str) -> UnitMonitor | None:
    """The monitor before ``me`` that measures ``metric``, as a mechanism or as a measure's key.

    Raises:
        ValueError: there is one, but it acts after ``me``.
    """
    before, after = callbacks_before(trainer, me, UnitMonitor)
    for monitor in before:
        if _measures(monitor, metric):
            return monitor
    if any(_measures(monitor, metric) for monitor in after):
        raise ValueError(
            f"CriticalWindow({metric!r}) stands before the UnitMonitor it follows; put it after "
            "that one in callbacks=[...]"
        )
    return None


def _measures(monitor: UnitMonitor, metric: str) -> bool:
    names = [m.name for m in monitor.mechanisms] + [m.name for m in monitor.measures]
    return any(metric == name or metric.startswith(f"{name}/") for name in names)
