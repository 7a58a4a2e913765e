"""A study's arms against their controls: paired differences, intervals, and what they say.

Arms of a seed share weights and data order up to the branch, so seeds are pairs. Every interval is
Student's t over seeds, 95%, of one comparison by itself; see
:mod:`~mda_lightning.analysis.effects`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mda_lightning.analysis.comparison_controls import control_phrase, held_against
from mda_lightning.analysis.comparison_coupling import couplings
from mda_lightning.analysis.comparison_files import write_files
from mda_lightning.analysis.comparison_heads import head_effects
from mda_lightning.analysis.comparison_selections import selection_groups
from mda_lightning.analysis.comparison_tables import console_lines
from mda_lightning.analysis.comparison_values import (
    ArmComparison,
    ComparisonValues,
    PairedCrossing,
    Quantity,
    finite_pairs,
    paired,
)
from mda_lightning.analysis.comparison_words import arm_verdict, head_phrase, metric_name
from mda_lightning.analysis.effects import LateDifference, late_difference
from mda_lightning.analysis.outcomes import (
    ABLATION,
    HEAD_SCORES,
    ArmOutcome,
    area_between,
    companion_pair,
    study_outcomes,
)
from mda_lightning.analysis.study import BASELINE, SeedRun, Study, load_study

__all__ = ["StudyComparison", "compare_study", "quantities_of", "write_comparison"]

EXPECTED = {
    "icl_gain": "in-context learning",
    "held_out_loss": "held-out loss",
    ABLATION: "ablation of the head",
}

Outcomes = Mapping[int, Mapping[str, ArmOutcome]]


class StudyComparison(ComparisonValues):
    """A study, compared; the attributes are those of :class:`ComparisonValues`."""

    def lines(self) -> list[str]:
        """The table and the verdicts for a terminal of 110 columns."""
        return console_lines(self)


def compare_study(folder: str | Path | Study) -> StudyComparison:
    """Compare the arms of a study, finished or not.

    Raises:
        StudyError: the folder is no study, or one of another version.
    """
    study = folder if isinstance(folder, Study) else load_study(folder)
    notes: list[str] = []
    outcomes = study_outcomes(study, notes)
    known = quantities_of(study)
    arms = [
        _compare(study, outcomes, known, arm.name, arm.control or BASELINE)
        for arm in study.declared.values()
        if arm.is_treated
    ]
    baseline = [
        _compare(study, outcomes, known, name, BASELINE)
        for name in study.arm_names
        if name != BASELINE
    ]
    heads = head_effects(study, outcomes, arms)
    groups = selection_groups(study, outcomes, arms)
    return StudyComparison(
        study=study,
        outcomes=outcomes,
        quantities=known,
        arms=tuple(arms),
        against_baseline=tuple(baseline),
        selections=tuple(groups),
        heads=tuple(heads),
        couplings=tuple(couplings(study, outcomes, known)),
        notes=(*notes, *_caveats(study, outcomes, arms)),
    )


def write_comparison(folder: str | Path) -> StudyComparison:
    """Compare, and write ``comparison.json``, ``.csv``, ``.md`` and ``figures/comparison*.png``.

    Raises:
        StudyError: the folder is no study, or one of another version.
        PermissionError: the folder cannot be written to.
    """
    comparison = compare_study(folder)
    write_files(comparison)
    return comparison


def quantities_of(study: Study) -> tuple[Quantity, ...]:
    """What arms of a study are compared in, besides the steps of crossing."""
    score = metric_name(study.metric)
    return (
        Quantity("final", f"{score} of the {head_phrase(study)}"),
        Quantity("area", f"mean difference of the {score}s from the branch to the window's end"),
        Quantity("area_steps", "area between the curves", "μ·steps", 1),
        Quantity("icl_gain", "in-context learning (gain)", "nats"),
        Quantity("icl_olsson", "loss late in the context minus early", "nats"),
        Quantity("held_out_loss", "held-out loss", "nats", 4),
        Quantity(ABLATION, "what ablating the head costs the copied token", "nats"),
        *(Quantity(name, metric_name(name)) for name in HEAD_SCORES if name != study.metric),
    )


def _compare(
    study: Study, outcomes: Outcomes, known: Sequence[Quantity], arm: str, other: str
) -> ArmComparison:
    both = [
        (seed, outcomes[seed.seed][arm], outcomes[seed.seed][other])
        for seed in study.seeds
        if {arm, other} <= set(outcomes.get(seed.seed, {}))
    ]
    against, treated = held_against(study, [seed for seed, _, _ in both], arm, other)
    names = (study.declared[arm].phrase, control_phrase(study, against, treated, other))
    quantities = {}
    for quantity in known:
        pairs = [_pair(quantity.key, seed, a, b) for seed, a, b in both]
        late = _late(both, pairs) if quantity.key == "final" else None
        quantities[quantity.key] = paired(quantity, pairs, names, late)
    comparison = ArmComparison(
        arm, other, against, quantities, _crossings(study, both, names), "", treated
    )
    return replace(comparison, verdict=arm_verdict(study, comparison))


def _pair(
    key: str, seed: SeedRun, a: ArmOutcome, b: ArmOutcome
) -> tuple[int, float | None, float | None]:
    if key == "final":
        return seed.seed, a.final, b.final
    if key in ("area", "area_steps"):
        # An arm that stopped early has no area up to the window's end.
        area = None
        if a.final is not None and b.final is not None:
            area = area_between(a.curve, b.curve, until=seed.window.end)
        if area is None:
            return seed.seed, None, None
        return seed.seed, area[0] / (area[1] if key == "area" else 1), 0.0
    together = companion_pair(a, b, key)
    return (seed.seed, None, None) if together is None else (seed.seed, *together)


def _late(
    both: Sequence[tuple[SeedRun, ArmOutcome, ArmOutcome]],
    pairs: Sequence[tuple[int, float | None, float | None]],
) -> LateDifference | None:
    """How the difference wandered late in the run, where there is one seed alone."""
    known = {seed for seed, _, _ in finite_pairs(pairs)}
    if len(known) != 1:
        return None
    seed, a, b = next(entry for entry in both if entry[0].seed in known)
    since = seed.window.midpoint if seed.window.midpoint is not None else seed.window.start
    return None if since is None else late_difference(a.curve, b.curve, since=int(since))


def _crossings(
    study: Study,
    both: Sequence[tuple[SeedRun, ArmOutcome, ArmOutcome]],
    names: tuple[str, str],
) -> tuple[PairedCrossing, ...]:
    found = []
    for threshold in study.thresholds:
        quantity = Quantity(f"crossing@{threshold:g}", f"crossing of {threshold:g}", "steps", 0)
        crossed = [(s.seed, a.crossings[threshold], b.crossings[threshold]) for s, a, b in both]
        shift = paired(quantity, [(seed, a.step, b.step) for seed, a, b in crossed], names)
        found.append(
            PairedCrossing(
                threshold=threshold,
                shift=shift,
                crossed=sum(a.step is not None for _, a, _ in crossed),
                other_crossed=sum(b.step is not None for _, _, b in crossed),
                n=len(crossed),
                at_branch=sum(a.at_branch and b.at_branch for _, a, b in crossed),
            )
        )
    return tuple(found)


def _caveats(study: Study, outcomes: Outcomes, arms: Sequence[ArmComparison]) -> list[str]:
    notes = []
    lost = [seed.seed for seed in study.seeds if seed.without_window]
    if lost:
        notes.append(
            f"No window in seed {', '.join(map(str, lost))}: such seeds count in no comparison, so "
            "the results describe the runs in which a head formed."
        )
    bare = [one.arm for one in arms if one.against == "baseline"]
    if bare:
        notes.append(
            f"Without a matched control, so compared with the untouched run only: "
            f"{', '.join(bare)}."
        )
    reached = [one for one in arms if one.final.effect is not None]
    for key, name in EXPECTED.items():
        if reached and all(one.quantities[key].effect is None for one in reached):
            notes.append(
                f"No {name} to compare: no two arms measured it at the same step after the branch."
            )
    nowhere = [one.arm for one in arms if one.final.effect is None]
    if nowhere and outcomes:
        notes.append(
            f"No seed has both the arm and what it is compared with: {', '.join(nowhere)}."
        )
    return notes
