"""How influence is spread over samples: concentration, net drive, and the tail's power law.

Every function takes a plain array of scores (one per sample; positive = training on the sample
promotes the unit) and leaves non-finite entries to the caller: they are refused, never dropped.

Sources: the paper's section 5.1 (top 10% of samples, power law) and appendix I.1 (net positive
drive); Clauset, Shalizi and Newman 2009, "Power-law distributions in empirical data", sections 3
and 4 (maximum likelihood exponent, cut-off by Kolmogorov-Smirnov distance, bootstrap p-value).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

Floats = NDArray[np.float64]

MIN_TAIL = 25
"""Fewest samples a tail is fitted to: below this the exponent's error exceeds a fifth of it."""


@dataclass(frozen=True)
class TailFit:
    """A continuous power law ``p(x) ~ x**-exponent`` for ``x >= cutoff``.

    Attributes:
        exponent: maximum likelihood estimate (the paper reports values close to 3).
        error: its asymptotic standard error, ``(exponent - 1) / sqrt(n_tail)``.
        cutoff: the score from which the law is fitted, in score units.
        n_tail: samples at or above the cutoff.
        ks: Kolmogorov-Smirnov distance between tail and law, in [0, 1].
        p_value: share of synthetic data sets drawn from the fitted law whose own fit is worse;
            at or below 0.1 the law is implausible. ``None`` when no bootstrap was asked for.
    """

    exponent: float
    error: float
    cutoff: float
    n_tail: int
    ks: float
    p_value: float | None

    @property
    def plausible(self) -> bool | None:
        """Whether the bootstrap leaves the power law standing (p > 0.1, Clauset's rule)."""
        return None if self.p_value is None else self.p_value > 0.1


@dataclass(frozen=True)
class Drive:
    """Positive against negative influence mass (appendix I.1).

    Attributes:
        positive: sum of the positive scores.
        negative: absolute sum of the negative scores.
    """

    positive: float
    negative: float

    @property
    def balance(self) -> float:
        """``(P - N) / (P + N)`` in [-1, 1]; 0 is an even contest. NaN when all scores are 0."""
        total = self.positive + self.negative
        return (self.positive - self.negative) / total if total > 0 else math.nan

    @property
    def ratio(self) -> float:
        """``P / N``: infinite without opponents, NaN when all scores are 0."""
        if self.negative == 0:
            return math.inf if self.positive > 0 else math.nan
        return self.positive / self.negative


def _scores(scores: ArrayLike) -> Floats:
    values = np.asarray(scores, dtype=np.float64).ravel()
    if values.size == 0:
        raise ValueError("no scores were given; a distribution needs at least one sample")
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {values.size} scores are not finite; leave them out and report their count"
        )
    return values


def top_count(n_samples: int, fraction: float) -> int:
    """How many samples "the top ``fraction``" are: ``fraction * n`` rounded, at least 1.

    Raises:
        ValueError: the fraction is outside (0, 1], or there is no sample.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction} is out of range: it must be in (0, 1]")
    if n_samples < 1:
        raise ValueError("no samples to take a top from")
    return max(1, round(fraction * n_samples))


def top_share(scores: ArrayLike, fraction: float = 0.10) -> float:
    """Share of all positive influence held by the top ``fraction`` of *all* samples.

    ``sum of max(0, s) over the top / sum of max(0, s)``, in [0, 1]; NaN when no score is positive.
    """
    values = _scores(scores)
    positive = np.sort(np.clip(values, 0.0, None))[::-1]
    total = float(positive.sum())
    if total == 0.0:
        return math.nan
    return float(positive[: top_count(values.size, fraction)].sum()) / total


def normal_top_share(fraction: float, *, mean: float = 0.0, sd: float = 1.0) -> float:
    """What :func:`top_share` tends to when the scores are normal noise: the yardstick to beat.

    For zero-mean noise and the top 10% this is 0.44, so a share of one half is by itself little
    evidence of concentration. Closed form: with ``E[X; X > t] = mean * Q + sd * pdf`` at the
    standardised threshold, the ratio of that at the top's quantile (or 0, if higher) and at 0.
    """
    top_count(1, fraction)
    if not sd > 0:
        raise ValueError(f"sd {sd} is out of range: it must be positive")

    def mass_above(threshold: float) -> float:
        z = (threshold - mean) / sd
        return float(mean * norm.sf(z) + sd * norm.pdf(z))

    cut = mean + sd * float(norm.isf(fraction)) if fraction < 1 else -math.inf
    return mass_above(max(cut, 0.0)) / mass_above(0.0)


def net_drive(scores: ArrayLike) -> Drive:
    """Positive and negative influence mass over all samples."""
    values = _scores(scores)
    return Drive(
        positive=float(values[values > 0].sum()), negative=float(-values[values < 0].sum())
    )


def _fit_sorted(ascending: Floats, starts: NDArray[np.int64]) -> tuple[float, int, float]:
    """Best (exponent, start index, KS distance) over candidate cut-offs of a sorted sample."""
    logs = np.log(ascending)
    best = (math.nan, -1, math.inf)
    for start in starts.tolist():
        tail = logs[start:] - logs[start]
        total = float(tail.sum())
        n = tail.size
        if total <= 0.0:
            continue
        slope = n / total
        law = -np.expm1(-slope * tail)
        steps = np.arange(n + 1) / n
        ks = max(float(np.abs(law - steps[1:]).max()), float(np.abs(law - steps[:-1]).max()))
        if ks < best[2]:
            best = (1.0 + slope, start, ks)
    return best


def _candidate_starts(n: int, candidates: int) -> NDArray[np.int64]:
    last = n - MIN_TAIL
    return np.unique(np.linspace(0, last, min(candidates, last + 1)).astype(np.int64))


def fit_tail(
    scores: ArrayLike, *, candidates: int = 60, n_bootstrap: int = 100, seed: int = 0
) -> TailFit | None:
    """Fit a power law to the upper tail of the positive scores.

    The exponent is the maximum likelihood one, ``1 + n / sum(log(x / cutoff))``; the cut-off is
    the one of ``candidates`` evenly spaced ranks with the smallest KS distance; the p-value comes
    from ``n_bootstrap`` samples of the same size that follow the law above the cut-off and the
    data below it, each fitted the same way.

    Args:
        scores: any scores; those above 0 are used.
        candidates: cut-offs tried; the tail keeps at least ``MIN_TAIL`` samples.
        n_bootstrap: synthetic data sets for the p-value; 0 leaves it out.
        seed: of the bootstrap's own generator.

    Returns:
        The fit, or ``None`` when fewer than ``MIN_TAIL`` scores are positive or all are equal.
    """
    values = _scores(scores)
    positive = np.sort(values[values > 0])
    if positive.size < MIN_TAIL:
        return None
    # A tail holds every score at its cut-off, where several are equal.
    spread = _candidate_starts(positive.size, candidates)
    starts = np.unique(np.searchsorted(positive, positive[spread]))
    exponent, start, ks = _fit_sorted(positive, starts)
    if start < 0:
        return None
    n_tail = positive.size - start
    p_value = None
    if n_bootstrap > 0:
        worse = 0
        rng = np.random.default_rng(seed)
        for _ in range(n_bootstrap):
            drawn = _draw_like(positive, start, exponent, rng=rng)
            worse += _fit_sorted(drawn, starts)[2] >= ks
        p_value = worse / n_bootstrap
    return TailFit(
        exponent=exponent,
        error=(exponent - 1.0) / math.sqrt(n_tail),
        cutoff=float(positive[start]),
        n_tail=int(n_tail),
        ks=ks,
        p_value=p_value,
    )


def _draw_like(
    positive: Floats, start: int, exponent: float, *, rng: np.random.Generator
) -> NDArray[Any]:
    """One sorted synthetic data set: the law above the cut-off, resampled data below it."""
    n = positive.size
    n_tail = int(rng.binomial(n, (n - start) / n)) if start else n
    uniform = rng.random(n_tail)
    tail = positive[start] * (1.0 - uniform) ** (-1.0 / (exponent - 1.0))
    body = rng.choice(positive[:start], size=n - n_tail) if start else positive[:0]
    return np.sort(np.concatenate([body, tail]))
