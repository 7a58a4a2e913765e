"""The detector's promises: starts are back-dated, ends have reasons, state is the history."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mda_lightning.window import (
    MechanismWindow,
    WindowDetector,
    WindowRule,
    message_of,
    replay,
)
from mda_lightning.window.fit import refine
from mda_lightning.window.floor import has_held, noise

FLOOR = 0.052


def logistic(n: int, *, height: float, midpoint: float, width: float) -> np.ndarray:
    return FLOOR + height / (1 + np.exp(-(np.arange(n) - midpoint) / width))


def noisy(curve: np.ndarray, *, seed: int, sd: float = 0.004) -> np.ndarray:
    return curve + np.random.default_rng(seed).normal(size=curve.shape) * sd


def detect(values: np.ndarray, *, every: int = 10) -> tuple[WindowDetector, list]:
    columns = values.reshape(len(values), -1)
    detector = WindowDetector(columns.shape[1], floor=FLOOR)
    return detector, replay(detector, range(0, every * len(values), every), columns)


def test_the_start_is_the_first_of_five_values_above_the_threshold() -> None:
    values = np.full(60, FLOOR)
    values[30:34] = 0.2  # four are not enough
    values[40:] = 0.2
    detector, events = detect(values)
    assert [(e.kind, e.step, e.start) for e in events[:4]] == [
        ("warning", 300, 300),
        ("calm", 340, 300),
        ("warning", 400, 400),
        ("opened", 440, 400),
    ]
    assert detector.windows()[0].start == 400


def test_a_window_closes_by_level_when_the_ema_has_held_it_five_times() -> None:
    values = np.full(80, FLOOR)
    values[30:] = 0.8
    detector, events = detect(values)
    smooth, ema = [], FLOOR
    for value in values:
        ema += 0.3 * (value - ema)
        smooth.append(ema)
    first = int(np.argmax(np.array(smooth) >= 0.4))
    closed = next(e for e in events if e.kind == "closed")
    assert (closed.step, closed.reason) == (10 * (first + 4), "level")
    assert detector.states == ["FORMED"]


def test_a_rise_that_ends_below_the_level_closes_on_its_plateau() -> None:
    """The paper's 70M model ends at 0.304: a fixed 0.4 alone never fires."""
    curve = logistic(400, height=0.25, midpoint=150, width=10)
    detector, _ = detect(noisy(curve, seed=0))
    (window,) = detector.windows()
    assert window.end_reason == "plateau"
    assert not window.censored
    assert window.end is not None
    assert FLOOR + 0.8 * 0.25 < curve[window.end // 10] < FLOOR + 0.98 * 0.25, "90% of the rise"
    assert window.midpoint is not None and abs(window.midpoint - 1500) < 60


@pytest.mark.parametrize("seed", range(10))
def test_flat_curves_and_short_spikes_open_nothing(seed: int) -> None:
    values = noisy(np.full(400, FLOOR), seed=seed, sd=0.008)
    values[50::60] += 0.5
    values[51::60] += 0.5
    assert detect(values)[0].windows() == []


@pytest.mark.parametrize("seed", range(10))
def test_simulated_rises_are_found_near_where_the_clean_curve_crosses(seed: int) -> None:
    rng = np.random.default_rng(seed)
    clean = logistic(
        500, height=rng.uniform(0.2, 0.8), midpoint=rng.uniform(150, 300), width=rng.uniform(3, 30)
    )
    detector, _ = detect(noisy(clean, seed=seed))
    (window,) = detector.windows()
    crossing = int(np.argmax(clean > window.threshold))
    assert abs(window.start / 10 - crossing) <= 5
    assert window.end is not None and window.start < window.end


def test_a_noisy_floor_raises_the_threshold() -> None:
    quiet, _ = detect(noisy(np.full(60, FLOOR), seed=1, sd=0.001))
    loud, _ = detect(noisy(np.full(60, FLOOR), seed=1, sd=0.03))
    assert quiet.up[0] == pytest.approx(0.10)
    assert loud.up[0] > 0.15


def test_a_head_that_hands_over_lapses_and_may_rise_again() -> None:
    values = np.full(200, FLOOR)
    values[30:80] = 0.6
    values[130:] = 0.6
    detector, events = detect(values)
    assert [e.kind for e in events if e.kind in ("opened", "closed", "lapsed")] == [
        "opened",
        "closed",
        "lapsed",
        "opened",
        "closed",
    ]
    assert [w.start for w in detector.windows()] == [300, 1300]


def test_a_rise_that_falls_back_before_it_formed_is_reported_as_lapsed() -> None:
    values = np.full(120, FLOOR)
    values[30:45] = 0.2
    (window,) = detect(values)[0].windows()
    assert (window.end_reason, window.state) == ("lapsed", "LAPSED")


def test_a_run_that_stops_inside_a_window_reports_it_as_censored() -> None:
    detector, _ = detect(logistic(155, height=0.5, midpoint=170, width=15))
    (window,) = detector.windows()
    assert window.censored and window.end is None and window.midpoint is None


def test_a_model_that_had_the_head_from_the_first_evaluation_is_marked() -> None:
    (window,) = detect(np.full(40, 0.6))[0].windows()
    assert window.start == 0 and window.start_censored


def test_units_do_not_see_each_other() -> None:
    curves = np.stack(
        [noisy(logistic(300, height=0.1 * i, midpoint=150, width=9), seed=i) for i in range(8)], 1
    )
    together, _ = detect(curves)
    for unit in range(8):
        alone, _ = detect(curves[:, unit])
        mine = [w for w in together.windows() if w.unit_index == unit]
        assert [(w.start, w.end, w.midpoint) for w in mine] == [
            (w.start, w.end, w.midpoint) for w in alone.windows()
        ]


@settings(max_examples=12, deadline=None)
@given(cut=st.integers(0, 249), seed=st.integers(0, 3))
def test_stopped_anywhere_and_restored_it_finds_the_identical_windows(cut: int, seed: int) -> None:
    curves = np.stack(
        [noisy(logistic(250, height=h, midpoint=110, width=8), seed=seed) for h in (0.0, 0.3)], 1
    )
    curves[100:103, 1] = np.nan
    whole, events = detect(curves)
    first = WindowDetector(2, floor=FLOOR)
    before = replay(first, range(0, 10 * cut, 10), curves[:cut])
    second = WindowDetector(2, floor=FLOOR)
    second.load_state_dict(first.state_dict())
    after = replay(second, range(10 * cut, 2500, 10), curves[cut:])
    assert before + after == events
    assert second.windows() == whole.windows()
    np.testing.assert_equal(second.state_dict(), whole.state_dict())


def test_state_is_plain_lists_and_numbers() -> None:
    detector, _ = detect(logistic(50, height=0.5, midpoint=20, width=3))
    assert json.loads(json.dumps(detector.state_dict())) == detector.state_dict()


def test_missing_values_change_nothing_but_their_count() -> None:
    curve = logistic(300, height=0.5, midpoint=120, width=6)
    with_gap = curve.copy()
    with_gap[40:50] = np.nan
    gap, _ = detect(with_gap)
    whole, _ = detect(curve)
    assert gap.n_missing[0] == 10
    assert gap.windows()[0].start == whole.windows()[0].start
    nothing, events = detect(np.full(30, np.nan))
    assert events == [] and nothing.windows() == []


def test_repeated_steps_are_counted_and_decreasing_ones_refused() -> None:
    detector = WindowDetector(1, floor=FLOOR)
    detector.update(10, [0.05])
    assert detector.update(10, [0.9]) == []
    assert detector.n_repeated == 1
    with pytest.raises(ValueError, match="step 5 comes after step 10"):
        detector.update(5, [0.05])
    with pytest.raises(ValueError, match="2 values for 1 units at step 20"):
        detector.update(20, [0.1, 0.2])


def test_thresholds_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"level=0\.05 is not above minimum_up=0\.1"):
        WindowRule(level=0.05)
    with pytest.raises(ValueError, match=r"rearm=1\.5"):
        WindowRule(rearm=1.5)
    with pytest.raises(ValueError, match="n_units is 1"):
        WindowDetector(1).load_state_dict(WindowDetector(2).state_dict())


def test_the_refinement_recovers_a_logistic_it_was_given() -> None:
    steps = np.arange(0.0, 3000.0, 10.0)
    values = 0.05 + 0.4 / (1 + np.exp(-(steps - 1500) / 80))
    fit = refine(steps, values, start=1300, end=2200)
    assert fit is not None
    assert fit.midpoint == pytest.approx(1500, abs=1)
    assert fit.start == pytest.approx(1500 - 80 * np.log(9), abs=3)
    assert fit.end == pytest.approx(1500 + 80 * np.log(9), abs=3)
    assert refine(steps[:3], values[:3], start=0, end=20) is None


def ar1(n: int, *, sd: float, rho: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = np.zeros(n)
    for t in range(1, n):
        noise[t] = rho * noise[t - 1] + np.sqrt(1 - rho**2) * rng.normal()
    return sd * noise


@pytest.mark.parametrize("decay", [1.0, 2.0, 4.0])
def test_a_spike_that_falls_off_opens_nothing_though_five_values_are_above(decay: float) -> None:
    values = noisy(np.full(300, FLOOR), seed=0, sd=0.002)
    values[100:] += 0.6 * np.exp(-np.arange(200) / decay)
    above = values > 0.10
    if decay > 1.0:
        assert above[100:105].all(), "five in a row are above the threshold"
    assert detect(values)[0].windows() == []


def test_a_head_that_rises_within_its_first_evaluations_does_not_raise_its_own_threshold() -> None:
    late, _ = detect(noisy(logistic(300, height=0.5, midpoint=150, width=4), seed=0))
    early, _ = detect(noisy(logistic(300, height=0.5, midpoint=16, width=4), seed=0))
    (after,), (before,) = late.windows(), early.windows()
    assert before.threshold == pytest.approx(after.threshold, abs=0.005)
    assert abs((150 * 10 - after.start) - (16 * 10 - before.start)) <= 20


def test_a_fall_from_uniform_attention_does_not_count_as_noise() -> None:
    """Most heads lose what uniform attention gave them while the floor is being learned."""
    fall = 0.04 * np.exp(-np.arange(300) / 25)
    detector, _ = detect(noisy(0.015 + fall, seed=0, sd=0.002))
    assert detector.up[0] == pytest.approx(0.10)
    lasting = np.stack([0.05 + ar1(300, sd=0.012, rho=0.9, seed=i) for i in range(20)], 1)
    assert np.mean(detect(lasting)[0].up) > 0.105, "noise that outlasts an evaluation does"


def test_a_unit_that_rests_and_rises_again_has_two_windows() -> None:
    curve = logistic(500, height=0.2, midpoint=80, width=6)
    curve += 0.4 / (1 + np.exp(-(np.arange(500) - 300) / 8))
    detector, events = detect(noisy(curve, seed=0, sd=0.006))
    first, second = detector.windows()
    assert first.end_reason == "plateau" and second.end_reason in ("level", "plateau")
    assert first.end is not None and first.end < second.start
    assert second.floor == pytest.approx(FLOOR + 0.2, abs=0.02)
    halfway_up = np.flatnonzero(curve > second.floor + 0.05)[0] * 10
    assert abs(second.start - halfway_up) <= 50
    assert [e.kind for e in events if e.kind in ("opened", "closed")] == ["opened", "closed"] * 2


def test_what_creeps_on_from_a_plateau_is_no_second_rise() -> None:
    curve = logistic(1200, height=0.3, midpoint=80, width=6) + np.linspace(0.0, 0.3, 1200)
    assert len(detect(noisy(curve, seed=0, sd=0.008))[0].windows()) == 1


def test_a_second_rise_that_falls_back_leaves_the_unit_formed() -> None:
    curve = logistic(500, height=0.3, midpoint=80, width=6)
    curve[300:312] += 0.3
    detector, _ = detect(noisy(curve, seed=0, sd=0.004))
    assert [w.end_reason for w in detector.windows()] == ["plateau", "lapsed"]
    assert detector.states == ["FORMED"]


def hand_over(*, gap: int = 0) -> np.ndarray:
    """Unit 0 forms and falls back at 200; unit 1 rises ``gap`` evaluations later; unit 2 never."""
    at = np.arange(400)
    falls = logistic(400, height=0.5, midpoint=60, width=5) - 0.5 / (1 + np.exp(-(at - 200) / 6))
    rises = logistic(400, height=0.5, midpoint=200 + gap, width=6)
    return np.stack([falls, rises, np.full(400, FLOOR)], 1)


def test_a_hand_over_names_both_units_once() -> None:
    _, events = detect(noisy(hand_over(), seed=0))
    handed = [e for e in events if e.kind == "handed_over"]
    assert [(e.unit_index, e.to_index) for e in handed] == [(0, 1)]
    lapsed = next(e for e in events if e.kind == "lapsed")
    assert handed[0].step == lapsed.step


def test_a_rise_long_before_or_after_a_lapse_is_no_hand_over() -> None:
    for gap in (-120, 120):
        _, events = detect(noisy(hand_over(gap=gap), seed=0))
        assert {e.kind for e in events} >= {"lapsed", "opened"}
        assert not [e for e in events if e.kind == "handed_over"], gap


def test_without_a_level_windows_close_on_plateaus_only() -> None:
    curve = noisy(logistic(500, height=0.8, midpoint=150, width=20), seed=0)
    detector = WindowDetector(1, floor=FLOOR, rule=WindowRule(level=None))
    replay(detector, range(0, 5000, 10), curve[:, None])
    with_level, _ = detect(curve)
    assert [w.end_reason for w in detector.windows()] == ["plateau"]
    assert with_level.windows()[0].end_reason == "level"
    assert detector.windows()[0].end > with_level.windows()[0].end  # type: ignore[operator]


def test_a_noisy_floor_that_reaches_the_level_does_not_close_windows_as_they_open() -> None:
    values = 0.05 + ar1(600, sd=0.05, rho=0.3, seed=0)
    values[300:] += 0.6 / (1 + np.exp(-(np.arange(300) - 60) / 10))
    detector, _ = detect(values)
    (window,) = detector.windows()
    assert window.threshold > 0.25
    assert window.end_reason == "plateau"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"patience": 0}, "patience=0"),
        ({"minimum_up": -9.0, "level": None}, "by its distance from where it begins"),
        ({"n_early": 3}, r"n_early=3 is under patience=5"),
        ({"slope_span": (40, 10)}, r"slope_span=\(40, 10\)"),
        ({"hold": 1.2}, r"hold=1\.2"),
        ({"n_sigma": -1.0}, r"n_sigma=-1\.0"),
        ({"minimum_up": 0.5}, r"level=0\.4 is not above minimum_up=0\.5"),
    ],
)
def test_every_contradiction_is_named(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        WindowRule(**wrong)


def test_the_midpoints_interval_covers_the_truth_and_shrinks_with_the_noise() -> None:
    steps = np.arange(0.0, 3000.0, 10.0)
    clean = 0.05 + 0.4 / (1 + np.exp(-(steps - 1500) / 80))
    widths = []
    for sd in (0.004, 0.016):
        inside = []
        for seed in range(60):
            values = clean + ar1(len(steps), sd=sd, rho=0.6, seed=seed)
            fit = refine(steps, values, start=1300, end=2200)
            assert fit is not None
            low, high = fit.midpoint_interval
            inside.append(low <= 1500 <= high)
        widths.append(high - low)
        assert np.mean(inside) >= 0.85
    assert widths[1] > 2.5 * widths[0]


def test_a_low_plateau_waits_for_a_rival_and_not_for_a_slow_climber() -> None:
    at = np.arange(500)
    low = logistic(500, height=0.2, midpoint=80, width=5)
    rival = logistic(500, height=0.6, midpoint=130, width=10)
    climber = FLOOR + np.clip((at - 40) * 0.0008, 0.0, 0.4)
    for curves, target in (((low, rival), 1), ((low, climber), 0)):
        follower = MechanismWindow(range(2), chance=FLOOR)
        for i, row in enumerate(np.stack(curves, 1)):
            follower.update(10 * i, row)
        assert follower.window is not None and follower.window[0] == target
        assert follower.closed_at is not None and follower.closed_at < 2500


def test_several_targets_are_the_highest_when_the_window_is_over() -> None:
    curves = [logistic(400, height=h, midpoint=100, width=6) for h in (0.3, 0.7, 0.5, 0.0)]
    follower = MechanismWindow("abcd", chance=FLOOR, targets=3)
    for i, row in enumerate(np.stack(curves, 1)):
        follower.update(10 * i, row)
    assert [unit for unit, _ in follower.targets] == ["b", "c", "a"]
    named = MechanismWindow("abcd", chance=FLOOR, targets=["a", "c"])
    for i, row in enumerate(np.stack(curves, 1)):
        named.update(10 * i, row)
    own = dict(named.targets)
    assert named.window is not None and set(own) == {"a", "c"}
    assert named.window[1].start == min(w.start for w in own.values())
    assert named.window[1].end == max(w.end for w in own.values())
    with pytest.raises(ValueError, match="e is not among the 4 units, a to d"):
        MechanismWindow("abcd", chance=FLOOR, targets=["e"])


def test_infinite_values_are_missing_values() -> None:
    curve = noisy(logistic(300, height=0.5, midpoint=120, width=6), seed=0)
    holes = np.flatnonzero(np.random.default_rng(1).random(300) < 0.2)
    found = []
    for hole in (np.nan, np.inf, -np.inf):
        values = curve.copy()
        values[holes] = hole
        detector, events = detect(values)
        found.append((detector.windows(), events, detector.highest.tolist(), detector.state_dict()))
        assert detector.n_missing[0] == len(holes)
    np.testing.assert_equal(found[1], found[0])
    np.testing.assert_equal(found[2], found[0])


def test_a_long_gap_inside_a_window_is_no_rest() -> None:
    curve = noisy(logistic(600, height=0.9, midpoint=320, width=60), seed=0)
    curve[150:300] = np.nan
    (window,) = detect(curve)[0].windows()
    assert window.end is not None and window.end > 3000


def test_a_unit_whose_first_values_are_missing_may_have_been_there_before() -> None:
    values = np.full(60, 0.6)
    values[:10] = np.nan
    (window,) = detect(values)[0].windows()
    assert window.start == 100 and window.start_censored


def test_a_head_that_was_there_from_the_first_evaluation_is_not_the_mechanisms_window() -> None:
    """A run that goes on from a published checkpoint has such heads."""
    there = np.full(400, 0.5)
    low = np.full(400, 0.12)
    rises = logistic(400, height=0.6, midpoint=300, width=6)
    follower = MechanismWindow("abc", chance=FLOOR)
    for i, row in enumerate(np.stack([there, low, rises], 1)):
        if i == 200:
            assert (follower.phase, follower.window, follower.asks) == ("before", None, False)
            assert "a, b: above the threshold at the first evaluation" in message_of(follower)
        follower.update(10 * i, row)
    assert follower.phase == "closed"
    assert follower.window is not None and follower.window[0] == "c"
    named = MechanismWindow("abc", chance=FLOOR, targets=["a"])
    for i, row in enumerate(np.stack([there, low, rises], 1)):
        named.update(10 * i, row)
    assert named.window is not None and named.window[1].start_censored


def test_a_rise_that_opens_after_the_lapse_it_began_in_is_a_hand_over() -> None:
    _, events = detect(noisy(hand_over(gap=36), seed=0))
    kinds = [(e.kind, e.unit_index) for e in events]
    assert kinds.index(("lapsed", 0)) < kinds.index(("opened", 1)), "or this tests the other order"
    handed = [(e.unit_index, e.to_index) for e in events if e.kind == "handed_over"]
    assert handed == [(0, 1)]


def test_windows_of_one_unit_do_not_overlap_and_have_a_length() -> None:
    rng = np.random.default_rng(0)
    steps = rng.normal(0.0, 0.03, (500, 60)).cumsum(0) * (rng.random((500, 60)) < 0.3)
    curves = np.clip(0.05 + np.abs(steps), 0.0, 1.0)
    detector, _ = detect(curves)
    ended = 0
    for unit in range(60):
        mine = [w for w in detector.windows() if w.unit_index == unit]
        for window in mine:
            assert window.end is None or window.end > window.start
            ended += window.end is not None
        for one, other in pairwise(mine):
            assert one.end is not None and one.end < other.start
    assert ended > 20


def test_the_lapse_line_is_at_least_halfway_from_the_floor_to_the_threshold() -> None:
    """Where chance is high, as for previous-token heads, 0.8 of the threshold is the floor."""
    chance = 0.113
    values = np.full(300, chance)
    values[60:150] = 0.3
    values += 0.002 * np.random.default_rng(0).normal(size=300)
    detector = WindowDetector(1, floor=chance)
    replay(detector, range(0, 3000, 10), values[:, None])
    assert 0.8 * detector.windows()[0].threshold < chance + 0.005
    assert detector.states == ["LAPSED"]


@pytest.mark.parametrize(
    ("run", "held"),
    [
        ([0.3, 0.4, 0.5, 0.5, 0.55], True),
        ([0.6, 0.5, 0.4, 0.3, 0.25], False),  # falls off
        ([0.2, 0.15, 0.2, 0.6, 0.6], False),  # the last two are high, most are not
        ([0.5, 0.5, 0.5, 0.34, 0.34], False),  # 0.59 of the peak, above the floor
        ([0.5, 0.5, 0.5, 0.42, 0.42], True),
    ],
)
def test_a_run_has_held_when_its_last_values_are_near_its_peak(run: list, held: bool) -> None:
    assert has_held(np.array(run), floor=0.1, rule=WindowRule()) is held


@pytest.mark.parametrize("rho", [0.0, 0.8])
@pytest.mark.parametrize("n", [10, 22, 100])
def test_noise_is_estimated_about_the_trend(n: int, rho: float) -> None:
    curves = np.stack([ar1(n, sd=0.01, rho=rho, seed=i) for i in range(400)], 1)
    curves += np.linspace(0.0, 0.2, n)[:, None]
    estimate = float(np.median(noise(curves)))
    if rho == 0.0:
        assert estimate == pytest.approx(0.01, rel=0.2)
    else:
        assert 0.004 < estimate < 0.011, "few values of lasting noise look quieter than they are"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"level": float("inf")}, "level=inf must be a finite number; give level=None"),
        ({"n_sigma": float("nan")}, "n_sigma=nan must be a finite number"),
        ({"patience": 2.5}, r"patience=2\.5 must be a whole number"),
        ({"n_early": float("nan")}, "n_early=nan must be a whole number"),
    ],
)
def test_numbers_that_would_fail_later_are_refused(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        WindowRule(**wrong)


def test_a_fit_of_another_rise_is_none() -> None:
    """Closed at the level at once, refined when it rests: only by a logistic of that window."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        values = np.concatenate([np.full(20, FLOOR), np.full(20, 0.45), np.full(200, 0.45)])
        values[60:] += 0.3 / (1 + np.exp(-(np.arange(180) - 60) / 8))
        detector, _ = detect(values + rng.normal(size=240) * 0.01)
        for window in detector.windows():
            if window.refined_midpoint is not None:
                assert window.end is not None and window.refined_start is not None
                assert window.refined_start <= window.end
                assert window.refined_midpoint <= 2 * window.end - window.start
