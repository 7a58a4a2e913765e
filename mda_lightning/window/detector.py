"""Online detection of critical windows: numbers in, events out.

A *critical window* is the stretch of training in which a unit's monitoring metric rises from its
floor to its formed level. Each unit runs through four states:

    PRE ──opened──> RISING ──closed──> FORMED ──lapsed──> LAPSED ──opened──> RISING ...
                    │    ^──────opened────┘                 ^
                    └───────────────lapsed──────────────────┘

Units hand over to each other (App. K of the paper), hence LAPSED and second windows; and a unit
that has come to rest may rise again, hence FORMED to RISING. Everything is vectorised over units
and is a function of the values alone: the state *is* the history, so a detector restored from it
goes on exactly as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mda_lightning.window.climb import Climbs
from mda_lightning.window.ending import halfway, plateau_end, refined
from mda_lightning.window.floor import Floors, has_held, last_above
from mda_lightning.window.handover import hand_overs
from mda_lightning.window.history import History
from mda_lightning.window.rule import (
    STATES,
    EndReason,
    EventKind,
    State,
    Window,
    WindowEvent,
    WindowRule,
)

_PRE, _RISING, _FORMED, _LAPSED = range(4)
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


class WindowDetector:
    """Follow ``n_units`` curves at once and say when each one's window opens and closes.

    Values are held in single precision.

    Args:
        n_units: number of curves.
        floor: the metric's chance value, one number or one per unit.
        rule: thresholds.
    """

    def __init__(
        self, n_units: int, *, floor: ArrayLike = 0.0, rule: WindowRule | None = None
    ) -> None:
        if n_units < 1:
            raise ValueError(f"n_units={n_units}: a detector follows at least one unit")
        self.n_units = n_units
        self.rule = rule or WindowRule()
        self.chance = np.broadcast_to(np.asarray(floor, np.float64), (n_units,)).copy()
        if not np.isfinite(self.chance).all():
            raise ValueError("floor must be finite: it is the metric's chance value")
        self._clear()

    def _clear(self) -> None:
        n = self.n_units
        self._history = History(n)
        self._ema = np.full((self.rule.slope_span[1] + 1, n), np.nan)  # the last ones, a ring
        self._floors = Floors(self.chance, self.rule)
        self._state = np.full(n, _PRE, np.int8)
        self._start = np.zeros(n, np.int64)
        self._start_row = np.zeros(n, np.int64)
        self._first_row = np.full(n, -1, np.int64)  # first finite value
        self._end_row = np.full(n, -1, np.int64)  # last window's end
        self._above_run = np.zeros(n, np.int64)
        self._level_run = np.zeros(n, np.int64)
        self._low_run = np.zeros(n, np.int64)
        self._climbs = Climbs(n, self.rule)
        self._lapsed_at = np.full(n, -1, np.int64)
        # What the unit rose from the first time: a fall below it is a lapse.
        self._base_floor = self._floors.floor.copy()
        self._base_sigma = self._floors.sigma.copy()
        self._base_line = self._floors.rearm
        self._from = np.zeros((2, n))  # floor and threshold of the window at hand
        self._ended: list[Window] = []
        self.n_missing = np.zeros(n, np.int64)
        """Per unit, evaluations that were not finite; they change nothing."""
        self.n_repeated = 0
        """Evaluations, since this object began, whose step was the last one again: ignored."""

    # -- what can be read ---------------------------------------------------------------------

    @property
    def floor(self) -> Floats:
        """[n_units] what each unit rises from now: its floor, or the level at which it rests."""
        floor: Floats = self._floors.floor.copy()
        return floor

    @property
    def up(self) -> Floats:
        """[n_units] the opening thresholds now."""
        up: Floats = self._floors.up.copy()
        return up

    @property
    def ema(self) -> Floats:
        """[n_units] the smoothed values; NaN before a unit's first finite value."""
        ema: Floats = self._ema[(len(self._history) - 1) % len(self._ema)].copy()
        return ema

    @property
    def newest(self) -> Floats:
        """[n_units] the last values, finite or not; NaN before the first."""
        return self._history.newest

    @property
    def highest(self) -> Floats:
        """[n_units] the highest values so far; NaN where none was finite."""
        return self._history.highest

    @property
    def states(self) -> list[State]:
        return [STATES[code] for code in self._state]

    @property
    def rising(self) -> Mask:
        """[n_units] which are inside a window."""
        return np.asarray(self._state == _RISING)

    @property
    def start_censored(self) -> Mask:
        """[n_units] whose window at hand, or last one, began at their very first evaluation."""
        return np.asarray(self._start_row <= np.maximum(self._first_row, 0))

    @property
    def formed(self) -> Mask:
        """[n_units] which have formed and not lapsed."""
        return np.asarray(self._state == _FORMED)

    @property
    def n_evaluations(self) -> int:
        return len(self._history)

    @property
    def last_step(self) -> int | None:
        return int(self._history.steps[-1]) if len(self._history) else None

    @property
    def stirring(self) -> Mask:
        """[n_units] which may be about to rise: smoothed, they are more than halfway to the
        threshold and climbing."""
        now = len(self._history) - 1
        back = max(now - self.rule.slope_span[1] // 2, 0)
        ema, before = self.ema, self._ema[back % len(self._ema)]
        climbing = ema - before > self._floors.sigma
        return np.asarray(self._armed() & (ema > self._floors.half) & climbing)

    @property
    def warned(self) -> Mask:
        """[n_units] which may be opening a window: their last value was above the threshold."""
        return np.asarray(self._armed() & (self._above_run > 0))

    def warned_since(self) -> dict[int, int]:
        """Units that may be opening a window: unit index -> step of the first value above."""
        return {int(i): int(self._start[i]) for i in np.flatnonzero(self.warned)}

    def windows(self) -> list[Window]:
        """Every window so far, by start then unit; open ones are censored and have no end."""
        found = self._ended + [self._open_window(int(i)) for i in np.flatnonzero(self.rising)]
        found = [replace(w, state=STATES[self._state[w.unit_index]]) for w in found]
        return sorted(found, key=lambda w: (w.start, w.unit_index))

    def _open_window(self, unit: int) -> Window:
        floor, threshold = (float(x) for x in self._from[:, unit])
        return Window(
            unit_index=unit,
            start=int(self._start[unit]),
            end=None,
            midpoint=None,
            end_reason=None,
            state="RISING",
            censored=True,
            start_censored=bool(self.start_censored[unit]),
            floor=floor,
            threshold=threshold,
        )

    # -- what changes it ----------------------------------------------------------------------

    def update(self, step: int, values: ArrayLike) -> list[WindowEvent]:
        """Take one evaluation, [n_units] values measured after ``step`` updates.

        Values that are not finite leave their unit as it was; a step that repeats the last one is
        counted and ignored.

        Raises:
            ValueError: another number of values, or a step before the last one.
        """
        given = np.array(values, np.float32).reshape(-1)
        if given.shape != (self.n_units,):
            raise ValueError(f"{len(given)} values for {self.n_units} units at step {step}")
        if not self._history.admits(step):
            self.n_repeated += 1
            return []
        finite = np.isfinite(given)
        given[~finite] = np.nan
        new = given.astype(np.float64)
        self.n_missing += ~finite
        self._first_row[finite & (self._first_row < 0)] = len(self._history)
        self._append(step, given, new, finite)
        events = self._open(step, new, finite)
        self._floors.take(new, self._is_calm())
        events += self._close(step, finite)
        if any(event.kind in ("lapsed", "opened") for event in events):
            events += hand_overs(
                events,
                self._ended,
                rising=self.rising,
                formed=self.formed,
                last_high=self._climbs.last_high,
                lapsed_at=np.where(self._state == _LAPSED, self._lapsed_at, -1),
            )
        return sorted(events, key=lambda e: e.unit_index)

    def _armed(self) -> Mask:
        """Units of which a window may open."""
        resting = (self._state == _FORMED) & self._floors.is_plateau
        return np.asarray((self._state == _PRE) | (self._state == _LAPSED) | resting)

    def _is_calm(self) -> Mask:
        low = (self.ema < self._floors.half) | ~self._floors.is_learned
        return np.asarray(self._armed() & (self._above_run == 0) & low)

    def _append(self, step: int, given: NDArray[np.float32], new: Floats, finite: Mask) -> None:
        before = self.ema
        safe = np.where(finite, new, before)
        ema = np.where(np.isnan(before), safe, before + self.rule.smoothing * (safe - before))
        self._ema[len(self._history) % len(self._ema)] = ema
        self._history.append(step, given)

    def _open(self, step: int, new: Floats, finite: Mask) -> list[WindowEvent]:
        armed, floor = self._armed(), self._floors.floor
        above = armed & finite & (new > self._floors.up)
        first = above & (self._above_run == 0)
        broken = armed & finite & ~above & (self._above_run > 0)
        if not (above.any() or broken.any()):
            return []
        self._start[first], self._start_row[first] = step, len(self._history) - 1
        self._above_run[above] += 1
        self._above_run[broken] = 0
        opened = above & (self._above_run >= self.rule.patience)
        for unit in np.flatnonzero(opened):
            run = self._history.values[self._start_row[unit] :, unit]
            opened[unit] = has_held(run, floor=floor[unit], rule=self.rule)
        for unit in np.flatnonzero(opened & self._floors.is_plateau):
            row = last_above(self._history.values[:, unit], self._floors.half[unit], self.rule)
            row = max(row, int(self._start_row[unit]) - self.rule.n_early, self._end_row[unit] + 1)
            self._start_row[unit], self._start[unit] = row, self._history.steps[row]
        if opened.any():
            self._begin(opened)
        kinds: dict[EventKind, Mask] = {"warning": first, "calm": broken, "opened": opened}
        return [
            WindowEvent(kind, int(i), step, int(self._start[i]))
            for kind, which in kinds.items()
            for i in np.flatnonzero(which)
        ]

    def _begin(self, opened: Mask) -> None:
        fresh = opened & ~self._floors.is_plateau
        self._base_floor[fresh] = self._floors.floor[fresh]
        self._base_sigma[fresh] = self._floors.sigma[fresh]
        self._base_line[fresh] = self._floors.rearm[fresh]
        self._from[:, opened] = np.stack([self._floors.floor, self._floors.up])[:, opened]
        self._state[opened] = _RISING
        self._above_run[opened] = self._low_run[opened] = 0
        self._climbs.begin(opened)

    def _close(self, step: int, finite: Mask) -> list[WindowEvent]:
        rule, ema, up = self.rule, self.ema, self._floors.up
        rising = finite & (self._state == _RISING)
        formed = finite & (self._state == _FORMED)
        watched = rising | formed
        if rule.level is not None:
            # Counted in every state: a head that jumps past the level has held it while opening.
            held = ema >= rule.level
            self._level_run[finite] = np.where(held, self._level_run + 1, 0)[finite]
        if not watched.any():
            return []
        climbing = watched & ~(formed & self._floors.is_plateau)
        self._climbs.take(ema, watched, step=step)
        flat = self._climbs.are_over(
            ema, self._ema, self._history, climbing, start_row=self._start_row, floors=self._floors
        )
        low = ema < np.where(rising, self._floors.rearm, self._base_line)
        self._low_run[watched] = np.where(low, self._low_run + 1, 0)[watched]
        lapsed = watched & (self._low_run >= rule.patience)
        at_level = rising & (self._level_run >= rule.patience)
        if rule.level is not None:
            # A level that is hardly above the threshold would close a window as it opens.
            floor = self._floors.floor
            at_level &= rule.level >= floor + rule.plateau_rise * (up - floor)
        events = []
        for unit in map(int, np.flatnonzero(lapsed | flat | at_level)):
            reason: EndReason = (
                "lapsed" if lapsed[unit] else "level" if at_level[unit] else "plateau"
            )
            start = int(self._start[unit])
            if rising[unit]:
                self._end(unit, step, reason)
            elif reason == "plateau":
                self._refine_again(unit, step)
            self._settle(unit, float(ema[unit]), reason, step)
            if rising[unit] or reason == "lapsed":
                kind: EventKind = "lapsed" if reason == "lapsed" else "closed"
                events.append(WindowEvent(kind, unit, step, start, reason))
        return events

    def _settle(self, unit: int, ema: float, reason: EndReason, step: int) -> None:
        """The state that follows the end of a window, of a climb after it, or of a formed unit."""
        self._low_run[unit] = 0
        if reason == "lapsed" and not (
            self._floors.is_plateau[unit] and ema >= self._base_line[unit]
        ):
            self._state[unit] = _LAPSED
            self._lapsed_at[unit] = step
            self._floors.fall_to(unit, self._base_floor[unit], self._base_sigma[unit])
            return
        self._state[unit] = _FORMED
        if reason == "level":
            self._floors.is_plateau[unit] = False  # it may still climb: see when it comes to rest
        else:
            self._floors.rest_at(unit, ema)

    def _end(self, unit: int, step: int, reason: EndReason) -> None:
        self._end_row[unit] = len(self._history) - 1
        steps, values = self._curve(unit)
        window = replace(self._open_window(unit), end=step, end_reason=reason, censored=False)
        if reason == "plateau":
            window = replace(window, end=plateau_end(window, steps, values, rule=self.rule))
        if reason != "lapsed":
            window = refined(window, steps, values, until=step)
        if window.refined_midpoint is None:
            assert window.end is not None
            middle = halfway(steps, values, start=window.start, end=window.end)
        else:
            middle = min(max(window.refined_midpoint, window.start), window.end or step)
        self._ended.append(replace(window, midpoint=middle))

    def _refine_again(self, unit: int, step: int) -> None:
        """A window that closed at the level, now that the unit has come to rest."""
        place = max(i for i, w in enumerate(self._ended) if w.unit_index == unit)
        steps, values = self._curve(unit)
        self._ended[place] = refined(self._ended[place], steps, values, until=step)

    def _curve(self, unit: int) -> tuple[Floats, Floats]:
        values = self._history.values[:, unit].astype(np.float64)
        return self._history.steps.astype(np.float64), values

    # -- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The history as lists of numbers, from which everything else follows."""
        return {
            "schema_version": 2,
            "n_units": self.n_units,
            "floor": self.chance.tolist(),
            "rule": self.rule.settings(),
            "steps": self._history.steps.tolist(),
            "values": self._history.values.reshape(-1).tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the history of another detector of the same units and rule.

        Raises:
            ValueError: the state belongs to another number of units, chance value or rule.
        """
        mine = self.state_dict()
        for key in ("schema_version", "n_units", "floor", "rule"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"this detector's {key} is {mine[key]}, the saved one's {state[key]}: "
                    "restore it with the settings it was saved with"
                )
        self._clear()
        values = np.asarray(state["values"], np.float32).reshape(-1, self.n_units)
        replay(self, state["steps"], values)


def replay(
    detector: WindowDetector, steps: Sequence[int], values: NDArray[np.floating[Any]]
) -> list[WindowEvent]:
    """Feed recorded evaluations, [n] steps and [n, n_units] values; return all events."""
    events: list[WindowEvent] = []
    for step, row in zip(steps, values, strict=True):
        events += detector.update(int(step), row)
    return events
