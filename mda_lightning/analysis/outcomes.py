"""What one arm of one seed came to, in numbers: the rows that a study's comparison pairs.

μ is the study's metric of the seed's target head. An arm's own steps are those after the branch up
to the arms' last one; before, its run and the untouched one are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from mda_lightning.analysis.run_curves import (
    Floats,
    Ints,
    StudyError,
    head_curve,
    model_curve,
    read_metrics,
)
from mda_lightning.analysis.study import SeedRun, Study

COMPANIONS_AVERAGED = 3
STAYS_FOR = 2

Curve = tuple[Ints, Floats]

WHOLE_MODEL = {
    "icl_gain": "icl/gain",
    "icl_olsson": "icl/olsson",
    "held_out_loss": "held_out_loss",
}
"""Companions of the whole model: our name, and the metric's up to an ``@``."""

ABLATION = "ablation"
HEAD_SCORES = ("induction", "previous_token")


@dataclass(frozen=True)
class Crossing:
    """When μ rose to a threshold and stayed there.

    Attributes:
        step: optimizer step, interpolated between evaluations; ``None`` when it never did.
        looked_until: last evaluation; a crossing that is ``None`` is censored there.
        at_branch: μ was there already when the arms parted, so ``step`` says nothing of the arm.
    """

    threshold: float
    step: float | None
    looked_until: int
    at_branch: bool = False


@dataclass(frozen=True)
class ArmOutcome:
    """One arm of one seed.

    Attributes:
        final: mean μ over the seed's ``measured_at``; ``None`` when the arm did not get there.
        curve: (steps, μ) from the branch to the arms' last step.
        crossings: by threshold.
        heads: the metric of every head, averaged over ``measured_at``.
        companions: name to (steps, values) after the branch, up to the end of the window, where μ
            is compared, however long the arms go on; the names are those of
            :data:`WHOLE_MODEL`, ``ablation`` (drop of the copied token's log-probability, in nats,
            without the target head) and the target's other attention score.
    """

    seed: int
    arm: str
    final: float | None
    curve: Curve
    crossings: Mapping[float, Crossing]
    heads: Mapping[str, float]
    companions: Mapping[str, Curve]

    def companion(self, name: str) -> float | None:
        """Mean of the last up to 3 evaluations; ``None`` where there is none."""
        known = self.companions.get(name)
        return None if known is None else float(known[1][-COMPANIONS_AVERAGED:].mean())


def crossing_of(steps: ArrayLike, values: ArrayLike, threshold: float) -> Crossing:
    """The first evaluation from which μ stays at or above the threshold for two evaluations.

    The step is interpolated linearly between that evaluation and the one before. A curve that is
    above at its first two evaluations crosses at its first step. Evaluations that are not finite
    are left out, as if they had not been made.

    Args:
        steps: ascending, [S], from the branch on.
        values: μ there, [S].

    Raises:
        ValueError: the curve has no point.
    """
    at = np.asarray(steps, dtype=np.float64)
    mu = np.asarray(values, dtype=np.float64)
    if at.size == 0:
        raise ValueError("a curve without evaluations crosses nothing; leave it out")
    known = np.isfinite(mu)
    if not known.any():
        return Crossing(threshold, None, int(at[0]))
    at, mu = at[known], mu[known]
    above = mu >= threshold
    stays = above[:-1] & above[1:]
    until = int(at[-1])
    if not stays.any():
        return Crossing(threshold, None, until)
    first = int(np.argmax(stays))
    if first == 0:
        return Crossing(threshold, float(at[0]), until, at_branch=True)
    before, after = first - 1, first
    share = (threshold - mu[before]) / (mu[after] - mu[before])
    return Crossing(threshold, float(at[before] + share * (at[after] - at[before])), until)


def area_between(treated: Curve, control: Curve, *, until: int | None) -> tuple[float, int] | None:
    """Signed area treated - control over their shared steps, by trapezoids.

    Args:
        treated, control: (steps, μ) from the branch on.
        until: last step counted; None takes all.

    Returns:
        (area in μ·steps, number of steps it spans), or ``None`` with fewer than 2 shared steps.
    """
    steps, at_treated, at_control = np.intersect1d(treated[0], control[0], return_indices=True)
    within = np.ones(len(steps), dtype=bool) if until is None else steps <= until
    if int(within.sum()) < 2:
        return None
    difference = (treated[1][at_treated] - control[1][at_control])[within]
    steps = steps[within]
    return float(np.trapezoid(difference, steps)), int(steps[-1] - steps[0])


def companion_pair(
    treated: ArmOutcome, control: ArmOutcome, name: str
) -> tuple[float, float] | None:
    """A companion of both, each averaged over the last up to 3 evaluations that both made."""
    means = companions_together([treated, control], name)
    return None if means is None else (means[0], means[1])


def companions_together(outcomes: list[ArmOutcome], name: str) -> list[float] | None:
    """A companion of several arms, averaged over the last up to 3 steps that all measured.

    Returns:
        One value an arm, or ``None`` where one lacks it or no step is shared.
    """
    curves = [one.companions[name] for one in outcomes if name in one.companions]
    if len(curves) < len(outcomes) or not curves:
        return None
    shared = curves[0][0]
    for steps, _ in curves[1:]:
        shared = np.intersect1d(shared, steps)
    last = shared[-COMPANIONS_AVERAGED:]
    if not last.size:
        return None
    return [float(values[np.isin(steps, last)].mean()) for steps, values in curves]


def study_outcomes(
    study: Study, notes: list[str] | None = None
) -> dict[int, dict[str, ArmOutcome]]:
    """The outcomes of every arm that left metrics, by seed and arm.

    Args:
        notes: sentences about what could not be read are added here.
    """
    found: dict[int, dict[str, ArmOutcome]] = {}
    for seed in study.seeds:
        if seed.without_window or seed.target is None:
            continue
        outcomes = {}
        for name in seed.arms:
            try:
                outcome = _outcome(study, seed, name)
            except StudyError as error:
                if notes is not None:
                    reason = str(error).replace(f"{study.folder}/", "")
                    notes.append(f"Seed {seed.seed}: arm {name} is not compared: {reason}.")
                continue
            if outcome is not None:
                outcomes[name] = outcome
        found[seed.seed] = outcomes
    return found


def _outcome(study: Study, seed: SeedRun, name: str) -> ArmOutcome | None:
    arm = seed.arms[name]
    target = str(seed.target)
    branch = branch_of(seed)
    if arm.curves is None or arm.metrics is None or branch is None:
        return None
    steps, values = arm.curves.of(target)
    before = seed.base.of(target) if seed.base is not None and target in seed.base.units else None
    curve = _from_branch((steps, values), before, branch, seed.end)
    if not curve[0].size:
        return None
    frame = read_metrics(arm.metrics)
    companions = {
        key: after
        for key, known in _companion_curves(frame, study.metric, target).items()
        if (after := _after(known, branch, _judged_until(seed))) is not None
    }
    return ArmOutcome(
        seed=seed.seed,
        arm=name,
        final=arm.value,
        curve=curve,
        crossings={t: crossing_of(*curve, t) for t in study.thresholds},
        heads=_final_heads(seed, name),
        companions=companions,
    )


def _judged_until(seed: SeedRun) -> int | None:
    """The last step whose numbers count in the comparison; with a margin, arms go on after it."""
    known = (seed.window.end, *seed.measured_at)
    return max((step for step in known if step is not None), default=seed.end)


def branch_of(seed: SeedRun) -> int | None:
    """Where the seed's arms part; the window's start where the study does not say."""
    return seed.branch if seed.branch is not None else seed.window.start


def _from_branch(own: Curve, base: Curve | None, branch: int, end: int | None) -> Curve:
    """The curve from the branch on; at the branch itself an arm's run is the base run."""
    steps, values = own
    if base is not None and not (steps == branch).any() and (base[0] == branch).any():
        steps = np.append(steps, branch)
        values = np.append(values, base[1][base[0] == branch])
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
    inside = (steps >= branch) & (steps <= (steps.max(initial=0) if end is None else end))
    return steps[inside], values[inside]


def _after(curve: Curve, branch: int, end: int | None) -> Curve | None:
    steps, values = curve
    inside = (steps > branch) & (steps <= (steps.max(initial=0) if end is None else end))
    return (steps[inside], values[inside]) if inside.any() else None


def _companion_curves(frame: pd.DataFrame, metric: str, target: str) -> dict[str, Curve]:
    found = {key: model_curve(frame, name) for key, name in WHOLE_MODEL.items()}
    found[ABLATION] = head_curve(frame, "ablation/logprob", target)
    found |= {name: head_curve(frame, name, target) for name in HEAD_SCORES if name != metric}
    return {key: curve for key, curve in found.items() if curve is not None}


def _final_heads(seed: SeedRun, name: str) -> dict[str, float]:
    curves = seed.arms[name].curves
    if curves is None:
        return {}
    rows = np.isin(curves.steps, seed.measured_at) if seed.measured_at else curves.steps.size - 1
    if seed.measured_at and int(np.sum(rows)) != len(set(seed.measured_at)):
        return {}
    means = curves.values[rows].reshape(-1, len(curves.units)).mean(axis=0)
    return {u: float(v) for u, v in zip(curves.units, means, strict=True) if np.isfinite(v)}
