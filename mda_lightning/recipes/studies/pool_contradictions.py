"""More samples asked for than an interval has, for an arm or for its random control besides.

Pools are counted at most: a corpus that turns out to be smaller is told when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from mda_lightning.recipes.studies.arm_contradictions import chosen_from, known_step
from mda_lightning.recipes.studies.arm_settings import ArmSettings, Position
from mda_lightning.recipes.studies.settings import StudySettings

Positions = tuple[Position, Position] | None


def pool_contradictions(settings: StudySettings) -> Iterator[str]:
    """What arms ask for beyond what there is, a message each."""
    if settings.training.batch_size < 1:
        return
    controlled = {arm.control_of for arm in settings.arms.values()}
    for name, arm in settings.arms.items():
        share = _share(arm, settings)
        sensible = (arm.count or 1) > 0 and 0 < share <= 1
        if arm.control_of is not None or arm.do == "prune" or not sensible:
            continue
        if arm.do == "steer":
            yield from _steered(name, arm, settings, name in controlled)
        elif arm.generator is not None:
            if name in controlled and arm.count is not None:
                yield from _count(name, arm.count, arm.from_steps, settings, drawn=1)
        elif arm.do == "replace":
            yield from _replaced(name, arm, settings, name in controlled)
        elif arm.count is not None:
            times = 2 if name in controlled else 1
            yield from _count(name, arm.count, chosen_from(arm), settings, drawn=times)
        elif name in controlled:
            pool = _pool(chosen_from(arm), settings)
            if share > 0.5 or (pool is not None and 2 * _part(share, pool) > pool):
                yield _too_large_a_share(name, share, pool)


def _steered(
    name: str, arm: ArmSettings, settings: StudySettings, controlled: bool
) -> Iterator[str]:
    share, batch = _share(arm, settings), settings.training.batch_size
    if not controlled:
        return
    if share > 0.5:
        yield _too_large_a_share(name, share, None)
    elif arm.policy == "suppress" and 2 * math.ceil(share * batch) > batch:
        yield (
            f"arms.{name} masks up to {math.ceil(share * batch)} of the {batch} samples of a batch "
            "and has a random control, which takes as many others of it; give a smaller fraction, "
            "or a larger training.batch_size"
        )


def _replaced(
    name: str, arm: ArmSettings, settings: StudySettings, controlled: bool
) -> Iterator[str]:
    """Of both intervals as many; the control brings in as many others of the second."""
    if arm.count is not None:
        yield from _count(name, arm.count, arm.steps, settings, drawn=1)
        yield from _count(name, arm.count, arm.from_steps, settings, drawn=2 if controlled else 1)
        return
    share = _share(arm, settings)
    out, into = _pool(arm.steps, settings), _pool(arm.from_steps, settings)
    if not controlled:
        return
    if out is not None and into is not None:
        too_large = 2 * min(_part(share, out), _part(share, into)) > into
    else:
        too_large = share * min(1.0, _ratio(arm) or 0.0) > 0.5
    if too_large:
        yield _too_large_a_share(name, share, into)


def _count(
    name: str, count: int, positions: Positions, settings: StudySettings, *, drawn: int
) -> Iterator[str]:
    """A number of samples, ``drawn`` times as many being needed of the interval."""
    pool = _pool(positions, settings)
    called = "its interval" if pool is not None else "training"
    if pool is None:  # of a window that is yet to be found
        pool = _at_most(settings, settings.training.max_steps)
    if drawn * count <= pool:
        return
    besides = ", and as many others for its random control" if drawn == 2 else ""
    yield (
        f"arms.{name}.count is {count:,}{besides}, and {called} has {pool:,} samples; give at most "
        f"{pool // drawn:,}, or choose from more steps"
    )


def _too_large_a_share(name: str, share: float, pool: int | None) -> str:
    of = "the samples" if pool is None else f"the {pool:,} samples of its interval"
    return (
        f"arms.{name} treats {100 * share:g}% of {of} and has a random control, for which as many "
        "others are needed; give a fraction of at most 0.5 (and 2 samples or more to choose from), "
        "or leave the control out"
    )


def _share(arm: ArmSettings, settings: StudySettings) -> float:
    return settings.intervention.fraction if arm.fraction is None else arm.fraction


def _part(share: float, pool: int) -> int:
    return max(1, round(share * pool))


def _pool(positions: Positions, settings: StudySettings) -> int | None:
    """The samples of an interval, at most; None where the recipe does not say its steps."""
    start, end = (known_step(one, settings) for one in positions or ("0%", "100%"))
    if start is None or end is None or start >= end:
        return None
    return _at_most(settings, end - start)


def _at_most(settings: StudySettings, n_steps: int) -> int:
    samples = n_steps * settings.training.batch_size
    rows = settings.corpus.n_rows
    return samples if rows is None or rows < 1 else min(samples, rows)


def _ratio(arm: ArmSettings) -> float | None:
    """Length of an arm's steps to that of its from_steps; None where not both are in percent."""
    lengths = []
    for positions in (arm.steps, arm.from_steps):
        parts = []
        for one in positions or ("0%", "100%"):
            if isinstance(one, int):
                return None
            try:
                parts.append(float(one.strip(" %")))
            except ValueError:
                return None
        lengths.append(parts[1] - parts[0])
    return lengths[0] / lengths[1] if min(lengths) > 0 else None
