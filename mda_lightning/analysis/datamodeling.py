"""Linear datamodeling score (LDS): do summed scores predict what training on a subset gives?

A model is trained on each of S random subsets of the samples and an outcome is measured, here the
head's μ. A ranking predicts the outcome by the sum of its scores over the subset; its LDS is
Spearman's correlation of prediction and outcome over the subsets (Ilyas et al. 2022,
"Datamodels"; Park et al. 2023, "TRAK", definition 2.3). 0 is no better than chance; noise in
training and in μ keeps even perfect scores below 1, so values compare within a study.

>>> kept = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]], dtype=bool)
>>> mu = [0.30, 0.25, 0.22, 0.20]
>>> float(predictions(kept, [2.0, 1.0, 0.0, 0.0])[0])
3.0
>>> round(rank_correlation(predictions(kept, [2.0, 1.0, 0.0, 0.0]), mu), 3)
1.0
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap, rankdata
from scipy.stats import t as student_t

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

LEAST_SUBSETS = 5
"""Fewest subsets with an outcome: with fewer, no order is improbable (1 in 24 at four)."""

MOST_MISSING = 0.5
"""Largest share of the samples that a ranking may have no finite value for."""


def predictions(kept: ArrayLike, values: ArrayLike) -> Floats:
    """The sum of the values of each subset's samples, [S].

    A sample without a finite value counts as the mean of the others: it neither speaks for a
    subset nor against it.

    Args:
        kept: which samples each subset holds, bool [S, N].
        values: [N]; positive means that training on the sample promotes the unit.

    Raises:
        ValueError: shapes that do not match, or more than ``MOST_MISSING`` of the values not
            finite.
    """
    subsets = np.asarray(kept, dtype=bool)
    scores = np.asarray(values, dtype=np.float64)
    if subsets.ndim != 2 or scores.shape != subsets.shape[1:]:
        raise ValueError(
            f"subsets have shape {subsets.shape} and values {scores.shape}; [S, N] and [N] needed"
        )
    finite = np.isfinite(scores)
    if not finite.any() or 1 - finite.mean() > MOST_MISSING:
        raise ValueError(
            f"{int((~finite).sum())} of {scores.size} samples of the subsets have no finite value, "
            f"more than {MOST_MISSING:.0%}; score the samples that the subsets were drawn from"
        )
    filled = np.where(finite, scores, scores[finite].mean())
    sums: Floats = subsets.astype(np.float64) @ filled
    return sums


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's correlation, ties with their mean rank; NaN where one is constant."""
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    return float(_correlations(one[None], other[None])[0])


@dataclass(frozen=True)
class LinearScore:
    """The LDS of one ranking in one seed.

    Attributes:
        n_subsets: with an outcome.
        n_missing: samples whose value was not finite, see :func:`predictions`.
        value: Spearman's correlation; NaN for a ranking that predicts the same for every subset.
        low, high: 95% interval over subsets (bootstrap, bias-corrected and accelerated); NaN where
            it does not exist, as for a correlation of 1.
        p_value: share of random pairings of predictions with outcomes that correlate at least as
            much, one-sided.
    """

    ranking: str
    seed: int
    n_subsets: int
    n_missing: int
    value: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Difference:
    """LDS of ``ranking`` minus that of ``other`` on the same subsets.

    Attributes:
        per_seed: (seed, value, low, high), the interval over the seed's subsets, paired bootstrap.
        mean, low, high: over seeds, 95% Student's t interval; the interval is NaN with one seed.
    """

    ranking: str
    other: str
    per_seed: tuple[tuple[int, float, float, float], ...]
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class RankingScore:
    """The LDS of one ranking over seeds.

    Attributes:
        per_seed: one a seed that could be judged.
        mean, low, high: over seeds, 95% Student's t interval; the interval is NaN with one seed.
        p_value: share of random pairings, drawn in every seed, whose mean correlation is at least
            as large, one-sided.
    """

    ranking: str
    per_seed: tuple[LinearScore, ...]
    mean: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class DatamodelingTable:
    """LDS of several rankings.

    Attributes:
        rankings: in the order given.
        differences: the reference minus every other ranking; empty without a reference.
        notes: what could not be judged, in sentences.
    """

    rankings: tuple[RankingScore, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class SubsetOutcomes:
    """What training on random subsets of one seed's samples gave.

    Attributes:
        sample_ids: int64 [N], ascending or not, each once.
        kept: bool [S, N].
        outcomes: float64 [S]; NaN where a subset was not trained on.
        before: the outcome's value before training on any; None where it is not known.
        about: what was done, JSON values.
    """

    seed: int
    sample_ids: Ints
    kept: Bools
    outcomes: Floats
    before: float | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (self.outcomes.size, self.sample_ids.size)
        if self.kept.shape != shape or np.unique(self.sample_ids).size != self.sample_ids.size:
            raise ValueError(
                f"subsets of seed {self.seed} have shape {self.kept.shape} for {shape[0]} outcomes "
                f"and {shape[1]} samples, each of which must be named once"
            )

    def aligned(self, sample_ids: ArrayLike, values: ArrayLike) -> Floats:
        """A ranking's values of these samples, [N]; NaN for those that it does not have."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        given = np.asarray(values, dtype=np.float64)
        order = np.argsort(ids)
        at = np.searchsorted(ids, self.sample_ids, sorter=order)
        row = order[np.minimum(at, ids.size - 1)] if ids.size else np.zeros_like(at)
        found = ids[row] == self.sample_ids if ids.size else np.zeros(at.shape, dtype=bool)
        return np.where(found, given[row] if ids.size else math.nan, math.nan)


def datamodeling_table(
    subsets: Sequence[SubsetOutcomes],
    values: Mapping[str, Mapping[int, ArrayLike]],
    *,
    reference: str | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> DatamodelingTable:
    """LDS of every ranking in every seed, means over seeds, and paired differences.

    Args:
        subsets: one a seed.
        values: ranking -> seed -> values aligned with that seed's ``sample_ids``, [N].
        reference: the ranking that the others are compared with.
        n_resamples: of each bootstrap and each permutation test.
        seed: of their own generators.

    Raises:
        ValueError: a reference that is no ranking, or a seed named twice.
    """
    if reference is not None and reference not in values:
        raise ValueError(f"reference {reference!r} is no ranking; there are: {', '.join(values)}")
    if len({one.seed for one in subsets}) < len(subsets):
        raise ValueError("a seed is named twice; give the subsets of each seed once")
    notes: list[str] = []
    predicted: dict[str, dict[int, Floats]] = {name: {} for name in values}
    rows: dict[str, list[LinearScore]] = {name: [] for name in values}
    nulls: dict[str, list[Floats]] = {name: [] for name in values}
    for one in subsets:
        known = np.isfinite(one.outcomes)
        if (n := int(known.sum())) < LEAST_SUBSETS:
            notes.append(
                f"Seed {one.seed}: {n} subsets have an outcome; a correlation is computed from "
                f"{LEAST_SUBSETS} on."
            )
            continue
        outcomes = one.outcomes[known]
        rng = np.random.default_rng([seed, one.seed])
        shuffled = rng.permuted(np.tile(rankdata(outcomes), (n_resamples, 1)), axis=1)
        for name, by_seed in values.items():
            if one.seed not in by_seed:
                notes.append(f"Seed {one.seed}: no values of ranking {name}.")
                continue
            scores = np.asarray(by_seed[one.seed], dtype=np.float64)
            try:
                guess = predictions(one.kept[known], scores)
            except ValueError as error:
                notes.append(f"Seed {one.seed}, ranking {name}: {error}.")
                continue
            predicted[name][one.seed] = guess
            value = rank_correlation(guess, outcomes)
            null = _correlations(np.broadcast_to(guess, shuffled.shape), shuffled)
            low, high = _interval((guess,), outcomes, n_resamples, seed)
            rows[name].append(
                LinearScore(
                    ranking=name,
                    seed=one.seed,
                    n_subsets=n,
                    n_missing=int((~np.isfinite(scores)).sum()),
                    value=value,
                    low=low,
                    high=high,
                    p_value=_p_value(null, value),
                )
            )
            nulls[name].append(null)
    outcomes_of = {one.seed: one.outcomes[np.isfinite(one.outcomes)] for one in subsets}
    differences = [
        _difference(reference, name, predicted, outcomes_of, n_resamples=n_resamples, seed=seed)
        for name in values
        if reference is not None and name != reference
    ]
    return DatamodelingTable(
        rankings=tuple(_over_seeds(name, rows[name], nulls[name]) for name in values),
        differences=tuple(one for one in differences if one is not None),
        notes=tuple(notes),
    )


def linear_datamodeling_score(
    kept: ArrayLike,
    values: ArrayLike,
    outcomes: ArrayLike,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> LinearScore:
    """The LDS of one ranking from one set of subsets, with its interval and p value.

    Args:
        kept: bool [S, N].
        values: [N].
        outcomes: [S]; subsets without a finite one are left out.

    Raises:
        ValueError: fewer than ``LEAST_SUBSETS`` outcomes, other shapes, or too many values that
            are not finite.
    """
    scores = np.asarray(values, dtype=np.float64)
    measured = np.asarray(outcomes, dtype=np.float64)
    subsets = np.asarray(kept, dtype=bool)
    one = SubsetOutcomes(0, np.arange(scores.size), subsets, measured)
    table = datamodeling_table([one], {"": {0: scores}}, n_resamples=n_resamples, seed=seed)
    if not table.rankings[0].per_seed:
        raise ValueError(table.notes[0])
    return table.rankings[0].per_seed[0]


def seed_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95% Student's t interval of one number a seed; the interval is NaN with one."""
    known = np.asarray(values, dtype=np.float64)
    if known.size == 0:
        return math.nan, math.nan, math.nan
    mean = float(known.mean())
    if known.size == 1:
        return mean, math.nan, math.nan
    half = float(student_t.ppf(0.975, known.size - 1) * known.std(ddof=1) / math.sqrt(known.size))
    return mean, mean - half, mean + half


def _over_seeds(name: str, rows: list[LinearScore], nulls: list[Floats]) -> RankingScore:
    known = [i for i, row in enumerate(rows) if math.isfinite(row.value)]
    mean, low, high = seed_interval([rows[i].value for i in known])
    null = np.mean([nulls[i] for i in known], axis=0) if known else np.zeros(0)
    return RankingScore(name, tuple(rows), mean, low, high, _p_value(null, mean))


def _difference(
    reference: str,
    name: str,
    predicted: Mapping[str, Mapping[int, Floats]],
    outcomes: Mapping[int, Floats],
    *,
    n_resamples: int,
    seed: int,
) -> Difference | None:
    per_seed = []
    for number in predicted[reference].keys() & predicted[name].keys():
        pair = predicted[reference][number], predicted[name][number]
        first, second = (rank_correlation(one, outcomes[number]) for one in pair)
        if math.isfinite(first - second):
            low, high = _interval(pair, outcomes[number], n_resamples, seed)
            per_seed.append((number, first - second, low, high))
    if not per_seed:
        return None
    per_seed.sort()
    mean, low, high = seed_interval([value for _, value, _, _ in per_seed])
    return Difference(reference, name, tuple(per_seed), mean, low, high)


def _interval(
    guesses: Sequence[Floats], outcomes: Floats, n_resamples: int, seed: int
) -> tuple[float, float]:
    """BCa interval of one guess's correlation with the outcomes, or of two guesses' difference."""

    def statistic(rows: Ints, axis: int = -1) -> Floats:
        flat = rows.reshape(-1, rows.shape[-1])
        measured = outcomes[flat]
        values = [_correlations(guess[flat], measured) for guess in guesses]
        both = values[0] if len(values) == 1 else values[0] - values[1]
        return both.reshape(rows.shape[:-1])

    everything = np.arange(outcomes.size)
    with warnings.catch_warnings():  # a degenerate sample has no interval, which NaN says
        warnings.simplefilter("ignore")
        found = bootstrap(
            (everything,),
            statistic,
            n_resamples=n_resamples,
            vectorized=True,
            method="BCa",
            random_state=np.random.default_rng([seed, 1]),
        )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _correlations(first: Floats, second: Floats) -> Floats:
    """Spearman's correlation of each pair of rows, [B]; NaN where one is constant."""
    one, other = (rankdata(rows, axis=-1) for rows in (first, second))
    one = one - one.mean(axis=-1, keepdims=True)
    other = other - other.mean(axis=-1, keepdims=True)
    norms = np.sqrt((one**2).sum(axis=-1) * (other**2).sum(axis=-1))
    values: Floats = np.full(norms.shape, np.nan)
    np.divide((one * other).sum(axis=-1), norms, out=values, where=norms > 0)
    return np.clip(values, -1.0, 1.0)


def _p_value(null: Floats, value: float) -> float:
    if not math.isfinite(value) or null.size == 0:
        return math.nan
    return (int((null >= value - 1e-12).sum()) + 1) / (null.size + 1)
