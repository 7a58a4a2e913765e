"""Distributions, paired effects and domain composition against closed forms and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mda_lightning.analysis.composition import chance_range, composition
from mda_lightning.analysis.distributions import (
    fit_tail,
    net_drive,
    normal_top_share,
    top_count,
    top_share,
)
from mda_lightning.analysis.effects import late_difference, paired_effects, signed

finite = st.floats(-1e3, 1e3, allow_nan=False)


def test_top_share_of_known_arrays() -> None:
    assert top_share(np.ones(100), 0.10) == pytest.approx(0.10)
    assert top_share([0.0] * 9 + [5.0], 0.10) == 1.0
    assert top_share([4, 3, 2, 1, -10, -10, -10, -10, -10, -10], 0.2) == pytest.approx(0.7)
    assert math.isnan(top_share([-1.0, -2.0]))


def test_top_share_of_a_pareto_law_is_its_closed_form() -> None:
    """A Pareto law of density exponent a has Lorenz share q ** ((a - 2) / (a - 1)) in its top q."""
    exponent, n = 3.5, 200_000
    quantiles = (np.arange(n) + 0.5) / n
    scores = (1 - quantiles) ** (-1 / (exponent - 1))
    assert top_share(scores, 0.1) == pytest.approx(0.1 ** (1.5 / 2.5), rel=5e-3)


def test_noise_already_holds_44_percent_in_its_top_tenth() -> None:
    assert normal_top_share(0.10) == pytest.approx(0.440, abs=5e-4)
    normal = stats.norm(loc=0.4, scale=1.3).ppf((np.arange(100_000) + 0.5) / 100_000)
    assert normal_top_share(0.1, mean=0.4, sd=1.3) == pytest.approx(top_share(normal), abs=1e-3)
    assert normal_top_share(1.0) == pytest.approx(1.0)


@given(st.lists(finite, min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_top_share_is_a_share_and_at_least_the_fraction(scores: list[float], f: float) -> None:
    share = top_share(scores, f)
    if math.isnan(share):
        assert max(scores) <= 0
    else:
        assert top_count(len(scores), f) / len(scores) - 1e-9 <= share <= 1 + 1e-9


def test_net_drive() -> None:
    drive = net_drive([3.0, 1.0, -1.0, 0.0])
    assert (drive.positive, drive.negative) == (4.0, 1.0)
    assert drive.balance == pytest.approx(0.6)
    assert drive.ratio == pytest.approx(4.0)
    assert net_drive([1.0]).ratio == math.inf
    assert math.isnan(net_drive([0.0]).balance)


@pytest.mark.parametrize("exponent", [2.2, 3.0, 4.0])
def test_pareto_samples_give_their_exponent_back(exponent: float) -> None:
    rng = np.random.default_rng(3)
    scores = 0.01 * (1 - rng.random(6000)) ** (-1 / (exponent - 1))
    fit = fit_tail(np.concatenate([scores, -scores]), n_bootstrap=30)
    assert fit is not None
    assert abs(fit.exponent - exponent) < 4 * fit.error
    assert fit.error == pytest.approx((fit.exponent - 1) / math.sqrt(fit.n_tail))
    assert fit.plausible


def test_tail_exponent_matches_scipy_at_the_chosen_cutoff() -> None:
    """With the cut-off given, scipy's own maximum likelihood for a Pareto law is the reference."""
    rng = np.random.default_rng(5)
    scores = rng.lognormal(0.0, 1.0, 1500)
    fit = fit_tail(scores, n_bootstrap=0)
    assert fit is not None and fit.p_value is None
    tail = scores[scores >= fit.cutoff]
    shape, _, _ = stats.pareto.fit(tail, floc=0, fscale=fit.cutoff)
    assert fit.exponent == pytest.approx(shape + 1, rel=1e-4)
    assert fit.ks == pytest.approx(stats.kstest(tail, stats.pareto(shape, 0, fit.cutoff).cdf)[0])


def test_a_tail_that_is_no_power_law_is_rejected() -> None:
    """Uniform scores stop abruptly; the test has power, so that 'plausible' means something."""
    fit = fit_tail(np.random.default_rng(0).uniform(1.0, 2.0, 3000), n_bootstrap=30, candidates=1)
    assert fit is not None and fit.plausible is False


def test_tail_needs_enough_unequal_positive_scores() -> None:
    assert fit_tail(np.r_[np.ones(10), -np.ones(500)]) is None
    assert fit_tail(np.ones(100)) is None


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_scores_that_cannot_be_summarised_are_refused(bad: list[float]) -> None:
    for function in (top_share, net_drive, fit_tail):
        with pytest.raises(ValueError, match="score"):
            function(bad)
    with pytest.raises(ValueError, match="out of range"):
        top_share([1.0], 0.0)


@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=12))
def test_interval_is_scipys_paired_t_interval(pairs: list[tuple[float, float]]) -> None:
    treated, control = np.array(pairs).T
    effect = paired_effects(treated.tolist(), control.tolist())
    differences = treated - control
    assert effect.mean == pytest.approx(float(differences.mean()))
    if differences.std(ddof=1) > 1e-6:
        low, high = stats.ttest_rel(treated, control).confidence_interval(0.95)
        assert (effect.low, effect.high) == (pytest.approx(low), pytest.approx(high))
    assert (effect.direction == "no clear difference") == (effect.low <= 0 <= effect.high)


def test_verdicts_name_direction_numbers_and_seeds() -> None:
    names = {"treated_name": "masking the top", "control_name": "masking at random"}
    lower = paired_effects([0.30, 0.31, 0.32], [0.40, 0.40, 0.42], quantity="score", **names)
    assert lower.direction == "lower"
    assert lower.verdict.startswith("Masking the top lowered the score against masking at random")
    assert "−0.097" in lower.verdict and "3 seeds" in lower.verdict
    higher = paired_effects([0.40, 0.40, 0.42], [0.30, 0.31, 0.32], quantity="score", **names)
    assert higher.direction == "higher" and "raised" in higher.verdict
    unclear = paired_effects([0.30, 0.45], [0.40, 0.40], **names)
    assert unclear.verdict.startswith("No clear difference")
    assert "includes 0" in unclear.verdict


def test_an_interval_that_touches_zero_is_no_clear_difference() -> None:
    """Differences 0, 0, ... have the interval [0, 0]: it includes 0."""
    assert paired_effects([1.0, 2.0], [1.0, 2.0]).direction == "no clear difference"
    assert paired_effects([1.5, 2.5], [1.0, 2.0]).direction == "higher"


def test_one_seed_gives_a_description_and_no_interval() -> None:
    steps = np.arange(0, 100, 10)
    late = late_difference((steps, steps * 0.01), (steps[2:], steps[2:] * 0.0), since=50)
    assert late is not None and (late.n, late.since) == (5, 50)
    assert late.mean == pytest.approx(0.7)
    assert late.sd == pytest.approx(np.std([0.5, 0.6, 0.7, 0.8, 0.9], ddof=1))
    effect = paired_effects([0.30], [0.38], late=late)
    assert effect.direction == "one seed" and math.isnan(effect.low) and math.isnan(effect.high)
    assert "no interval" in effect.verdict and "0.080 lower" in effect.verdict
    assert "From step 50" in effect.verdict
    assert late_difference((steps, steps), (steps, steps), since=90) is None


def test_effects_refuse_what_is_not_paired() -> None:
    with pytest.raises(ValueError, match="one of each per seed"):
        paired_effects([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no seed"):
        paired_effects([], [])
    with pytest.raises(ValueError, match="not finite"):
        paired_effects([math.nan], [1.0])


@pytest.mark.parametrize(
    ("value", "text"), [(0.0314, "+0.031"), (-0.0806, "−0.081"), (-0.0001, "0.000")]
)
def test_signed_numbers(value: float, text: str) -> None:
    assert signed(value) == text


def test_composition_counts_and_lift() -> None:
    scored = ["code"] * 80 + ["log"] * 20
    rows = composition([["log"] * 8 + ["code"] * 2], [scored])
    assert [row.domain for row in rows] == ["log", "code"]
    log = rows[0]
    assert (log.top, log.top_total, log.base, log.base_total) == (8, 10, 20, 100)
    assert log.lift == pytest.approx(4.0)
    assert log.beyond_chance
    assert sum(row.top_share for row in rows) == pytest.approx(1.0)


def test_chance_range_of_one_seed_is_hypergeometric() -> None:
    law = stats.hypergeom(100, 20, 10)
    assert chance_range([100], [20], [10]) == (int(law.ppf(0.025)), int(law.ppf(0.975)))


def test_chance_range_over_seeds_holds_the_random_draws_it_promises() -> None:
    """Simulated draws: at least 95% fall inside, and the range is not simply everything."""
    rng = np.random.default_rng(1)
    drawn = sum(rng.hypergeometric(30, 170, 20, 20_000) for _ in range(3))
    low, high = chance_range([200] * 3, [30] * 3, [20] * 3)
    inside = float(((drawn >= low) & (drawn <= high)).mean())
    assert 0.945 < inside < 0.99


def test_rare_domains_are_folded_into_one_row() -> None:
    scored = [f"d{i:02d}" for i in range(30) for _ in range(30 - i)]
    rows = composition([scored[:50]], [scored], most=5)
    assert len(rows) == 5
    assert any(row.domain == "26 other domains" for row in rows)
    assert sum(row.base for row in rows) == len(scored)


def test_composition_refuses_a_top_set_from_elsewhere() -> None:
    with pytest.raises(ValueError, match="must come from the scored samples"):
        composition([["x"]], [["y"]])
    with pytest.raises(ValueError, match="non-empty pair"):
        composition([[]], [["y"]])
