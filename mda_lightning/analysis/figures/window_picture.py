"""What a figure of critical windows is drawn from, and which part of it is shown how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mda_lightning.analysis.figures.style import Theme
from mda_lightning.window import Window, WindowEvent

Floats = NDArray[np.float64]

_MOST_NAMED = 5
_MOST_ROWS = 8
_BRIDGED = 2
"""A line goes on over so many missing evaluations, and breaks at more."""
_SHORT = 0.05
"""The axis is cut to the windows where they fill less than this share of it."""
_DASHES = ((0, (6, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (3, 2)), (0, (8, 2, 1, 2, 1, 2)))


@dataclass(frozen=True)
class Picture:
    """Arguments of :func:`~mda_lightning.analysis.figures.windows.windows_figure`, as arrays."""

    steps: Floats
    values: Floats
    smooth: Floats
    units: Sequence[str]
    windows: Sequence[Window]
    targets: Sequence[Window]
    events: Sequence[WindowEvent]
    floor: float
    opens_at: float
    falls: bool
    theme: Theme

    @property
    def named(self) -> list[int]:
        """Units drawn by name: targets, then those with windows, then the highest, to a limit."""
        heights = np.where(np.isfinite(self.smooth), self.smooth, np.nan)
        heights = -heights if self.falls else heights
        peaks = np.where(np.isnan(heights), -np.inf, heights).max(axis=0, initial=-np.inf)
        targets = [w.unit_index for w in self.targets]
        risen = sorted({w.unit_index for w in self.windows}, key=lambda i: -peaks[i])
        highest = [int(i) for i in np.argsort(-peaks, kind="stable") if np.isfinite(peaks[i])]
        order = list(dict.fromkeys([*targets, *risen, *highest[:3]]))
        return order[: max(_MOST_NAMED, len(set(targets)))]

    @property
    def rows(self) -> list[int]:
        """Units with a row of their own below: those with windows, targets first, to a limit."""
        risen = [w.unit_index for w in sorted(self.windows, key=lambda w: w.start)]
        return list(dict.fromkeys([*(w.unit_index for w in self.targets), *risen]))[:_MOST_ROWS]

    @property
    def range(self) -> tuple[float, float]:
        """First and last step shown: all, unless the windows are a small part of that."""
        first, last = float(self.steps[0]), float(self.steps[-1])
        if first == last:
            return first - 1.0, last + 1.0
        shown = [w for w in self.windows if w.unit_index in self.rows]
        margin = 0.01 * (last - first)
        if not shown:
            return first - margin, last + margin
        low = min(w.start for w in shown)
        ends = [last if w.end is None else float(w.end) for w in shown]
        high = max([*ends, *self.lapses.values()])
        if high == last or high - low >= _SHORT * (last - first):
            return first - margin, last + margin
        length = max(high - low, 1)
        return max(first, low - 2.0 * length), min(last, high + 3.0 * length)

    @property
    def is_cut(self) -> bool:
        low, high = self.range
        return bool(low > self.steps[0] or high < self.steps[-1])

    def style(self, place: int) -> dict[str, Any]:
        """Of the ``place``-th named unit: hue and dashes, either of which tells it apart."""
        if place == 0:
            return {"color": self.theme.accent, "linewidth": 2.4, "linestyle": "-"}
        hues = (dict(self.theme.operations)["mask"], *self.theme.spare, self.theme.ink)
        return {
            "color": hues[(place - 1) % len(hues)],
            "linewidth": 1.7,
            "linestyle": _DASHES[(place - 1) % len(_DASHES)],
        }

    def track(self, unit: int, *, stride: int = 1) -> tuple[Floats, Floats]:
        """Steps and EMA of a unit where it was measured, with a NaN where the line breaks."""
        at = np.flatnonzero(np.isfinite(self.values[:, unit]) & np.isfinite(self.smooth[:, unit]))
        breaks = np.flatnonzero(np.diff(at) > _BRIDGED + 1) + 1
        at = at if len(breaks) else at[::stride]
        steps = np.insert(self.steps[at], breaks, np.nan)
        return steps, np.insert(self.smooth[at, unit], breaks, np.nan)

    @property
    def lapses(self) -> dict[tuple[int, int], float]:
        """Unit and start of a window -> the step at which it was lost."""
        found = {
            (event.unit_index, event.start): float(event.step)
            for event in self.events
            if event.kind == "lapsed"
        }
        for window in self.windows:
            if window.end_reason == "lapsed" and window.end is not None:
                found.setdefault((window.unit_index, window.start), float(window.end))
        return found
