"""Curves of which the truth is known, and how the detector does on them.

Every curve is what a metric of one unit would be at an evaluation every 10 steps: a noise-free
course and an AR(1) process on top. What the detector is to find follows from the noise-free course
alone: the first evaluation above ``max(0.10, floor + 6 sigma)``, sigma the noise's own marginal
standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from mda_lightning.window import Window, WindowDetector, WindowRule, replay

Array = NDArray[np.float64]
Rows = Iterator[tuple[str, tuple[float, float, float]]]

EVERY = 10
N_EVALUATIONS = 600
CHANCE = 0.052
EARLY_STEPS = 200
_RISE = 0.2
_LEVEL_NOISE = 0.04  # a head's noise grows with its score: 0.02 at 0.5 in runs of our own
_LN9 = float(np.log(9.0))


@dataclass
class Curves:
    """Curves of one kind: values and noise-free courses [n, N_EVALUATIONS], sigma [n]."""

    values: Array
    course: Array
    sigma: Array
    rule: WindowRule = field(default_factory=WindowRule)

    @property
    def true_start(self) -> NDArray[np.int64]:
        """Per curve, the evaluation at which the course is first above its threshold; -1: never."""
        up = np.maximum(self.rule.minimum_up, self.course[:, 0] + self.rule.n_sigma * self.sigma)
        above = self.course > up[:, None]
        return np.where(above.any(1), above.argmax(1), -1)


def ar1(rng: np.random.Generator, n: int, sigma: Array, rho: Array) -> Array:
    """Stationary AR(1) noise [n, N_EVALUATIONS] of marginal standard deviation sigma [n]."""
    shocks = rng.normal(size=(n, N_EVALUATIONS))
    noise = np.empty_like(shocks)
    noise[:, 0] = shocks[:, 0]
    for t in range(1, N_EVALUATIONS):
        noise[:, t] = rho * noise[:, t - 1] + np.sqrt(1 - rho**2) * shocks[:, t]
    return noise * sigma[:, None]


def _noisy(rng: np.random.Generator, course: Array) -> Curves:
    n = len(course)
    sigma = np.exp(rng.uniform(np.log(0.001), np.log(0.015), n))
    rho = rng.uniform(0.0, 0.95, n)
    wider = np.sqrt(1 + (_LEVEL_NOISE * (course - CHANCE) / sigma[:, None]) ** 2)
    return Curves(course + wider * ar1(rng, n, sigma, rho), course, sigma)


def _sigmoids(rng: np.random.Generator, n: int, *, height: tuple[float, float]) -> Array:
    """Rises whose 10-90% lasts 30 to 2,000 steps, of which 10% is done at evaluation 8 or later."""
    at = np.arange(N_EVALUATIONS)
    length = np.exp(rng.uniform(np.log(3.0), np.log(200.0), n))
    begin = rng.uniform(8.0, N_EVALUATIONS - 1.6 * length - 40.0)
    middle, width = begin + length / 2, length / (2 * _LN9)
    high = rng.uniform(*height, n)
    return CHANCE + high[:, None] * expit((at - middle[:, None]) / width[:, None])


def rises(rng: np.random.Generator, n: int) -> Curves:
    """Sigmoids of heights 0.2 to 0.9."""
    return _noisy(rng, _sigmoids(rng, n, height=(_RISE, 0.9)))


def flat(rng: np.random.Generator, n: int) -> Curves:
    """Nothing happens."""
    return _noisy(rng, np.full((n, N_EVALUATIONS), CHANCE))


def drifts(rng: np.random.Generator, n: int) -> Curves:
    """A slow climb over the whole run that stays below the least threshold."""
    share = np.linspace(0.0, 1.0, N_EVALUATIONS) ** rng.uniform(0.4, 2.5, (n, 1))
    return _noisy(rng, CHANCE + rng.uniform(-0.03, 0.03, (n, 1)) * share)


def _with_spikes(rng: np.random.Generator, n: int, *, apart: int) -> Curves:
    curves = flat(rng, n)
    for row in curves.values:
        free = np.arange(N_EVALUATIONS)
        for _ in range(rng.integers(1, 13)):
            at, high = int(rng.choice(free)), rng.uniform(0.05, 0.6)
            free = free[np.abs(free - at) >= apart]
            if rng.random() < 0.5:
                row[at : at + rng.integers(1, 5)] += high
            else:
                left = np.arange(N_EVALUATIONS - at)
                row[at:] += high * np.exp(-left / rng.uniform(1.0, 4.0))
    return curves


def spikes(rng: np.random.Generator, n: int) -> Curves:
    """Flat, with one to twelve spikes of height 0.05 to 0.6, 200 steps or more from each other:
    four evaluations or shorter, or falling off by a factor e every one to four evaluations."""
    return _with_spikes(rng, n, apart=20)


def bursts(rng: np.random.Generator, n: int) -> Curves:
    """The same spikes anywhere: some follow each other so that together they are long."""
    return _with_spikes(rng, n, apart=1)


def two_steps(rng: np.random.Generator, n: int) -> Curves:
    """A rise to 0.2 to 0.35, 600 to 2,000 steps later a second one by 0.2 to 0.4."""
    at = np.arange(N_EVALUATIONS)
    length = np.exp(rng.uniform(np.log(3.0), np.log(60.0), (n, 2)))
    first = rng.uniform(40.0, 180.0, n)
    second = first + length.sum(1) + rng.uniform(60.0, 200.0, n)
    course = np.full((n, N_EVALUATIONS), CHANCE)
    for middle, width, high in (
        (first + length[:, 0] / 2, length[:, 0], rng.uniform(0.15, 0.30, n)),
        (second, length[:, 1], rng.uniform(0.2, 0.4, n)),
    ):
        z = (at - middle[:, None]) / (width[:, None] / (2 * _LN9))
        course = course + high[:, None] * expit(z)
    return _noisy(rng, course)


KINDS: dict[str, Callable[[np.random.Generator, int], Curves]] = {
    "rises": rises,
    "flat": flat,
    "drifts": drifts,
    "spikes": spikes,
    "bursts of spikes": bursts,
    "two steps": two_steps,
}


def detect(curves: Curves) -> list[list[Window]]:
    """The windows of every curve."""
    detector = WindowDetector(len(curves.values), floor=CHANCE, rule=curves.rule)
    replay(detector, range(0, EVERY * N_EVALUATIONS, EVERY), curves.values.T)
    found: list[list[Window]] = [[] for _ in curves.values]
    for window in detector.windows():
        found[window.unit_index].append(window)
    return found


@dataclass(frozen=True)
class Outcome:
    """Shares of all curves of a kind, and start errors in evaluations."""

    n: int
    opened: float
    early: float
    missed: float
    errors: Array
    """Start found less start true, of the window nearest to the true start."""


def outcome(curves: Curves) -> Outcome:
    """Compare what is found with the truth."""
    errors, n_opened, n_early, n_missed = [], 0, 0, 0
    for windows, truth in zip(detect(curves), curves.true_start, strict=True):
        n_opened += bool(windows)
        if truth < 0:
            continue
        off = np.array([w.start / EVERY - truth for w in windows])
        n_early += bool((off < -EARLY_STEPS / EVERY).any())
        late_enough = off[off >= -EARLY_STEPS / EVERY]
        if len(late_enough):
            errors.append(late_enough[np.abs(late_enough).argmin()])
        else:
            n_missed += 1
    n = len(curves.values)
    return Outcome(n, n_opened / n, n_early / n, n_missed / n, np.array(errors))


if __name__ == "__main__":
    import sys

    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    for kind, make in KINDS.items():
        curves = make(np.random.default_rng(0), n)
        o = outcome(curves)
        e = np.abs(o.errors) if len(o.errors) else np.array([np.nan])
        print(
            f"{kind:10s} n={o.n} opened {o.opened:.4f} early {o.early:.4f} missed {o.missed:.4f} med|err| {np.median(e):.1f} p90 {np.quantile(e, 0.9):.1f} p99 {np.quantile(e, 0.99):.1f} mean err {np.mean(o.errors) if len(o.errors) else np.nan:.2f}"
        )
