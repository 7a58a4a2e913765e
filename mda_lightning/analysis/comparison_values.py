"""The values of a study's comparison: what was paired, over which seeds, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mda_lightning.analysis.effects import (
    Direction,
    Effect,
    LateDifference,
    paired_effects,
    paired_p,
)
from mda_lightning.analysis.outcomes import ArmOutcome
from mda_lightning.analysis.study import Study

Against = Literal["matched", "shared", "declared", "baseline"]
"""What an arm is held against: the random control that was drawn for it, as many samples; a random
control that was not (that of another arm, which several share); another arm that it is declared
against; or the untouched run."""

Treated = tuple[int, int, int]
"""(seed, samples that the arm treats, samples that the other treats)."""

FEW_SEEDS = 5
"""Below this many an interval is given, and said to rest on few."""


@dataclass(frozen=True)
class Quantity:
    """A number that arms are compared in.

    Attributes:
        key: as the files call it.
        name: as a sentence calls it.
        unit: "", "steps", "nats" or "μ·steps".
        digits: decimals to print.
    """

    key: str
    name: str
    unit: str = ""
    digits: int = 3


@dataclass(frozen=True)
class PairedQuantity:
    """One quantity of one pair of arms over the seeds that have both.

    Attributes:
        effect: mean of first - second with its interval; ``None`` when no seed has both.
        seeds: those that went in, in the order of ``effect.differences``.
        p: two-sided, of the paired t test; ``None`` with fewer than two seeds.
    """

    quantity: Quantity
    effect: Effect | None
    seeds: tuple[int, ...]
    p: float | None

    @property
    def direction(self) -> Direction | None:
        """The effect's; ``None`` without one."""
        return None if self.effect is None else self.effect.direction


@dataclass(frozen=True)
class PairedCrossing:
    """When two arms crossed a threshold.

    Attributes:
        shift: first - second in steps, over the seeds in which both crossed.
        crossed, other_crossed: seeds in which the one and the other crossed.
        n: seeds that have both curves.
        at_branch: seeds among those paired in which both were above when they parted, so that
            their difference is 0 whatever was done.
    """

    threshold: float
    shift: PairedQuantity
    crossed: int
    other_crossed: int
    n: int
    at_branch: int


@dataclass(frozen=True)
class ArmComparison:
    """One arm against another.

    Attributes:
        quantities: by :attr:`Quantity.key`; "final" and "area" are always there.
        verdict: plain sentences.
        treated: how many samples the two treat, of the seeds where the study says it.
    """

    arm: str
    other: str
    against: Against
    quantities: Mapping[str, PairedQuantity]
    crossings: tuple[PairedCrossing, ...]
    verdict: str
    treated: tuple[Treated, ...] = ()

    @property
    def final(self) -> PairedQuantity:
        """μ where the arms are compared."""
        return self.quantities["final"]

    def crossing(self) -> PairedCrossing | None:
        """The threshold that says most: crossed by both in most seeds, the highest of those."""
        told = [one for one in self.crossings if one.at_branch < max(1, len(one.shift.seeds))]
        told = told or list(self.crossings)
        return max(told, key=lambda c: (len(c.shift.seeds), c.threshold), default=None)


@dataclass(frozen=True)
class SelectionPair:
    """Two selections under the same operation and control.

    Attributes:
        paired: final μ of the reference minus the other's.
        stronger: the one with the larger effect in the operation's direction where ``holm`` is at
            most 0.05; ``None`` where none is shown to be.
        holm: p adjusted for the comparisons of the group.
    """

    reference: str
    other: str
    paired: PairedQuantity
    stronger: str | None
    holm: float | None


@dataclass(frozen=True)
class SelectionGroup:
    """Arms that differ in how their samples were chosen: same operation, same control.

    Attributes:
        reference: the arm that every other one is compared with.
        ranked: (arm, its difference from the control), the strongest first; an operation without
            a direction of its own is ranked by size.
        verdict: plain sentences.
    """

    do: str
    control: str
    reference: str
    ranked: tuple[tuple[str, PairedQuantity], ...]
    pairs: tuple[SelectionPair, ...]
    verdict: str


@dataclass(frozen=True)
class HeadEffects:
    """What one arm did to every head, against the same other arm as in its comparison.

    Attributes:
        effects: by head; over the seeds in which it is not the target, unless it is in all.
        target_in: heads and in how many seeds each is the target.
        parts: "target", "second", "lowest" and "others" (mean over all heads but the target): the
            head that has the part in each seed, whichever it is.
    """

    arm: str
    other: str
    effects: Mapping[str, PairedQuantity]
    target_in: Mapping[str, int]
    parts: Mapping[str, PairedQuantity]


@dataclass(frozen=True)
class Coupling:
    """How a number of the whole model goes with μ across the arms of a seed.

    Attributes:
        points: (seed, arm, μ difference, difference of the number), against the untouched run.
        correlations: Pearson's, by seed.
        correlation, slope: mean over seeds, with interval; the slope in the number's unit per 1 μ.
        left_out: seeds with fewer than three arms that have both.
        centred_on: "baseline", or "mean" where the untouched run lacks the number.
    """

    quantity: Quantity
    points: tuple[tuple[int, str, float, float], ...]
    correlations: Mapping[int, float]
    slopes: Mapping[int, float]
    correlation: Effect | None
    slope: Effect | None
    left_out: tuple[int, ...]
    centred_on: str
    verdict: str


@dataclass(frozen=True)
class ComparisonValues:
    """What a comparison of a study consists of.

    Attributes:
        arms: every arm that is no control, against its control, else against the untouched run.
        against_baseline: every arm against the untouched run.
        notes: what is missing and what cannot be said.
    """

    study: Study
    outcomes: Mapping[int, Mapping[str, ArmOutcome]]
    quantities: tuple[Quantity, ...]
    arms: tuple[ArmComparison, ...]
    against_baseline: tuple[ArmComparison, ...]
    selections: tuple[SelectionGroup, ...]
    heads: tuple[HeadEffects, ...]
    couplings: tuple[Coupling, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def verdicts(self) -> list[str]:
        """One paragraph an arm, then what the selections and the couplings say."""
        return [
            *(one.verdict for one in self.arms),
            *(one.verdict for one in self.selections),
            *(one.verdict for one in self.couplings),
        ]


def finite_pairs(
    pairs: Sequence[tuple[int, float | None, float | None]],
) -> list[tuple[int, float, float]]:
    """(seed, first, second) where both are known and finite."""
    return [
        (seed, a, b)
        for seed, a, b in pairs
        if a is not None and b is not None and np.isfinite([a, b]).all()
    ]


def paired(
    quantity: Quantity,
    pairs: Sequence[tuple[int, float | None, float | None]],
    names: tuple[str, str] = ("treated", "control"),
    late: LateDifference | None = None,
) -> PairedQuantity:
    """The effect over the seeds in which both values are known and finite."""
    known = finite_pairs(pairs)
    if not known:
        return PairedQuantity(quantity, None, (), None)
    effect = paired_effects(
        [a for _, a, _ in known],
        [b for _, _, b in known],
        treated_name=names[0],
        control_name=names[1],
        quantity=quantity.name,
        late=late,
    )
    return PairedQuantity(
        quantity, effect, tuple(seed for seed, _, _ in known), paired_p(effect.differences)
    )
