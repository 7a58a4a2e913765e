"""The logistic refinement of a window that has ended: its 10-90% span and its midpoint."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning, curve_fit

Array = NDArray[np.float64]

# A logistic passes 10% and 90% of its rise ln(9) widths before and after its midpoint.
_WIDTHS_TO_TEN_PERCENT = float(np.log(9.0))
_MINIMUM_POINTS = 8
_NORMAL_95 = 1.96
_FAR = 1e15  # steps; an interval that says nothing is not infinite, which JSON has no word for
_MINIMUM_R2 = 0.8


@dataclass(frozen=True)
class Refinement:
    """A logistic rise fitted to one unit's curve; steps are fractional."""

    start: float
    """Step at which 10% of the rise is done."""
    midpoint: float
    end: float
    """Step at which 90% of the rise is done; may lie past the data while the rise goes on."""
    low: float
    high: float
    r2: float
    midpoint_interval: tuple[int, int]
    """Nominal 95% interval of the midpoint, in whole steps. Residuals that follow each other count
    for as many independent ones as an AR(1) process of their lag-1 correlation has."""


def _logistic(step: Array, low: float, rise: float, midpoint: float, width: float) -> Array:
    return low + rise / (1.0 + np.exp(-np.clip((step - midpoint) / width, -500.0, 500.0)))


def _jacobian(step: Array, low: float, rise: float, midpoint: float, width: float) -> Array:
    z = np.clip((step - midpoint) / width, -500.0, 500.0)
    share = 1.0 / (1.0 + np.exp(-z))
    slope = rise * share * (1.0 - share) / width
    return np.stack([np.ones_like(share), share, -slope, -slope * z], axis=1)


def refine(steps: Array, values: Array, *, start: int, end: int) -> Refinement | None:
    """Fit ``low + rise / (1 + exp(-(step - midpoint) / width))`` around one window.

    Args:
        steps: [n] increasing steps of the evaluations.
        values: [n] the unit's values; what is not finite is left out.
        start: first step of the window.
        end: last step of the window. The points used are those up to ``end`` and as far before
            ``start`` as the window is long, so that the floor is seen.

    Returns:
        The fit, or None where there is none to trust: fewer than 8 points, no convergence, a
        midpoint outside the window, or less than 80% of the variance explained.
    """
    used = np.isfinite(values) & (steps >= start - max(end - start, 1)) & (steps <= end)
    x, y = steps[used].astype(np.float64), values[used].astype(np.float64)
    if len(x) < _MINIMUM_POINTS or end <= start or np.ptp(y) == 0.0:
        return None
    length = float(end - start)
    first_guess = (float(y.min()), float(np.ptp(y)), start + length / 2, length / 6)
    lower = (min(0.0, float(y.min())) - 1e-9, 0.0, start - length, length * 1e-3)
    # The rise may still be going on: its top is bounded by twice what was seen, not by the data.
    upper = (float(y.max()), 2.0 * float(np.ptp(y)) + 1e-9, end + length, 2.0 * length)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)
            fitted, covariance = curve_fit(
                _logistic, x, y, p0=first_guess, bounds=(lower, upper), jac=_jacobian
            )
    except RuntimeError:  # scipy's word for "no convergence"
        return None
    low, rise, midpoint, width = (float(p) for p in fitted)
    residuals = y - _logistic(x, low, rise, midpoint, width)
    r2 = 1.0 - float(residuals @ residuals) / float(np.sum((y - y.mean()) ** 2))
    if r2 < _MINIMUM_R2 or not start <= midpoint <= end:
        return None
    reach = _WIDTHS_TO_TEN_PERCENT * width
    margin = _NORMAL_95 * float(np.sqrt(covariance[2, 2])) * _inflation(residuals)
    interval = math.floor(_near(midpoint - margin)), math.ceil(_near(midpoint + margin))
    return Refinement(midpoint - reach, midpoint, midpoint + reach, low, low + rise, r2, interval)


def _inflation(residuals: Array) -> float:
    """By how much an AR(1) process widens a standard error that was taken for white noise."""
    power = float(residuals @ residuals)
    rho = float(residuals[1:] @ residuals[:-1]) / power if power > 0.0 else 0.0
    rho += (1.0 + 4.0 * rho) / len(residuals)  # a short curve's correlation comes out too low
    rho = min(max(rho, 0.0), 0.99)
    return float(np.sqrt((1.0 + rho) / (1.0 - rho)))


def _near(step: float) -> float:
    return min(max(step, -_FAR), _FAR)
