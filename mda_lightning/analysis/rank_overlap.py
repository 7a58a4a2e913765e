"""Rank-biased overlap (RBO): how alike two rankings are, the more so the higher up they agree.

Sources: Webber, Moffat and Zobel 2010, "A similarity measure for indefinite rankings" (equations
21 and 23); Corsi and Urbano 2024, "The treatment of ties in rank-biased overlap" (its expectation
over the orders of tied samples).

>>> values = [9.0, 8.0, 1.0, 2.0]
>>> round(rank_biased_overlap(values, [8.0, 9.0, 1.0, 2.0], depth=4, p=0.9), 6)
0.9
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import rankdata

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TOP_WEIGHT = 0.9
"""Share of RBO's weight that the compared depth has, where no persistence is given."""


def top_weight(depth: int, p: float) -> float:
    """Share of RBO's weight on the first ``depth`` ranks (equation 21 of Webber et al.)."""
    if depth < 1 or not 0 < p < 1:
        raise ValueError(f"depth {depth} must be at least 1 and p {p} inside (0, 1)")
    before = np.arange(1, depth)
    rest = -math.log1p(-p) - float((np.power(p, before) / before).sum())
    return float(1 - p ** (depth - 1) + (1 - p) / p * depth * rest)


def persistence(depth: int, weight: float = TOP_WEIGHT) -> float:
    """The p of RBO that puts ``weight`` of it on the first ``depth`` ranks.

    Raises:
        ValueError: depth below 1, or weight outside (0, 1).
    """
    if depth < 1 or not 0 < weight < 1:
        raise ValueError(f"depth {depth} must be at least 1 and weight {weight} inside (0, 1)")
    lowest, highest = 1e-9, 1 - 1e-9 / depth
    return float(brentq(lambda p: top_weight(depth, p) - weight, lowest, highest, xtol=1e-14))


def rank_biased_overlap(
    first: ArrayLike, second: ArrayLike, *, depth: int, p: float | None = None
) -> float:
    """Extrapolated RBO of two rankings of the same samples, known down to ``depth``; in [0, 1].

    ``X_k / k * p**k + (1 - p) / p * sum_{d <= k} X_d / d * p**d`` with X_d the number of samples
    among the first d of both (equation 23). Tied samples have no order: X_d is then its mean over
    all orders, those of the two rankings independent (RBO^a of Corsi and Urbano).

    Args:
        first, second: values, the highest ranks first, [N], finite.
        depth: k, at most N.
        p: persistence, in (0, 1); None puts ``TOP_WEIGHT`` on the first ``depth`` ranks.

    Raises:
        ValueError: other shapes, values that are not finite, or a depth or p out of range.
    """
    one, other = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if one.shape != other.shape or one.ndim != 1:
        raise ValueError(
            f"rankings have shapes {one.shape} and {other.shape}: give values of the same samples"
        )
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise ValueError("a value is not finite; leave that sample out of both rankings")
    if not 1 <= depth <= one.size:
        raise ValueError(f"depth {depth} is out of range: there are {one.size} samples")
    shared = _shared_by_depth(_Places.of(one, depth), _Places.of(other, depth), depth)
    return _extrapolated(shared / np.arange(1, depth + 1), checked_persistence(p, depth))


def expected_rbo(depth: int, pool: int, p: float | None = None) -> float:
    """Mean of :func:`rank_biased_overlap` when one ranking is random: X_d is d**2 / pool."""
    if not 1 <= depth <= pool:
        raise ValueError(f"depth {depth} is out of range: there are {pool} samples")
    return _extrapolated(np.arange(1, depth + 1) / pool, checked_persistence(p, depth))


def checked_persistence(p: float | None, depth: int) -> float:
    """``p``, or :func:`persistence` of the depth where it is None."""
    if p is None:
        return persistence(depth)
    if not 0 < p < 1:
        raise ValueError(f"p {p} is out of range: it must be inside (0, 1)")
    return p


def _extrapolated(agreement: Floats, p: float) -> float:
    powers = p ** np.arange(1, agreement.size + 1)
    value = agreement[-1] * powers[-1] + (1 - p) / p * float((agreement * powers).sum())
    return float(min(value, 1.0))  # rounding may leave identical rankings a hair above


@dataclass(frozen=True)
class _Places:
    """Where each sample stands: ``above`` others are before it for sure, ``size`` share its value.

    ``members`` are the samples that some order puts among the first ``depth``.
    """

    above: Ints
    size: Ints
    members: Ints
    tied: bool

    @classmethod
    def of(cls, values: Floats, depth: int) -> _Places:
        last = rankdata(-values, method="max").astype(np.int64)
        above = rankdata(-values, method="min").astype(np.int64) - 1
        members = np.flatnonzero(above < depth)
        size = last - above
        return cls(above, size, members, bool((size[members] > 1).any()))


def _shared_by_depth(first: _Places, second: _Places, depth: int) -> Floats:
    """X_d, d = 1..depth, [depth]."""
    if not first.tied and not second.tied:
        both = np.maximum(first.above[second.members], second.above[second.members])
        return np.cumsum(np.bincount(both[both < depth], minlength=depth)).astype(np.float64)
    # A sample is among the first d with chance clip((d - above) / size, 0, 1). The product of two
    # such chances is a polynomial of d between four corners; coefficients are added up there.
    rows = first.members[second.above[first.members] < depth]
    low_1, wide_1 = first.above[rows], first.size[rows]
    low_2, wide_2 = second.above[rows], second.size[rows]
    high_1, high_2 = low_1 + wide_1, low_2 + wide_2
    changes = np.zeros((3, depth + 2))

    def add(start: Ints, stop: Ints, coefficients: tuple[Floats, Floats, Floats]) -> None:
        for power, values in enumerate(coefficients):
            for at, sign in ((start, 1.0), (stop, -1.0)):
                places = np.minimum(at + 1, depth + 1)
                weights = np.where(start < stop, sign * values, 0.0)
                changes[power] += np.bincount(places, weights, minlength=depth + 2)

    none = np.zeros(len(rows))
    one = np.ones(len(rows))
    slope_1, slope_2 = 1.0 / wide_1, 1.0 / wide_2
    both = slope_1 * slope_2
    add(
        np.maximum(low_1, low_2),
        np.minimum(high_1, high_2),
        (both * low_1 * low_2, -both * (low_1 + low_2), both),
    )
    add(np.maximum(high_1, low_2), high_2, (-slope_2 * low_2, slope_2, none))
    add(np.maximum(high_2, low_1), high_1, (-slope_1 * low_1, slope_1, none))
    add(np.maximum(high_1, high_2), np.full(len(rows), depth), (one, none, none))
    d = np.arange(1.0, depth + 1)
    terms = np.cumsum(changes, axis=1)[:, 1 : depth + 1]
    shared: Floats = terms[0] + d * (terms[1] + d * terms[2])
    return shared


def rbo_matrix(values: Floats, *, depth: int, p: float) -> Floats:
    """:func:`rank_biased_overlap` of every pair of rows of ``values`` [U, N], [U, U]."""
    places = [_Places.of(row, depth) for row in values]
    depths = np.arange(1, depth + 1)
    matrix = np.eye(len(places))
    for i, one in enumerate(places):
        for j in range(i):
            agreement = _shared_by_depth(one, places[j], depth) / depths
            matrix[i, j] = matrix[j, i] = _extrapolated(agreement, p)
    return matrix
