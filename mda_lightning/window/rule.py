"""The vocabulary of critical windows: the rule, what an evaluation changes, what was found."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

State = Literal["PRE", "RISING", "FORMED", "LAPSED"]
EventKind = Literal["warning", "calm", "opened", "closed", "lapsed", "handed_over"]
EndReason = Literal["level", "plateau", "lapsed"]

STATES: tuple[State, ...] = ("PRE", "RISING", "FORMED", "LAPSED")


@dataclass(frozen=True)
class WindowRule:
    """The thresholds of a detector, in units of the metric and in evaluations."""

    minimum_up: float = 0.10
    """A unit's first window never opens at or below this value."""
    n_sigma: float = 6.0
    """It opens above floor + n_sigma * sigma, sigma the scaled MAD of the early evaluations."""
    minimum_sigma: float = 0.005
    """Least sigma: a fixed probe set on a model at rest has a MAD of nearly 0."""
    n_early: int = 100
    """How many evaluations without a rise make the floor, at most."""
    guard: int = 10
    """An evaluation counts towards the floor when as many later ones have shown no rise."""
    minimum_rise: float = 0.10
    """A unit that has formed opens another window at least this far above the level it rests at."""
    rearm: float = 0.8
    """A unit has lapsed when its EMA is under rearm * up, or under halfway from floor to up."""
    smoothing: float = 0.3
    """Weight of the newest value in the EMA."""
    patience: int = 5
    """Consecutive evaluations that open, close or lapse."""
    hold: float = 0.7
    """A window opens when the mean of the last two is at least this share of the highest so far,
    above the floor: a spike that falls off is none."""
    level: float | None = 0.4
    """A window closes when the EMA has held this; None: on a plateau only."""
    plateau_slope: float = 0.1
    """... or when the slope has held under this share of its peak,"""
    plateau_share: float = 0.8
    """while the EMA is at least this share of its maximum,"""
    plateau_rise: float = 1.5
    """and the EMA is this many times as far above the floor as the threshold is."""
    slope_span: tuple[int, int] = (10, 40)
    """The slope is the EMA's change over half the window so far, at least and at most these."""
    plateau_done: float = 0.9
    """A window that closes on a plateau ended where this share of its rise was done."""

    def __post_init__(self) -> None:
        self._check_kinds()
        if not self.minimum_up > 0.0:
            raise ValueError(
                f"minimum_up={self.minimum_up} must be above 0, as shares of thresholds count; "
                "follow a metric below 0, or one that falls, by its distance from where it begins"
            )
        if not 0.0 < self.rearm <= 1.0:
            raise ValueError(f"rearm={self.rearm} must lie in (0, 1]: it multiplies the threshold")
        if not 0.0 < self.smoothing <= 1.0:
            raise ValueError(f"smoothing={self.smoothing} must lie in (0, 1]")
        if self.level is not None and self.level <= self.minimum_up:
            raise ValueError(
                f"level={self.level} is not above minimum_up={self.minimum_up}: a window would "
                "close as it opens; raise level, lower minimum_up, or give level=None to close "
                "on a plateau only"
            )
        counts = ("patience", "n_early", "guard")
        for name, count in [(name, getattr(self, name)) for name in counts]:
            if count < 1:
                raise ValueError(f"{name}={count} counts evaluations: at least 1")
        if self.n_early < self.patience:
            raise ValueError(
                f"n_early={self.n_early} is under patience={self.patience}: a floor is the median "
                "of at least that many evaluations; raise n_early"
            )
        shortest, longest = self.slope_span
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"slope_span={self.slope_span}: (least, most) evaluations, 1 <= least <= most"
            )
        for name in ("plateau_slope", "plateau_share", "plateau_done", "hold"):
            share = getattr(self, name)
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name}={share} is a share: it must lie in [0, 1]")
        for name in ("n_sigma", "minimum_sigma", "minimum_rise", "plateau_rise"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    def _check_kinds(self) -> None:
        for name, value in asdict(self).items():
            counts = name in ("n_early", "guard", "patience", "slope_span")
            for one in value if isinstance(value, (tuple, list)) else (value,):
                if one is None and name == "level":
                    continue
                kind = int if counts else (int, float)
                if isinstance(one, bool) or not isinstance(one, kind) or not math.isfinite(one):
                    what = "a whole number of evaluations" if counts else "a finite number"
                    way = "; give level=None to close on a plateau only" if name == "level" else ""
                    raise ValueError(f"{name}={value} must be {what}{way}")

    def settings(self) -> dict[str, float | int | list[int]]:
        """The thresholds as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class WindowEvent:
    """What one evaluation changed for one unit.

    ``warning``: a first value above the threshold (``start`` is this step); ``calm``: such a run
    broke before it opened a window; ``opened``, ``closed``, ``lapsed``: of the window that began
    at ``start``; ``handed_over``: a lapse while unit ``to_index`` rose, or a rise while it lapsed.
    """

    kind: EventKind
    unit_index: int
    step: int
    start: int
    reason: EndReason | None = None
    to_index: int | None = None


@dataclass(frozen=True)
class Window:
    """One window of one unit. Steps are those of the evaluations; ``refined_*`` are rounded.

    Two windows are kept: that found online (``start``, ``midpoint``, ``end``), by which training
    and checkpoints go, and that of a logistic fitted afterwards (``refined_*``). A window that
    closed at the level is fitted again when the unit has come to rest.
    """

    unit_index: int
    start: int
    end: int | None
    """Where 90% of the rise was done, if it closed on a plateau; else when it closed."""
    midpoint: int | None
    """The logistic midpoint when the window closed, or where the curve is halfway up when no
    logistic fits."""
    end_reason: EndReason | None
    state: State
    """The unit's state now."""
    censored: bool
    """The evaluations end inside this window."""
    start_censored: bool
    """The unit was above its threshold at the very first evaluation."""
    floor: float
    """What the unit rose from: its floor, or the level at which it had rested."""
    threshold: float
    """The value above which the window opened."""
    refined_start: int | None = None
    """Where the logistic has done 10% of its rise; None where no logistic fits, as below, or where
    that would be before the first evaluation."""
    refined_midpoint: int | None = None
    refined_end: int | None = None
    """... 90%; past the data while the rise goes on."""
    midpoint_interval: tuple[int, int] | None = None
    """Interval of ``refined_midpoint``, nominally 95%: where the curve is no logistic, as one that
    creeps on after its rise, it covers less."""
