"""What a window's turns are told to: subscribers, loggers, the monitor's page, the console."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from mda_lightning.callbacks.loggers import alert
from mda_lightning.callbacks.unit_monitor import UnitMonitor
from mda_lightning.callbacks.window_source import Values
from mda_lightning.window import MechanismWindow, WindowEvent

_TURNS = ("opened", "closed", "lapsed", "handed_over")


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


@dataclass(frozen=True)
class Turn:
    """An announcement and its words."""

    title: str
    more: str
    announcement: Announcement

    @property
    def line(self) -> str:
        return f"{self.title} ({self.more})"


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

    def scalars(
        self, follower: MechanismWindow[Any], *, own: Callable[[float], float]
    ) -> dict[str, float]:
        """The values to log after an evaluation; ``own`` turns what is followed into the metric's
        own units."""
        detector, watched, states = follower.detector, follower.watched, follower.detector.states
        values = {
            f"{self._metric}/n_rising": float(sum(states[i] == "RISING" for i in watched)),
            f"{self._metric}/n_formed": float(sum(states[i] == "FORMED" for i in watched)),
            f"{self._metric}/window_open": float(follower.phase == "open"),
        }
        ema = detector.ema[watched]
        if np.isfinite(ema).any():
            values[f"{self._metric}/ema_max"] = own(float(np.nanmax(ema)))
        return values

    def turns(
        self, follower: MechanismWindow[Any], events: Iterable[WindowEvent], values: Values
    ) -> list[Turn]:
        """What there is to tell of an evaluation's events; warnings and what came to nothing are
        no turns."""
        return [self._turn(follower, event, values) for event in events if event.kind in _TURNS]

    def _turn(self, follower: MechanismWindow[Any], event: WindowEvent, values: Values) -> Turn:
        kind, unit = event.kind, follower.units[event.unit_index]
        assert kind != "warning" and kind != "calm"
        to = None if event.to_index is None else follower.units[event.to_index]
        if to is None:
            title = f"{self._metric}: window of {unit} {kind}"
            reason = "" if event.reason is None else f", {event.reason}"
            score = float(values[event.unit_index])
            more = f"window from step {event.start}, score {score:.3f}{reason}"
        else:
            title = f"{self._metric}: {unit} handed over to {to}"
            more = f"{unit} has fallen back while {to} rose"
        one = Announcement(kind, self._metric, unit, event.step, event.start, event.reason, to)
        return Turn(title, more, one)

    def note(self, monitor: UnitMonitor | None, turn: Turn) -> None:
        """Put it on the monitor's page."""
        if monitor is not None:
            monitor.note(turn.announcement.step, turn.line)

    def tell(self, monitor: UnitMonitor | None, step: int, text: str) -> None:
        """A line on the console and on the monitor's page."""
        if monitor is not None:
            monitor.note(step, text)
        rank_zero_info(f"step {step}: {text}")

    def announce(self, trainer: pl.Trainer, turn: Turn) -> None:
        """Tell loggers, the console and subscribers."""
        one = turn.announcement
        alert(trainer, turn.title, f"step {one.step}, {turn.more}")
        rank_zero_info(f"step {one.step}: {turn.line}")
        for follow in list(self._subscribers):
            follow(one)
