"""What can be run and should be known before it is."""

from __future__ import annotations

from collections.abc import Iterator

from mda_lightning.recipes.studies.arm_contradictions import settled
from mda_lightning.recipes.studies.settings import StudySettings

_ENOUGH_SEEDS = 5
_ENOUGH_SUBSETS = 20
_MATCHED = (
    *("fraction", "count", "from_steps", "steps", "mode", "placement", "copies", "weight"),
    *("policy", "refresh_every"),
)
"""What a random control has in common with the arm that it was drawn for."""


def remarks_on(settings: StudySettings, seeds: tuple[int, ...]) -> tuple[str, ...]:
    """What can be run and should be known: missing or shared controls, too few seeds."""
    return tuple(_remarks(settings, seeds))


def _remarks(settings: StudySettings, seeds: tuple[int, ...]) -> Iterator[str]:
    without = [
        name
        for name, arm in settings.arms.items()
        if arm.control_of is None
        and settings.control_of(name) is None
        and not _is_control(name, settings)
    ]
    if without:
        yield (
            f"no matched random control: {', '.join(without)}; compared with the baseline only, "
            "from which any change of data differs (control_of or control gives one)"
        )
    yield from _of_shared_controls(settings)
    yield from _of_the_window(settings)
    if len(seeds) == 1:
        yield "one seed: differences have no interval; give more (seeds=5)"
    elif len(seeds) < _ENOUGH_SEEDS:
        yield f"{len(seeds)} seeds: intervals over so few are wide; give more (seeds=5)"
    corpus, training = settings.corpus, settings.training
    if corpus.kind == "megatron" and corpus.shuffle:
        yield (
            "corpus.shuffle is true: the order of a preshuffled corpus is not kept, so that step i "
            "sees other samples than it saw originally"
        )
    if not corpus.shuffle and corpus.n_rows is not None:
        needed = training.batch_size * (settings.window.end or training.max_steps)
        if corpus.n_rows < needed:
            yield (
                f"corpus.n_rows is {corpus.n_rows:,}, and {needed:,} samples are trained on: the "
                "corpus is gone through more than once"
            )
    other = sorted(
        name
        for name, arm in settings.arms.items()
        if arm.control_of is None and arm.unit != "target" and arm.do != "steer"
    )
    if other and settings.scoring.units == "target":
        yield (
            f"scoring.units is target, and {', '.join(other)} ranks by another head: samples are "
            "scored again, for all heads; scoring.units=all scores them once"
        )
    if 0 < settings.subsets.count < _ENOUGH_SUBSETS:
        yield (
            f"{settings.subsets.count} subsets a seed: a rank correlation of so few is uncertain; "
            f"{_ENOUGH_SUBSETS} or more say more"
        )


def _of_shared_controls(settings: StudySettings) -> Iterator[str]:
    """Where a control was drawn for another arm, in what the two arms differ."""
    for name, arm in settings.arms.items():
        control = None if arm.control is None else settings.arms.get(arm.control)
        owner = None if control is None else control.control_of
        if owner not in settings.arms or owner is None or owner == name:
            continue
        mine, theirs = settled(arm, settings), settled(settings.arms[owner], settings)
        differ = [key for key in _MATCHED if mine[key] != theirs[key]]
        if differ:
            yield (
                f"{name} is compared with {arm.control}, which was drawn for {owner}, and differs "
                f"from that one in {', '.join(differ)}: no matched control (control_of={name} is)"
            )


def _of_the_window(settings: StudySettings) -> Iterator[str]:
    """What hangs on where a window is found."""
    if settings.window.is_fixed:
        return
    numbered = [
        name
        for name, arm in settings.arms.items()
        if arm.steps is not None and any(isinstance(one, int) for one in arm.steps)
    ]
    if numbered:
        yield (
            f"steps of {', '.join(numbered)} are numbers, and the window is yet to be found: where "
            "they are not in it, the study stops there or the arm changes nothing; give places in "
            "the window, such as 50%"
        )
    if settings.scoring.estimator != "in_run":
        return
    own = settings.scoring
    used = {arm.by for arm in settings.arms.values() if arm.do in ("mask", "insert", "replace")}
    used |= set(settings.subsets.rankings) if settings.subsets.count else set()
    replayed = [
        name
        for name in sorted(used | set(settings.rankings))
        for ranking in (settings.ranking(name),)
        if ranking.method == "influence"
        and (ranking.curvature or own.curvature, ranking.probe_function or own.probe_function)
        != (own.curvature, own.probe_function)
    ]
    if replayed:
        yield (
            f"scoring.estimator is in_run, and {', '.join(replayed)} would need another curvature "
            "or probe function than the base run's scores: those are by replay at "
            f"{', '.join(own.replay_at)}, so that rankings differ in the estimator, too"
        )


def _is_control(name: str, settings: StudySettings) -> bool:
    """Whether other arms are compared with it."""
    return any(arm.control == name for arm in settings.arms.values())
