"""Is the tail a power law, or does another heavy or light tail describe it as well or better?

A power law that passes its own goodness-of-fit test is not thereby shown: a log-normal tail often
passes, too. Clauset, Shalizi and Newman 2009 (section 5) compare likelihoods on the same tail, with
Vuong's test (1989) of whether the ratio could be chance.

>>> from mda_lightning.analysis.distributions import fit_tail
>>> scores = 0.01 * np.exp(np.linspace(0.01, 4.0, 400))
>>> fit = fit_tail(scores, n_bootstrap=0)
>>> sorted(one.law for one in tail_alternatives(scores, fit))
['exponential', 'log-normal']
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.stats import norm

from mda_lightning.analysis.distributions import TailFit

Floats = NDArray[np.float64]
Law = Literal["exponential", "log-normal"]


@dataclass(frozen=True)
class LikelihoodRatio:
    """The power law against another law on the samples at or above its cut-off.

    Attributes:
        law: the other one, fitted to the tail by maximum likelihood.
        ratio: log-likelihood of the power law minus that of the other, nats; positive favours the
            power law.
        p_value: two-sided; chance of a ratio so far from 0 if both laws were equally close to the
            truth. Above 0.1 the sign of the ratio says nothing.
    """

    law: Law
    ratio: float
    p_value: float

    @property
    def verdict(self) -> str:
        """``power law``, the other law's name, or ``undecided``."""
        if not self.p_value <= 0.1:
            return "undecided"
        return "power law" if self.ratio > 0 else self.law


def tail_alternatives(scores: ArrayLike, fit: TailFit) -> tuple[LikelihoodRatio, ...]:
    """Compare a fitted power law with an exponential and a log-normal tail.

    Args:
        scores: those that ``fit`` was made of.
        fit: from :func:`~mda_lightning.analysis.distributions.fit_tail`.

    Raises:
        ValueError: the scores have another number at or above the cut-off than the fit.
    """
    values = np.asarray(scores, dtype=np.float64).ravel()
    tail = values[values >= fit.cutoff]
    if tail.size != fit.n_tail:
        raise ValueError(
            f"{tail.size} scores are at or above the cut-off {fit.cutoff:.3g}, the fit has "
            f"{fit.n_tail}: give the scores that it was made of"
        )
    x = tail / fit.cutoff  # densities below are of this ratio, at 1 and above
    power = math.log(fit.exponent - 1.0) - fit.exponent * np.log(x)
    return (
        _compared("exponential", power, _exponential(x)),
        _compared("log-normal", power, _lognormal(x)),
    )


def _exponential(x: Floats) -> Floats:
    rate = 1.0 / float((x - 1.0).mean())
    return math.log(rate) - rate * (x - 1.0)


def _lognormal(x: Floats) -> Floats:
    """Log-density of the log-normal law that fits best above 1, each [n]."""
    logs = np.log(x)

    def density(parameters: Floats) -> Floats:
        mean, sd = float(parameters[0]), math.exp(float(parameters[1]))
        log_density: Floats = norm.logpdf(logs, mean, sd) - logs - norm.logsf(0.0, mean, sd)
        return log_density

    def cost(parameters: Floats) -> float:
        value = -float(density(parameters).mean())
        return value if math.isfinite(value) else 1e9

    starts = [
        (float(logs.mean()), math.log(float(logs.std()) or 1.0)),
        (0.0, math.log(float(logs.mean()) or 1.0)),
        (-3.0, math.log(2.0 * float(np.sqrt((logs**2).mean())) or 1.0)),
    ]
    bounds = [(-50.0, float(logs.max()) + 1.0), (-8.0, 4.0)]
    found = [
        minimize(cost, start, method="Nelder-Mead", bounds=bounds, options={"maxiter": 2000})
        for start in starts
    ]
    return density(min(found, key=lambda one: float(one.fun)).x)


def _compared(law: Law, power: Floats, other: Floats) -> LikelihoodRatio:
    differences = power - other
    ratio, spread = float(differences.sum()), float(differences.std())
    if spread == 0.0:
        return LikelihoodRatio(law, ratio, 1.0)
    statistic = ratio / (spread * math.sqrt(differences.size))
    return LikelihoodRatio(law, ratio, 2.0 * float(norm.sf(abs(statistic))))
