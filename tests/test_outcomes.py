"""What an arm of a seed came to: crossings, areas and companions against loops and closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_study import write_made_study, write_run

from mda_lightning.analysis.outcomes import (
    area_between,
    companion_pair,
    companions_together,
    crossing_of,
    study_outcomes,
)
from mda_lightning.analysis.run_curves import StudyError, head_curve, model_curve, read_metrics
from mda_lightning.analysis.study import load_study


def crossing_by_loop(steps: list[int], values: list[float], threshold: float) -> float | None:
    for i in range(len(values) - 1):
        if values[i] >= threshold and values[i + 1] >= threshold:
            if i == 0:
                return steps[0]
            rise = (threshold - values[i - 1]) / (values[i] - values[i - 1])
            return steps[i - 1] + rise * (steps[i] - steps[i - 1])
    return None


@given(
    st.lists(st.floats(0.0, 1.0).map(lambda v: round(v, 3)), min_size=1, max_size=30),
    st.sampled_from([0.2, 0.5, 0.75]),
)
def test_a_crossing_is_what_a_loop_finds(values: list[float], threshold: float) -> None:
    steps = [100 + 7 * i for i in range(len(values))]
    found = crossing_of(steps, values, threshold)
    expected = crossing_by_loop(steps, values, threshold)
    assert (found.step is None) == (expected is None)
    if expected is not None:
        assert found.step == pytest.approx(expected)
    assert found.looked_until == steps[-1]


def test_crossings_of_known_curves() -> None:
    steps = [100, 110, 120, 130, 140]
    ramp = crossing_of(steps, [0.0, 0.1, 0.2, 0.3, 0.4], 0.25)
    assert ramp.step == pytest.approx(125.0) and not ramp.at_branch
    spike = crossing_of(steps, [0.0, 0.9, 0.0, 0.3, 0.4], 0.25)
    assert spike.step == pytest.approx(120 + 10 * 0.25 / 0.3)
    above = crossing_of(steps, [0.3, 0.3, 0.1, 0.1, 0.1], 0.25)
    assert above.step == 100.0 and above.at_branch
    assert crossing_of(steps, [0.3, 0.1, 0.1, 0.3, 0.3], 0.25).step == pytest.approx(127.5)
    # Reached at the last evaluation alone, nothing says that it stays.
    last = crossing_of(steps, [0.0, 0.0, 0.0, 0.0, 0.9], 0.25)
    assert last.step is None and last.looked_until == 140
    assert crossing_of([100], [0.9], 0.25).step is None
    # An evaluation that is not a number was not made.
    gap = crossing_of(steps, [0.0, 0.1, math.nan, 0.3, 0.4], 0.25)
    assert gap.step == pytest.approx(110 + 20 * 0.15 / 0.2) and not gap.at_branch
    first = crossing_of(steps, [math.nan, 0.1, 0.2, 0.3, math.nan], 0.15)
    assert first.step == pytest.approx(115.0) and first.looked_until == 130
    nothing = crossing_of(steps, [math.nan] * 5, 0.25)
    assert nothing.step is None and not nothing.at_branch
    with pytest.raises(ValueError, match="without evaluations"):
        crossing_of([], [], 0.25)


def test_area_is_the_triangle_between_a_ramp_and_its_start() -> None:
    steps = np.arange(100, 201, 10)
    ramp = (steps, (steps - 100) * 0.001)
    flat = (steps, np.zeros(len(steps)))
    assert area_between(ramp, flat, until=200) == (pytest.approx(100 * 0.1 / 2), 100)
    assert area_between(flat, ramp, until=200) == (pytest.approx(-5.0), 100)
    assert area_between(ramp, flat, until=150) == (pytest.approx(50 * 0.05 / 2), 50)
    # On the steps that both have: every second one of the ramp's gives the same triangle.
    sparse = (steps[::2], np.zeros(len(steps[::2])))
    assert area_between(ramp, sparse, until=None) == (pytest.approx(5.0), 100)
    assert area_between(ramp, (steps[:1], flat[1][:1]), until=None) is None
    assert area_between(ramp, (steps + 1, flat[1]), until=None) is None


MASK = {
    "mask-top": {"do": "mask", "control": "mask-random", "by": "ekfac", "phrase": "masking"},
    "mask-random": {"do": "mask", "control": None, "control_of": "mask-top", "phrase": "control"},
}


def test_outcomes_are_read_off_the_run(tmp_path: Path) -> None:
    """The base run goes on for longer; the arm's file begins after the branch; one head is NaN."""
    base_steps = list(range(0, 301, 10))
    arm_steps = list(range(110, 221, 10))

    def heads(steps: list[int], slope: float) -> dict[str, dict[str, tuple[list, list]]]:
        return {
            "induction": {
                "L0H0": (steps, [slope * s for s in steps]),
                "L0H1": (steps, [0.5 for _ in steps]),
                "L1H1": (steps, [math.nan for _ in steps]),
            },
            "ablation/logprob": {"L0H0": ([100, 150, 200], [9.0, 1.0, 3.0])},
            "previous_token": {"L0H0": ([150], [0.7])},
        }

    model = {
        "icl/gain@127": ([50, 100, 120, 150, 180, 210, 300], [9.0, 9.0, 8.0, 1.0, 2.0, 6.0, 9.0]),
        "held_out_loss": ([100], [4.0]),
    }
    folder = write_made_study(
        tmp_path,
        MASK,
        {
            0: {
                "baseline": {"heads": heads(base_steps, 0.001), "model": model},
                "mask-top": {"heads": heads(arm_steps, 0.002), "model": model},
            }
        },
        thresholds=(0.3, 5.0),
    )
    outcomes = study_outcomes(load_study(folder))[0]
    assert list(outcomes) == ["baseline", "mask-top"]
    base, arm = outcomes["baseline"], outcomes["mask-top"]
    assert base.final == pytest.approx(0.195) and arm.final == pytest.approx(0.39)
    assert (base.curve[0][0], base.curve[0][-1]) == (100, 220)
    # At the branch the arm's run is the base run, which has the step.
    assert arm.curve[0][0] == 100 and arm.curve[1][0] == pytest.approx(0.1)
    assert arm.crossings[0.3].step == pytest.approx(150.0)
    assert arm.crossings[5.0].step is None and arm.crossings[5.0].looked_until == 220
    assert arm.heads == {"L0H0": pytest.approx(0.39), "L0H1": 0.5}
    # After the branch and up to the window's end, where μ is compared; the arm goes on to 220.
    assert arm.companion("icl_gain") == pytest.approx((8.0 + 1.0 + 2.0) / 3)
    assert arm.companion("ablation") == pytest.approx(2.0)
    assert arm.companion("previous_token") == pytest.approx(0.7)
    assert arm.companion("held_out_loss") is None and arm.companion("icl_olsson") is None


def test_companions_are_averaged_over_the_steps_that_both_have(tmp_path: Path) -> None:
    steps = list(range(100, 221, 10))
    heads = {"induction": {"L0H0": (steps, [0.1] * len(steps))}}
    loss = {
        "mask-top": ([120, 150, 180, 200, 210], [1.0, 2.0, 3.0, 4.0, 5.0]),
        "mask-random": ([120, 150, 200, 210], [10.0, 20.0, 40.0, 70.0]),
        "baseline": ([], []),
    }
    runs = {n: {"heads": heads, "model": {"held_out_loss": track}} for n, track in loss.items()}
    outcomes = study_outcomes(load_study(write_made_study(tmp_path, MASK, {3: runs})))[3]
    pair = companion_pair(outcomes["mask-top"], outcomes["mask-random"], "held_out_loss")
    assert pair == (pytest.approx((1 + 2 + 4) / 3), pytest.approx((10 + 20 + 40) / 3))
    assert list(outcomes["mask-top"].companions["held_out_loss"][0]) == [120, 150, 180, 200]
    assert companion_pair(outcomes["mask-top"], outcomes["baseline"], "held_out_loss") is None
    assert companions_together([], "held_out_loss") is None


def test_metrics_tables_by_hand(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        {"induction": {"L1H0": ([20, 10, 20], [0.2, 0.1, 0.3])}},
        {"icl/gain@63": ([10, 20], [1.0, math.nan]), "icl/gainful": ([10], [7.0])},
    )
    frame = read_metrics(tmp_path / "unit_metrics.parquet")
    steps, values = head_curve(frame, "induction", "L1H0") or ((), ())
    assert (list(steps), list(values)) == ([10, 20], [0.1, 0.3])
    assert head_curve(frame, "induction", "L0H0") is None
    gain = model_curve(frame, "icl/gain")
    assert gain is not None and (list(gain[0]), list(gain[1])) == ([10], [1.0])
    assert model_curve(frame, "held_out_loss") is None
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(StudyError, match="cannot be read as Parquet"):
        read_metrics(tmp_path / "bad.parquet")
