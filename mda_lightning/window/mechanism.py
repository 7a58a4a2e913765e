"""Which unit's window is the mechanism's, and which checkpoints it needs: no Trainer in here."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mda_lightning.window.detector import WindowDetector
from mda_lightning.window.rule import Window, WindowEvent, WindowRule

Phase = Literal["before", "warned", "open", "closed"]
Edge = Literal["start", "mid", "end"]
U = TypeVar("U", bound=Hashable)
Mask = NDArray[np.bool_]

_RIVAL = 0.5  # a unit this high, as a share of the leading one, may still overtake it


class MechanismWindow(Generic[U]):
    """Follow all units of a mechanism and decide when *its* window is over.

    Without names, the mechanism's window is that of the unit that is highest (smoothed) when its
    own window has closed: at the level at once, on a plateau below it when no other unit that is
    at least half as high is rising any more. The targets are the ``k`` highest of those that rise
    or have formed then. A unit that was above its threshold at the first evaluation does not count:
    when it formed was not seen. With names, the window lasts from the first start to the last end
    of the units named, and is over when all of theirs are.

    Args:
        units: in the order of the values; heads, or anything else with a name.
        chance: the metric's chance value.
        targets: how many, or the units themselves.
        rule: thresholds.

    Raises:
        ValueError: no target, or one that is not among the units.
    """

    def __init__(
        self,
        units: Sequence[U],
        *,
        chance: ArrayLike,
        targets: int | Sequence[U] = 1,
        rule: WindowRule | None = None,
    ) -> None:
        self.units = list(units)
        self.detector = WindowDetector(len(self.units), floor=chance, rule=rule)
        self.n_targets = targets if isinstance(targets, int) else len(targets)
        if self.n_targets < 1:
            raise ValueError(f"targets={targets}: at least one unit, by number or by name")
        self.named: list[int] | None = None
        if not isinstance(targets, int):
            strangers = [unit for unit in targets if unit not in self.units]
            if strangers:
                raise ValueError(
                    f"{strangers[0]} is not among the {len(self.units)} units, "
                    f"{self.units[0]} to {self.units[-1]}"
                )
            self.named = [self.units.index(unit) for unit in targets]
        self.watched = self.named or list(range(len(self.units)))
        self._mask = np.array(self.watched)
        self.handovers: list[WindowEvent] = []
        self.phase: Phase = "before"
        self.asks = False
        """Whether a unit watched is about to rise or rises, and its newest value is finite: of one
        that is not, measuring more often would say nothing."""
        self._closed_at: int | None = None
        self._chosen: list[tuple[int, int]] = []  # (unit, start) of the targets, the first leads

    @property
    def last_step(self) -> int:
        """Step of the last evaluation; -1 before the first."""
        return -1 if self.detector.last_step is None else self.detector.last_step

    @property
    def closed_at(self) -> int | None:
        """The step at which the mechanism's window was known to be over."""
        return self._closed_at

    @property
    def targets(self) -> list[tuple[U, Window]]:
        """The targets that have risen and their windows, the leading one first.

        Once the window is over they stay; before, they are the likeliest so far. The last windows
        of units that lapsed where there is no other.
        """
        chosen = self._chosen or self._likely()
        windows = {(w.unit_index, w.start): w for w in self.detector.windows()}
        return [(self.units[unit], windows[unit, start]) for unit, start in chosen]

    @property
    def window(self) -> tuple[U, Window] | None:
        """The leading target and the mechanism's window."""
        targets = self.targets
        if not targets:
            return None
        unit, window = targets[0]
        windows = [window] if self.named is None else [one for _, one in targets]
        if self._closed_at is not None:
            window = replace(window, end=max(w.end for w in windows if w.end is not None))
        elif window.end_reason != "lapsed":
            # The unit's own may have ended, while the mechanism's waits for others.
            window = replace(window, end=None, midpoint=None, end_reason=None, censored=True)
        return unit, replace(
            window,
            start=min(one.start for one in windows),
            start_censored=any(one.start_censored for one in windows),
        )

    def update(self, step: int, values: ArrayLike) -> list[WindowEvent]:
        """Take one evaluation, one value a unit; returns what it changed for the units watched."""
        events = self.detector.update(step, values)
        watched = set(self.watched)
        self.handovers += [e for e in events if e.kind == "handed_over"]
        if self._closed_at is None:
            if self._is_over():
                self._chosen, self._closed_at = self._likely(), step
            self._settle()
        return [e for e in events if e.unit_index in watched or e.to_index in watched]

    def _risen(self) -> tuple[Mask, Mask]:
        """Of the units watched, which rise and which have formed.

        Without names, one that was there from the first evaluation is neither: when it formed was
        not seen.
        """
        seen = np.ones(len(self.watched), np.bool_)
        if self.named is None:
            seen = ~self.detector.start_censored[self._mask]
        return self.detector.rising[self._mask] & seen, self.detector.formed[self._mask] & seen

    def _is_over(self) -> bool:
        rising, formed = self._risen()
        if self.named is not None:
            return bool(formed.all())
        risen = rising | formed
        if not risen.any():
            return False
        ema = np.where(risen, self.detector.ema[self._mask], -np.inf)
        top = int(ema.argmax())
        if not formed[top]:
            return False
        level = self.detector.rule.level
        if level is not None and ema[top] >= level:
            return True
        chance = self.detector.chance[self._mask]
        height = self.detector.ema[self._mask] - chance
        return not (rising & (height >= _RIVAL * (ema[top] - chance[top]))).any()

    def _likely(self) -> list[tuple[int, int]]:
        """(unit, start) of at most ``n_targets`` windows, one a unit, the highest unit first."""
        ema, states = self.detector.ema, self.detector.states
        last: dict[int, Window] = {}
        for window in self.detector.windows():  # by start
            if window.unit_index in self.watched and (self.named or not window.start_censored):
                former = last.get(window.unit_index)
                if former is None or not _is_kept(former, window):
                    last[window.unit_index] = window
        risen = {i: w for i, w in last.items() if states[i] in ("RISING", "FORMED")}
        among = risen or last
        ranked = sorted(among.values(), key=lambda w: (-float(ema[w.unit_index]), w.start))
        return [(w.unit_index, w.start) for w in ranked[: self.n_targets]]

    def _settle(self) -> None:
        self.phase, self.asks = "before", False
        if self._closed_at is not None:
            self.phase = "closed"
            return
        rising, formed = self._risen()
        warned = self.detector.warned[self._mask]
        if rising.any() or formed.any():
            self.phase = "open"
        elif warned.any():
            self.phase = "warned"
        moving = rising | warned | self.detector.stirring[self._mask]
        self.asks = bool(np.isfinite(self.detector.newest[self._mask][moving]).any())

    def wanted(self) -> list[int]:
        """Steps of which a checkpoint may turn out to be wanted, the most wanted first: starts of
        the windows that may become the mechanism's, the likeliest first, and then their ends."""
        ema, states = self.detector.ema, self.detector.states
        starts: dict[int, int] = {}
        ends: dict[int, int] = {}
        for window in self.detector.windows():  # by start: a unit's latest counts
            unit = window.unit_index
            if window.end is None or states[unit] == "FORMED":
                starts[unit] = window.start
                if window.end is not None:
                    ends[unit] = window.end
        warned = self.detector.warned_since()
        likely = sorted(
            (starts.keys() | warned.keys()) & set(self.watched), key=lambda i: -float(ema[i])
        )
        wanted = [starts.get(i, warned.get(i, 0)) for i in likely]
        wanted += [warned[i] for i in likely if i in warned and i in starts]
        return wanted + [ends[i] for i in likely if i in ends]

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
        if window.end is not None and self._closed_at is not None:
            end, middle = window.end, window.midpoint
            edges["mid"] = min(steps, key=lambda s: (abs(s - (middle or window.start)), s))
            edges["end"] = min(steps, key=lambda s: (abs(s - end), s))
        return edges


def _is_kept(former: Window, later: Window) -> bool:
    """Of two windows of one unit, whether the former stays the one that counts.

    A lapse gives way to the rise that follows. After a rest the higher rise is the later one.
    """
    return former.end_reason not in ("lapsed", "plateau") and later.end_reason == "lapsed"
