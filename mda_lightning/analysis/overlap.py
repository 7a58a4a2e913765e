"""How alike rankings of the same samples are: shared top sets, rank-biased overlap, correlation.

For heads it is the paper's figure 3b: do heads of one mechanism want the same data? Between ways
to rank samples it says how much one selection is another under a different name.

Source: the paper's section 5.2. Of a score table, ``{unit: table.mean_scores(unit)[1] for unit in
table.units}`` is what :func:`overlap_matrix` takes.

>>> scores = {"L0H0": [9.0, 8.0, 1.0, 2.0], "L0H1": [7.0, 1.0, 6.0, 0.0]}
>>> both = overlap_matrix(scores, fraction=0.5)
>>> both.of("L0H0", "L0H1").shared
1
>>> round(both.of("L0H0", "L0H1").jaccard, 3)
0.333
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import hypergeom, rankdata

from mda_lightning.analysis.distributions import top_count
from mda_lightning.analysis.rank_overlap import checked_persistence, expected_rbo, rbo_matrix

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class SetOverlap:
    """Two sets drawn from one pool.

    Attributes:
        shared, first, second, pool: sizes: of the intersection, of the sets, of the pool.
        jaccard: intersection over union, in [0, 1].
        expected: what ``jaccard`` is on average when one of the sets is random.
        p_value: chance that a random set shares at least so many (hypergeometric, one-sided).
    """

    shared: int
    first: int
    second: int
    pool: int
    jaccard: float
    expected: float
    p_value: float


def set_overlap(first: ArrayLike, second: ArrayLike, *, pool: int) -> SetOverlap:
    """Compare two sets of sample ids out of ``pool`` samples.

    Args:
        first, second: ids, each once.
        pool: how many samples both were chosen from.

    Raises:
        ValueError: a set is empty, names an id twice, or both together exceed the pool.
    """
    one, other = (np.asarray(ids).ravel() for ids in (first, second))
    for ids in (one, other):
        if ids.size == 0 or np.unique(ids).size < ids.size:
            raise ValueError(f"a set of {ids.size} ids: give at least one, each once")
    shared = int(np.intersect1d(one, other).size)
    if (union := one.size + other.size - shared) > pool:
        raise ValueError(f"{union} different ids come from a pool of {pool}; give the pool's size")
    return SetOverlap(
        shared=shared,
        first=one.size,
        second=other.size,
        pool=pool,
        jaccard=shared / union,
        expected=expected_jaccard(one.size, other.size, pool),
        p_value=float(hypergeom.sf(shared - 1, pool, one.size, other.size)),
    )


def expected_jaccard(first: int, second: int, pool: int) -> float:
    """Mean Jaccard index of a fixed and a random set of these sizes from one pool, exactly."""
    shared = np.arange(max(0, first + second - pool), min(first, second) + 1)
    chances = hypergeom.pmf(shared, pool, first, second)
    return float((chances * shared / (first + second - shared)).sum())


# -- matrices --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OverlapMatrix:
    """Every pair of U rankings of the same samples.

    Attributes:
        names: of the rankings, [U].
        pool: samples that all of them have a finite value for; ``n_excluded`` have not.
        depth: size of a top set; ties at its edge go by the samples' order, as in a plan.
        shared: sizes of the intersections of top sets, [U, U].
        jaccard, p_values: see :class:`SetOverlap`, [U, U]; the diagonal is 1 and NaN.
        rbo: extrapolated rank-biased overlap to ``depth``, [U, U].
        spearman: rank correlation over the whole pool, [U, U]; NaN for a constant ranking.
        expected_jaccard, expected_rbo: of a random ranking.
        p: persistence of RBO.
    """

    names: tuple[str, ...]
    pool: int
    n_excluded: int
    depth: int
    shared: Ints
    jaccard: Floats
    p_values: Floats
    rbo: Floats
    spearman: Floats
    expected_jaccard: float
    expected_rbo: float
    p: float

    def of(self, first: str, second: str) -> SetOverlap:
        """The top sets of one pair."""
        at = self.names.index(first), self.names.index(second)
        return SetOverlap(
            shared=int(self.shared[at]),
            first=self.depth,
            second=self.depth,
            pool=self.pool,
            jaccard=float(self.jaccard[at]),
            expected=self.expected_jaccard,
            p_value=float(self.p_values[at]),
        )

    def ordered(self, names: Sequence[str]) -> OverlapMatrix:
        """The same with rows and columns in this order; names left out are dropped."""
        order = [self.names.index(name) for name in names]
        grid = np.ix_(order, order)
        return replace(
            self,
            names=tuple(names),
            shared=self.shared[grid],
            jaccard=self.jaccard[grid],
            p_values=self.p_values[grid],
            rbo=self.rbo[grid],
            spearman=self.spearman[grid],
        )


def overlap_matrix(
    rankings: Mapping[str, ArrayLike], *, fraction: float = 0.10, p: float | None = None
) -> OverlapMatrix:
    """Compare every pair of rankings.

    Args:
        rankings: name -> values of the same samples in the same order, [N]; the highest come
            first. Samples without a finite value in every ranking are left out of all.
        fraction: share of the samples in a top set.
        p: persistence of RBO; None puts 0.9 of its weight on the top set.

    Raises:
        ValueError: no ranking, other lengths, a ranking without a finite value, or no sample that
            all have.
    """
    if not rankings:
        raise ValueError("no ranking was given")
    rows = [np.asarray(values, dtype=np.float64).ravel() for values in rankings.values()]
    names = tuple(rankings)
    if len({row.size for row in rows}) > 1:
        sizes = ", ".join(f"{name} {row.size}" for name, row in zip(names, rows, strict=True))
        raise ValueError(f"rankings are of different samples: {sizes}")
    values = np.stack(rows)
    finite = np.isfinite(values)
    for name, known in zip(names, finite, strict=True):
        if not known.any():
            raise ValueError(f"ranking {name} has no finite value; leave it out")
    kept = finite.all(axis=0)
    if not kept.any():
        raise ValueError("no sample has a finite value in all rankings; compare fewer at a time")
    values = values[:, kept]
    pool = values.shape[1]
    depth = top_count(pool, fraction)
    p = checked_persistence(p, depth)
    members = np.zeros(values.shape, dtype=np.float32)
    for row, order in zip(members, np.argsort(-values, axis=1, kind="stable"), strict=True):
        row[order[:depth]] = 1.0
    shared = np.rint(members @ members.T).astype(np.int64)
    p_values = hypergeom.sf(shared - 1, pool, depth, depth)
    np.fill_diagonal(p_values, np.nan)
    return OverlapMatrix(
        names=names,
        pool=pool,
        n_excluded=int((~kept).sum()),
        depth=depth,
        shared=shared,
        jaccard=shared / (2 * depth - shared),
        p_values=p_values,
        rbo=rbo_matrix(values, depth=depth, p=p),
        spearman=_spearman(values),
        expected_jaccard=expected_jaccard(depth, depth, pool),
        expected_rbo=expected_rbo(depth, pool, p),
        p=p,
    )


def _spearman(values: Floats) -> Floats:
    ranks = rankdata(values, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms: Floats = np.sqrt((ranks**2).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix: Floats = np.clip(ranks @ ranks.T / np.outer(norms, norms), -1.0, 1.0)
    return matrix


# -- block structure -------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockContrast:
    """Mean overlap among the leading heads, between them and the others, and among the others.

    Attributes:
        leading: their names.
        within, between, outside: means over pairs; ``outside`` is NaN with fewer than two others.
        p_value: share of the ways to name as many leading heads whose ``within - between`` is at
            least as large, this one included; no smaller than one over their number.
    """

    leading: tuple[str, ...]
    within: float
    between: float
    outside: float
    p_value: float

    @property
    def contrast(self) -> float:
        """``within - between``: positive when the leading heads are a block of their own."""
        return self.within - self.between


def block_contrast(
    matrix: ArrayLike,
    names: Sequence[str],
    leading: Sequence[str],
    *,
    most_exact: int = 20_000,
    seed: int = 0,
) -> BlockContrast:
    """Whether some heads overlap more among themselves than with the others (figure 3b).

    Args:
        matrix: symmetric, [U, U]; the diagonal is not used.
        names: of its rows.
        leading: at least two of them, and not all.
        most_exact: with more ways to choose than this, that many are drawn instead.
        seed: of the draws.

    Raises:
        ValueError: a name that is not there, fewer than two leading heads, or no other.
    """
    table = np.array(matrix, dtype=np.float64)
    size = len(names)
    absent = sorted(set(leading) - set(names))
    chosen = np.isin(np.asarray(names), np.asarray(leading))
    count = int(chosen.sum())
    if absent or not 2 <= count < size:
        raise ValueError(
            f"{len(leading)} leading of {size} rows{f', {absent[0]} not one' if absent else ''}: "
            "two at least and not all are needed"
        )
    np.fill_diagonal(table, 0.0)
    within, between, outside = _block_means(table, chosen[None, :])
    ways = _ways(size, count, most_exact, seed)
    others_within, others_between, _ = _block_means(table, ways)
    least = within[0] - between[0] - 1e-12
    more = int((others_within - others_between >= least).sum())
    exact = math.comb(size, count) <= most_exact
    return BlockContrast(
        leading=tuple(name for name, one in zip(names, chosen, strict=True) if one),
        within=float(within[0]),
        between=float(between[0]),
        outside=float(outside[0]),
        p_value=more / len(ways) if exact else (more + 1) / (len(ways) + 1),
    )


def _block_means(table: Floats, chosen: Bools) -> tuple[Floats, Floats, Floats]:
    """Means over pairs for each way to choose, rows of ``chosen`` [B, U], each [B]."""
    inside = chosen.astype(np.float64)
    count, size = inside.sum(axis=1), table.shape[0]
    rest = size - count
    within = ((inside @ table) * inside).sum(axis=1)
    between = ((inside @ table) * (1 - inside)).sum(axis=1)
    outside = (((1 - inside) @ table) * (1 - inside)).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        pairs_outside = rest * (rest - 1)
        return within / (count * (count - 1)), between / (count * rest), outside / pairs_outside


def _ways(size: int, count: int, most_exact: int, seed: int) -> Bools:
    if math.comb(size, count) <= most_exact:
        picks = np.array(list(combinations(range(size), count)))
    else:
        rng = np.random.default_rng(seed)
        picks = np.argsort(rng.random((most_exact, size)), axis=1)[:, :count]
    ways = np.zeros((len(picks), size), dtype=bool)
    np.put_along_axis(ways, picks, True, axis=1)
    return ways
