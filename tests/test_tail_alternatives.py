"""Likelihood ratios of tails: against scipy's densities, and on tails whose law is known."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from scipy import optimize, stats

from mda_lightning.analysis import tail_alternatives as module
from mda_lightning.analysis.distributions import TailFit, fit_tail
from mda_lightning.analysis.tail_alternatives import LikelihoodRatio, tail_alternatives


def fitted_from(scores: np.ndarray, cutoff: float) -> TailFit:
    """The maximum likelihood power law above a given cut-off."""
    tail = scores[scores >= cutoff]
    exponent = 1 + tail.size / np.log(tail / cutoff).sum()
    return TailFit(exponent, 0.0, cutoff, tail.size, 0.0, None)


def by_law(scores: np.ndarray, fit: TailFit) -> dict[str, LikelihoodRatio]:
    return {one.law: one for one in tail_alternatives(scores, fit)}


def test_example() -> None:
    assert doctest.testmod(module).failed == 0 < doctest.testmod(module).attempted


def test_likelihoods_are_those_of_scipys_laws() -> None:
    scores = np.random.default_rng(0).lognormal(-4.0, 0.8, 900)
    cutoff = float(np.quantile(scores, 0.6))
    fit = fitted_from(scores, cutoff)
    tail = scores[scores >= cutoff]
    power = stats.pareto(fit.exponent - 1, scale=cutoff).logpdf(tail)
    exponential = stats.expon(cutoff, tail.mean() - cutoff).logpdf(tail)

    def cost(parameters: np.ndarray) -> float:
        law = stats.lognorm(math.exp(parameters[1]), scale=math.exp(parameters[0]))
        return -float((law.logpdf(tail) - law.logsf(cutoff)).sum())

    lognormal = -optimize.minimize(cost, [-4.0, -0.2], method="BFGS").fun
    found = by_law(scores, fit)
    assert found["exponential"].ratio == pytest.approx((power - exponential).sum())
    assert found["log-normal"].ratio == pytest.approx(power.sum() - lognormal, abs=0.01)
    differences = power - exponential
    z = abs(differences.sum()) / (math.sqrt(tail.size) * differences.std())
    assert found["exponential"].p_value == pytest.approx(math.erfc(z / math.sqrt(2)))


def test_known_tails_are_told_apart() -> None:
    rng = np.random.default_rng(1)
    pareto = (1 - rng.random(3000)) ** (-1 / 2.0)
    found = by_law(pareto, fitted_from(pareto, 1.0))
    assert found["exponential"].verdict == "power law"
    assert found["log-normal"].verdict != "log-normal"
    exponential = 1 + rng.exponential(1.0, 3000)
    assert (
        by_law(exponential, fitted_from(exponential, 1.0))["exponential"].verdict == "exponential"
    )
    lognormal = rng.lognormal(0.0, 0.6, 6000)
    assert by_law(lognormal, fitted_from(lognormal, 1.0))["log-normal"].verdict == "log-normal"


def test_few_samples_decide_nothing() -> None:
    undecided = 0
    for seed in range(20):
        pareto = (1 - np.random.default_rng(seed).random(40)) ** (-1 / 3.0)
        undecided += by_law(pareto, fitted_from(pareto, 1.0))["log-normal"].verdict == "undecided"
    assert undecided >= 15


def test_a_scale_changes_nothing() -> None:
    scores = np.random.default_rng(2).standard_t(3, 2000)
    first, second = fit_tail(scores, n_bootstrap=0), fit_tail(1e-6 * scores, n_bootstrap=0)
    assert first is not None and second is not None
    for one, other in zip(
        tail_alternatives(scores, first), tail_alternatives(1e-6 * scores, second), strict=True
    ):
        assert one.ratio == pytest.approx(other.ratio, rel=1e-3, abs=1e-3)


def test_scores_of_another_fit_are_refused() -> None:
    fit = TailFit(3.0, 0.1, 1.0, 50, 0.1, None)
    with pytest.raises(ValueError, match="2 scores are at or above"):
        tail_alternatives([0.5, 1.0, 2.0], fit)


def test_a_tail_holds_every_score_that_equals_its_cut_off() -> None:
    """Replayed scores of the same sample are equal; a cut-off between two of them is none."""
    rng = np.random.default_rng(5)
    scores = np.repeat(rng.pareto(2.0, size=400) + 1.0, 3)
    fit = fit_tail(scores, n_bootstrap=0)
    assert fit is not None
    assert fit.n_tail == int((scores >= fit.cutoff).sum())
    assert len(tail_alternatives(scores, fit)) == 2
