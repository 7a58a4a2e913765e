"""Influence over training steps against plain loops, scipy and simulated null cases."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from scipy import stats

from mda_lightning.analysis import time_bins as module
from mda_lightning.analysis.time_bins import (
    influence_slope,
    time_bins,
    top_mask,
    uniformity,
    widths_for,
)


def made_up(seed: int, *, n_steps: int = 400, batch: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return 1000 + np.repeat(np.arange(n_steps), batch), rng.standard_t(4, n_steps * batch) + 0.1


def test_example() -> None:
    assert doctest.testmod(module).failed == 0 < doctest.testmod(module).attempted


def test_bins_are_those_of_a_loop() -> None:
    steps, scores = made_up(0, n_steps=330)
    order = np.random.default_rng(1).permutation(steps.size)
    steps, scores = steps[order], scores[order]
    top = set(sorted(range(steps.size), key=lambda i: (-scores[i], i))[: round(0.1 * steps.size)])
    bins = time_bins(steps, scores)
    assert [(one.start, one.stop) for one in bins] == [
        (1000, 1100), (1100, 1200), (1200, 1300), (1300, 1400),
    ]  # fmt: skip
    for one in bins:
        inside = [i for i in range(steps.size) if one.start <= steps[i] < one.stop]
        own = [scores[i] for i in inside]
        assert one.n == len(own)
        assert one.total == pytest.approx(sum(own))
        assert one.mean == pytest.approx(sum(own) / len(own))
        assert one.error == pytest.approx(stats.sem(own))
        assert one.positive_share == sum(s > 0 for s in own) / len(own)
        positive, negative = sum(s for s in own if s > 0), -sum(s for s in own if s < 0)
        assert one.balance == pytest.approx((positive - negative) / (positive + negative))
        assert one.top == len(top & set(inside))
        assert one.top_share == one.top / one.n
        law = stats.hypergeom(steps.size, len(top), one.n)
        assert law.cdf(one.high) - law.cdf(one.low - 1) >= 0.95
        assert law.cdf(one.high - 1) - law.cdf(one.low) < 0.95
    assert sum(one.top for one in bins) == len(top)
    assert bins[-1].n == 30 * 8


def test_sliding_windows_are_full_and_overlap() -> None:
    steps, scores = made_up(2)
    bins = time_bins(steps, scores, width=100, stride=25)
    assert [one.start for one in bins] == list(range(1000, 1301, 25))
    assert all(one.n == 800 for one in bins)
    apart = {one.start: one for one in time_bins(steps, scores, width=100)}
    assert bins[4] == apart[1100]


def test_empty_bins_have_no_numbers() -> None:
    bins = time_bins([0, 250], [1.0, 2.0], width=100)
    assert [one.n for one in bins] == [1, 0, 1]
    assert math.isnan(bins[1].mean) and math.isnan(bins[1].top_share)
    assert uniformity([0, 250], [1.0, 2.0]).n_bins == 2


def test_chi_square_is_scipys() -> None:
    steps, scores = made_up(3)
    one = uniformity(steps, scores)
    bins = time_bins(steps, scores)
    table = [[b.top for b in bins], [b.n - b.top for b in bins]]
    reference = stats.chi2_contingency(table, correction=False)
    assert one.chi_square == pytest.approx(reference.statistic)
    assert one.p_value == pytest.approx(reference.pvalue)
    assert (one.degrees, one.drawn) == (reference.dof, False)
    assert one.dispersion == pytest.approx(reference.statistic / reference.dof)
    assert one.lowest == min(b.top_share for b in bins)
    assert one.highest == max(b.top_share for b in bins)
    assert one.positive_bins == 1.0


@pytest.mark.parametrize("width", [100, 5])
def test_even_influence_passes_and_a_burst_does_not(width: int) -> None:
    """Width 5 has 4 expected top samples a bin, so its p value is drawn."""
    p_values, dispersions = [], []
    for seed in range(60):
        steps, scores = made_up(seed)
        one = uniformity(steps, scores, width=width, n_draws=300)
        assert one.drawn == (width == 5)
        p_values.append(one.p_value)
        dispersions.append(one.dispersion)
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3
    spread = np.std(dispersions) / math.sqrt(60)
    assert np.mean(dispersions) == pytest.approx(1.0, abs=4 * spread)
    burst = np.where((steps >= 1100) & (steps < 1120), scores + 3.0, scores)
    late = uniformity(steps, burst, width=width, n_draws=300)
    assert late.p_value < 0.01 and late.dispersion > 2


def test_slope_of_one_sample_a_step_is_least_squares() -> None:
    rng = np.random.default_rng(5)
    steps = rng.permutation(50)
    scores = 0.02 * steps + rng.normal(size=50)
    slope = influence_slope(steps, scores)
    reference = stats.linregress(steps, scores)
    assert slope.per_100_steps == pytest.approx(100 * reference.slope)
    x = steps - steps.mean()
    errors = scores - reference.intercept - reference.slope * steps
    white = math.sqrt((x**2 * errors**2).sum() * 50 / 49 * 49 / 48) / (x**2).sum()
    half = 100 * stats.t(49).ppf(0.975) * white
    assert (slope.high - slope.low) / 2 == pytest.approx(half)
    assert slope.drift == pytest.approx(reference.slope * 49 / scores.std())


def test_slope_interval_covers_when_samples_of_a_step_move_together() -> None:
    rng = np.random.default_rng(6)
    steps = np.repeat(np.arange(60), 5)
    hits = 0
    for _ in range(300):
        noise = np.repeat(rng.normal(size=60), 5) + rng.normal(size=300)
        slope = influence_slope(steps, 0.01 * steps + noise)
        hits += slope.low <= 1.0 <= slope.high
    assert 0.90 <= hits / 300 <= 0.985


def test_slope_needs_steps_to_go_over() -> None:
    assert math.isnan(influence_slope([4, 4], [1.0, 2.0]).per_100_steps)
    two = influence_slope([0, 1, 1], [0.0, 1.0, 1.0])
    assert two.per_100_steps == pytest.approx(100.0) and math.isnan(two.low)
    assert influence_slope([0, 1, 2], [1.0, 1.0, 1.0]).drift == 0.0


def test_top_mask_breaks_ties_by_position() -> None:
    assert top_mask(np.array([1.0, 2.0, 1.0, 1.0]), 0.5).tolist() == [True, True, False, False]


def test_widths() -> None:
    assert widths_for(1000) == (25, 50, 100, 200)
    assert widths_for(250) == (25, 50, 100)
    assert widths_for(30) == (8,)


@pytest.mark.parametrize(
    ("steps", "scores", "options", "message"),
    [
        ([1], [1.0, 2.0], {}, "1 steps for 2 scores"),
        ([], [], {}, "0 steps"),
        ([1], [math.nan], {}, "not finite"),
        ([1], [1.0], {"width": 0}, "width 0"),
        ([1], [1.0], {"start": 2}, "before"),
    ],
)
def test_what_cannot_be_binned(
    steps: list[int], scores: list[float], options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        time_bins(steps, scores, **options)
