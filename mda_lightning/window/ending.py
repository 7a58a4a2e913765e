"""When a rise is over, where it ended, and how it went: of one unit's curve."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from mda_lightning.window.fit import refine
from mda_lightning.window.rule import Window, WindowRule

Array = NDArray[np.float64]


def is_at_rest(values: NDArray[np.floating[Any]], *, floor: float, rule: WindowRule) -> bool:
    """Whether the last quarter of a long window was as high as the quarter before it.

    For windows whose slope is lost in the noise of its own peak, or whose rise is small.

    Args:
        values: [n] from the window's start on, at least twice the longest slope span.
        floor: what the unit rose from.
        rule: thresholds.
    """
    span = max(rule.slope_span[1] // 2, len(values) // 4)
    parts = [part[np.isfinite(part)] for part in (values[-span:], values[-2 * span : -span])]
    if not all(len(part) for part in parts):
        return False
    lately, before = (float(np.mean(part, dtype=np.float64)) for part in parts)
    return bool(abs(lately - before) < rule.plateau_slope * (lately - floor))


def plateau_end(window: Window, steps: Array, values: Array, *, rule: WindowRule) -> int:
    """The step at which the smoothed values first had done most of the rise to the plateau.

    A plateau is known as such long after it began.

    Args:
        window: with its start and floor.
        steps, values: [n] the unit's curve until now.
        rule: ``plateau_done`` is the share of the rise.
    """
    inside = np.isfinite(values) & (steps >= window.start)
    x, y = steps[inside], values[inside] - window.floor
    top = float(np.mean(y[-rule.slope_span[0] :]))
    smooth = lfilter([rule.smoothing], [1.0, rule.smoothing - 1.0], y)
    reached = smooth >= rule.plateau_done * top
    row = int(np.argmax(reached)) if reached.any() else len(x) - 1
    return int(x[min(max(row, 1), len(x) - 1)])


def refined(window: Window, steps: Array, values: Array, *, until: int) -> Window:
    """The window with the logistic fitted to its curve up to ``until``, where one fits.

    A fit whose midpoint lies outside the window and beyond what followed by as much again is of
    another rise. One that has done its first 10% before the first evaluation has no start.
    """
    fit = refine(steps, values, start=window.start, end=until)
    assert window.end is not None
    reach = window.end - window.start
    if fit is None or fit.start > window.end or fit.midpoint > window.end + reach:
        return window
    low, high = fit.midpoint_interval
    if high - low > steps[-1] - steps[0]:
        return window
    return replace(
        window,
        refined_start=round(fit.start) if fit.start >= steps[0] else None,
        refined_midpoint=round(fit.midpoint),
        refined_end=round(fit.end),
        midpoint_interval=fit.midpoint_interval,
    )


def halfway(steps: Array, values: Array, *, start: int, end: int) -> int:
    """The first step in [start, end] whose value is halfway between the window's two ends."""
    inside = np.isfinite(values) & (steps >= start) & (steps <= end)
    x, y = steps[inside], values[inside]
    if len(x) == 0:
        return (start + end) // 2
    return int(x[np.argmax(y >= (y[0] + y[-1]) / 2)])
