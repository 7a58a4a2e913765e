"""The definition of a plan, sample by sample, against which schedules are checked."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from mda_lightning.interventions import Insert, Mask, Operation, Prune, Replace
from mda_lightning.schedule import BASE, INSERTED, REPLACED, BaseOrder, Schedule, ScheduledBatch


def whole(schedule: Schedule) -> ScheduledBatch:
    """All batches of a run, one after the other."""
    batches = [schedule.batch(step) for step in range(len(schedule))]
    return ScheduledBatch(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))


def base_stream(order: BaseOrder, count: int) -> np.ndarray:
    """The first samples of the endless base order."""
    steps = range(-(-count // order.batch_size))
    return np.concatenate([order.ids(step) for step in steps])[:count]


def inside(steps: tuple[int, int] | None, step: int) -> bool:
    return steps is None or steps[0] <= step < steps[1]


def check_against_definition(schedule: Schedule) -> None:
    """Every place of the run holds what the plan says, by a loop over places and operations."""
    order, operations = schedule.order, schedule.plan.operations
    stream, size = whole(schedule), schedule.order.batch_size
    origins = schedule.base_positions(0, len(schedule)).tolist()
    base = base_stream(order, (max(order.n_steps, _last_step(operations)) + 2) * size + 99)
    kept = [origin for origin in origins if origin >= 0]
    assert kept == list(range(len(kept)))  # nothing is lost, repeated or reordered
    inserted: Counter[int] = Counter()
    upcoming = 0
    for place, origin in enumerate(origins):
        sample, weight = int(stream.sample_ids[place]), float(stream.weights[place])
        provenance = int(stream.provenance[place])
        step = upcoming // size  # base step of this place, or of the base sample after it
        if provenance == INSERTED:
            inserted[sample] += 1
            expected, prunable = {sample}, False
            if origin >= 0:
                assert any(
                    isinstance(op, Insert)
                    and op.placement == "replace"
                    and inside(op.steps, step)
                    and int(base[origin]) not in spared_by(schedule, op)
                    for op in operations
                )
        else:
            expected, prunable = _at_base_place(operations, base, origin, size), True
            assert provenance == (
                BASE
                if expected == {int(base[origin])}
                and not any(_takes(op, int(base[origin]), step) for op in operations)
                else REPLACED
            )
        assert sample in expected
        weights = _weights(operations, sample, step, place // size, provenance)
        if prunable:
            for op in operations:
                if isinstance(op, Prune) and inside(op.steps, step):
                    weights |= {np.float32(w * op.weight) for w in weights}
        assert np.float32(weight) in weights
        upcoming += origin >= 0
    planned: Counter[int] = Counter()
    for op in operations:
        if isinstance(op, Insert):
            planned.update({int(i): op.copies for i in op.sample_ids})
    assert inserted == planned


def _last_step(operations: tuple[Operation, ...]) -> int:
    windows = [op.by_steps for op in operations if isinstance(op, Replace) and op.by_steps]
    return max((window[1] for window in windows), default=0)


def spared_by(schedule: Schedule, insert: Insert) -> set[int]:
    """Its own samples and those that the plan, not a later decision, names in its steps."""
    spared = set(schedule.plan.spared.tolist()) | set(insert.sample_ids.tolist())
    for op in schedule.plan.operations:
        steps = set(range(*op.steps)) if op.steps is not None else None
        meets = steps is None or bool(steps & set(range(*insert.steps)))
        if isinstance(op, Mask) and op.clock == "run":
            meets = True  # where it falls in base steps depends on what is shifted
        if meets and not getattr(op, "online", False):
            spared |= set(op.named_ids.tolist())
    return spared


def _takes(op: Operation, sample: int, step: int) -> bool:
    if not isinstance(op, Replace) or not inside(op.steps, step):
        return False
    return op.sample_ids is None or sample in op.sample_ids.tolist()


def _at_base_place(
    operations: tuple[Operation, ...], base: np.ndarray, origin: int, size: int
) -> set[int]:
    sample, step = int(base[origin]), origin // size
    for op in operations:
        if not _takes(op, sample, step):
            continue
        assert isinstance(op, Replace)
        if op.sample_ids is not None and op.by is not None:
            return {dict(zip(op.sample_ids.tolist(), op.by.tolist(), strict=True))[sample]}
        if op.by is not None:
            return set(op.by.tolist())
        assert op.by_steps is not None
        offset = origin - op.steps[0] * size
        length = (op.by_steps[1] - op.by_steps[0]) * size
        return {int(base[op.by_steps[0] * size + offset % length])}
    return {sample}


def _weights(
    operations: tuple[Operation, ...], sample: int, base_step: int, run_step: int, provenance: int
) -> set[Any]:
    weight = 1.0
    for op in operations:
        if not isinstance(op, Mask) or sample not in op.sample_ids.tolist():
            continue
        if op.occurrences == "base" and provenance != BASE:
            continue
        if inside(op.steps, base_step if op.clock == "base" else run_step):
            weight = weight * op.weight if op.online else op.weight
    return {np.float32(weight)}
