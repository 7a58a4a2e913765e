"""The linear datamodeling score against scipy, and on outcomes whose true score is known."""

from __future__ import annotations

import doctest
import itertools
import math
import warnings

import numpy as np
import pytest
from scipy import stats

from mda_lightning.analysis import datamodeling as module
from mda_lightning.analysis.datamodeling import (
    SubsetOutcomes,
    datamodeling_table,
    linear_datamodeling_score,
    predictions,
    rank_correlation,
    seed_interval,
)


def subsets(rng: np.random.Generator, *, count: int, n: int = 200) -> np.ndarray:
    kept = np.zeros((count, n), dtype=bool)
    for row in kept:
        row[rng.choice(n, n // 2, replace=False)] = True
    return kept


def noisy(signal: np.ndarray, correlation: float, rng: np.random.Generator) -> np.ndarray:
    """The signal with as much normal noise as leaves that Pearson correlation, on average."""
    noise = rng.normal(size=signal.size) * signal.std()
    return correlation * signal + math.sqrt(1 - correlation**2) * noise


def true_spearman(correlation: float, n: int) -> float:
    """Mean of Spearman's coefficient of n draws from a bivariate normal law, exactly."""
    inner = math.asin(correlation) + (n - 2) * math.asin(correlation / 2)
    return 6 / (math.pi * (n + 1)) * inner


def test_example() -> None:
    assert doctest.testmod(module).failed == 0 < doctest.testmod(module).attempted


def test_predictions_are_sums_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    kept, values = subsets(rng, count=7, n=20), rng.normal(size=20)
    by_loop = [sum(v for v, k in zip(values, row, strict=True) if k) for row in kept]
    assert predictions(kept, values) == pytest.approx(by_loop)
    values[3] = np.nan
    filled = np.where(np.arange(20) == 3, np.nanmean(values), values)
    assert predictions(kept, values) == pytest.approx(kept @ filled)


def test_value_and_p_value_are_scipys() -> None:
    rng = np.random.default_rng(1)
    kept, values = subsets(rng, count=40), rng.normal(size=200)
    outcomes = np.round(noisy(kept @ values, 0.5, rng), 0)  # with ties
    one = linear_datamodeling_score(kept, values, outcomes, n_resamples=4000)
    reference = stats.spearmanr(kept @ values, outcomes, alternative="greater")
    assert one.value == pytest.approx(reference.statistic)
    assert one.p_value == pytest.approx(reference.pvalue, abs=0.005)
    assert (one.n_subsets, one.n_missing) == (40, 0)


def test_p_value_of_few_subsets_is_that_of_all_orders() -> None:
    rng = np.random.default_rng(2)
    kept, values = subsets(rng, count=6, n=30), rng.normal(size=30)
    outcomes = rng.normal(size=6)
    observed = stats.spearmanr(kept @ values, outcomes).statistic
    every = [
        stats.spearmanr(kept @ values, order).statistic
        for order in itertools.permutations(outcomes)
    ]
    exact = np.mean(np.array(every) >= observed - 1e-12)
    one = linear_datamodeling_score(kept, values, outcomes, n_resamples=20_000)
    assert one.p_value == pytest.approx(exact, abs=4 * math.sqrt(exact / 20_000) + 1e-4)


def test_interval_is_scipys_bca_interval() -> None:
    rng = np.random.default_rng(3)
    kept, values = subsets(rng, count=50), rng.normal(size=200)
    outcomes = noisy(kept @ values, 0.6, rng)
    one = linear_datamodeling_score(kept, values, outcomes, n_resamples=5000)
    reference = stats.bootstrap(
        (kept @ values, outcomes),
        lambda a, b: stats.spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=1500,
        method="BCa",
    ).confidence_interval
    assert (one.low, one.high) == (
        pytest.approx(reference.low, abs=0.05),
        pytest.approx(reference.high, abs=0.05),
    )
    again = linear_datamodeling_score(kept, values, outcomes, n_resamples=5000)
    assert again == one


@pytest.mark.parametrize("correlation", [0.0, 0.4, 0.8])
def test_linear_outcomes_give_their_true_score(correlation: float) -> None:
    """μ = the ranking's own sum plus noise: the expected Spearman coefficient is known."""
    found, covered = [], 0
    limit = 6 / math.pi * math.asin(correlation / 2)
    for trial in range(80):
        rng = np.random.default_rng([7, trial])
        kept, values = subsets(rng, count=30, n=100), rng.normal(size=100)
        spread = values.std() * math.sqrt(100 / 4 * 100 / 99)
        signal = kept @ values - values.sum() / 2
        outcomes = correlation * signal + math.sqrt(1 - correlation**2) * rng.normal(0, spread, 30)
        one = linear_datamodeling_score(kept, values, outcomes, n_resamples=300)
        found.append(one.value)
        covered += one.low <= limit <= one.high
    error = np.std(found) / math.sqrt(80)
    assert np.mean(found) == pytest.approx(true_spearman(correlation, 30), abs=4 * error)
    assert error < 0.03
    assert covered / 80 >= 0.86


def test_p_values_of_a_ranking_that_knows_nothing_are_even() -> None:
    p_values = []
    for trial in range(150):
        rng = np.random.default_rng([8, trial])
        kept = subsets(rng, count=20, n=60)
        one = linear_datamodeling_score(
            kept, rng.normal(size=60), rng.normal(size=20), n_resamples=200
        )
        p_values.append(one.p_value)
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def seeds_of(correlations: dict[str, float], *, n_seeds: int, count: int = 40):  # type: ignore[no-untyped-def]
    """Subsets whose outcome is the sum of hidden values that rankings know to a known degree."""
    found, values = [], {name: {} for name in correlations}
    for seed in range(n_seeds):
        rng = np.random.default_rng([9, seed])
        truth, ids = rng.normal(size=200), rng.permutation(1000)[:200]
        kept = subsets(rng, count=count)
        found.append(SubsetOutcomes(seed, ids, kept, noisy(kept @ truth, 0.95, rng)))
        for name, correlation in correlations.items():
            values[name][seed] = noisy(truth, correlation, rng)
    return found, values


def test_table_over_seeds_tells_good_rankings_from_bad() -> None:
    found, values = seeds_of({"good": 0.9, "fair": 0.5, "random": 0.0}, n_seeds=5)
    table = datamodeling_table(found, values, reference="good", n_resamples=400)
    by_name = {one.ranking: one for one in table.rankings}
    assert by_name["good"].mean > by_name["fair"].mean > by_name["random"].mean
    assert by_name["good"].p_value == pytest.approx(1 / 401)
    assert by_name["random"].p_value > 0.01
    for one in table.rankings:
        own = [row.value for row in one.per_seed]
        interval = stats.ttest_1samp(own, 0).confidence_interval(0.95)
        assert one.mean == pytest.approx(np.mean(own))
        assert (one.low, one.high) == pytest.approx((interval.low, interval.high))
        for row, subset in zip(one.per_seed, found, strict=True):
            guess = subset.kept @ values[one.ranking][row.seed]
            assert row.value == pytest.approx(stats.spearmanr(guess, subset.outcomes).statistic)
    assert [(one.ranking, one.other) for one in table.differences] == [
        ("good", "fair"), ("good", "random"),
    ]  # fmt: skip
    fair = table.differences[0]
    paired = [
        a.value - b.value
        for a, b in zip(by_name["good"].per_seed, by_name["fair"].per_seed, strict=True)
    ]
    assert [value for _, value, _, _ in fair.per_seed] == pytest.approx(paired)
    assert all(low < value < high for _, value, low, high in fair.per_seed)
    assert fair.mean == pytest.approx(np.mean(paired)) and fair.low > 0
    assert table.notes == ()


def test_differences_on_shared_subsets_are_narrower_than_apart() -> None:
    """Two rankings that see the same noise differ less than their own intervals suggest."""
    found, values = seeds_of({"a": 0.9}, n_seeds=1)
    rng = np.random.default_rng(0)
    found[0].outcomes[:] = noisy(found[0].outcomes, 0.5, rng)
    values["b"] = {0: noisy(values["a"][0], 0.99, rng)}
    table = datamodeling_table(found, values, reference="a", n_resamples=1000)
    _, _, low, high = table.differences[0].per_seed[0]
    alone = table.rankings[0].per_seed[0]
    assert high - low < 0.5 * (alone.high - alone.low)
    assert math.isnan(table.differences[0].low)


def test_what_is_missing_is_counted_and_said() -> None:
    found, values = seeds_of({"a": 0.9, "b": 0.5}, n_seeds=3, count=12)
    found[0].outcomes[3] = np.nan
    found[1].outcomes[4:] = np.nan
    values["a"][0][:10] = np.nan
    values["a"][2][:120] = np.nan
    del values["b"][0]
    table = datamodeling_table(found, values, reference="a", n_resamples=200)
    a, b = table.rankings
    assert [(row.seed, row.n_subsets, row.n_missing) for row in a.per_seed] == [(0, 11, 10)]
    assert [row.seed for row in b.per_seed] == [2]
    assert math.isnan(a.low)
    assert table.differences == ()
    text = " ".join(table.notes)
    assert "Seed 1: 4 subsets have an outcome" in text
    assert "Seed 0: no values of ranking b" in text
    assert "Seed 2, ranking a: 120 of 200 samples" in text


def test_constant_predictions_have_no_score() -> None:
    rng = np.random.default_rng(5)
    one = linear_datamodeling_score(
        subsets(rng, count=10), np.ones(200), rng.normal(size=10), n_resamples=50
    )
    assert math.isnan(one.value) and math.isnan(one.p_value) and math.isnan(one.low)


def test_perfect_prediction_warns_of_nothing() -> None:
    rng = np.random.default_rng(6)
    kept, values = subsets(rng, count=10), rng.normal(size=200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = linear_datamodeling_score(kept, values, kept @ values, n_resamples=100)
    assert one.value == 1.0


def test_values_are_aligned_by_sample() -> None:
    kept = np.eye(3, dtype=bool)
    one = SubsetOutcomes(0, np.array([7, 3, 9]), kept, np.zeros(3))
    aligned = one.aligned([9, 7, 1], [0.9, 0.7, 0.1])
    assert aligned[[0, 2]].tolist() == [0.7, 0.9] and math.isnan(aligned[1])
    assert np.isnan(one.aligned([], [])).all()


def test_seed_interval_of_one_and_none() -> None:
    assert seed_interval([0.5])[0] == 0.5 and math.isnan(seed_interval([0.5])[1])
    assert math.isnan(seed_interval([])[0])


def test_rank_correlation_with_ties_is_scipys() -> None:
    first, second = [1.0, 1.0, 2.0, 5.0], [3.0, 1.0, 1.0, 9.0]
    assert rank_correlation(first, second) == pytest.approx(stats.spearmanr(first, second)[0])


def test_what_has_no_score_is_refused() -> None:
    kept = np.ones((3, 4), dtype=bool)
    with pytest.raises(ValueError, match="3 subsets have an outcome"):
        linear_datamodeling_score(kept, np.ones(4), np.ones(3))
    with pytest.raises(ValueError, match="have shape"):
        predictions(kept, np.ones(5))
    with pytest.raises(ValueError, match="no finite value"):
        predictions(kept, [1.0, math.nan, math.nan, math.nan])
    with pytest.raises(ValueError, match="named once"):
        SubsetOutcomes(0, np.array([1, 1, 2, 3]), kept, np.ones(3))
    with pytest.raises(ValueError, match="no ranking"):
        datamodeling_table([], {"a": {}}, reference="b")
    one = SubsetOutcomes(0, np.arange(4), kept, np.ones(3))
    with pytest.raises(ValueError, match="named twice"):
        datamodeling_table([one, one], {"a": {}})
