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

from benchmarks.interleaved import Timing, interleaved, ratio
from benchmarks.monitoring_costs import pythia_step
from mda_lightning.window import MechanismWindow, Window, WindowDetector, WindowRule, replay

Array = NDArray[np.float64]
Rows = Iterator[tuple[str, tuple[float, float, float]]]

EVERY = 10
N_EVALUATIONS = 600
CHANCE = 0.052
EARLY_STEPS = 200
_RISE = 0.2
_LEVEL_NOISE = 0.04  # a head's noise grows with its score: 0.02 at 0.5 in runs of our own
_UNITS = 1000
_LN9 = float(np.log(9.0))


@dataclass
class Curves:
    """Curves of one kind: values and noise-free courses [n, N_EVALUATIONS], sigma [n].

    ``middles`` [n, k] are the evaluations at which each of a curve's k rises is half done.
    """

    values: Array
    course: Array
    sigma: Array
    middles: Array
    rule: WindowRule = field(default_factory=WindowRule)

    @property
    def true_start(self) -> NDArray[np.int64]:
        """Per curve, the evaluation at which the course is first above its threshold; -1: never."""
        up = np.maximum(self.rule.minimum_up, self.course[:, 0] + self.rule.n_sigma * self.sigma)
        above = self.course > up[:, None]
        return np.where(above.any(1), above.argmax(1), -1)

    @property
    def true_end(self) -> NDArray[np.int64]:
        """Per curve, the evaluation at which the course has passed the level, or, where it stays
        under it, has done 90% of its rise; -1 within 0.05 of the level, where either may be, and
        where there is not one rise."""
        top, low = self.course[:, -1], self.course[:, 0]
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


def _noisy(rng: np.random.Generator, course: Array, middles: Array | None = None) -> Curves:
    n = len(course)
    sigma = np.exp(rng.uniform(np.log(0.001), np.log(0.015), n))
    rho = rng.uniform(0.0, 0.95, n)
    wider = np.sqrt(1 + (_LEVEL_NOISE * (course - CHANCE) / sigma[:, None]) ** 2)
    if middles is None:
        middles = np.zeros((n, 0))
    return Curves(course + wider * ar1(rng, n, sigma, rho), course, sigma, middles)


def rises(rng: np.random.Generator, n: int) -> Curves:
    """Sigmoids of heights 0.2 to 0.9 whose 10-90% lasts 30 to 2,000 steps, the first 10% done at
    evaluation 8 or later."""
    at = np.arange(N_EVALUATIONS)
    length = np.exp(rng.uniform(np.log(3.0), np.log(200.0), n))
    begin = rng.uniform(8.0, N_EVALUATIONS - 1.6 * length - 40.0)
    middle, width = begin + length / 2, length / (2 * _LN9)
    high = rng.uniform(_RISE, 0.9, n)
    course = CHANCE + high[:, None] * expit((at - middle[:, None]) / width[:, None])
    return _noisy(rng, course, middle[:, None])


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
    """Shares of all curves of a kind, and errors in evaluations; NaN where there is no truth.

    Attributes:
        opened: curves with a window.
        early: curves with a window that starts more than 200 steps before the true start.
        missed: rises of which no window starts at the true start, or less than 200 steps earlier,
            and before the rise is over.
        start, end: median absolute errors of the window nearest to the true start.
        midpoint: the same of the logistic's midpoint.
        covered: logistic midpoints whose 95% interval holds the true one.
        second: curves of two rises with a later window about the middle of the second, 100 steps
            more or less.
    """

    opened: float
    early: float
    missed: float
    start: float
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
        *(float(np.median(x)) if x else np.nan for x in (starts, ends, midpoints)),
        *(float(np.mean(x)) if x else np.nan for x in (covered, second)),
    )


def simulated(rounds: int) -> Rows:
    """1,000 curves a kind and round, each round from another seed; shares in %, errors in
    evaluations of 10 steps."""
    for kind, make in KINDS.items():
        found = [outcome(make(np.random.default_rng(seed), 1000)) for seed in range(rounds)]
        for name, what, scale in _FIGURES:
            values = sorted(scale * float(getattr(one, name)) for one in found)
            has_rise = kind in ("rises", "two steps")
            if not np.isnan(values).any() and has_rise != (name == "opened"):
                yield f"{kind}: {what}", (values[len(values) // 2], values[0], values[-1])


_FIGURES = (
    ("opened", "false windows, %", 100.0),
    ("early", "start more than 200 steps early, %", 100.0),
    ("missed", "missed, %", 100.0),
    ("start", "error of the start, median", 1.0),
    ("end", "error of the end, median", 1.0),
    ("midpoint", "error of the logistic's midpoint, median", 1.0),
    ("covered", "midpoints inside their 95% interval, %", 100.0),
    ("second", "second rises found, %", 100.0),
)


def cost(rounds: int) -> Rows:
    """1,000 units, one in fifty of which rises, against a training step at Pythia-14M's shape."""
    rng = np.random.default_rng(0)
    course = np.full((_UNITS, N_EVALUATIONS), CHANCE)
    risen = rises(rng, _UNITS // 50).course
    course[: len(risen)] = risen
    values = (course + 0.004 * rng.normal(size=course.shape)).astype(np.float32).T
    train, n_steps_a_call = pythia_step()

    def follow() -> None:
        follower = MechanismWindow(range(_UNITS), chance=CHANCE)
        for i, row in enumerate(values):
            follower.update(EVERY * i, row)

    timings = interleaved({"train": train, "follow": follow}, rounds=rounds)
    micro = sorted(1e6 * seconds / N_EVALUATIONS for seconds in timings["follow"].seconds)
    yield (
        "1,000 heads: one evaluation, in microseconds",
        (micro[len(micro) // 2], micro[0], micro[-1]),
    )
    a_step = Timing(tuple(s / N_EVALUATIONS / EVERY for s in timings["follow"].seconds))
    limits = sorted(s / 1e-4 for s in a_step.seconds)
    yield (
        "1,000 heads every 10 steps: under 0.01% of a step from this length on, in seconds",
        (limits[len(limits) // 2], limits[0], limits[-1]),
    )
    step = Timing(tuple(s / n_steps_a_call for s in timings["train"].seconds))
    median, low, high = ratio(a_step, step)
    yield (
        "1,000 heads every 10 steps / one step of Pythia-14M on this machine, in 1e-6 %",
        (1e8 * median, 1e8 * low, 1e8 * high),
    )
