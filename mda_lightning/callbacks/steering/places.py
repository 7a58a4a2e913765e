"""Where in a run's batches an operation acts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mda_lightning.interventions import Insert, Mask
from mda_lightning.schedule import INSERTED, Schedule
from mda_lightning.schedule.placing import find

Ints = NDArray[np.int64]


def coming_window(schedule: Schedule, step: int, n_steps: int) -> tuple[int, int] | None:
    """Base steps of about the next ``n_steps`` from run step ``step`` on; None at the run's end."""
    first = schedule.base_step_at(step)
    last = min(first + n_steps, schedule.order.n_steps)
    return (first, last) if first < last else None


def that_fit(
    schedule: Schedule, step: int, window: tuple[int, int], ids: Ints, copies: int = 1
) -> int:
    """How many of ``ids``, from the first on, an insertion with ``replace`` has places for.

    Their own base places are left alone, as those of what the plan names in these steps.

    Args:
        step: the run's next step, at or before the window.
        window: base steps.
        ids: int64 [n], each once.
        copies: of each.
    """
    free = _free_places(schedule, step, window)
    by_id = np.argsort(ids)
    at, held = find(ids[by_id], free)
    own = np.bincount(by_id[at[held]], minlength=len(ids))
    room = len(free) - np.concatenate([[0], np.cumsum(own)])
    return int(np.flatnonzero(np.arange(len(ids) + 1) * copies <= room)[-1])


def _free_places(schedule: Schedule, step: int, window: tuple[int, int]) -> Ints:
    """The base samples of places that an insertion with ``replace`` may take."""
    first, last = run_steps_of(schedule, step, window)
    positions = schedule.base_positions(first, last)
    batches = [schedule.batch(one) for one in range(first, last)]
    inserted = np.concatenate([batch.provenance for batch in batches]) == INSERTED
    size = schedule.order.batch_size
    inside = (positions >= window[0] * size) & (positions < window[1] * size) & ~inserted
    ids = schedule.order.at(positions[inside])
    free: Ints = ids[~np.isin(ids, schedule.spared_in(window))]
    return free


def run_steps_of(schedule: Schedule, step: int, window: tuple[int, int]) -> tuple[int, int]:
    """Steps [first, last) of the run, from ``step`` on, that hold the places of base steps."""
    size, last = schedule.order.batch_size, step
    while last < len(schedule):
        positions = schedule.base_positions(last, last + 1)
        there = positions[positions >= 0]
        if there.size and there[0] >= window[1] * size:
            break
        last += 1
    return step, last


def places_of(
    operation: Mask | Insert, before: Schedule, after: Schedule, step: int
) -> tuple[Ints, Ints, Ints] | None:
    """The places that an operation decided at ``step`` has changed.

    Returns:
        Run steps, slots in their batches and sample ids, int64 [n] each; None for an insertion with
        ``shift``, whose places later insertions may move on.
    """
    if isinstance(operation, Insert):
        if operation.placement == "shift":
            return None
        first, last = run_steps_of(after, step, operation.steps)
    else:
        assert operation.steps is not None
        first, last = operation.steps
    steps, slots, ids = [], [], []
    for one in range(first, last):
        old, new = before.batch(one), after.batch(one)
        if isinstance(operation, Insert):
            # An inserted sample may take the place of the very same one.
            changed = (new.provenance == INSERTED) & (old.provenance != INSERTED)
        else:
            changed = new.weights != old.weights
        where = np.flatnonzero(changed)
        steps.append(np.full(len(where), one, np.int64))
        slots.append(where.astype(np.int64))
        ids.append(new.sample_ids[where])
    return np.concatenate(steps), np.concatenate(slots), np.concatenate(ids)
