"""From the arms of a recipe to plans: which samples, in which steps, against which control."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mda_lightning.base_order import BaseOrder
from mda_lightning.corpora import TokenRows
from mda_lightning.corpora.inserted import inserted_from_generator
from mda_lightning.interventions import Insert, Mask, Operation, Plan, Prune, Source
from mda_lightning.interventions.selection import samples_of
from mda_lightning.recipes.studies.settings import ArmSettings, Position, StudySettings
from mda_lightning.store.ranking import extreme
from mda_lightning.store.rankings import Rankings

Ints = NDArray[np.int64]
Steps = tuple[int, int]

_DRAWS = {"mask": 1_000_003, "insert": 2_000_003}
_OTHER_DRAW = 3_000_017
_NEXT_DRAW = 7_919
RECENT = 2
"""Of `amplify`: samples of so many intervals between refreshes are shown again."""
METHODS = {
    "ekfac": "EK-FAC influence",
    "kfac": "K-FAC influence",
    "identity": "gradient dot product",
    "loss": "highest loss",
    "repeated_ngrams": "repeated n-grams",
    "random": "a random order",
}


@dataclass(frozen=True)
class SeedFacts:
    """What is known of a seed once its base run has ended.

    Attributes:
        window: steps [start, end) in which the head forms.
        units: "target", "second" and "lowest" -> head.
        corpus_hash, order: of the base run's stream.
        rankings: of the samples.
        generated: arm -> the samples that its generator made.
    """

    seed: int
    window: Steps
    units: Mapping[str, str]
    corpus_hash: str
    order: BaseOrder
    rankings: Rankings
    generated: Mapping[str, Source] = field(default_factory=dict)

    def unit(self, name: str) -> str:
        """A head by what an arm calls it."""
        return self.units.get(name, name)


def step_of(position: Position, window: Steps) -> int:
    """The step that a position in or around the window is."""
    if isinstance(position, int):
        return position
    start, end = window
    return start + round(float(position.rstrip("% ")) / 100 * (end - start))


def steps_of(positions: tuple[Position, Position] | None, window: Steps) -> Steps:
    """[start, end) of two positions; None is the window itself.

    Raises:
        ValueError: no step lies between them.
    """
    if positions is None:
        return window
    start, end = (step_of(one, window) for one in positions)
    if not 0 <= start < end:
        raise ValueError(
            f"steps {positions[0]} to {positions[1]} are {start} to {end} in the window "
            f"{window[0]} to {window[1]}: no step lies between them; choose a later end, or an "
            "earlier start that is not before step 0"
        )
    return start, end


def first_step(settings: StudySettings, window: Steps) -> int:
    """The step from which some arm differs from the base run: where all arms branch."""
    return min(
        (
            steps_of(arm.steps, window)[0]
            for arm in settings.arms.values()
            if arm.control_of is None
        ),
        default=window[0],
    )


def plans_of(settings: StudySettings, facts: SeedFacts) -> dict[str, Plan]:
    """A plan for every arm but those steered while they run, and their controls.

    Controls treat as many random samples as the arm they are drawn for, none of its own. Insertions
    that take the places of base samples spare what any arm of their group treats (an arm, its
    control and the others that are compared with it), so that all of them take the same places.

    Raises:
        ValueError: an arm asks for more samples than there are, or for none.
    """
    plans: dict[str, Plan] = {}
    for name, arm in settings.arms.items():
        if arm.control_of is None and arm.do != "steer":
            plans[name] = _treated(name, arm, settings, facts)
    for name, arm in settings.arms.items():
        owner = arm.control_of
        if owner is None or owner not in plans:
            continue
        plans[name] = dataclasses.replace(
            control_plan(plans[owner], settings.arms[owner], arm.draw, facts), name=name
        )
    for members in _groups(settings, plans):
        spared = np.unique(np.concatenate([plans[name].treated_ids for name in members]))
        for name in members:
            plans[name] = dataclasses.replace(plans[name], spared=spared)
    for name, arm in settings.arms.items():
        if name in plans and arm.control_of is not None:  # of the plan as it is now
            source = {**plans[name].source, "control_of": plans[arm.control_of].content_hash}
            plans[name] = dataclasses.replace(plans[name], source=source)
    return plans


def control_plan(plan: Plan, arm: ArmSettings, draw: int, facts: SeedFacts) -> Plan:
    """The matched random control of an arm's plan."""
    if arm.do == "replace":
        pool = samples_of(facts.order, steps_of(arm.from_steps, facts.window))
    elif arm.do == "insert":
        pool = _pool(arm.from_steps, facts)
    else:
        pool = _pool(arm.steps, facts)
    seed = facts.seed + _DRAWS.get(arm.do, _OTHER_DRAW) + _NEXT_DRAW * draw
    return plan.random_control(pool, seed=seed)


def steered_control(plan: Plan, arm: ArmSettings, draw: int, facts: SeedFacts) -> Plan:
    """The matched random control of what a steered arm turned out to do.

    Decision by decision: as many other samples of the same batches are masked, or of the same
    recent steps are inserted in the same places.
    """
    rng = np.random.default_rng([facts.seed, _OTHER_DRAW, draw])
    operations: list[Operation] = []
    for operation in plan.operations:
        assert isinstance(operation, Mask | Insert) and operation.steps is not None
        start, end = operation.steps
        if isinstance(operation, Insert):
            start, end = max(0, start - RECENT * arm.refresh_every), start
        pool = np.setdiff1d(samples_of(facts.order, (start, end)), operation.sample_ids)
        count = len(operation.sample_ids)
        if count > len(pool):
            raise ValueError(
                f"steering chose {count} of the {count + len(pool)} samples of steps {start} to "
                f"{end}, which leaves too few for a random control; use a smaller fraction"
            )
        others = rng.choice(pool, size=count, replace=False)
        operations.append(dataclasses.replace(operation, sample_ids=np.sort(others)))
    return dataclasses.replace(
        plan,
        operations=tuple(operations),
        source={"control_of": plan.content_hash, "draw": draw},
        name=f"{plan.name}-random",
    )


def phrase_of(name: str, settings: StudySettings) -> str:
    """How a sentence calls an arm: "masking the top 10% by EK-FAC influence"."""
    arm = settings.arms[name]
    if arm.control_of is not None:
        return _control_phrase(settings.arms[arm.control_of], settings) + _again(arm.draw)
    if arm.do == "prune":
        return f"masking a random {_percent(arm.fraction)} of all samples"
    share = _share(arm, settings)
    if arm.do == "steer":
        doing = {"suppress": "masking", "amplify": "showing again"}[arm.policy]
        return f"{doing} the {arm.which} {share} while it trained"
    if arm.generator is not None:
        return f"inserting {share} generated samples ({arm.generator})"
    what = "samples of a random order" if arm.by == "random" else ""
    what = what or f"the {arm.which} {share} by {_method(arm, settings)}"
    doing = {"mask": "masking", "insert": "inserting", "replace": "replacing"}[arm.do]
    text = f"{doing} {what}" if arm.do != "insert" else f"{doing} copies of {what}"
    if arm.unit != "target":
        heads = {"second": "the second head", "lowest": "the lowest head"}
        text += f" for {heads.get(arm.unit, arm.unit)}"
    if arm.from_steps is not None:
        verb = "by those" if arm.do == "replace" else "of steps"
        text += f" {verb} of {arm.from_steps[0]} to {arm.from_steps[1]}".replace(
            "of steps of", "of"
        )
    return text


# -- the parts ------------------------------------------------------------------------------------


def _treated(name: str, arm: ArmSettings, settings: StudySettings, facts: SeedFacts) -> Plan:
    steps = steps_of(arm.steps, facts.window)
    what = settings.intervention
    source: dict[str, Any] = {}
    inserting: dict[str, Any] = {
        "mode": arm.mode or what.mode,
        "steps": steps,
        "placement": arm.placement or what.placement,
        "copies": arm.copies or what.copies,
    }
    if arm.do == "prune":
        plan = Plan.prune(fraction_of(arm, settings), steps, weight=arm.weight, draw=arm.draw)
    elif arm.generator is not None:
        plan = Plan.insert_rows(facts.generated[name], **inserting)
    else:
        chosen = chosen_ids(arm, settings, facts)
        unit = facts.unit(arm.unit)
        source |= {"by": arm.by, "unit": unit, "which": arm.which, "chosen": len(chosen)}
        if arm.do == "mask":
            plan = Plan.mask(chosen, steps=steps, weight=arm.weight)
        elif arm.do == "insert":
            plan = Plan.insert(chosen, **inserting)
        else:
            out = _best(arm, settings, facts, steps)
            n = min(len(out), len(chosen))
            plan = Plan.replace(steps=steps, sample_ids=out[:n], by=chosen[:n])
    return plan.bound(
        corpus_hash=facts.corpus_hash, order=facts.order, seed=facts.seed, source=source, name=name
    )


def chosen_ids(arm: ArmSettings, settings: StudySettings, facts: SeedFacts) -> Ints:
    """The samples that an arm treats, best first."""
    # What is masked stands in the steps of the mask.
    positions = arm.steps if arm.do == "mask" else arm.from_steps
    return _best(arm, settings, facts, steps_of(positions, facts.window))


def n_treated(plan: Plan) -> int | None:
    """How many samples a plan masks, inserts or replaces; None of a random pruning."""
    if any(isinstance(operation, Prune) for operation in plan.operations):
        return None
    counts = [op.count if isinstance(op, Insert) else len(_named(op)) for op in plan.operations]
    return sum(counts)


def _named(operation: Operation) -> Ints:
    found: Ints | None = getattr(operation, "sample_ids", None)
    return np.empty(0, np.int64) if found is None else found


def is_placed_among_others(name: str, settings: StudySettings) -> bool:
    """Whether an arm's insertions take the places of base samples."""
    arm = settings.arms[name]
    placement = arm.placement or settings.intervention.placement
    return arm.do == "insert" and placement == "replace"


def _best(arm: ArmSettings, settings: StudySettings, facts: SeedFacts, steps: Steps) -> Ints:
    unit = facts.unit(arm.unit) if facts.rankings.units(arm.by) else None
    ids, values = facts.rankings.values(arm.by, unit, steps=steps)
    keys = -values if arm.which == "top" else values
    fraction = None if arm.count is not None else fraction_of(arm, settings)
    if arm.count is not None and arm.count > int(np.isfinite(values).sum()):
        raise ValueError(
            f"{arm.count} samples were asked for by {arm.by}, and steps {steps[0]} to {steps[1]} "
            f"have {int(np.isfinite(values).sum())} with a finite value; ask for fewer"
        )
    return extreme(ids, keys, fraction=fraction, count=arm.count, of=f"{arm.by} {unit or ''}")


def generated_rows(
    settings: StudySettings, rows: TokenRows, order: BaseOrder, window: Steps, folder: Path
) -> dict[str, Source]:
    """The samples of every arm that generates them, written under ``folder``; by arm."""
    made = {}
    for name, arm in settings.arms.items():
        if arm.generator is None:
            continue
        pool = len(samples_of(order, steps_of(arm.from_steps, window)))
        count = arm.count or max(1, round(fraction_of(arm, settings) * pool))
        seed = int(np.random.SeedSequence([order.seed, arm.draw]).generate_state(1)[0])
        own = inserted_from_generator(
            folder / name, arm.generator, base=rows, n_rows=count, seed=seed
        )
        made[name] = Source.of(own, name=name)
    return made


def fraction_of(arm: ArmSettings, settings: StudySettings) -> float:
    """The share of samples that an arm treats."""
    return settings.intervention.fraction if arm.fraction is None else arm.fraction


def _pool(positions: tuple[Position, Position] | None, facts: SeedFacts) -> Ints:
    return samples_of(facts.order, steps_of(positions, facts.window))


def _groups(settings: StudySettings, plans: Mapping[str, Plan]) -> list[list[str]]:
    """Insertions with ``replace`` that are compared with one another, control first."""
    groups: dict[str, list[str]] = {}
    for name in plans:
        owner = settings.arms[name].control_of or name
        if is_placed_among_others(owner, settings):
            groups.setdefault(settings.control_of(owner) or owner, []).append(name)
    return list(groups.values())


def _share(arm: ArmSettings, settings: StudySettings) -> str:
    if arm.generator is not None and arm.count is None:
        return f"as many as {_percent(fraction_of(arm, settings))} of the window's"
    return f"{arm.count:,}" if arm.count is not None else _percent(fraction_of(arm, settings))


def _percent(fraction: float | None) -> str:
    return f"{100 * (fraction or 0):g}%"


def _method(arm: ArmSettings, settings: StudySettings) -> str:
    ranking = settings.ranking(arm.by)
    if ranking.method != "influence":
        return METHODS[ranking.method]
    text = METHODS[ranking.curvature or settings.scoring.curvature]
    probe = ranking.probe_function or settings.scoring.probe_function
    return text if probe == settings.scoring.probe_function else f"{text} on {probe}"


def _control_phrase(owner: ArmSettings, settings: StudySettings) -> str:
    return {
        "mask": "masking as many random samples",
        "insert": "inserting copies of as many random samples",
        "replace": "replacing them by as many random samples",
        "prune": "masking another random share",
        "steer": "doing the same to as many random samples",
    }[owner.do]


def _again(draw: int) -> str:
    return f" (draw {draw})" if draw else ""
