"""Whether in-context learning and held-out loss go with μ across the arms (Figure 4).

Within a seed the arms differ by what was done to the data alone, so a correlation across them says
whether the number of the whole model follows the head. Seeds, not arms, are the units of the
interval: arms of a seed share their training up to the branch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mda_lightning.analysis.comparison_values import Coupling, Quantity, finite_pairs
from mda_lightning.analysis.comparison_words import coupling_verdict
from mda_lightning.analysis.effects import Effect, paired_effects
from mda_lightning.analysis.outcomes import ArmOutcome, companions_together
from mda_lightning.analysis.study import BASELINE, Study

COUPLED = ("icl_gain", "held_out_loss")
LEAST_ARMS = 3

Points = list[tuple[int, str, float, float]]


def couplings(
    study: Study,
    outcomes: Mapping[int, Mapping[str, ArmOutcome]],
    quantities: Sequence[Quantity],
) -> list[Coupling]:
    """The coupling of each number that the study measured."""
    by_key = {quantity.key: quantity for quantity in quantities}
    return [
        found for key in COUPLED if (found := coupling(study, outcomes, by_key[key])) is not None
    ]


def coupling(
    study: Study, outcomes: Mapping[int, Mapping[str, ArmOutcome]], quantity: Quantity
) -> Coupling | None:
    """Correlation and slope per seed, and their means over seeds.

    Arms of a seed are averaged over the last evaluations that all of them made. Differences are
    from the untouched run, which is a point itself, at (0, 0); where it made none of those
    evaluations, from the mean of the seed's arms, which leaves correlation and slope as they are.

    Returns:
        ``None`` where no seed has an arm with the number.
    """
    points: Points = []
    correlations: dict[int, float] = {}
    slopes: dict[int, float] = {}
    left_out: list[int] = []
    centred: set[str] = set()
    for seed, arms in outcomes.items():
        mine, centre = _points(seed, arms, quantity.key)
        if not mine:
            continue
        points += mine
        centred.add(centre)
        x, y = np.array([(a, b) for _, _, a, b in mine]).T
        if len(mine) < LEAST_ARMS or np.ptp(x) == 0 or np.ptp(y) == 0:
            left_out.append(seed)
            continue
        correlations[seed] = float(np.corrcoef(x, y)[0, 1])
        slopes[seed] = float(np.polyfit(x, y, 1)[0])
    if not points:
        return None
    correlation, slope = _over_seeds(correlations), _over_seeds(slopes)
    return Coupling(
        quantity=quantity,
        points=tuple(points),
        correlations=correlations,
        slopes=slopes,
        correlation=correlation,
        slope=slope,
        left_out=tuple(left_out),
        centred_on="baseline" if centred == {"baseline"} else "mean",
        verdict=coupling_verdict(study, quantity, correlation, slope, len(left_out)),
    )


def _over_seeds(values: Mapping[int, float]) -> Effect | None:
    known = list(values.values())
    return paired_effects(known, [0.0] * len(known)) if known else None


def _points(seed: int, arms: Mapping[str, ArmOutcome], key: str) -> tuple[Points, str]:
    with_both = [one for one in arms.values() if one.final is not None and key in one.companions]
    branched = [one for one in with_both if one.arm != BASELINE]
    centre = BASELINE
    means = companions_together(with_both, key) if len(with_both) > len(branched) else None
    if means is None:
        with_both, centre = branched, "mean"
        means = companions_together(branched, key)
    if means is None:
        return [], centre
    known = finite_pairs(
        [(i, one.final, mean) for i, (one, mean) in enumerate(zip(with_both, means, strict=True))]
    )
    if not known:
        return [], centre
    origin = np.mean([(a, b) for _, a, b in known], axis=0)
    at_baseline = [(a, b) for i, a, b in known if with_both[i].arm == BASELINE]
    if centre == BASELINE and at_baseline:
        origin = np.asarray(at_baseline[0])
    return [
        (seed, with_both[i].arm, float(a - origin[0]), float(b - origin[1])) for i, a, b in known
    ], centre
