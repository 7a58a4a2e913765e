"""Where insertions stand in the stream.

Places of a dispersed insertion are the first images of a keyed permutation of its window, computed
one by one: memory is that of the inserted samples, however long the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mda_lightning.base_order import BaseOrder
from mda_lightning.interventions.operations import Insert
from mda_lightning.shuffling import key_of, keyed_order, shuffled

_MOST_AT_ONCE = 2**20


class Placed(NamedTuple):
    """Inserted samples: ``places`` int64 [n], ascending, and ``sample_ids`` int64 [n]."""

    places: NDArray[np.int64]
    sample_ids: NDArray[np.int64]


def find(
    ascending: NDArray[np.int64], values: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For each value: how many of ``ascending`` are below it, and whether it is among them."""
    below = np.searchsorted(ascending, values)
    if not ascending.size:
        return below, np.zeros(len(values), bool)
    return below, ascending[np.minimum(below, len(ascending) - 1)] == values


def nothing() -> Placed:
    """No samples, nowhere."""
    return Placed(np.empty(0, np.int64), np.empty(0, np.int64))


def shifted(
    order: BaseOrder, inserts: Sequence[tuple[np.uint64, Insert]], placed: Placed
) -> Placed:
    """What is inserted with ``shift``; places are positions in the final stream.

    A dispersed insertion of N samples into a window of W base samples takes N of the W + N places
    of the stretched window, uniformly; a concentrated one takes the first N.

    Args:
        placed: what is inserted already; it comes first where two stand at the same place.
    """
    if not inserts:
        return placed
    anchors, ids = [placed.places - np.arange(len(placed.places))], [placed.sample_ids]
    for key, op in inserts:
        start, end = order.places(op.steps)
        places = np.arange(op.count, dtype=np.int64)
        if op.mode == "dispersed":
            size = end - start + op.count
            places = np.sort(shuffled(places, size, key=key ^ key_of("places")))
        # Subtracting the inserted ones before each leaves the base position that it comes before.
        anchors.append(start + places - np.arange(op.count))
        ids.append(_in_stream_order(key, op))
    anchor, flat = np.concatenate(anchors), np.concatenate(ids)
    by_anchor = np.argsort(anchor, kind="stable")
    return Placed(anchor[by_anchor] + np.arange(len(anchor)), flat[by_anchor])


def replaced(
    order: BaseOrder,
    inserts: Sequence[tuple[np.uint64, Insert]],
    spared: Callable[[Insert], NDArray[np.int64]],
    placed: Placed,
) -> Placed:
    """What is inserted with ``replace``; places are base positions.

    Places of spared samples are left alone: an insertion must not undo a mask, nor take out what
    it is meant to add.

    Args:
        spared: of an insertion, the sample ids, ascending.
        placed: what is inserted already, and keeps its places.

    Raises:
        ValueError: more insertions than places.
    """
    taken, ids = placed
    for key, op in inserts:
        places = _free_places(order, key, op, spared(op), taken)
        # Where they stand comes from the draw, who stands where from the samples' own order.
        ids = np.concatenate([ids, _in_stream_order(key, op)])
        taken = np.concatenate([taken, np.sort(places)])
        by_place = np.argsort(taken)
        taken, ids = taken[by_place], ids[by_place]
    return Placed(taken, ids)


def _free_places(
    order: BaseOrder,
    key: np.uint64,
    op: Insert,
    spared: NDArray[np.int64],
    taken: NDArray[np.int64],
) -> NDArray[np.int64]:
    start, end = order.places(op.steps)
    size, missing, seen = end - start, op.count, 0
    found = [np.empty(0, np.int64)]
    while missing and seen < size:
        some = np.arange(seen, min(seen + 2 * missing + 64, seen + _MOST_AT_ONCE, size))
        seen += len(some)
        if op.mode == "dispersed":
            # Drawn before the spared ones are left out, so that plans that spare the same samples
            # take the same places.
            some = shuffled(some, size, key=key ^ key_of("places"))
        some = start + some
        free = some[~find(spared, order.at(some))[1] & ~find(taken, some)[1]][:missing]
        found.append(free)
        missing -= len(free)
    if missing:
        raise ValueError(
            f"{op.count} insertions by replacement do not fit into steps {op.steps}: "
            f"{op.count - missing} of its {size} places hold no spared sample; insert "
            "fewer, widen the window or use placement='shift'"
        )
    return np.concatenate(found)


def _in_stream_order(key: np.uint64, op: Insert) -> NDArray[np.int64]:
    ids = np.tile(op.sample_ids, op.copies)
    return ids[keyed_order(key, len(ids))]
