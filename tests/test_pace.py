"""The rate that adapts: dense where something moves, sparse elsewhere, resumable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from training import Clock, CurveMechanism, Rows, StrangersModule, fit

from mda_lightning.callbacks import CriticalWindow, UnitMonitor
from mda_lightning.callbacks.pace import Pace
from mda_lightning.window import WindowRule

DENSE, QUIET = 2, 10
RULE = WindowRule(slope_span=(3, 6))


def rise(step: int) -> np.ndarray:
    """L1H1 is at chance to step 150, at 0.6 from step 210; 1 at a time in between."""
    values = np.full((2, 2), 0.05)
    values[1, 1] += 0.55 * min(max((step - 150) / 60, 0.0), 1.0)
    return values


def spike(step: int) -> np.ndarray:
    """L1H1 is above the threshold at one quiet measurement, and at rest again after it."""
    values = np.full((2, 2), 0.05)
    values[1, 1] = 0.2 if 100 <= step < 102 else 0.05
    return values


def simulated(pace: Pace, curve: Callable[[int], np.ndarray], n: int) -> list[int]:
    taken: list[tuple[int, np.ndarray]] = []
    for step in range(n + 1):
        if pace.is_due(step, asked=False):
            taken.append((step, curve(step)))
            recent = [v for s, v in taken if s >= step - pace.span]
            pace.take([np.stack(recent)])
    return [step for step, _ in taken]


def test_it_is_dense_while_scores_move_and_for_the_look_back_after() -> None:
    steps = simulated(Pace(DENSE, QUIET, look_back=2), rise, 400)
    # Quiet to 150; 160 is the first quiet step at which the head has moved (by 0.09).
    assert steps[: steps.index(160) + 1] == list(range(0, 161, QUIET))
    # It stands still from 210, and the look-back of 20 steps still sees it move until 230.
    dense = [s for s in steps if 160 <= s <= 228]
    assert dense == list(range(160, 229, DENSE))
    assert [s for s in steps if s > 240] == list(range(250, 401, QUIET))


def test_a_slow_drift_counts_over_the_look_back_and_a_slower_one_does_not() -> None:
    def drift(per_step: float) -> Callable[[int], np.ndarray]:
        return lambda step: np.array([[per_step * step]])

    # Over 5 quiet intervals of 10 steps: 0.025 is more than the tolerance of 0.02, 0.015 is not.
    assert DENSE in np.diff(simulated(Pace(DENSE, QUIET), drift(0.0005), 300))
    assert set(np.diff(simulated(Pace(DENSE, QUIET), drift(0.0003), 300))) == {QUIET}


def test_a_score_that_wobbles_about_its_level_is_at_rest() -> None:
    """Formed heads wobble by more than the tolerance for the rest of a run."""
    wobble = 0.5 + 0.02 * np.random.default_rng(0).normal(size=4000)

    def scores(step: int) -> np.ndarray:
        return wobble[step : step + 1]

    def rising(step: int) -> np.ndarray:
        return scores(step) + max(step - 1500, 0) * 0.005

    steps = np.array(simulated(Pace(DENSE, QUIET), scores, 3000))
    assert np.mean(np.diff(steps) == DENSE) < 0.2
    steps = np.array(simulated(Pace(DENSE, QUIET), rising, 3000))
    assert np.mean(np.diff(steps[steps > 1600]) == DENSE) > 0.8


def test_values_that_are_not_finite_are_at_rest() -> None:
    pace = Pace(DENSE, QUIET)
    pace.take([np.array([[0.1, np.nan], [0.1, 0.9], [0.1, np.nan]])])
    assert pace.interval(asked=False) == QUIET
    pace.take([np.array([[np.nan, 0.2], [0.1, 0.25]])])
    assert pace.interval(asked=False) == DENSE


def test_a_fixed_rate_never_changes() -> None:
    pace = Pace(5)
    pace.take([np.array([[0.0], [1.0]])])
    assert not pace.adapts
    assert pace.interval(asked=True) == pace.interval(asked=False) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "every_n_steps=0"),
        ((10, 25), "quiet_every_n_steps=25 is not a multiple of every_n_steps=10"),
        ((10, 5), "quiet_every_n_steps=5 is not a multiple"),
    ],
)
def test_rates_off_the_grid_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pace(*arguments)
    with pytest.raises(ValueError, match=message):
        UnitMonitor(every_n_steps=arguments[0], quiet_every_n_steps=(*arguments, None)[1])


def run(
    folder: Path, curve: Callable[[int], np.ndarray], *, quiet: int | None, **arguments: Any
) -> tuple[UnitMonitor, CriticalWindow]:
    clock = Clock()
    monitor = UnitMonitor(
        [CurveMechanism(clock, curve)],
        every_n_steps=DENSE,
        quiet_every_n_steps=quiet,
        # Scores alone never make it dense: what does is CriticalWindow's asking.
        tolerance=arguments.pop("tolerance", 0.02),
        folder=str(folder),
    )
    window = CriticalWindow("curve", rule=RULE, ring=3)
    fit(
        StrangersModule(),
        [clock, monitor, window, *arguments.pop("extra", [])],
        folder,
        data=Rows(1200),
        max_steps=290,
        **arguments,
    )
    return monitor, window


def steps_of(monitor: UnitMonitor) -> list[int]:
    return monitor.table.curves("curve")[0].tolist()


def test_the_window_is_found_within_a_quiet_interval_of_the_fixed_rates(tmp_path: Path) -> None:
    fixed, window = run(tmp_path / "fixed", rise, quiet=None)
    adapting, other = run(tmp_path / "adapting", rise, quiet=QUIET)
    assert window.window is not None and other.window is not None
    assert 0 <= other.window[1].start - window.window[1].start <= QUIET
    assert abs(other.window[1].end - window.window[1].end) <= QUIET
    steps = steps_of(adapting)
    assert [s for s in steps if s < 160] == list(range(0, 160, QUIET))
    inside = [s for s in steps if 160 <= s <= 210]
    assert inside == list(range(160, 211, DENSE))
    assert len(steps) < 0.5 * len(steps_of(fixed))


def test_a_warning_makes_the_next_steps_dense_until_it_comes_to_nothing(tmp_path: Path) -> None:
    monitor, window = run(tmp_path, spike, quiet=QUIET, tolerance=10.0)
    assert window.phase == "before"
    steps = steps_of(monitor)
    # Warned at 100, measured again at once at 102, where the head is back; and at 104, since its
    # smoothed value is still more than halfway to the threshold: quiet from there.
    assert steps == [*range(0, 101, QUIET), 102, 104, *range(110, 291, QUIET)]


@pytest.mark.parametrize(("lost_at", "phase"), [(102, "warned"), (150, "open")])
def test_a_head_that_is_lost_after_its_warning_does_not_keep_the_rate_dense(
    tmp_path: Path, lost_at: int, phase: str
) -> None:
    def curve(step: int) -> np.ndarray:
        values = np.full((2, 2), 0.05)
        values[1, 1] = 0.05 if step < 100 else 0.15 + 0.004 * (step - 100)
        values[1, 1] = np.nan if step >= lost_at else values[1, 1]
        return values

    with pytest.warns(UserWarning, match=f"not finite at step {lost_at}"):
        monitor, window = run(tmp_path, curve, quiet=QUIET, tolerance=10.0)
    assert window.phase == phase
    first_quiet = lost_at + (QUIET if lost_at % QUIET == 0 else QUIET - lost_at % QUIET)
    assert steps_of(monitor) == [
        *range(0, 100, QUIET),
        *range(100, lost_at + 1, DENSE),
        *range(first_quiet, 291, QUIET),
    ]


def test_an_open_window_is_measured_densely_whatever_the_tolerance(tmp_path: Path) -> None:
    monitor, window = run(tmp_path, rise, quiet=QUIET, tolerance=10.0)
    assert window.window is not None and window.phase == "closed"
    start, end = window.window[1].start, window.window[1].end
    assert end is not None
    steps = steps_of(monitor)
    assert [s for s in steps if start <= s <= end] == list(range(start, end + 1, DENSE))
    assert [s for s in steps if s > end] == list(range(end + QUIET - end % QUIET, 291, QUIET))


@pytest.mark.parametrize("at", [100, 156, 180, 222])
def test_resumed_in_the_middle_it_goes_on_as_if_it_had_not_stopped(tmp_path: Path, at: int) -> None:
    saver = ModelCheckpoint(tmp_path / "at", every_n_train_steps=at, save_top_k=-1)
    whole, window = run(
        tmp_path / "run", rise, quiet=QUIET, extra=[saver], enable_checkpointing=True
    )
    checkpoint = next((tmp_path / "at").glob(f"*step={at}.ckpt"))
    again, other = run(tmp_path / "run", rise, quiet=QUIET, ckpt_path=checkpoint)
    assert steps_of(again) == steps_of(whole)
    np.testing.assert_array_equal(again.table.curves("curve")[1], whole.table.curves("curve")[1])
    assert other.window == window.window
