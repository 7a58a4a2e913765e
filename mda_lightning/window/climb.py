"""Whether a rise has come to a plateau; vectorised over units."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mda_lightning.window.ending import is_at_rest
from mda_lightning.window.floor import Floors
from mda_lightning.window.history import History
from mda_lightning.window.rule import WindowRule

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Climbs:
    """The steepest slope and the highest smoothed value of every unit's rise.

    Attributes:
        last_high: [n_units] step at which the smoothed value was last near its maximum.
    """

    def __init__(self, n_units: int, rule: WindowRule) -> None:
        self.rule = rule
        self.last_high = np.zeros(n_units, np.int64)
        self._max_ema = np.full(n_units, -np.inf)
        self._peak_slope = np.zeros(n_units)
        self._flat_run = np.zeros(n_units, np.int64)

    def begin(self, units: Mask) -> None:
        """These units begin to rise."""
        self._max_ema[units], self._peak_slope[units], self._flat_run[units] = -np.inf, 0.0, 0

    def take(self, ema: Floats, watched: Mask, *, step: int) -> None:
        """Take the smoothed values [n_units] of units that rise or have formed."""
        self._max_ema[watched] = np.maximum(self._max_ema, ema)[watched]
        self.last_high[watched & self._is_near_maximum(ema)] = step

    def are_over(
        self,
        ema: Floats,
        emas: Floats,
        history: History,
        climbing: Mask,
        *,
        start_row: NDArray[np.int64],
        floors: Floors,
    ) -> Mask:
        """[n_units] which of the climbing units have come to a plateau.

        The slope is the EMA's change over a span that grows with the window, per step.

        Args:
            ema: [n_units] smoothed values now.
            emas: [n, n_units] the last ones, a ring.
            history: of the values.
            climbing: [n_units].
            start_row: [n_units] the evaluation at which each window began.
            floors: what each unit rises from, and its threshold.
        """
        rule, now = self.rule, len(history) - 1
        age = now - start_row
        span = np.minimum(np.clip(age // 2, *rule.slope_span), max(now, 1))
        then = np.maximum(now - span, 0)
        elapsed = np.maximum(history.steps[now] - history.steps[then], 1)
        slope = (ema - emas[then % len(emas), np.arange(len(ema))]) / elapsed
        slope = np.where(np.isfinite(slope), slope, 0.0)
        self._peak_slope[climbing] = np.maximum(self._peak_slope, slope)[climbing]
        flat = (
            (age >= rule.slope_span[0])
            & (slope < rule.plateau_slope * self._peak_slope)
            & self._is_near_maximum(ema)
            & (ema - floors.floor >= rule.plateau_rise * (floors.up - floors.floor))
        )
        self._flat_run[climbing] = np.where(flat, self._flat_run + 1, 0)[climbing]
        old = (age + 1 >= 2 * rule.slope_span[1]) & (age % rule.patience == 0)
        for unit in np.flatnonzero(climbing & old):
            values = history.values[start_row[unit] :, unit]
            if is_at_rest(values, floor=floors.floor[unit], rule=rule):
                self._flat_run[unit] = rule.patience
        return np.asarray(climbing & (self._flat_run >= rule.patience))

    def _is_near_maximum(self, ema: Floats) -> Mask:
        return np.asarray(ema >= self.rule.plateau_share * self._max_ema)
