"""The vocabulary of critical windows: the rule, what an evaluation changes, what was found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

State = Literal["PRE", "RISING", "FORMED", "LAPSED"]
EventKind = Literal["warning", "calm", "opened", "closed", "lapsed"]
EndReason = Literal["level", "plateau", "lapsed"]

STATES: tuple[State, ...] = ("PRE", "RISING", "FORMED", "LAPSED")


@dataclass(frozen=True)
class WindowRule:
    """The thresholds of a detector, in units of the metric and in evaluations."""

    minimum_up: float = 0.10
    """A window never opens at or below this value."""
    n_sigma: float = 6.0
    """It opens above floor + n_sigma * sigma, sigma the scaled MAD of the early evaluations."""
    minimum_sigma: float = 0.005
    """Least sigma: a fixed probe set on a model at rest has a MAD of nearly 0."""
    n_early: int = 20
    """How many evaluations below the threshold make the floor."""
    rearm: float = 0.8
    """A unit has lapsed when its EMA is under rearm * up."""
    smoothing: float = 0.3
    """Weight of the newest value in the EMA."""
    patience: int = 5
    """Consecutive evaluations that open, close or lapse."""
    level: float = 0.4
    """A window closes when the EMA has held this."""
    plateau_slope: float = 0.1
    """... or when the slope has held under this share of its peak,"""
    plateau_share: float = 0.8
    """while the EMA is at least this share of its maximum,"""
    plateau_rise: float = 2.0
    """and the EMA is this many times as far above the floor as the threshold is."""
    slope_span: tuple[int, int] = (10, 40)
    """The slope is the EMA's change over half the window so far, at least and at most these."""

    def __post_init__(self) -> None:
        if not 0.0 < self.rearm <= 1.0:
            raise ValueError(f"rearm={self.rearm} must lie in (0, 1]: it multiplies the threshold")
        if not 0.0 < self.smoothing <= 1.0:
            raise ValueError(f"smoothing={self.smoothing} must lie in (0, 1]")
        if self.level <= self.minimum_up:
            raise ValueError(
                f"level={self.level} is not above minimum_up={self.minimum_up}: a window would "
                "close as it opens; raise level or lower minimum_up"
            )
        if min(self.patience, self.n_early, self.slope_span[0]) < 1:
            raise ValueError("patience, n_early and slope_span count evaluations: at least 1")

    def settings(self) -> dict[str, float | int | list[int]]:
        """The thresholds as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class WindowEvent:
    """What one evaluation changed for one unit.

    ``warning``: a first value above the threshold (``start`` is this step); ``calm``: such a run
    broke before it opened a window; ``opened``, ``closed``, ``lapsed``: of the window that began
    at ``start``.
    """

    kind: EventKind
    unit_index: int
    step: int
    start: int
    reason: EndReason | None = None


@dataclass(frozen=True)
class Window:
    """One window of one unit. Steps are those of the evaluations; ``refined_*`` are rounded."""

    unit_index: int
    start: int
    end: int | None
    midpoint: int | None
    """The logistic midpoint, or where the curve is halfway up when no logistic fits."""
    refined_start: int | None
    refined_end: int | None
    end_reason: EndReason | None
    state: State
    """The unit's state now."""
    censored: bool
    """The evaluations end inside this window."""
    start_censored: bool
    """The unit was above its threshold at the very first evaluation."""
