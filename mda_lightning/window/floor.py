"""The floor that a curve rises from, and how far above it a rise begins; vectorised over units."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from mda_lightning.window.rule import WindowRule

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_LONGEST_LAG = 20


class Floors:
    """Median and noise of the early evaluations of every unit, and the thresholds they give.

    A value counts once ``guard`` later evaluations have shown no rise: a unit that begins to rise
    at once would else raise its own threshold. Until ``patience`` values count, the floor is the
    metric's chance value. Of a unit that has formed the last ``n_early`` values count, not the
    first ones: what creeps on from a plateau is no rise.

    Args:
        chance: [n_units] the metric's chance value.
        rule: thresholds.

    Attributes:
        floor, sigma: [n_units].
        up: [n_units] the value above which a rise begins.
        is_plateau: [n_units] whether the unit has formed, and ``floor`` is the level it rests at.
    """

    def __init__(self, chance: Floats, rule: WindowRule) -> None:
        n = len(chance)
        self.rule = rule
        self.chance = chance
        self.floor = chance.copy()
        self.sigma = np.full(n, rule.minimum_sigma)
        self.is_plateau = np.zeros(n, np.bool_)
        self._kept = np.full((rule.n_early, n), np.nan)
        self._n_kept = np.zeros(n, np.int64)
        self._waiting = np.full((rule.guard, n), np.nan)  # the last values, the oldest at _oldest
        self._oldest = 0
        # Medians are taken when the count has grown by half: a few times in a run, not every time.
        counts, count = {rule.n_early}, rule.patience
        while count < rule.n_early:
            counts.add(count)
            count += max(1, count // 2)
        self._learns_at = np.isin(np.arange(rule.n_early + 1), list(counts))
        self.up = np.zeros(n)
        self._update_up(np.arange(n))

    def _update_up(self, units: NDArray[np.int64]) -> None:
        rule, floor = self.rule, self.floor[units]
        noise = floor + rule.n_sigma * self.sigma[units]
        least = np.where(self.is_plateau[units], floor + rule.minimum_rise, rule.minimum_up)
        self.up[units] = np.maximum(least, noise)

    @property
    def is_learned(self) -> Mask:
        """[n_units] whether the floor is more than the chance value it began from."""
        return np.asarray(self._n_kept >= self.rule.patience)

    @property
    def half(self) -> Floats:
        """[n_units] halfway from the floor to the threshold."""
        return (self.floor + self.up) / 2

    @property
    def rearm(self) -> Floats:
        """[n_units] the line below which a rise has been lost."""
        return np.maximum(self.rule.rearm * self.up, self.half)

    def take(self, values: Floats, calm: Mask) -> None:
        """Take one evaluation [n_units].

        Args:
            values: what is not finite counts nowhere.
            calm: units that show no rise: the value that has waited longest counts.
        """
        ripe = self._waiting[self._oldest].copy()
        self._waiting[self._oldest] = values
        self._oldest = (self._oldest + 1) % self.rule.guard
        n_early = self.rule.n_early
        counted = calm & np.isfinite(ripe) & (self.is_plateau | (self._n_kept < n_early))
        if not counted.any():
            return
        units = np.flatnonzero(counted)
        self._kept[self._n_kept[units] % n_early, units] = ripe[units]
        self._n_kept[units] += 1
        counts = self._n_kept[units]
        again = (counts > n_early) & (counts % max(n_early // 4, 1) == 0)
        units = units[self._learns_at[np.minimum(counts, n_early)] & ((counts <= n_early) | again)]
        if len(units) == 0:
            return
        for count in np.unique(self._n_kept[units]):  # most units have as many as each other
            self._learn(units[self._n_kept[units] == count], int(count))

    def _learn(self, units: NDArray[np.int64], count: int) -> None:
        n_early = self.rule.n_early
        kept = self._kept[: min(count, n_early), units]
        if count > n_early:
            kept = np.roll(kept, -(count % n_early), axis=0)  # in their order
        median, is_plateau = np.median(kept, axis=0), self.is_plateau[units]
        self.floor[units] = np.where(is_plateau, median, np.maximum(self.chance[units], median))
        self.sigma[units] = np.maximum(self.rule.minimum_sigma, noise(kept))
        self._update_up(units)

    def rest_at(self, unit: int, level: float) -> None:
        """The unit has formed: learn the level at which it rests, beginning from ``level``."""
        self._forget(unit)
        self.is_plateau[unit] = True
        self.floor[unit] = level
        self._update_up(np.array([unit]))

    def fall_to(self, unit: int, floor: float, sigma: float) -> None:
        """The unit has lapsed: what counts is the floor it once rose from."""
        self._forget(unit)
        self.is_plateau[unit] = False
        self.floor[unit], self.sigma[unit] = floor, sigma
        self._n_kept[unit] = self.rule.n_early  # known already
        self._update_up(np.array([unit]))

    def _forget(self, unit: int) -> None:
        self._waiting[:, unit] = np.nan
        self._kept[:, unit] = np.nan
        self._n_kept[unit] = 0


def noise(values: Floats) -> Floats:
    """The standard deviation of curves about their trend, from the scaled MAD of differences.

    Differences over up to 20 evaluations, so that noise that outlasts an evaluation counts, and a
    trend does not: most heads fall away from uniform attention while the floor is being learned.

    Args:
        values: [n, n_units] in order, finite.
    """
    lag = min(_LONGEST_LAG, len(values) // 2)
    changes = values[lag:] - values[: len(values) - lag]
    mad = np.median(np.abs(changes - np.median(changes, axis=0)), axis=0)
    few = 1.0 + 6.6 / len(values) ** 1.35  # white noise in so few values comes out too low by it
    return np.asarray(few * _MAD_TO_SIGMA * mad / math.sqrt(2.0))


def has_held(run: NDArray[np.floating[Any]], *, floor: float, rule: WindowRule) -> bool:
    """Whether values above the threshold have not fallen off, as those of a spike do.

    Args:
        run: [n] consecutive values above the threshold, and what was not finite between them.
        floor: what the unit rises from.
        rule: ``hold`` is the share of the run's peak that its last values must have.
    """
    above = run[np.isfinite(run)].astype(np.float64) - floor
    lately = min(float(np.mean(above[-2:])), float(np.median(above[-rule.patience :])))
    return lately >= rule.hold * float(above.max())


def last_above(values: NDArray[np.floating[Any]], line: float, rule: WindowRule) -> int:
    """Since when the smoothed values have been above ``line``: an index into ``values`` [n].

    A unit that rises again from a level at which its noise is large passes its threshold late.
    """
    weight = rule.smoothing
    finite = np.flatnonzero(np.isfinite(values))
    y = values[finite].astype(np.float64)
    initial = [(1.0 - weight) * y[0]]
    smooth, _ = lfilter([weight], [1.0, weight - 1.0], y, zi=initial)
    below = np.flatnonzero(smooth <= line)
    since = int(below[-1]) + 1 if len(below) else 0
    return int(finite[min(since, len(finite) - 1)])
