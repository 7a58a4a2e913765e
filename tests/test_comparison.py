"""Arms against controls: scipy and plain loops on studies whose answers are known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_study import write_made_study
from scipy import stats

from mda_lightning.analysis.comparison import StudyComparison, compare_study
from mda_lightning.analysis.comparison_values import ArmComparison
from mda_lightning.analysis.effects import holm, paired_p
from mda_lightning.analysis.study import StudyError, load_study

STEPS = list(range(0, 221, 10))
COMPANIONS = [120, 160, 200, 220]


def arm(do: str, control: str | None = None, **settings: Any) -> dict[str, Any]:
    return {"do": do, "control": control, "phrase": f"{do} {settings}", **settings}


ARMS = {
    "mask-top": arm("mask", "mask-random", by="ekfac"),
    "mask-random": arm("mask", control_of="mask-top"),
}


def run(
    level: float, *, heads: Mapping[str, float] | None = None, icl: float = 0.0, loss: float = 4.0
) -> dict[str, Any]:
    """A run at μ 0.1 until the branch at step 100, and at ``level`` from step 110 on."""
    units = {"L0H0": level, "L0H1": 0.06, "L1H0": 0.07, "L1H1": 0.05, **(heads or {})}
    return {
        "heads": {
            "induction": {
                unit: (STEPS, [0.1 if step <= 100 else value for step in STEPS])
                for unit, value in units.items()
            },
            "ablation/logprob": {"L0H0": (COMPANIONS, [2 * level] * 4)},
        },
        "model": {
            "icl/gain@127": (COMPANIONS, [icl] * 4),
            "held_out_loss": (COMPANIONS, [loss] * 4),
        },
    }


def of(comparison: StudyComparison, name: str) -> ArmComparison:
    return next(one for one in comparison.arms if one.arm == name)


@pytest.fixture
def five(tmp_path: Path) -> tuple[StudyComparison, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    treated, control = 0.3 + rng.normal(0, 0.02, 5), 0.4 + rng.normal(0, 0.02, 5)
    runs = {
        seed: {
            "baseline": run(0.42),
            "mask-top": run(treated[seed], icl=treated[seed], loss=4 - treated[seed]),
            "mask-random": run(control[seed], icl=control[seed], loss=4 - control[seed]),
        }
        for seed in range(5)
    }
    folder = write_made_study(tmp_path, ARMS, runs, thresholds=(0.2, 0.35))
    return compare_study(folder), treated, control


def test_every_quantity_is_scipys_paired_t(
    five: tuple[StudyComparison, np.ndarray, np.ndarray],
) -> None:
    comparison, treated, control = five
    (one,) = comparison.arms
    assert (one.arm, one.other, one.against) == ("mask-top", "mask-random", "matched")
    reference = stats.ttest_rel(treated, control)
    low, high = reference.confidence_interval(0.95)
    expected = {
        "final": 1.0,
        "icl_gain": 1.0,
        "held_out_loss": -1.0,
        "ablation": 2.0,
        # 100 steps, of which the first ten go from no difference to all of it.
        "area": 0.95,
        "area_steps": 95.0,
    }
    for key, factor in expected.items():
        paired = one.quantities[key]
        assert paired.effect is not None and paired.seeds == (0, 1, 2, 3, 4)
        assert paired.effect.mean == pytest.approx(factor * np.mean(treated - control))
        assert [paired.effect.low, paired.effect.high] == pytest.approx(
            sorted([factor * low, factor * high])
        )
        assert paired.p == pytest.approx(reference.pvalue)
    assert one.quantities["icl_olsson"].effect is None
    against = {c.arm: c for c in comparison.against_baseline}
    assert set(against) == {"mask-top", "mask-random"}
    assert against["mask-random"].final.effect is not None
    assert against["mask-random"].final.effect.mean == pytest.approx(np.mean(control) - 0.42)


def test_the_verdict_says_what_moved_and_whose_head_it_is(
    five: tuple[StudyComparison, np.ndarray, np.ndarray],
) -> None:
    comparison, treated, control = five
    verdict = comparison.arms[0].verdict
    assert "lowered the induction score of the target head L0H0 against" in verdict
    assert "In-context learning fell with it" in verdict and "held-out loss rose" in verdict
    assert "5 seeds" in verdict and "Only" not in verdict
    # μ jumps in ten steps to its level, so a threshold is crossed at a share of them.
    later = np.mean([(0.2 - 0.1) / (t - 0.1) - (0.2 - 0.1) / (c - 0.1)
                     for t, c in zip(treated, control, strict=True)]) * 10  # fmt: skip
    crossing = {c.threshold: c for c in comparison.arms[0].crossings}[0.2]
    assert crossing.shift.effect is not None
    assert crossing.shift.effect.mean == pytest.approx(later)


def test_a_crossing_that_never_comes_is_counted_and_gives_no_difference(tmp_path: Path) -> None:
    treated = (0.25, 0.33, 0.36, 0.20)
    runs = {
        seed: {
            "baseline": run(0.4),
            "mask-top": run(level),
            "mask-random": run(0.4 if seed < 3 else 0.25),
        }
        for seed, level in enumerate(treated)
    }
    comparison = compare_study(write_made_study(tmp_path, ARMS, runs, thresholds=(0.3, 0.9)))
    first, second = comparison.arms[0].crossings
    assert (first.crossed, first.other_crossed, first.n) == (2, 3, 4)
    assert first.shift.seeds == (1, 2)
    assert (second.crossed, second.other_crossed, second.shift.effect) == (0, 0, None)
    verdict = comparison.arms[0].verdict
    assert "0.3 was reached in 2 of 4 seeds, against 3 of 4" in verdict
    assert "in the 2 with both" in verdict
    assert "Only 4 seeds" in verdict


def test_above_at_the_branch_is_no_finding(tmp_path: Path) -> None:
    runs = {s: {"mask-top": run(0.3), "mask-random": run(0.4)} for s in range(3)}
    comparison = compare_study(write_made_study(tmp_path, ARMS, runs, thresholds=(0.05,)))
    (crossing,) = comparison.arms[0].crossings
    assert crossing.at_branch == 3
    assert "0.05" not in comparison.arms[0].verdict


def test_missing_arms_nan_and_unequal_seeds_cost_their_seed_alone(tmp_path: Path) -> None:
    runs: dict[int, dict[str, Any]] = {
        s: {"baseline": run(0.4), "mask-top": run(0.3 + 0.01 * s), "mask-random": run(0.4)}
        for s in range(5)
    }
    del runs[1]["mask-random"]
    runs[2]["mask-top"] = run(float("nan"))
    runs[3]["mask-random"]["model"] = {}
    comparison = compare_study(write_made_study(tmp_path, ARMS, runs, no_window=(4,)))
    one = comparison.arms[0]
    assert one.final.seeds == (0, 3)
    # Seed 2 has no μ, but the numbers of the whole model; seed 3 the other way round.
    assert one.quantities["icl_gain"].seeds == (0, 2)
    assert one.final.effect is not None
    assert one.final.effect.differences == pytest.approx((-0.1, -0.07))
    assert any("No window in seed 4" in note for note in comparison.notes)
    assert any("seed 1: not finished: mask-random" in n.lower() for n in comparison.study.notes)


def test_one_seed_has_no_interval_and_few_are_said_to_be_few(tmp_path: Path) -> None:
    runs = {s: {"mask-top": run(0.3 + 0.001 * s), "mask-random": run(0.4)} for s in range(3)}
    one = compare_study(write_made_study(tmp_path / "1", ARMS, {0: runs[0]})).arms[0]
    assert "One seed gives no interval" in one.verdict and one.final.p is None
    three = compare_study(write_made_study(tmp_path / "3", ARMS, runs)).arms[0]
    assert "Only 3 seeds" in three.verdict


def test_arms_without_a_control_meet_the_untouched_run_and_it_is_said(tmp_path: Path) -> None:
    arms = {
        "prune": arm("prune"),
        "late": arm("replace", "prune"),
        "lost": arm("mask", "gone"),
        "gone": arm("mask", control_of="lost"),
    }
    runs = {
        s: {"baseline": run(0.4), "prune": run(0.2 + 0.01 * s), "late": run(0.3)} for s in range(5)
    }
    comparison = compare_study(write_made_study(tmp_path, arms, runs))
    prune, late, lost = (of(comparison, name) for name in ("prune", "late", "lost"))
    assert (prune.other, prune.against) == ("baseline", "baseline")
    assert "no matched control" in prune.verdict
    assert (late.other, late.against) == ("prune", "declared")
    assert "Prune is no random control" in late.verdict
    assert lost.final.effect is None and "nothing can be said yet" in lost.verdict
    assert any("untouched run only: prune" in note for note in comparison.notes)


def test_a_control_that_is_not_declared_is_refused(tmp_path: Path) -> None:
    folder = write_made_study(tmp_path, {"mask-top": arm("mask", "absent")}, {})
    with pytest.raises(StudyError, match=r"'mask-top' is declared against 'absent'.*there are"):
        load_study(folder)


def test_a_study_that_barely_began(tmp_path: Path) -> None:
    comparison = compare_study(write_made_study(tmp_path, ARMS, {}))
    assert comparison.heads == comparison.couplings == ()
    assert "nothing can be said yet" in " ".join(comparison.verdicts)
    assert comparison.lines()


def test_names_say_nothing_about_controls(tmp_path: Path) -> None:
    """A control of another name, and an arm whose name looks like one."""
    arms = {
        "mask-random": arm("mask", "plain", by="ekfac"),
        "plain": arm("mask", control_of="mask-random"),
    }
    runs = {s: {"mask-random": run(0.3), "plain": run(0.4 + 0.01 * s)} for s in range(2)}
    comparison = compare_study(write_made_study(tmp_path, arms, runs))
    (one,) = comparison.arms
    assert (one.arm, one.other, one.against) == ("mask-random", "plain", "matched")


SHARED = {
    "mask-top": {**arm("mask", "mask-random", by="ekfac"), "phrase": "masking the top"},
    "mask-loss": {**arm("mask", "mask-random", by="loss"), "phrase": "masking by loss"},
    "mask-random": {
        **arm("mask", control_of="mask-top"),
        "phrase": "masking as many random samples",
    },
    "mask-kfac": {**arm("mask", "by-chance", by="kfac"), "phrase": "masking by K-FAC"},
    "by-chance": {**arm("mask", by="random"), "phrase": "masking samples of a random order"},
}
SHARED_RUNS = {s: {name: run(0.4 + 0.01 * s) for name in ("baseline", *SHARED)} for s in range(5)}


def test_only_an_arms_own_control_is_called_matched(tmp_path: Path) -> None:
    comparison = compare_study(write_made_study(tmp_path, SHARED, SHARED_RUNS))
    own, loss, kfac = (of(comparison, name) for name in ("mask-top", "mask-loss", "mask-kfac"))
    assert (own.against, loss.against, kfac.against) == ("matched", "shared", "shared")
    assert "and masking as many random samples: " in own.verdict and "shared" not in own.verdict
    # Without counts nothing is said of them, and "as many" is left out.
    assert "and masking random samples (drawn for mask-top): " in loss.verdict
    assert "mask-random is a shared random control, drawn for mask-top" in loss.verdict
    assert "by-chance is a random selection that was drawn for no arm" in kfac.verdict
    assert "and masking samples of a random order: " in kfac.verdict
    assert not any("treats" in text for text in comparison.verdicts)
    lines = " ".join(" ".join(comparison.lines()).split())
    for said in (
        "mask-random: drawn for mask-top; a shared random control, not matched, of mask-loss.",
        "by-chance: drawn for no arm; a shared random control, not matched, of mask-kfac.",
    ):
        assert said in lines
    assert "Not as many samples" not in lines


def test_numbers_of_treated_samples_are_named_where_they_differ(tmp_path: Path) -> None:
    counts = {
        "mask-top": 1600, "mask-loss": 700, "mask-random": 1600, "mask-kfac": 40, "by-chance": None
    }  # fmt: skip
    folder = write_made_study(tmp_path / "a", SHARED, SHARED_RUNS, treated=counts)
    comparison = compare_study(folder)
    own, loss, kfac = (of(comparison, name) for name in ("mask-top", "mask-loss", "mask-kfac"))
    assert own.against == "matched" and own.treated == tuple((s, 1600, 1600) for s in range(5))
    assert "mask-loss treats 700 samples, mask-random 1,600: that alone may be" in loss.verdict
    assert "masking random samples (drawn for mask-top)" in loss.verdict
    assert kfac.treated == () and "treats" not in kfac.verdict
    said = "Not as many samples: mask-loss treats 700 samples, mask-random 1,600."
    assert said in "\n".join(comparison.lines())
    (group,) = [one for one in comparison.selections if one.control == "mask-random"]
    assert "not of as many samples (seed 0: mask-top 1,600, mask-loss 700)" in group.verdict

    equal = compare_study(
        write_made_study(tmp_path / "b", SHARED, SHARED_RUNS, treated=counts | {"mask-loss": 1600})
    )
    verdict = of(equal, "mask-loss").verdict
    assert of(equal, "mask-loss").against == "shared"
    assert "masking as many random samples (drawn for mask-top)" in verdict
    assert "treats 1" not in verdict
    assert not any("not of as many" in one.verdict for one in equal.selections)

    # A control that turned out to treat fewer than the arm it was drawn for is not matched.
    fewer = compare_study(
        write_made_study(tmp_path / "c", SHARED, SHARED_RUNS, treated=counts | {"mask-random": 9})
    )
    one = of(fewer, "mask-top")
    assert one.against == "shared" and "mask-top treats 1,600 samples, mask-random 9" in one.verdict
    assert "shared random control" not in one.verdict


def test_companions_are_those_of_the_steps_where_the_arms_are_compared(tmp_path: Path) -> None:
    """The window ends at 200 and the arms at 220, where in-context learning turns around."""
    runs: dict[int, dict[str, Any]] = {}
    for seed in range(5):
        made = {"mask-top": run(0.3 + 0.01 * seed), "mask-random": run(0.4)}
        made["mask-top"]["model"]["icl/gain@127"] = (COMPANIONS, [-1.0, -1.0, -1.0 - seed, 900.0])
        runs[seed] = made
    comparison = compare_study(write_made_study(tmp_path, ARMS, runs))
    effect = of(comparison, "mask-top").quantities["icl_gain"].effect
    assert effect is not None
    assert effect.differences == pytest.approx([-1 - seed / 3 for seed in range(5)])
    coupling = next(one for one in comparison.couplings if one.quantity.key == "icl_gain")
    assert max(abs(y) for _, _, _, y in coupling.points) < 2


SELECTIONS = {
    "mask-loss": arm("mask", "mask-random", by="loss"),
    "mask-other": arm("mask", "mask-random", by="ekfac", unit="second"),
    "mask-top": arm("mask", "mask-random", by="ekfac"),
    "mask-dot": arm("mask", "mask-random", by="dot"),
    "mask-random": arm("mask", control_of="mask-top"),
    "insert-top": arm("insert", "insert-random", by="ekfac"),
    "insert-random": arm("insert", control_of="insert-top"),
}


def test_selections_are_held_against_ekfac_with_holms_p(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    means = {"mask-loss": 0.38, "mask-other": 0.33, "mask-top": 0.30, "mask-dot": 0.305}
    levels = {name: mean + rng.normal(0, 0.012, 6) for name, mean in means.items()}
    runs = {
        s: {"mask-random": run(0.4)} | {name: run(levels[name][s]) for name in means}
        for s in range(6)
    }
    comparison = compare_study(write_made_study(tmp_path, SELECTIONS, runs))
    (group,) = comparison.selections
    assert (group.do, group.control, group.reference) == ("mask", "mask-random", "mask-top")
    means_found = {name: levels[name].mean() for name in means}
    assert [name for name, _ in group.ranked] == sorted(means_found, key=lambda n: means_found[n])
    p = {
        pair.other: stats.ttest_rel(levels["mask-top"], levels[pair.other]).pvalue
        for pair in group.pairs
    }
    assert set(p) == {"mask-loss", "mask-other", "mask-dot"}
    ordered = sorted(p, key=lambda name: p[name])
    for pair in group.pairs:
        rank = ordered.index(pair.other)
        adjusted = min(1.0, max(p[ordered[i]] * (3 - i) for i in range(rank + 1)))
        assert pair.paired.p == pytest.approx(p[pair.other])
        assert pair.holm == pytest.approx(adjusted)
        assert pair.stronger == ("mask-top" if adjusted <= 0.05 else None)
    assert {pair.other: pair.stronger for pair in group.pairs}["mask-loss"] == "mask-top"
    assert "3 comparisons with mask-top" in group.verdict and "Holm" in group.verdict
    assert "No selection is shown to be stronger than mask-top" in group.verdict


def test_a_stronger_baseline_is_said_to_be_stronger(tmp_path: Path) -> None:
    arms = {name: SELECTIONS[name] for name in ("mask-loss", "mask-top", "mask-random")}
    runs = {
        s: {"mask-random": run(0.4), "mask-top": run(0.35 + 0.001 * s), "mask-loss": run(0.2)}
        for s in range(5)
    }
    (group,) = compare_study(write_made_study(tmp_path, arms, runs)).selections
    assert group.pairs[0].stronger == "mask-loss"
    assert "is stronger than mask-top" in group.verdict
    assert "No selection is shown" not in group.verdict


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_by_its_definition(p: list[float]) -> None:
    """Rejecting at α whatever is adjusted to at most α is Holm's sequential procedure."""
    adjusted = holm(p)
    for alpha in (0.01, 0.05, 0.3):
        rejected: set[int] = set()
        for step, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[index] * (len(p) - step) > alpha:
                break
            rejected.add(index)
        assert {i for i, value in enumerate(adjusted) if value <= alpha} == rejected


def test_p_values_at_the_edges() -> None:
    assert paired_p([0.1]) is None and paired_p([]) is None
    assert paired_p([0.0, 0.0]) == 1.0 and paired_p([0.1, 0.1]) == 0.0
    differences = [0.1, -0.2, 0.4]
    assert paired_p(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)


def test_other_heads_leave_out_the_seeds_in_which_they_are_the_target(tmp_path: Path) -> None:
    """L0H1 is the target of seed 2: its change there is not one of another head."""
    change = {0: 0.010, 1: 0.020, 2: -0.3, 3: 0.015}
    runs = {
        s: {
            "mask-top": run(0.3, heads={"L0H1": 0.4 + change[s], "L1H0": 0.05 + 0.01 * s}),
            "mask-random": run(0.4, heads={"L0H1": 0.4}),
        }
        for s in change
    }
    targets = {0: "L0H0", 1: "L0H0", 2: "L0H1", 3: "L0H0"}
    comparison = compare_study(write_made_study(tmp_path, ARMS, runs, targets=targets))
    (heads,) = comparison.heads
    assert heads.target_in == {"L0H0": 3, "L0H1": 1}
    assert heads.effects["L0H1"].seeds == (0, 1, 3)
    assert heads.effects["L0H1"].effect is not None
    assert heads.effects["L0H1"].effect.mean == pytest.approx(0.015)
    assert heads.effects["L0H0"].seeds == (2,)
    assert heads.effects["L1H0"].seeds == (0, 1, 2, 3)
    low, high = stats.ttest_1samp([-0.02, -0.01, 0.0, 0.01], 0).confidence_interval(0.95)
    effect = heads.effects["L1H0"].effect
    assert effect is not None and (effect.low, effect.high) == pytest.approx((low, high))
    assert heads.parts["target"].effect is not None
    assert heads.parts["target"].effect.differences == pytest.approx((-0.1, -0.1, -0.3, -0.1))
    # Mean over the three others: L0H1, L1H0 and L1H1, or L0H0 in seed 2.
    others = [(0.01 - 0.02) / 3, (0.02 - 0.01) / 3, -0.1 / 3, (0.015 + 0.01) / 3]
    assert heads.parts["others"].effect is not None
    assert heads.parts["others"].effect.differences == pytest.approx(others)
    assert "target head of each seed" in comparison.arms[0].verdict
    assert "L0H1 in seed 2" in " ".join(comparison.lines())


def test_coupling_is_the_mean_of_the_seeds_correlations(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    names = ("baseline", "mask-top", "mask-random")
    levels = {s: dict(zip(names, (0.42, 0.3, 0.4), strict=True)) for s in range(4)}
    gains = {
        s: {n: 2 * level + rng.normal(0, 0.05) for n, level in levels[s].items()} for s in levels
    }
    runs = {
        s: {n: run(levels[s][n], icl=gains[s][n], loss=5 - levels[s][n]) for n in names}
        for s in levels
    }
    by_key = {
        c.quantity.key: c for c in compare_study(write_made_study(tmp_path, ARMS, runs)).couplings
    }
    icl = by_key["icl_gain"]
    assert icl.centred_on == "baseline"
    fits = [
        stats.linregress([levels[s][n] for n in names], [gains[s][n] for n in names])
        for s in levels
    ]
    assert list(icl.correlations.values()) == pytest.approx([fit.rvalue for fit in fits])
    assert list(icl.slopes.values()) == pytest.approx([fit.slope for fit in fits])
    low, high = stats.ttest_1samp([fit.rvalue for fit in fits], 0).confidence_interval(0.95)
    assert icl.correlation is not None
    assert (icl.correlation.low, icl.correlation.high) == pytest.approx((low, high))
    loss = by_key["held_out_loss"]
    assert loss.slope is not None and loss.slope.mean == pytest.approx(-1.0)
    assert "held-out loss falls as the induction score rises" in loss.verdict


def test_coupling_without_the_untouched_runs_number_is_centred_on_the_arms(tmp_path: Path) -> None:
    arms = {**ARMS, "mask-loss": arm("mask", "mask-random", by="loss")}
    levels = {"mask-top": 0.3, "mask-random": 0.4, "mask-loss": 0.35}
    runs: dict[int, dict[str, Any]] = {
        s: {n: run(level + 0.01 * s, icl=3 * level) for n, level in levels.items()}
        for s in range(2)
    }
    for made in runs.values():
        made["baseline"] = run(0.42)
        made["baseline"]["model"] = {"icl/gain@127": ([100], [1.0])}
    couplings = compare_study(write_made_study(tmp_path, arms, runs)).couplings
    icl = next(one for one in couplings if one.quantity.key == "icl_gain")
    assert icl.centred_on == "mean" and len(icl.points) == 6
    assert sum(x for _, _, x, _ in icl.points) == pytest.approx(0.0)
    assert icl.slope is not None and icl.slope.mean == pytest.approx(3.0)
    # The held-out loss was the same in every arm: nothing to correlate.
    loss = next(one for one in couplings if one.quantity.key == "held_out_loss")
    assert loss.correlation is None and loss.left_out == (0, 1)
    assert "cannot be said" in loss.verdict


def test_previous_token_studies_speak_of_their_own_score(tmp_path: Path) -> None:
    runs = {}
    for s in range(3):
        runs[s] = {"mask-top": run(0.3 + 0.002 * s), "mask-random": run(0.4)}
        for one in runs[s].values():
            one["heads"]["previous_token"] = one["heads"].pop("induction")
            one["heads"]["induction"] = {"L0H0": (COMPANIONS, [0.08] * 4)}
    folder = write_made_study(tmp_path, ARMS, runs, metric="previous_token")
    comparison = compare_study(folder)
    assert "previous-token score of the target head L0H0" in comparison.arms[0].verdict
    assert comparison.arms[0].quantities["induction"].effect is not None
    assert "previous_token" not in comparison.arms[0].quantities
    assert "induction" not in " ".join(comparison.verdicts)
