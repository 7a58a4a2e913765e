"""Random controls: the same operations on random samples."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mda_lightning.base_order import BaseOrder
from mda_lightning.interventions.operations import (
    Insert,
    Mask,
    Operation,
    Replace,
    Steps,
    as_ids,
)
from mda_lightning.sample_ids import unique_ids
from mda_lightning.shuffling import key_of, keyed_order

Ids: TypeAlias = NDArray[np.int64]

_MOST_PLACES = 2**24


def controlled(
    operations: Sequence[Operation],
    order: BaseOrder | None,
    pool_ids: ArrayLike,
    seed: int,
    *,
    exclude: ArrayLike | None = None,
) -> tuple[Operation, ...]:
    """The operations with a random stand-in for every sample; see :meth:`Plan.random_control`.

    A mask that was decided on the way is of the samples of a step or a few. Its stand-ins are drawn
    from the base samples of its own window, so that as many places are masked there: of all that
    the pool has, hardly one would come in that step.
    """
    shifts = any(isinstance(op, Insert) and op.placement == "shift" for op in operations)
    alike = [op for op in operations if not _has_own_window(op, shifts)]
    treated = _unique([_substituted(op, order) for op in alike])
    excluded = _unique([treated, *(_told(op, order) for op in operations)])
    if exclude is not None:
        excluded = _unique([excluded, as_ids(exclude)])
    pool = unique_ids(as_ids(pool_ids))
    pool = pool[~_among(pool, excluded)]
    if len(pool) < len(treated):
        raise ValueError(
            f"the random control needs {len(treated)} samples besides the treated and excluded "
            f"ones, the pool has {len(pool)}; treat a smaller fraction or widen the pool"
        )
    drawn = _drawn(treated, pool, _met_by(alike, order, treated, pool), seed)

    def stand_ins(ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return drawn[np.searchsorted(treated, ids)]

    excluded = _unique([excluded, drawn])

    def of_its_window(number: int, op: Mask) -> Mask:
        assert op.steps is not None
        met = _base_ids(order, op.steps)
        # What stands there by an insertion has its stand-in there.
        inserted = _among(op.sample_ids, treated) & ~_among(op.sample_ids, met)
        count = int((~inserted).sum())
        free = met[_among(met, pool) & ~_among(met, excluded)]
        if len(free) < count:
            raise ValueError(
                f"the random control needs {count} samples of steps {op.steps} for those masked "
                f"there, {len(free)} are left that the pool has and that are neither treated nor "
                "excluded anywhere; widen the pool, or compare with a pruning of as many: "
                "Plan.prune(fraction, steps)"
            )
        key = key_of("random control", seed, "of mask", number)
        own = free[keyed_order(key, len(free))[:count]]
        ids = np.concatenate([stand_ins(op.sample_ids[inserted]), own])
        return dataclasses.replace(op, sample_ids=ids)

    def on_stand_ins(number: int, op: Operation) -> Operation:
        if isinstance(op, Mask) and _has_own_window(op, shifts):
            return of_its_window(number, op)
        if isinstance(op, Mask | Insert):
            return dataclasses.replace(op, sample_ids=stand_ins(op.sample_ids))
        if isinstance(op, Replace):
            return dataclasses.replace(op, by=stand_ins(_substituted(op, order)), by_steps=None)
        draw = int(key_of("another pruning", op.draw, seed) >> np.uint64(32))
        return dataclasses.replace(op, draw=draw)

    return tuple(on_stand_ins(number, op) for number, op in enumerate(operations))


def _drawn(treated: Ids, pool: Ids, kinds: tuple[Ids, Ids], seed: int) -> Ids:
    """For each treated sample one of the pool that its masks' windows meet as often.

    Args:
        kinds: of the treated and of the pool, alike where they are met as often.
    """
    order = keyed_order(key_of("random control", seed), len(pool))
    of_treated, of_pool = kinds[0], kinds[1][order]
    drawn, used = np.full(len(treated), -1, np.int64), np.zeros(len(pool), bool)
    for kind in np.unique(of_treated):
        wanted, there = np.flatnonzero(of_treated == kind), np.flatnonzero(of_pool == kind)
        n = min(len(wanted), len(there))
        drawn[wanted[:n]] = pool[order[there[:n]]]
        used[there[:n]] = True
    missing = np.flatnonzero(drawn < 0)
    if missing.size:
        warnings.warn(
            f"{len(missing)} of {len(treated)} samples have a stand-in that stands more or less "
            "often in the steps than they do: the pool has no other; the control treats another "
            "number of places. Widen the pool",
            stacklevel=5,
        )
        drawn[missing] = pool[order[np.flatnonzero(~used)[: len(missing)]]]
    return drawn


def _met_by(
    operations: Sequence[Operation], order: BaseOrder | None, treated: Ids, pool: Ids
) -> tuple[Ids, Ids]:
    """A number for each of the treated and of the pool that says how often each mask's window has
    it.

    Left out is what cannot be told: windows of the run's own steps, or without an order; and the
    whole run or windows of many millions of places, in which it would take long.
    """
    windows = {
        op.steps
        for op in operations
        if isinstance(op, Mask) and op.clock == "base" and op.steps is not None
    }
    kinds = np.zeros(len(treated), np.int64), np.zeros(len(pool), np.int64)
    for steps in sorted(windows):
        if order is None or order.places(steps)[1] - order.places(steps)[0] > _MOST_PLACES:
            continue
        there = order.at(np.arange(*order.places(steps), dtype=np.int64))
        known, counts = np.unique(there, return_counts=True)
        for of_some, ids in zip(kinds, (treated, pool), strict=True):
            at = np.minimum(np.searchsorted(known, ids), len(known) - 1)
            of_some *= int(counts.max()) + 1
            of_some += np.where(known[at] == ids, counts[at], 0)
    return kinds


def _has_own_window(op: Operation, shifts: bool) -> bool:
    """Whether a mask's stand-ins are of its own window.

    Which base samples a window of the run's own steps holds, is known where nothing shifts.
    """
    if not isinstance(op, Mask) or not op.online or op.steps is None:
        return False
    return op.clock == "base" or not shifts


def _among(ids: NDArray[np.int64], ascending: NDArray[np.int64]) -> NDArray[np.bool_]:
    if not ascending.size:
        return np.zeros(len(ids), bool)
    at = np.minimum(np.searchsorted(ascending, ids), len(ascending) - 1)
    found: NDArray[np.bool_] = ascending[at] == ids
    return found


def _substituted(op: Operation, order: BaseOrder | None) -> NDArray[np.int64]:
    """The samples that get a stand-in; of a replacement, those that come in."""
    if not isinstance(op, Replace):
        return op.named_ids
    if op.by is not None:
        return op.by
    assert op.by_steps is not None
    # No more than there are places: what does not come in needs no stand-in.
    first, last = op.by_steps
    return _base_ids(order, (first, min(last, first + op.steps[1] - op.steps[0])))


def _told(op: Operation, order: BaseOrder | None) -> NDArray[np.int64]:
    """The samples that an operation concerns, and that are no stand-ins therefore."""
    if isinstance(op, Replace) and op.sample_ids is None:
        return np.union1d(op.named_ids, _base_ids(order, op.steps))
    return op.named_ids


def _base_ids(order: BaseOrder | None, steps: Steps) -> NDArray[np.int64]:
    if order is None:
        raise ValueError(
            f"which samples steps {steps} hold depends on the base order; tie the plan to it "
            "with bound(order=...) before drawing a control"
        )
    return unique_ids(order.at(np.arange(*order.places(steps), dtype=np.int64)))


def _unique(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return unique_ids(np.concatenate([np.empty(0, np.int64), *parts]))
