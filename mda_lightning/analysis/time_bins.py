"""Whether influence comes evenly over training: the paper's section 5.3 and appendix I.2.

A bin is a stretch of optimizer steps. Of each: how many samples, how much influence, how many of
the top set. Uniformity is asked three ways: does every bin hold its share of the top set (Pearson's
chi-square test of homogeneity), how far do the shares scatter beyond chance (index of dispersion),
and does mean influence drift over steps (a slope with its interval).

>>> steps = [0, 0, 1, 1, 2, 2, 3, 3]
>>> scores = [4.0, -1.0, 0.0, 1.0, 3.0, 0.0, 2.0, -1.0]
>>> [(one.start, one.stop, one.n, one.total) for one in time_bins(steps, scores, width=2)]
[(0, 2, 4, 4.0), (2, 4, 4, 4.0)]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2, hypergeom
from scipy.stats import t as student_t

from mda_lightning.analysis.distributions import net_drive, top_count

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

WIDTH = 100
"""Steps in a bin, as in the paper."""

LEAST_EXPECTED = 5.0
"""Below this many expected top samples in a bin the chi-square law is not to be trusted."""


@dataclass(frozen=True)
class TimeBin:
    """The samples of steps [start, stop).

    Attributes:
        n: samples; ``top`` of them are in the top set.
        total, mean: of their scores; the mean is NaN in an empty bin.
        error: standard error of the mean; NaN below two samples.
        positive_share: share of the samples with a score above 0.
        balance: net drive, ``(P - N) / (P + N)``; see
            :class:`~mda_lightning.analysis.distributions.Drive`.
        low, high: central 95% range of ``top`` for a random top set.
    """

    start: int
    stop: int
    n: int
    top: int
    total: float
    mean: float
    error: float
    positive_share: float
    balance: float
    low: int
    high: int

    @property
    def top_share(self) -> float:
        """Share of the bin's samples that are in the top set; NaN in an empty bin."""
        return self.top / self.n if self.n else math.nan


@dataclass(frozen=True)
class Slope:
    """Least-squares slope of score over step.

    Attributes:
        per_100_steps: in score units; ``low`` and ``high`` its 95% interval, with errors clustered
            by step (samples of one step share weights), Student's t with one degree of freedom
            less than there are steps. NaN with fewer than three steps.
        drift: the slope over the whole range of steps, in standard deviations of the scores.
    """

    per_100_steps: float
    low: float
    high: float
    drift: float


@dataclass(frozen=True)
class Uniformity:
    """How evenly the top set lies over bins of one width.

    Attributes:
        n_bins: bins with samples.
        chi_square: Pearson's statistic of the table bins x (top, other); 0 with one bin.
        degrees: ``n_bins - 1``.
        p_value: its upper tail; NaN with one bin.
        drawn: whether ``p_value`` is from random top sets of the same size instead of the
            chi-square law, because a bin expects fewer than ``LEAST_EXPECTED`` of them.
        dispersion: ``chi_square / degrees``, variance over mean of the counts, corrected for
            drawing without replacement: 1 on average for a random set; NaN with one bin.
        lowest, highest: share of a bin's samples that are in the top set, over bins.
        positive_bins: share of bins whose net drive is positive.
    """

    width: int
    n_bins: int
    chi_square: float
    degrees: int
    p_value: float
    drawn: bool
    dispersion: float
    lowest: float
    highest: float
    positive_bins: float


def time_bins(
    steps: ArrayLike,
    scores: ArrayLike,
    *,
    width: int = WIDTH,
    stride: int | None = None,
    fraction: float = 0.10,
    start: int | None = None,
) -> list[TimeBin]:
    """Cut steps into bins and summarise the scores in each.

    Args:
        steps: at which each sample was trained on, [N].
        scores: finite, [N].
        width: steps in a bin; the last may hold fewer, and so fewer samples.
        stride: steps from one bin's start to the next; None is ``width``. A smaller one gives
            sliding windows, of which only full ones are kept (appendix I.2).
        fraction: share of the samples that are the top set; ties at its edge go by position.
        start: of the first bin; None is the first step.

    Raises:
        ValueError: other lengths, no sample, scores that are not finite, a step before ``start``,
            or a width or stride below 1.
    """
    at, values = _checked(steps, scores)
    first = int(at.min()) if start is None else start
    jump = width if stride is None else stride
    if width < 1 or jump < 1:
        raise ValueError(f"width {width} and stride {jump} are steps: at least 1")
    if at.min() < first:
        raise ValueError(f"step {at.min()} is before the first bin's start, {first}")
    top = top_mask(values, fraction)
    order = np.argsort(at, kind="stable")
    at, values, top = at[order], values[order], top[order]
    last = int(at[-1]) + 1
    starts = np.arange(first, last, jump)
    if jump < width and (full := starts[starts + width <= last]).size:
        starts = full
    edges = np.searchsorted(at, [starts, starts + width])
    return [
        _bin(int(begin), width, values[low:high], top[low:high], values.size, int(top.sum()))
        for begin, low, high in zip(starts, *edges, strict=True)
    ]


def top_mask(scores: Floats, fraction: float) -> Bools:
    """Which of the scores [N] are the top ``fraction``; ties at the edge go by position."""
    mask = np.zeros(scores.size, dtype=bool)
    mask[np.argsort(-scores, kind="stable")[: top_count(scores.size, fraction)]] = True
    return mask


def uniformity(
    steps: ArrayLike,
    scores: ArrayLike,
    *,
    width: int = WIDTH,
    fraction: float = 0.10,
    start: int | None = None,
    n_draws: int = 4000,
    seed: int = 0,
) -> Uniformity:
    """Test whether the top set lies evenly over bins, given how many samples each bin has.

    Args:
        steps, scores, width, fraction, start: as for :func:`time_bins`.
        n_draws, seed: of random top sets, where bins are too small for the chi-square law.

    Raises:
        ValueError: as :func:`time_bins`.
    """
    bins = [
        one
        for one in time_bins(steps, scores, width=width, fraction=fraction, start=start)
        if one.n
    ]
    sizes = np.array([one.n for one in bins])
    tops = np.array([one.top for one in bins])
    chosen, degrees = int(tops.sum()), len(bins) - 1
    p_value, statistic, drawn = math.nan, 0.0, False
    if degrees and chosen < sizes.sum():
        statistic = float(_chi_square(tops[None], sizes)[0])
        drawn = bool((sizes * chosen / sizes.sum()).min() < LEAST_EXPECTED)
        if drawn:
            rng = np.random.default_rng(seed)
            random = rng.multivariate_hypergeometric(sizes, chosen, size=n_draws)
            more = int((_chi_square(random, sizes) >= statistic - 1e-9).sum())
            p_value = (more + 1) / (n_draws + 1)
        else:
            p_value = float(chi2.sf(statistic, degrees))
    shares = tops / sizes
    return Uniformity(
        width=width,
        n_bins=len(bins),
        chi_square=statistic,
        degrees=degrees,
        p_value=p_value,
        drawn=drawn,
        dispersion=statistic / degrees if degrees else math.nan,
        lowest=float(shares.min()),
        highest=float(shares.max()),
        positive_bins=float(np.mean([one.balance > 0 for one in bins])),
    )


def influence_slope(steps: ArrayLike, scores: ArrayLike) -> Slope:
    """Whether mean influence rises or falls over steps; see :class:`Slope`.

    Raises:
        ValueError: as :func:`time_bins`.
    """
    at, values = _checked(steps, scores)
    centred = at - at.mean()
    spread = float(centred @ centred)
    if spread == 0.0:
        return Slope(math.nan, math.nan, math.nan, math.nan)
    slope = float(centred @ values) / spread
    sd = float(values.std())
    drift = slope * float(at.max() - at.min()) / sd if sd > 0 else 0.0
    _, step_of = np.unique(at, return_inverse=True)
    n, groups = values.size, int(step_of.max()) + 1
    if groups < 3:
        return Slope(100 * slope, math.nan, math.nan, drift)
    residuals = values - values.mean() - slope * centred
    moments = np.bincount(step_of, weights=centred * residuals)
    correction = groups / (groups - 1) * (n - 1) / (n - 2)
    error = math.sqrt(correction * float(moments @ moments)) / spread
    half = float(student_t.ppf(0.975, groups - 1)) * error
    return Slope(100 * slope, 100 * (slope - half), 100 * (slope + half), drift)


def widths_for(n_steps: int, width: int = WIDTH) -> tuple[int, ...]:
    """Bin widths to try over ``n_steps``: a quarter, half, once and twice ``width``.

    Of those, the ones that give at least two bins; at least one in any case. A range shorter than
    two bins is cut in four instead.
    """
    wanted: Sequence[int] = (width // 4, width // 2, width, 2 * width)
    usable = tuple(w for w in wanted if w >= 1 and n_steps >= 2 * w)
    return usable or (max(1, math.ceil(n_steps / 4)),)


def _chi_square(tops: Ints, sizes: Ints) -> Floats:
    """Pearson's statistic of bins x (top, other) for rows of counts [B, bins], [B]."""
    share = tops.sum(axis=1, keepdims=True) / sizes.sum()
    statistic: Floats = ((tops - sizes * share) ** 2 / (sizes * share * (1 - share))).sum(axis=1)
    return statistic


def _bin(start: int, width: int, values: Floats, top: Bools, total: int, chosen: int) -> TimeBin:
    n = values.size
    low, high = hypergeom.ppf([0.025, 0.975], total, chosen, n) if n else (0, 0)
    return TimeBin(
        start=start,
        stop=start + width,
        n=n,
        top=int(top.sum()),
        total=float(values.sum()),
        mean=float(values.mean()) if n else math.nan,
        error=float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan,
        positive_share=float((values > 0).mean()) if n else math.nan,
        balance=net_drive(values).balance if n else math.nan,
        low=int(low),
        high=int(high),
    )


def _checked(steps: ArrayLike, scores: ArrayLike) -> tuple[Ints, Floats]:
    at = np.asarray(steps, dtype=np.int64).ravel()
    values = np.asarray(scores, dtype=np.float64).ravel()
    if at.size != values.size or values.size == 0:
        raise ValueError(f"{at.size} steps for {values.size} scores: give one of each per sample")
    if bad := int((~np.isfinite(values)).sum()):
        raise ValueError(
            f"{bad} of {values.size} scores are not finite; leave them out and report their count"
        )
    return at, values
