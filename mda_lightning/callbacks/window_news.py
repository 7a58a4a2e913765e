"""What a window's turns are told to: subscribers, loggers, the monitor's page, the console."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from mda_lightning.callbacks.loggers import alert
from mda_lightning.callbacks.unit_monitor import UnitMonitor
from mda_lightning.callbacks.window_source import Values
from mda_lightning.window import MechanismWindow, WindowEvent


@dataclass(frozen=True)
class Announcement:
    """A window of one unit opened, closed or lapsed, or one unit lapsed while ``to`` rose."""

    kind: Literal["opened", "closed", "lapsed", "handed_over"]
    mechanism: str
    unit: Hashable
    step: int
    start: int
    reason: str | None
    to: Hashable | None = None


class WindowNews:
    """Tells what happens to the windows of one metric.

    Args:
        metric: its name.
    """

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self._subscribers: list[Callable[[Announcement], None]] = []

    def subscribe(self, follow: Callable[[Announcement], None]) -> Callable[[], None]:
        """Call ``follow`` with every announcement; returns what ends it."""
        self._subscribers.append(follow)
        return lambda: self._subscribers.remove(follow)

    def scalars(self, follower: MechanismWindow[Any], *, sign: float) -> dict[str, float]:
        """The values to log after an evaluation; ``sign`` is -1 for a metric that was turned."""
        detector, watched, states = follower.detector, follower.watched, follower.detector.states
        values = {
            f"{self._metric}/n_rising": float(sum(states[i] == "RISING" for i in watched)),
            f"{self._metric}/n_formed": float(sum(states[i] == "FORMED" for i in watched)),
            f"{self._metric}/window_open": float(follower.phase == "open"),
        }
        ema = detector.ema[watched]
        if np.isfinite(ema).any():
            values[f"{self._metric}/ema_max"] = sign * float(np.nanmax(ema))
        return values

    def announce(
        self,
        trainer: pl.Trainer,
        monitor: UnitMonitor | None,
        follower: MechanismWindow[Any],
        event: WindowEvent,
        values: Values,
    ) -> None:
        """Tell everybody of a turn; warnings and what came to nothing are no turns."""
        kind, unit = event.kind, follower.units[event.unit_index]
        if kind == "warning" or kind == "calm":
            return
        to = None if event.to_index is None else follower.units[event.to_index]
        if to is None:
            title = f"{self._metric}: window of {unit} {kind}"
            reason = "" if event.reason is None else f", {event.reason}"
            score = float(values[event.unit_index])
            more = f"window from step {event.start}, score {score:.3f}{reason}"
        else:
            title = f"{self._metric}: {unit} handed over to {to}"
            more = f"{unit} has fallen back while {to} rose"
        alert(trainer, title, f"step {event.step}, {more}")
        tell(monitor, event.step, f"{title} ({more})")
        one = Announcement(kind, self._metric, unit, event.step, event.start, event.reason, to)
        for follow in list(self._subscribers):
            follow(one)


def tell(monitor: UnitMonitor | None, step: int, text: str) -> None:
    """A line on the console and on the monitor's page."""
    if monitor is not None:
        monitor.note(step, text)
    rank_zero_info(f"step {step}: {text}")
