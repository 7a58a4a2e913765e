"""What the arms did to every head: the target, other heads of note, and all the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from mda_lightning.analysis.comparison_values import (
    ArmComparison,
    HeadEffects,
    PairedQuantity,
    Quantity,
    paired,
)
from mda_lightning.analysis.comparison_words import metric_name
from mda_lightning.analysis.outcomes import ArmOutcome
from mda_lightning.analysis.study import SeedRun, Study
from mda_lightning.units import parse_unit

PARTS = ("target", "second", "lowest", "others")


def head_effects(
    study: Study,
    outcomes: Mapping[int, Mapping[str, ArmOutcome]],
    arms: Sequence[ArmComparison],
) -> list[HeadEffects]:
    """Final differences of every head, for every arm against what it is compared with."""
    return [found for one in arms if (found := _of(study, outcomes, one)) is not None]


def _of(
    study: Study, outcomes: Mapping[int, Mapping[str, ArmOutcome]], one: ArmComparison
) -> HeadEffects | None:
    both = [
        (seed, outcomes[seed.seed][one.arm].heads, outcomes[seed.seed][one.other].heads)
        for seed in study.seeds
        if {one.arm, one.other} <= set(outcomes.get(seed.seed, {}))
    ]
    both = [entry for entry in both if entry[1] and entry[2]]
    if not both:
        return None
    target_in = Counter(str(seed.target) for seed, _, _ in both)
    names = sorted({unit for _, a, b in both for unit in (*a, *b)}, key=parse_unit)
    score = metric_name(study.metric)
    effects = {}
    for unit in names:
        everywhere = target_in[unit] == len(both)
        effects[unit] = paired(
            Quantity(f"head@{unit}", f"{score} of {unit}"),
            [
                (seed.seed, a.get(unit), b.get(unit))
                for seed, a, b in both
                if everywhere or seed.target != unit
            ],
        )
    parts = {
        part: paired(
            Quantity(f"part@{part}", f"{score} of the {part}"),
            [(seed.seed, _part(seed, a, part), _part(seed, b, part)) for seed, a, b in both],
        )
        for part in PARTS
    }
    return HeadEffects(one.arm, one.other, effects, dict(target_in), parts)


def _part(seed: SeedRun, heads: Mapping[str, float], part: str) -> float | None:
    if part == "others":
        others = [value for unit, value in heads.items() if unit != seed.target]
        return float(np.mean(others)) if others else None
    unit = seed.target if part == "target" else seed.units.get(part)
    return None if unit is None else heads.get(unit)


def grid_of(heads: HeadEffects) -> tuple[tuple[int, int], dict[tuple[int, int], PairedQuantity]]:
    """((layers, heads), effects by place) of a model's heads."""
    places = {
        (head.layer, head.head): effect
        for unit, effect in heads.effects.items()
        for head in (parse_unit(unit),)
    }
    return (1 + max(a for a, _ in places), 1 + max(b for _, b in places)), places
