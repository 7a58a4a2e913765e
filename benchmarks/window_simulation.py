"""Curves of which the truth is known, and how the detector does on them.

Every curve is what a metric of one unit would be at an evaluation every 10 steps: a noise-free
course and an AR(1) process on top. What the detector is to find follows from the noise-free course
alone: the first evaluation above ``max(0.10, floor + 6 sigma)``, sigma the noise's own marginal
standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from benchmarks.interleaved import interleaved
from mda_lightning.window import MechanismWindow, Window, WindowDetector, WindowRule, replay

Array = NDArray[np.float64]
Rows = Iterator[tuple[str, tuple[float, float, float]]]

EVERY = 10
N_EVALUATIONS = 600
CHANCE = 0.052
EARLY_STEPS = 200
_RISE = 0.2
_LOUD = (0.015, 0.03)
_LEVEL_NOISE = 0.04  # a head's noise grows with its score: 0.02 at 0.5 in runs of our own
_UNITS = 1000
_LN9 = float(np.log(9.0))


@dataclass
class Curves:
    """Curves of one kind: values and noise-free courses [n, N_EVALUATIONS], sigma [n].

    ``floor`` [n] is what the course lies at before it rises, ``middles`` [n, k] the evaluations at
    which each of a curve's k rises is half done.
    """

    values: Array
    course: Array
    sigma: Array
    floor: Array
    middles: Array
    rule: WindowRule = field(default_factory=WindowRule)

    @property
    def true_start(self) -> NDArray[np.int64]:
        """Per curve, the evaluation at which the course is first above its threshold; -1: never."""
        up = np.maximum(self.rule.minimum_up, self.floor + self.rule.n_sigma * self.sigma)
        above = self.course > up[:, None]
        return np.where(above.any(1), above.argmax(1), -1)

    @property
    def true_end(self) -> NDArray[np.int64]:
        """Per curve, the evaluation at which the course has passed the level, or, where it stays
        under it, has done 90% of its rise; -1 within 0.05 of the level, where either may be, and
        where there is not one rise."""
        top, low = self.course[:, -1], self.floor
        level = self.rule.level or np.inf
        line = np.where(top > level, level, low + 0.9 * (top - low))
        reached = (self.course >= line[:, None]).argmax(1)
        unclear = (np.abs(top - level) < 0.05) | (self.middles.shape[1] != 1)
        return np.where(unclear, -1, reached)


def ar1(rng: np.random.Generator, n: int, sigma: Array, rho: Array) -> Array:
    """Stationary AR(1) noise [n, N_EVALUATIONS] of marginal standard deviation sigma [n]."""
    shocks = rng.normal(size=(n, N_EVALUATIONS))
    noise = np.empty_like(shocks)
    noise[:, 0] = shocks[:, 0]
    for t in range(1, N_EVALUATIONS):
        noise[:, t] = rho * noise[:, t - 1] + np.sqrt(1 - rho**2) * shocks[:, t]
    return noise * sigma[:, None]


def _noisy(
    rng: np.random.Generator,
    course: Array,
    middles: Array | None = None,
    *,
    sigmas: tuple[float, float] = (0.001, 0.015),
    floor: Array | float = CHANCE,
) -> Curves:
    n = len(course)
    sigma = np.exp(rng.uniform(*np.log(sigmas), n))
    rho = rng.uniform(0.0, 0.95, n)
    wider = np.sqrt(1 + (_LEVEL_NOISE * (course - CHANCE) / sigma[:, None]) ** 2)
    if middles is None:
        middles = np.zeros((n, 0))
    return Curves(
        course + wider * ar1(rng, n, sigma, rho), course, sigma, np.broadcast_to(floor, n), middles
    )


def _sigmoids(
    rng: np.random.Generator, n: int, *, lengths: tuple[float, float] = (3.0, 200.0)
) -> tuple[Array, Array]:
    """Courses [n, N_EVALUATIONS] of heights 0.2 to 0.9, the first 10% done at evaluation 8 or
    later, and their middles [n, 1]; ``lengths`` of the 10-90% in evaluations."""
    at = np.arange(N_EVALUATIONS)
    length = np.exp(rng.uniform(*np.log(lengths), n))
    last = np.maximum(N_EVALUATIONS - 1.6 * length - 40.0, 9.0)
    begin = rng.uniform(8.0, last)
    middle, width = begin + length / 2, length / (2 * _LN9)
    high = rng.uniform(_RISE, 0.9, n)
    course = CHANCE + high[:, None] * expit((at - middle[:, None]) / width[:, None])
    return course, middle[:, None]


def rises(rng: np.random.Generator, n: int) -> Curves:
    """Sigmoids of heights 0.2 to 0.9 whose 10-90% lasts 30 to 2,000 steps."""
    return _noisy(rng, *_sigmoids(rng, n))


def slow_rises(rng: np.random.Generator, n: int) -> Curves:
    """The same over 2,000 to 3,400 steps."""
    return _noisy(rng, *_sigmoids(rng, n, lengths=(200.0, 340.0)))


def noisy_rises(rng: np.random.Generator, n: int) -> Curves:
    """Rises with a noise of 0.015 to 0.03 at the floor."""
    return _noisy(rng, *_sigmoids(rng, n), sigmas=_LOUD)


def high_floors(rng: np.random.Generator, n: int) -> Curves:
    """Rises from floors that lie 0.01 to 0.04 above the chance value."""
    course, middles = _sigmoids(rng, n)
    above = rng.uniform(0.01, 0.04, n)
    return _noisy(rng, course + above[:, None], middles, floor=CHANCE + above)


def _flat(rng: np.random.Generator, n: int, **noise: Any) -> Curves:
    return _noisy(rng, np.full((n, N_EVALUATIONS), CHANCE), **noise)


def flat(rng: np.random.Generator, n: int) -> Curves:
    """Nothing happens."""
    return _flat(rng, n)


def noisy_flat(rng: np.random.Generator, n: int) -> Curves:
    """Nothing happens, with a noise of 0.015 to 0.03."""
    return _flat(rng, n, sigmas=_LOUD)


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


def rounded(rng: np.random.Generator, n: int) -> Curves:
    """Spikes 200 steps or more apart that come and go as a Gaussian, two to five evaluations wide
    at half their height of 0.05 to 0.6: the wider ones are above the threshold for longer than the
    rule's five evaluations."""
    curves = flat(rng, n)
    at = np.arange(N_EVALUATIONS)
    for row in curves.values:
        for middle in np.arange(20, N_EVALUATIONS - 20, 40)[: rng.integers(1, 13)]:
            width = rng.uniform(2.0, 5.0) / 2.355
            row += rng.uniform(0.05, 0.6) * np.exp(-(((at - middle) / width) ** 2) / 2)
    return curves


def two_steps(rng: np.random.Generator, n: int) -> Curves:
    """A rise to 0.2 to 0.35, 600 to 2,000 steps later a second one by 0.2 to 0.4."""
    at = np.arange(N_EVALUATIONS)
    length = np.exp(rng.uniform(np.log(3.0), np.log(60.0), (n, 2)))
    first = rng.uniform(40.0, 180.0, n)
    second = first + length.sum(1) + rng.uniform(60.0, 200.0, n)
    course = np.full((n, N_EVALUATIONS), CHANCE)
    middles = np.stack([first + length[:, 0] / 2, second], 1)
    heights = np.stack([rng.uniform(0.15, 0.30, n), rng.uniform(0.2, 0.4, n)], 1)
    for middle, width, high in zip(middles.T, length.T, heights.T, strict=True):
        z = (at - middle[:, None]) / (width[:, None] / (2 * _LN9))
        course = course + high[:, None] * expit(z)
    return _noisy(rng, course, middles)


KINDS: dict[str, Callable[[np.random.Generator, int], Curves]] = {
    "rises": rises,
    "flat": flat,
    "drifts": drifts,
    "spikes": spikes,
    "two steps": two_steps,
    "beyond: rises of 2,000 to 3,400 steps": slow_rises,
    "beyond: rises in noise of 0.015 to 0.03": noisy_rises,
    "beyond: flat in noise of 0.015 to 0.03": noisy_flat,
    "beyond: floor 0.01 to 0.04 above chance": high_floors,
    "beyond: rounded spikes": rounded,
    "beyond: bursts of spikes": bursts,
}
"""What the detector is made for, and what lies beyond it."""


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
    """Shares of all curves of a kind, and errors in evaluations; NaN where there is no truth.

    Attributes:
        opened: curves with a window.
        early: curves with a window that starts more than 200 steps before the true start.
        missed: rises of which no window starts at the true start, or less than 200 steps earlier,
            and before the rise is over.
        start, end: median absolute errors of the window nearest to the true start.
        start_90: the start's 90th percentile.
        midpoint: the same of the logistic's midpoint.
        covered: logistic midpoints whose 95% interval holds the true one.
        second: curves of two rises with a later window about the middle of the second, 100 steps
            more or less.
    """

    opened: float
    early: float
    missed: float
    start: float
    start_90: float
    end: float
    midpoint: float
    covered: float
    second: float


def outcome(curves: Curves) -> Outcome:
    """Compare what is found with the truth."""
    found = detect(curves)
    starts, ends, midpoints, covered, second = [], [], [], [], []
    n_early = n_missed = 0
    latest = N_EVALUATIONS if not curves.middles.shape[1] else None
    for i, (windows, start, end) in enumerate(
        zip(found, curves.true_start, curves.true_end, strict=True)
    ):
        if start < 0:
            continue
        off = [w.start / EVERY - start for w in windows]
        n_early += any(x < -EARLY_STEPS / EVERY for x in off)
        over = latest or curves.middles[i, 0] + 2 * (curves.middles[i, 0] - start) + 20
        near = [
            (abs(x), w)
            for x, w in zip(off, windows, strict=True)
            if x >= -EARLY_STEPS / EVERY and w.start / EVERY <= over
        ]
        if curves.middles.shape[1] == 2:
            middle = EVERY * curves.middles[i, 1]
            near_by = EARLY_STEPS / 2
            second.append(
                any(
                    w.start <= middle + near_by and (w.end or middle) >= middle - near_by
                    for w in windows[1:]
                )
            )
        if not near:
            n_missed += 1
            continue
        error, window = min(near, key=lambda pair: pair[0])
        starts.append(error)
        if window.end is not None and end >= 0 and window.end_reason != "lapsed":
            ends.append(abs(window.end / EVERY - end))
        if window.midpoint_interval is not None and window.refined_midpoint is not None:
            truth = EVERY * curves.middles[i, 0]
            midpoints.append(abs(window.refined_midpoint - truth) / EVERY)
            low, high = window.midpoint_interval
            covered.append(low <= truth <= high)
    n = len(found)
    return Outcome(
        sum(map(bool, found)) / n,
        n_early / n,
        n_missed / n,
        *(float(np.quantile(starts, q)) if starts else np.nan for q in (0.5, 0.9)),
        *(float(np.median(x)) if x else np.nan for x in (ends, midpoints)),
        *(float(np.mean(x)) if x else np.nan for x in (covered, second)),
    )


def simulated(rounds: int) -> Rows:
    """1,000 curves a kind and round, each round from another seed; shares in %, errors in
    evaluations of 10 steps."""
    for kind, make in KINDS.items():
        found = [outcome(make(np.random.default_rng(seed), 1000)) for seed in range(rounds)]
        for name, what, scale in _FIGURES:
            values = sorted(scale * float(getattr(one, name)) for one in found)
            has_rise = bool(make(np.random.default_rng(0), 1).middles.size)
            if not np.isnan(values).any() and has_rise != (name == "opened"):
                yield f"{kind}: {what}", (values[len(values) // 2], values[0], values[-1])


_FIGURES = (
    ("opened", "false windows, %", 100.0),
    ("early", "start more than 200 steps early, %", 100.0),
    ("missed", "missed, %", 100.0),
    ("start", "error of the start, median", 1.0),
    ("start_90", "error of the start, 90th percentile", 1.0),
    ("end", "error of the end, median", 1.0),
    ("midpoint", "error of the logistic's midpoint, median", 1.0),
    ("covered", "midpoints inside their nominal 95% interval, %", 100.0),
    ("second", "second rises found, %", 100.0),
)


def cost(rounds: int) -> Rows:
    """1,000 units: none, one in fifty, or all of them rise within 6,000 steps."""
    rng = np.random.default_rng(0)
    for what, n_rising in (("none rises", 0), ("one in fifty rises", 20), ("all rise", _UNITS)):
        course = np.full((_UNITS, N_EVALUATIONS), CHANCE)
        if n_rising:
            course[:n_rising] = rises(rng, n_rising).course
        values = (course + 0.004 * rng.normal(size=course.shape)).astype(np.float32).T
        follow = partial(_follow, values)
        seconds = sorted(interleaved({"follow": follow}, rounds=rounds)["follow"].seconds)
        micro = [1e6 * one / N_EVALUATIONS for one in seconds]
        yield (
            f"1,000 heads, {what}: one evaluation, in microseconds",
            (micro[len(micro) // 2], micro[0], micro[-1]),
        )
        limits = [one / EVERY / 100 for one in micro]
        yield (
            "... every 10 steps, under 0.01% of a step from this length on, in seconds",
            (limits[len(limits) // 2], limits[0], limits[-1]),
        )


def _follow(values: NDArray[np.float32]) -> None:
    follower = MechanismWindow(range(values.shape[1]), chance=CHANCE)
    for i, row in enumerate(values):
        follower.update(EVERY * i, row)
