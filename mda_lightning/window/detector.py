"""Online detection of critical windows: numbers in, events out.

A *critical window* is the stretch of training in which a unit's monitoring metric rises from its
floor to its formed level. Each unit runs through four states:

    PRE ──opened──> RISING ──closed──> FORMED ──lapsed──> LAPSED ──opened──> RISING ...
                       └───────────────lapsed──────────────^

Units hand over to each other (App. K of the paper), hence LAPSED and second windows. Everything
is vectorised over units and is a function of the values alone: the state *is* the history, so a
detector restored from it goes on exactly as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mda_lightning.window.fit import halfway, refine
from mda_lightning.window.rule import (
    STATES,
    EndReason,
    EventKind,
    State,
    Window,
    WindowEvent,
    WindowRule,
)

__all__ = ["State", "Window", "WindowDetector", "WindowEvent", "WindowRule", "replay"]

_PRE, _RISING, _FORMED, _LAPSED = range(4)
_MAD_TO_SIGMA = 1.4826  # of a normal distribution


class WindowDetector:
    """Follow ``n_units`` curves at once and say when each one's window opens and closes.

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
        n, rule = self.n_units, self.rule
        self._n = 0
        self._steps = np.zeros(64, np.int64)
        self._values = np.zeros((64, n))
        self._smooth = np.zeros((64, n))
        self._early = np.full((rule.n_early, n), np.nan)
        self._n_early = np.zeros(n, np.int64)
        self.floor = self.chance.copy()
        self._sigma = np.full(n, rule.minimum_sigma)
        self._state = np.full(n, _PRE, np.int8)
        self._start = np.zeros(n, np.int64)
        self._start_row = np.zeros(n, np.int64)
        self._above_run = np.zeros(n, np.int64)
        self._level_run = np.zeros(n, np.int64)
        self._plateau_run = np.zeros(n, np.int64)
        self._low_run = np.zeros(n, np.int64)
        self._peak_slope = np.zeros(n)
        self._max_ema = np.zeros(n)
        self._ended: list[Window] = []
        self.n_missing = np.zeros(n, np.int64)
        """Per unit, evaluations that were not finite; they change nothing."""
        self.n_repeated = 0
        """Evaluations whose step was the last one again; they change nothing."""

    # -- what can be read ---------------------------------------------------------------------

    @property
    def up(self) -> NDArray[np.float64]:
        """[n_units] the opening thresholds now."""
        return np.maximum(self.rule.minimum_up, self.floor + self.rule.n_sigma * self._sigma)

    @property
    def ema(self) -> NDArray[np.float64]:
        """[n_units] the smoothed values; NaN before a unit's first finite value."""
        return self._smooth[self._n - 1].copy() if self._n else np.full(self.n_units, np.nan)

    @property
    def newest(self) -> NDArray[np.float64]:
        """[n_units] the last values, finite or not; NaN before the first."""
        return self._values[self._n - 1].copy() if self._n else np.full(self.n_units, np.nan)

    @property
    def highest(self) -> NDArray[np.float64]:
        """[n_units] the highest values so far; NaN where none was finite."""
        if not self._n:
            return np.full(self.n_units, np.nan)
        return np.asarray(np.fmax.reduce(self._values[: self._n], axis=0))

    @property
    def states(self) -> list[State]:
        return [STATES[code] for code in self._state]

    @property
    def n_evaluations(self) -> int:
        return self._n

    @property
    def last_step(self) -> int | None:
        return int(self._steps[self._n - 1]) if self._n else None

    def warned_since(self) -> dict[int, int]:
        """Units that may be opening a window: unit index -> step of the first value above."""
        waiting = np.flatnonzero(self._armed() & (self._above_run > 0))
        return {int(i): int(self._start[i]) for i in waiting}

    def windows(self) -> list[Window]:
        """Every window so far, by start then unit; open ones are censored and have no end."""
        found = [self._window(w.unit_index, ended=w) for w in self._ended]
        found += [self._window(int(i), ended=None) for i in np.flatnonzero(self._state == _RISING)]
        return sorted(found, key=lambda w: (w.start, w.unit_index))

    def _window(self, unit: int, *, ended: Window | None) -> Window:
        state = STATES[self._state[unit]]
        if ended is not None:
            return Window(**{**asdict(ended), "state": state})
        first = bool(self._start_row[unit] == 0)
        start = int(self._start[unit])
        return Window(unit, start, None, None, None, None, None, state, True, first)

    # -- what changes it ----------------------------------------------------------------------

    def update(self, step: int, values: ArrayLike) -> list[WindowEvent]:
        """Take one evaluation, [n_units] values measured after ``step`` updates.

        Values that are not finite leave their unit as it was; a step that repeats the last one is
        counted and ignored.

        Raises:
            ValueError: another number of values, or a step before the last one.
        """
        new = np.asarray(values, np.float64).reshape(-1)
        if new.shape != (self.n_units,):
            raise ValueError(f"{len(new)} values for {self.n_units} units at step {step}")
        if self._n and step <= self._steps[self._n - 1]:
            if step == self._steps[self._n - 1]:
                self.n_repeated += 1
                return []
            raise ValueError(
                f"step {step} comes after step {self.last_step}: evaluations must be in order; "
                "sort them, or begin again with a new detector"
            )
        finite = np.isfinite(new)
        self.n_missing += ~finite
        self._append(step, new, finite)
        up = self.up
        above = finite & (new > up)
        events = self._open(step, finite, above)
        self._learn_floor(new, finite & ~above & self._armed())
        events += self._close(step, finite, up)
        return sorted(events, key=lambda e: e.unit_index)

    def _armed(self) -> NDArray[np.bool_]:
        return np.asarray((self._state == _PRE) | (self._state == _LAPSED))

    def _append(self, step: int, new: NDArray[np.float64], finite: NDArray[np.bool_]) -> None:
        if self._n == len(self._steps):
            self._steps = np.concatenate([self._steps, np.zeros_like(self._steps)])
            self._values = np.concatenate([self._values, np.zeros_like(self._values)])
            self._smooth = np.concatenate([self._smooth, np.zeros_like(self._smooth)])
        before = self.ema
        safe = np.where(finite, new, before)
        self._steps[self._n] = step
        self._values[self._n] = new
        self._smooth[self._n] = np.where(
            np.isnan(before), safe, before + self.rule.smoothing * (safe - before)
        )
        self._n += 1

    def _learn_floor(self, new: NDArray[np.float64], calm: NDArray[np.bool_]) -> None:
        """Floor and sigma from the first ``n_early`` values that were not above the threshold."""
        units = np.flatnonzero(calm & (self._n_early < self.rule.n_early))
        if len(units) == 0:
            return
        self._early[self._n_early[units], units] = new[units]
        self._n_early[units] += 1
        units = units[self._n_early[units] >= self.rule.patience]
        if len(units) == 0:
            return
        early = self._early[:, units]
        median = np.nanmedian(early, axis=0)
        mad = np.nanmedian(np.abs(early - median), axis=0)
        self.floor[units] = np.maximum(self.chance[units], median)
        self._sigma[units] = np.maximum(self.rule.minimum_sigma, _MAD_TO_SIGMA * mad)

    def _open(
        self, step: int, finite: NDArray[np.bool_], above: NDArray[np.bool_]
    ) -> list[WindowEvent]:
        armed = self._armed()
        first = armed & above & (self._above_run == 0)
        broken = armed & finite & ~above & (self._above_run > 0)
        self._start[first], self._start_row[first] = step, self._n - 1
        self._above_run[armed & above] += 1
        self._above_run[broken] = 0
        opened = armed & (self._above_run >= self.rule.patience)
        self._state[opened] = _RISING
        for counter in (self._above_run, self._plateau_run, self._low_run):
            counter[opened] = 0
        self._peak_slope[opened] = 0.0
        self._max_ema[opened] = 0.0
        kinds: tuple[tuple[EventKind, NDArray[np.bool_]], ...] = (
            ("warning", first),
            ("calm", broken),
            ("opened", opened),
        )
        return [
            WindowEvent(kind, int(i), step, int(self._start[i]))
            for kind, which in kinds
            for i in np.flatnonzero(which)
        ]

    def _close(
        self, step: int, finite: NDArray[np.bool_], up: NDArray[np.float64]
    ) -> list[WindowEvent]:
        rule, ema = self.rule, self._smooth[self._n - 1]
        rising = finite & (self._state == _RISING)
        watched = rising | (finite & (self._state == _FORMED))
        # Counted in every state: a head that jumps past the level has held it while opening.
        self._level_run[finite] = np.where(ema >= rule.level, self._level_run + 1, 0)[finite]
        if not watched.any():
            return []
        self._max_ema[rising] = np.maximum(self._max_ema, ema)[rising]
        settled = rising & self._on_plateau(ema, up, rising)
        low = ema < rule.rearm * up
        for counter, among, holds in (
            (self._plateau_run, rising, settled),
            (self._low_run, watched, low),
        ):
            counter[among] = np.where(holds, counter + 1, 0)[among]
        events = []
        for unit in np.flatnonzero(watched):
            reason: EndReason | None = None
            if self._low_run[unit] >= rule.patience:
                reason = "lapsed"
            elif rising[unit] and self._level_run[unit] >= rule.patience:
                reason = "level"
            elif rising[unit] and self._plateau_run[unit] >= rule.patience:
                reason = "plateau"
            if reason is None:
                continue
            if rising[unit]:
                self._end(int(unit), step, reason)
            self._state[unit] = _LAPSED if reason == "lapsed" else _FORMED
            self._low_run[unit] = 0
            kind: EventKind = "lapsed" if reason == "lapsed" else "closed"
            events.append(WindowEvent(kind, int(unit), step, int(self._start[unit]), reason))
        return events

    def _on_plateau(
        self, ema: NDArray[np.float64], up: NDArray[np.float64], rising: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """The slope is the EMA's change over a span that grows with the window (per step)."""
        rule, now = self.rule, self._n - 1
        age = now - self._start_row
        span = np.minimum(np.clip(age // 2, *rule.slope_span), max(now, 1))
        then = np.maximum(now - span, 0)
        elapsed = np.maximum(self._steps[now] - self._steps[then], 1)
        slope = (ema - self._smooth[then, np.arange(self.n_units)]) / elapsed
        slope = np.where(np.isfinite(slope), slope, 0.0)
        self._peak_slope[rising] = np.maximum(self._peak_slope, slope)[rising]
        return np.asarray(
            (age >= rule.slope_span[0])
            & (slope < rule.plateau_slope * self._peak_slope)
            & (ema >= rule.plateau_share * self._max_ema)
            & (ema - self.floor >= rule.plateau_rise * (up - self.floor))
        )

    def _end(self, unit: int, step: int, reason: EndReason) -> None:
        steps, values = self._steps[: self._n], self._values[: self._n, unit]
        start = int(self._start[unit])
        fit = None
        if reason != "lapsed":
            fit = refine(steps.astype(np.float64), values, start=start, end=step)
        self._ended.append(
            Window(
                unit_index=unit,
                start=start,
                end=step,
                midpoint=round(fit.midpoint)
                if fit
                else halfway(steps.astype(np.float64), values, start=start, end=step),
                refined_start=round(fit.start) if fit else None,
                refined_end=round(fit.end) if fit else None,
                end_reason=reason,
                state="LAPSED" if reason == "lapsed" else "FORMED",
                censored=False,
                start_censored=bool(self._start_row[unit] == 0),
            )
        )

    # -- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The history as lists of numbers, from which everything else follows."""
        return {
            "schema_version": 1,
            "n_units": self.n_units,
            "floor": self.chance.tolist(),
            "rule": self.rule.settings(),
            "steps": self._steps[: self._n].tolist(),
            "values": self._values[: self._n].reshape(-1).tolist(),
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
        values = np.asarray(state["values"], np.float64).reshape(-1, self.n_units)
        replay(self, state["steps"], values)


def replay(
    detector: WindowDetector, steps: Sequence[int], values: NDArray[np.float64]
) -> list[WindowEvent]:
    """Feed recorded evaluations, [n] steps and [n, n_units] values; return all events."""
    events: list[WindowEvent] = []
    for step, row in zip(steps, values, strict=True):
        events += detector.update(int(step), row)
    return events
