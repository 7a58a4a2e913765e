"""Which head's window is the mechanism's, and which checkpoints it needs: no Trainer in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mda_lightning.units import Head
from mda_lightning.window.detector import WindowDetector
from mda_lightning.window.rule import Window, WindowEvent, WindowRule

Phase = Literal["before", "warned", "open", "closed"]
Edge = Literal["start", "mid", "end"]


class MechanismWindow:
    """Follow all heads of a mechanism and decide when *its* window is over.

    The mechanism's window is that of its target: the head named, or in retrospect the head that is
    highest (smoothed) when its own window has closed.

    Args:
        heads: the units, in the order of the values.
        chance: the metric's chance value.
        target: the head named, or None.
        rule: thresholds.
    """

    def __init__(
        self, heads: Sequence[Head], *, chance: float, target: Head | None, rule: WindowRule
    ) -> None:
        self.heads = list(heads)
        self.detector = WindowDetector(len(self.heads), floor=chance, rule=rule)
        self.watched = list(range(len(heads))) if target is None else [self.heads.index(target)]
        self.phase: Phase = "before"
        self.asks = False
        """Whether a watched head is warned of a window or in one, and its newest value is finite:
        of one that is not, measuring more often would say nothing."""
        self._closed: tuple[int, int] | None = None  # unit, step

    @property
    def last_step(self) -> int:
        """Step of the last evaluation; -1 before the first."""
        return -1 if self.detector.last_step is None else self.detector.last_step

    @property
    def closed_at(self) -> int | None:
        """The step at which the mechanism's window was over."""
        return None if self._closed is None else self._closed[1]

    @property
    def window(self) -> tuple[Head, Window] | None:
        """The target and its window: closed, else open, else the last that lapsed."""
        windows = [w for w in self.detector.windows() if w.unit_index in self.watched]
        if self._closed is not None:
            windows = [w for w in windows if (w.unit_index, w.end) == self._closed]
        if not windows:
            return None
        ema = self.detector.ema
        best = max(windows, key=lambda w: (w.censored, float(ema[w.unit_index]), w.start))
        return self.heads[best.unit_index], best

    def update(self, step: int, values: NDArray[np.float32]) -> list[WindowEvent]:
        """Take one evaluation [L, H]; returns what it changed for the watched heads."""
        events = self.detector.update(step, values)
        if self._closed is None:
            self._closed = self._find_closed()
            self._settle()
        return [event for event in events if event.unit_index in self.watched]

    def _find_closed(self) -> tuple[int, int] | None:
        states, ema = self.detector.states, self.detector.ema
        risen = [i for i in self.watched if states[i] in ("RISING", "FORMED")]
        if not risen:
            return None
        top = max(risen, key=lambda i: float(ema[i]))
        if states[top] != "FORMED":
            return None
        ends = [w.end for w in self.detector.windows() if w.unit_index == top]
        return next((top, end) for end in reversed(ends) if end is not None)

    def _settle(self) -> None:
        self.phase = self._find_phase()
        self.asks = False
        if self.phase in ("warned", "open"):
            states = self.detector.states
            rising = {i for i in self.watched if states[i] == "RISING"}
            waiting = self.detector.warned_since().keys() & set(self.watched)
            self.asks = bool(np.isfinite(self.detector.newest[list(rising | waiting)]).any())

    def _find_phase(self) -> Phase:
        if self._closed is not None:
            return "closed"
        states = self.detector.states
        if any(states[i] == "RISING" for i in self.watched):
            return "open"
        return "warned" if self.detector.warned_since().keys() & set(self.watched) else "before"

    def starts(self) -> list[int]:
        """Starts of the windows that may become the target's, the most likely first."""
        ema, states = self.detector.ema, self.detector.states
        found = dict(self.detector.warned_since())
        for window in self.detector.windows():
            if window.censored or states[window.unit_index] == "FORMED":
                found[window.unit_index] = window.start
        likely = sorted(found.keys() & set(self.watched), key=lambda i: -float(ema[i]))
        return [found[i] for i in likely]

    def edges(self, steps: Sequence[int]) -> dict[Edge, int]:
        """Of checkpoints at ``steps``, those of the window's start, midpoint and end.

        The start's is the last at or before the window's start; without one there is none. An open
        window has a start only.
        """
        found = self.window
        if found is None or not steps:
            return {}
        window = found[1]
        edges: dict[Edge, int] = {}
        before = [s for s in steps if s <= window.start]
        if before:
            edges["start"] = max(before)
        if window.end is not None and self._closed is not None:
            middle = window.start if window.midpoint is None else window.midpoint
            edges["mid"] = min(steps, key=lambda s: (abs(s - middle), s))
            edges["end"] = min(steps, key=lambda s: (abs(s - (window.end or 0)), s))
        return edges

    def state_dict(self) -> dict[str, Any]:
        """Numbers, lists and one tensor: cheaper to save than as many numbers in a list."""
        state = self.detector.state_dict()
        return {"detector": state, "closed": None if self._closed is None else list(self._closed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state; raises ValueError when it is of other heads or another rule."""
        saved = state["detector"]
        self.detector.load_state_dict(saved)
        closed = state["closed"]
        self._closed = None if closed is None else (int(closed[0]), int(closed[1]))
        self._settle()
