"""Which samples come first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def mean_by_sample(ids: Ints, scores: NDArray[np.float32]) -> tuple[Ints, NDArray[np.float64]]:
    """Ascending unique ids [M] and the mean of each one's scores [M], from rows [N]."""
    means = Means(ids)
    return means.ids, means.of(scores)


class Means:
    """The mean of each sample's scores, for many columns of scores over the same rows.

    Args:
        ids: of the rows [N].
        rows: which of them count, bool [N]; None is all.

    Attributes:
        ids: ascending unique sample ids [M].
        first_rows: a row of each of them [M].
    """

    def __init__(self, ids: Ints, rows: NDArray[np.bool_] | None = None) -> None:
        self._rows = None if rows is None else np.flatnonzero(rows)
        own = ids if self._rows is None else ids[self._rows]
        self.ids, first, self._which = np.unique(own, return_index=True, return_inverse=True)
        self.first_rows: Ints = first if self._rows is None else self._rows[first]
        self._counts = np.bincount(self._which, minlength=len(self.ids))

    def of(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """Means [M] of a column [N] over each sample's finite scores; NaN where it has none.

        A sample that was masked once has no score of that time, and keeps those of the others.
        """
        own = (scores if self._rows is None else scores[self._rows]).astype(np.float64)
        finite = np.isfinite(own)
        sums = np.bincount(self._which, weights=np.where(finite, own, 0.0), minlength=len(self.ids))
        counts = self._counts - np.bincount(self._which[~finite], minlength=len(self.ids))
        means: NDArray[np.float64] = np.full(len(self.ids), np.nan)
        np.divide(sums, counts, out=means, where=counts > 0)
        return means


def extreme(
    ids: Ints,
    keys: NDArray[np.float64],
    *,
    fraction: float | None,
    count: int | None,
    of: str,
) -> Ints:
    """The ids with the smallest finite keys, smallest first, ties by id.

    Args:
        ids: ascending [M].
        keys: [M].
        fraction: of the finite ones, in (0, 1]; at least one.
        count: instead of a fraction.
        of: what is ranked, for the error message.

    Raises:
        ValueError: out of range, or fewer finite ones than asked for.
    """
    finite = np.isfinite(keys)
    ids, keys = ids[finite], keys[finite]
    if count is None:
        assert fraction is not None
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is {fraction}; it is a share of the samples, (0, 1]")
        count = max(1, round(fraction * len(ids)))
    if not 0 < count <= len(ids):
        raise ValueError(
            f"{count} samples were asked for of {of}, which has {len(ids)} with a finite score"
        )
    # Sorting what is wanted alone: a tenth of a million samples is in order in a tenth of the time.
    last = np.partition(keys, count - 1)[count - 1]
    chosen = np.flatnonzero(keys <= last)
    return ids[chosen[np.argsort(keys[chosen], kind="stable")[:count]]]


def by_best_place(rankings: Sequence[Ints], size: int) -> Ints:
    """The union of rankings, each item once, by its best place, then by the order of rankings.

    Args:
        rankings: of items 0 .. size - 1, best first, none twice in one of them.
        size: how many there are.
    """
    if not rankings:
        raise ValueError("no unit was given; name at least one")
    nowhere = np.iinfo(np.int64).max
    best = np.full(size, nowhere)
    for number, ranking in enumerate(rankings):
        places = np.arange(len(ranking)) * len(rankings) + number
        best[ranking] = np.minimum(best[ranking], places)
    found = np.flatnonzero(best != nowhere)
    return found[np.argsort(best[found])]
