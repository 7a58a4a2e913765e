"""What was trained on, as runs of places: the lossless encoding behind the ledger.

A *place* is one sample of one step; its position in the run is ``step * batch_size + slot``. Nearly
all places hold what the base order puts there, so that neighbours can be told by the first of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mda_lightning.base_order import BaseOrder

NOT_BASE = -1
"""As ``base_position``: the sample id does not follow from the base order and is written out."""


@dataclass(frozen=True)
class Share:
    """The places of one rank: ``size`` in a row, the micro-batch, then as many of each other rank.

    They are numbered 0, 1, 2, ... in the order in which the rank trains on them.

    Attributes:
        size: samples of a rank's micro-batch.
        rank: of ``world_size``.
        world_size: ranks.
    """

    size: int = 1
    rank: int = 0
    world_size: int = 1

    def positions(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Run positions of the places with these numbers."""
        micro_batches, within = np.divmod(numbers, self.size)
        return (micro_batches * self.world_size + self.rank) * self.size + within

    def numbers(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the places at these run positions, which must be this rank's."""
        parts, within = np.divmod(positions, self.size)
        return parts // self.world_size * self.size + within


WHOLE = Share()
"""All places, in the order of the run."""


class LedgerRows(NamedTuple):
    """Runs of places of one rank that follow each other, by position.

    Attributes:
        position: int64 [n], run position of the first place.
        n_places: int64 [n]; the column ``count`` of a part.
        base_position: int64 [n], of the first place in the base order; the others are as far from
            it as their run positions are apart. -1 where the id is written out.
        sample_id: int64 [n], of every place where it is written out, else -1.
        weight: float32 [n].
        provenance: uint8 [n].
    """

    position: NDArray[np.int64]
    n_places: NDArray[np.int64]
    base_position: NDArray[np.int64]
    sample_id: NDArray[np.int64]
    weight: NDArray[np.float32]
    provenance: NDArray[np.uint8]

    def where(self, kept: Any) -> LedgerRows:
        """The chosen rows, by a mask, places or a slice."""
        columns: Any = [column[kept] for column in self]
        return LedgerRows(*columns)


class Places(NamedTuple):
    """Single places: what :class:`LedgerRows` stands for.

    Attributes:
        position: int64 [n], in the run.
        base_position: int64 [n]; -1 where the id is written out.
        sample_id: int64 [n]; -1 where it is the base order's at ``base_position``.
        weight: float32 [n].
        provenance: uint8 [n].
    """

    position: NDArray[np.int64]
    base_position: NDArray[np.int64]
    sample_id: NDArray[np.int64]
    weight: NDArray[np.float32]
    provenance: NDArray[np.uint8]

    def where(self, kept: Any) -> Places:
        """The chosen places, by a mask, indices or a slice."""
        columns: Any = [column[kept] for column in self]
        return Places(*columns)

    def ids(self, order: BaseOrder) -> NDArray[np.int64]:
        """Sample ids [n]."""
        ids = self.sample_id.copy()
        follows = self.base_position >= 0
        ids[follows] = order.at(self.base_position[follows])
        return ids


def encode(
    order: BaseOrder,
    positions: NDArray[np.int64],
    base_positions: NDArray[np.int64],
    ids: NDArray[np.int64],
    weights: NDArray[np.float32],
    provenance: NDArray[np.uint8],
    *,
    share: Share = WHOLE,
) -> LedgerRows:
    """Rows from which :func:`decode` gives exactly these places back.

    Args:
        order: the base order.
        positions: [n], ascending run positions of ``share``.
        base_positions: [n], where in the base order each sample is expected, -1 for nowhere. Only
            the size of the encoding depends on them: an id that is not there is written out.
        ids, weights, provenance: [n], what was trained on.
        share: whose places follow each other.
    """
    follows = base_positions >= 0
    follows[follows] = order.at(base_positions[follows]) == ids[follows]
    rows = LedgerRows(
        positions,
        np.ones(len(positions), np.int64),
        np.where(follows, base_positions, NOT_BASE),
        np.where(follows, -1, ids),
        weights.astype(np.float32, copy=False),
        provenance.astype(np.uint8, copy=False),
    )
    return joined(rows, share)


def decode(rows: LedgerRows, share: Share, first: int, last: int) -> Places:
    """The places with numbers [first, last) of ``share``."""
    numbers = share.numbers(rows.position)
    begin = np.maximum(numbers, first)
    counts = np.maximum(np.minimum(numbers + rows.n_places, last) - begin, 0)
    row = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    position = share.positions(begin[row] + within)
    base = rows.base_position[row]
    follows = base >= 0
    return Places(
        position,
        np.where(follows, base + position - rows.position[row], NOT_BASE),
        np.where(follows, -1, rows.sample_id[row]),
        rows.weight[row],
        rows.provenance[row],
    )


def joined(rows: LedgerRows, share: Share) -> LedgerRows:
    """The same places in as few rows as there can be, in the order of ``rows``."""
    if not len(rows.position):
        return rows
    numbers = share.numbers(rows.position)
    follows = rows.base_position >= 0
    told_by = (
        follows,
        np.where(follows, rows.base_position - rows.position, rows.sample_id),
        rows.weight.view(np.uint32),  # as bits: NaN is a weight like any other here
        rows.provenance,
    )
    goes_on = numbers[:-1] + rows.n_places[:-1] == numbers[1:]
    for column in told_by:
        goes_on &= column[1:] == column[:-1]
    first = np.flatnonzero(np.concatenate([[True], ~goes_on]))
    return rows.where(first)._replace(n_places=np.add.reduceat(rows.n_places, first))


def clipped(rows: LedgerRows, share: Share, last: int) -> LedgerRows:
    """The rows without places whose number is ``last`` or more."""
    numbers = share.numbers(rows.position)
    count = np.minimum(rows.n_places, last - numbers)
    return rows._replace(n_places=count).where(count > 0)
