"""Which selection is strongest: arms that differ only in how their samples were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mda_lightning.analysis.comparison_values import (
    ArmComparison,
    PairedQuantity,
    SelectionGroup,
    SelectionPair,
    paired,
)
from mda_lightning.analysis.comparison_words import LEVEL, selection_verdict
from mda_lightning.analysis.effects import holm
from mda_lightning.analysis.outcomes import ArmOutcome
from mda_lightning.analysis.study import DeclaredArm, Study

REFERENCE_RANKINGS = ("influence", "ekfac")


def selection_groups(
    study: Study,
    outcomes: Mapping[int, Mapping[str, ArmOutcome]],
    arms: Sequence[ArmComparison],
) -> list[SelectionGroup]:
    """One group for every operation and control that two or more arms share.

    The reference is the first arm of the top samples by EK-FAC influence on the target head (of
    samples that were trained on, not of generated ones), and
    without one the first arm; every other arm of the group is compared with it, and the p values
    are adjusted by Holm's method within the group.
    """
    shared: dict[tuple[str, str], list[ArmComparison]] = {}
    for one in arms:
        if one.against != "baseline":
            shared.setdefault((study.declared[one.arm].do, one.other), []).append(one)
    return [
        _group(study, outcomes, do, control, members)
        for (do, control), members in shared.items()
        if len(members) > 1
    ]


def direction_of(arm: DeclaredArm) -> int:
    """-1 where the operation is meant to lower μ, +1 to raise it, 0 where that is not fixed."""
    if arm.do == "steer":
        return 1 if arm.settings.get("policy") == "amplify" else -1
    return {"mask": -1, "insert": 1}.get(arm.do, 0)


def _group(
    study: Study,
    outcomes: Mapping[int, Mapping[str, ArmOutcome]],
    do: str,
    control: str,
    members: Sequence[ArmComparison],
) -> SelectionGroup:
    names = [one.arm for one in members]
    reference = next(
        (name for name in names if _is_reference(study.declared[name])),
        names[0],
    )
    signs = {direction_of(study.declared[name]) for name in names}
    sign = signs.pop() if len(signs) == 1 else 0
    found = []
    for name in names:
        if name == reference:
            continue
        pair = paired(
            members[0].final.quantity,
            [
                (seed, arms[reference].final, arms[name].final)
                for seed, arms in outcomes.items()
                if {reference, name} <= set(arms)
            ],
            (study.declared[reference].phrase, study.declared[name].phrase),
        )
        found.append((name, pair))
    tested = [pair.p for _, pair in found if pair.p is not None]
    adjusted = iter(holm(tested))
    pairs = tuple(
        SelectionPair(reference, name, pair, _stronger(pair, p, sign, reference, name), p)
        for name, pair in found
        for p in (None if pair.p is None else next(adjusted),)
    )
    ranked = tuple(
        sorted(
            ((one.arm, one.final) for one in members),
            key=lambda entry: strength(entry[1], sign),
            reverse=True,
        )
    )
    verdict = selection_verdict(study, do, control, reference, ranked, pairs, sign)
    verdict += _unequal_counts(study, names)
    return SelectionGroup(do, control, reference, ranked, pairs, verdict)


def _unequal_counts(study: Study, names: Sequence[str]) -> str:
    """A sentence where the selections are not of as many samples; empty where that is unknown."""
    for seed in study.seeds:
        counts = {name: seed.treated[name] for name in names if name in seed.treated}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
            return f" They are not of as many samples (seed {seed.seed}: {told})."
    return ""


def _is_reference(arm: DeclaredArm) -> bool:
    return (
        arm.by in REFERENCE_RANKINGS
        and arm.settings.get("which", "top") == "top"
        and arm.settings.get("unit", "target") == "target"
        and not arm.settings.get("generator")
    )


def strength(one: PairedQuantity, sign: int) -> float:
    """Size of an effect in the operation's direction; by size alone where it has none."""
    if one.effect is None:
        return float("-inf")
    return sign * one.effect.mean if sign else abs(one.effect.mean)


def _stronger(
    pair: PairedQuantity, p: float | None, sign: int, reference: str, other: str
) -> str | None:
    if pair.effect is None or p is None or p > LEVEL or sign == 0:
        return None
    return reference if pair.effect.mean * sign > 0 else other
