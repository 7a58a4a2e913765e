"""The detector on simulated curves of which the truth is known, and on recorded ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import window_simulation
from benchmarks.window_gallery import BY_EYE, Reading, nearest, panels
from benchmarks.window_simulation import EVERY, KINDS, Curves, Outcome, detect, outcome, rises
from mda_lightning.window import Window

N = 600
PANELS = {(panel.run, panel.metric): panel for panel in panels()}


def simulated(kind: str) -> Outcome:
    return outcome(KINDS[kind](np.random.default_rng(11), N))


def test_rises_are_found_in_time_and_none_is_missed() -> None:
    found = simulated("rises")
    assert found.opened == 1.0
    assert found.early <= 0.005
    assert found.missed <= 0.01
    assert found.start <= 3.0, "median error of the start, in evaluations"
    assert found.midpoint <= 1.0 and found.covered >= 0.85


@pytest.mark.parametrize("kind", ["flat", "drifts", "spikes"])
def test_what_is_no_rise_opens_nothing(kind: str) -> None:
    assert simulated(kind).opened <= 0.005


def test_both_rises_of_a_curve_in_two_steps_are_found() -> None:
    found = simulated("two steps")
    assert found.missed <= 0.01 and found.second >= 0.99
    assert found.start <= 3.0


def test_the_simulation_tells_a_bad_detector_from_a_good_one() -> None:
    """Late starts, windows that open at once and curves without windows are seen as such."""
    curves = rises(np.random.default_rng(0), 40)
    good = detect(curves)
    late = outcome_of(curves, good, shift=8)
    assert late.start >= 7
    assert outcome_of(curves, good, shift=-40).early > 0.9
    assert outcome_of(curves, [[] for _ in good], shift=0).missed == 1.0


def outcome_of(curves: Curves, windows: list[list[Window]], *, shift: int) -> Outcome:
    moved = [[replace(w, start=w.start + EVERY * shift) for w in found] for found in windows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_simulation, "detect", lambda _: moved)
        return outcome(curves)


#: Ends that the eye sees and the detector does not, as docs/window.md says.
OPEN = {("records-rate-0.015", "L2H3", 3850), ("layers-4", "L2H0", 5800)}


@pytest.mark.parametrize("one", BY_EYE, ids=lambda one: f"{one.run}-{one.unit}-{one.start}")
def test_recorded_rises_are_where_the_eye_sees_them(one: Reading) -> None:
    window = nearest(PANELS[one.run, one.metric], one)
    assert window is not None
    is_second = window.floor > 0.2  # from where noise is large, so that the threshold is high
    assert abs(window.start - one.start) <= (450 if is_second else 150)
    still_open = one.end is None or (one.run, one.unit, one.start) in OPEN
    assert window.censored == still_open
    if one.end is not None and window.end is not None:
        # The eye's end is where a curve rests, which the level of 0.4 does not wait for.
        assert one.start < window.end <= one.end + 400


def test_most_recorded_starts_are_within_five_evaluations_of_the_eyes() -> None:
    off = []
    for one in BY_EYE:
        window = nearest(PANELS[one.run, one.metric], one)
        assert window is not None
        if window.floor <= 0.2:
            off.append(abs(window.start - one.start) / EVERY)
    assert np.median(off) <= 5.0


def test_recorded_curves_that_do_not_rise_have_no_window() -> None:
    for run in ("records-seed-1", "layers-2", "width-48"):
        assert PANELS[run, "induction"].follower.detector.windows() == []


def test_a_second_rise_of_a_recorded_head_is_one_window_of_its_own() -> None:
    panel = PANELS["width-96", "previous_token"]
    first, second = panel.windows("L1H2")
    assert first.end is not None and first.end < 1000 < second.start
    assert second.floor == pytest.approx(
        float(panel.curves["L1H2"].loc[2800:3700].median()), abs=0.02
    )
