"""Overlap of rankings against plain loops, brute force over ties, scipy and published values."""

from __future__ import annotations

import doctest
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mda_lightning.analysis import overlap, rank_overlap
from mda_lightning.analysis.overlap import (
    block_contrast,
    expected_jaccard,
    overlap_matrix,
    set_overlap,
)
from mda_lightning.analysis.rank_overlap import (
    expected_rbo,
    persistence,
    rank_biased_overlap,
    top_weight,
)


def rbo_by_loop(first: list[int], second: list[int], depth: int, p: float) -> float:
    """Equation 23 of Webber et al., with sets."""
    total = 0.0
    for d in range(1, depth + 1):
        total += len(set(first[:d]) & set(second[:d])) / d * p**d
    return total * (1 - p) / p + len(set(first[:depth]) & set(second[:depth])) / depth * p**depth


def values_of(order: list[int]) -> list[float]:
    values = [0.0] * len(order)
    for place, item in enumerate(order):
        values[item] = -float(place)
    return values


@pytest.mark.parametrize("module", [overlap, rank_overlap])
def test_examples(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 0 and result.failed == 0


@given(
    st.permutations(range(9)), st.permutations(range(9)), st.integers(1, 9), st.floats(0.1, 0.99)
)
def test_rbo_is_that_of_a_loop(first: list[int], second: list[int], depth: int, p: float) -> None:
    value = rank_biased_overlap(values_of(first), values_of(second), depth=depth, p=p)
    assert value == pytest.approx(rbo_by_loop(first, second, depth, p), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=5, max_size=5),
    st.lists(st.integers(0, 2), min_size=5, max_size=5),
    st.integers(1, 5),
)
def test_rbo_of_tied_rankings_is_the_mean_over_all_orders(
    first: list[int], second: list[int], depth: int
) -> None:
    def orders(values: list[int]) -> list[list[int]]:
        every = itertools.permutations(range(5))
        return [
            list(order)
            for order in every
            if all(values[a] >= values[b] for a, b in itertools.pairwise(order))
        ]

    one, other = orders(first), orders(second)
    mean = np.mean([rbo_by_loop(a, b, depth, 0.8) for a in one for b in other])
    value = rank_biased_overlap(np.array(first), np.array(second), depth=depth, p=0.8)
    assert value == pytest.approx(float(mean), abs=1e-9)


def test_rbo_of_many_ties_keeps_its_precision() -> None:
    """A ranking by counts against one of distinct values, deep enough for rounding to show."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 40, 4000)
    scores = counts + rng.normal(0, 5, 4000)
    value = rank_biased_overlap(counts, scores, depth=2000, p=0.999)
    second = np.argsort(-scores).tolist()
    drawn = []
    for _ in range(60):
        first = np.lexsort((rng.random(4000), -counts)).tolist()
        drawn.append(rank_biased_overlap(values_of(first), values_of(second), depth=2000, p=0.999))
    assert value == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / math.sqrt(60))
    assert np.std(drawn) < 0.01


def test_rbo_of_known_rankings() -> None:
    up = np.arange(10.0)
    assert rank_biased_overlap(up, up, depth=7, p=0.9) == pytest.approx(1.0, abs=1e-12)
    apart = np.r_[np.arange(5.0), -np.arange(1.0, 6.0)]
    assert rank_biased_overlap(apart, -apart, depth=5, p=0.9) == 0.0
    swapped = up.copy()
    swapped[[8, 9]] = swapped[[9, 8]]
    # They agree at every depth but the first, whose weight is 1 - p.
    assert rank_biased_overlap(up, swapped, depth=10, p=0.7) == pytest.approx(0.7)


def test_weights_of_the_published_example() -> None:
    """Webber et al., section 5: p = 0.9 puts 86% on the top 10, p = 0.98 puts 86% on the top 50."""
    assert top_weight(10, 0.9) == pytest.approx(0.8556, abs=5e-5)
    assert top_weight(50, 0.98) == pytest.approx(0.8522, abs=5e-4)
    for depth, weight in ((1, 0.5), (10, 0.9), (5000, 0.9), (100_000, 0.99)):
        assert top_weight(depth, persistence(depth, weight)) == pytest.approx(weight, abs=1e-6)


def test_weight_is_the_share_of_the_infinite_sum() -> None:
    p, depth = 0.8, 6
    weights = [sum((1 - p) * p ** (d - 1) / d for d in range(rank, 400)) for rank in range(1, 400)]
    assert top_weight(depth, p) == pytest.approx(sum(weights[:depth]) / sum(weights), abs=1e-9)


def test_expected_values_of_random_rankings() -> None:
    rng = np.random.default_rng(4)
    fixed = np.arange(40.0)
    drawn = [overlap_matrix({"a": fixed, "b": rng.random(40)}, fraction=0.25) for _ in range(800)]
    rbos = [one.rbo[0, 1] for one in drawn]
    jaccards = [one.jaccard[0, 1] for one in drawn]
    for values, expected in (
        (rbos, drawn[0].expected_rbo),
        (jaccards, drawn[0].expected_jaccard),
    ):
        assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values) / math.sqrt(800))
    assert drawn[0].expected_rbo == expected_rbo(10, 40)
    p_values = np.array([one.p_values[0, 1] for one in drawn])
    assert (p_values <= 0.05).mean() <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 800)


def test_expected_jaccard_counts_every_set() -> None:
    every = [
        len({0, 1, 2} & set(other)) / len({0, 1, 2} | set(other))
        for other in itertools.combinations(range(7), 4)
    ]
    assert expected_jaccard(3, 4, 7) == pytest.approx(np.mean(every))
    assert expected_jaccard(5, 5, 7) > 0.4  # they must share three


def test_set_overlap_is_fishers_test() -> None:
    one = set_overlap(np.arange(10, 30), np.arange(20, 50), pool=100)
    assert (one.shared, one.first, one.second) == (10, 20, 30)
    assert one.jaccard == pytest.approx(10 / 40)
    table = [[10, 10], [20, 60]]
    assert one.p_value == pytest.approx(stats.fisher_exact(table, "greater").pvalue)
    with pytest.raises(ValueError, match="each once"):
        set_overlap([1, 1], [2], pool=5)
    with pytest.raises(ValueError, match="pool of 3"):
        set_overlap([1, 2], [3, 4], pool=3)


def test_matrix_agrees_with_pairs_and_scipy() -> None:
    rng = np.random.default_rng(2)
    shared = rng.normal(size=300)
    scores = {f"L0H{i}": shared * (i < 2) + rng.normal(size=300) for i in range(4)}
    scores["counts"] = rng.integers(0, 5, 300).astype(float)
    scores["L0H3"][[3, 50]] = np.nan
    matrix = overlap_matrix(scores, fraction=0.2)
    kept = np.isfinite(scores["L0H3"])
    assert (matrix.pool, matrix.n_excluded, matrix.depth) == (298, 2, 60)
    ids = np.arange(300)[kept]
    for first, second in itertools.combinations(scores, 2):
        a, b = scores[first][kept], scores[second][kept]
        tops = [set(sorted(range(298), key=lambda i, v=v: (-v[i], i))[:60]) for v in (a, b)]
        pair = set_overlap(ids[sorted(tops[0])], ids[sorted(tops[1])], pool=298)
        assert matrix.of(first, second) == pair
        at = matrix.names.index(first), matrix.names.index(second)
        assert matrix.spearman[at] == pytest.approx(stats.spearmanr(a, b).statistic)
        assert matrix.rbo[at] == pytest.approx(rank_biased_overlap(a, b, depth=60))
    assert matrix.of("L0H0", "L0H1").p_value < 1e-3
    turned = matrix.ordered(["counts", "L0H1"])
    assert turned.names == ("counts", "L0H1")
    assert turned.of("counts", "L0H1") == matrix.of("counts", "L0H1")
    assert turned.rbo[0, 1] == matrix.rbo[4, 1]


def test_constant_ranking_has_no_correlation() -> None:
    matrix = overlap_matrix({"a": np.arange(8.0), "b": np.ones(8)}, fraction=0.5)
    assert math.isnan(matrix.spearman[0, 1])


@pytest.mark.parametrize(
    ("rankings", "message"),
    [
        ({}, "no ranking"),
        ({"a": [1.0, 2.0], "b": [1.0]}, "different samples: a 2, b 1"),
        ({"a": [1.0, 2.0], "b": [math.nan] * 2}, "ranking b"),
        ({"a": [1.0, math.nan], "b": [math.nan, 1.0]}, "no sample"),
    ],
)
def test_rankings_that_cannot_be_compared(rankings: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlap_matrix(rankings)


def test_rbo_refuses_what_it_cannot_rank() -> None:
    with pytest.raises(ValueError, match="not finite"):
        rank_biased_overlap([1.0, math.nan], [1.0, 2.0], depth=1)
    with pytest.raises(ValueError, match="depth 3"):
        rank_biased_overlap([1.0, 2.0], [1.0, 2.0], depth=3)
    with pytest.raises(ValueError, match="p 1"):
        rank_biased_overlap([1.0, 2.0], [1.0, 2.0], depth=1, p=1.0)
    with pytest.raises(ValueError, match="shapes"):
        rank_biased_overlap([1.0], [1.0, 2.0], depth=1)


def test_a_block_is_told_from_none() -> None:
    table = np.full((7, 7), 0.1)
    table[:3, :3] = 0.6
    names = [f"h{i}" for i in range(7)]
    block = block_contrast(table, names, names[:3])
    assert (block.within, block.between, block.outside) == pytest.approx((0.6, 0.1, 0.1))
    assert block.contrast == pytest.approx(0.5)
    assert block.p_value == pytest.approx(1 / math.comb(7, 3))
    assert block_contrast(table, names, names[4:]).p_value > 0.4
    drawn = block_contrast(table, names, names[:3], most_exact=30)
    assert drawn.p_value == pytest.approx(1 / 31, abs=0.15)
    assert math.isnan(block_contrast(table[:3, :3], names[:3], names[:2]).outside)


def test_blocks_of_noise_are_seldom_significant() -> None:
    rng = np.random.default_rng(1)
    names = [f"h{i}" for i in range(7)]
    p_values = []
    for _ in range(300):
        noise = rng.random((7, 7))
        p_values.append(block_contrast(noise + noise.T, names, names[:3]).p_value)
    assert stats.kstest(p_values, "uniform").statistic < 0.12


@pytest.mark.parametrize("leading", [["h0"], ["h0", "h1", "h2"], ["h0", "h9"]])
def test_blocks_need_two_heads_and_others(leading: list[str]) -> None:
    with pytest.raises(ValueError, match="two at least and not all"):
        block_contrast(np.eye(3), ["h0", "h1", "h2"], leading)
