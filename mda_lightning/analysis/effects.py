"""Treated against control over seeds: paired differences, an interval, and a plain sentence.

Each seed trains every arm from the same checkpoint on the same data order, so seeds are pairs and
the difference within a seed is what varies. The interval is Student's t on those differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student_t
from scipy.stats import ttest_1samp

Direction = Literal["higher", "lower", "no clear difference", "one seed"]
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Effect:
    """Mean paired difference treated - control, in units of the measured quantity.

    Attributes:
        mean: mean difference over seeds.
        low, high: 95% interval of the mean; NaN with one seed.
        n: number of seeds (pairs).
        verdict: a sentence a reader can quote.
        direction: "no clear difference" whenever the interval includes 0 (its ends included).
        differences: the per-seed differences, in the order given.
    """

    mean: float
    low: float
    high: float
    n: int
    verdict: str
    direction: Direction
    differences: tuple[float, ...]


@dataclass(frozen=True)
class LateDifference:
    """How the difference of two curves wandered late in one run: a description, not an interval.

    Attributes:
        mean, sd: over the shared evaluation steps; sd is the sample standard deviation.
        n: evaluations used.
        since: first step used.
    """

    mean: float
    sd: float
    n: int
    since: int


def signed(value: float, digits: int = 3) -> str:
    """A signed number with a real minus sign: ``+0.031``, ``−0.081``, ``0.000``."""
    rounded = round(value, digits)
    text = f"{abs(rounded):.{digits}f}"
    return text if rounded == 0 else (f"+{text}" if rounded > 0 else f"{MINUS}{text}")


def late_difference(
    treated: tuple[ArrayLike, ArrayLike], control: tuple[ArrayLike, ArrayLike], *, since: int
) -> LateDifference | None:
    """Spread of treated - control over the steps both curves share, from ``since`` on.

    Args:
        treated, control: (steps, values) of one seed's two arms.
        since: first step counted, usually the window's midpoint.

    Returns:
        ``None`` when fewer than 3 shared steps remain.
    """
    steps, at_treated, at_control = np.intersect1d(
        np.asarray(treated[0]), np.asarray(control[0]), return_indices=True
    )
    difference = (
        np.asarray(treated[1], dtype=np.float64)[at_treated]
        - np.asarray(control[1], dtype=np.float64)[at_control]
    )[steps >= since]
    difference = difference[np.isfinite(difference)]
    if difference.size < 3:
        return None
    return LateDifference(
        float(difference.mean()), float(difference.std(ddof=1)), int(difference.size), int(since)
    )


def paired_effects(
    treated: Sequence[float],
    control: Sequence[float],
    *,
    treated_name: str = "treated",
    control_name: str = "control",
    quantity: str = "score",
    late: LateDifference | None = None,
) -> Effect:
    """Mean difference over seeds with its paired 95% t interval, and the verdict in words.

    ``mean ± t(0.975, n - 1) * sd / sqrt(n)`` of the differences ``treated[i] - control[i]``: the
    interval of ``scipy.stats.ttest_rel``.

    Args:
        treated, control: one value per seed, in the same order.
        treated_name, control_name: how the sentence calls them ("masking the top samples").
        quantity: what was measured ("induction score of the target head").
        late: used only with one seed, to describe how the difference wandered late in the run.

    Raises:
        ValueError: lengths differ, no pair is given, or a value is not finite.
    """
    first = np.asarray(treated, dtype=np.float64)
    second = np.asarray(control, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"treated has {first.size} values and control {second.size}: "
            "a paired comparison needs one of each per seed"
        )
    if first.size == 0:
        raise ValueError("no seed has both a treated and a control value; run at least one of each")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a value is not finite; leave that seed out of both lists and say so")
    differences = first - second
    n = int(differences.size)
    mean = float(differences.mean())
    if n == 1:
        low = high = math.nan
    else:
        half = float(student_t.ppf(0.975, n - 1)) * float(differences.std(ddof=1)) / math.sqrt(n)
        low, high = mean - half, mean + half
    direction = _direction(n, low, high)
    effect = Effect(mean, low, high, n, "", direction, tuple(float(d) for d in differences))
    verdict = _verdict(
        effect, treated_name=treated_name, control_name=control_name, quantity=quantity, late=late
    )
    return Effect(mean, low, high, n, verdict, direction, effect.differences)


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of Student's paired t test that the mean difference is 0.

    Returns:
        ``None`` with fewer than 2 seeds; differences that are all equal (but for rounding) give 1
        at 0, else 0.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.size < 2:
        return None
    size = float(np.abs(values).max())
    if float(np.ptp(values)) <= 1e-12 * size:
        return 0.0 if size else 1.0
    return float(ttest_1samp(values, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p values for there being several (Holm 1979), in order."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]


def _direction(n: int, low: float, high: float) -> Direction:
    if n == 1:
        return "one seed"
    if low > 0:
        return "higher"
    if high < 0:
        return "lower"
    return "no clear difference"


def _verdict(
    effect: Effect,
    *,
    treated_name: str,
    control_name: str,
    quantity: str,
    late: LateDifference | None,
) -> str:
    if effect.direction == "one seed":
        amount = f"{abs(effect.mean):.3f} {'lower' if effect.mean < 0 else 'higher'}"
        text = (
            f"One seed: the {quantity} ended {amount} after {treated_name} than after "
            f"{control_name}. One seed gives no interval, so this describes one run and proves "
            "nothing."
        )
        if late is not None:
            text += (
                f" From step {late.since} on, the difference averaged {signed(late.mean)} with a "
                f"standard deviation of {late.sd:.3f} over {late.n} evaluations of that run."
            )
        return text
    interval = (
        f"mean difference {signed(effect.mean)}, 95% interval {signed(effect.low)} to "
        f"{signed(effect.high)}, {effect.n} seeds"
    )
    if effect.direction == "no clear difference":
        return (
            f"No clear difference in the {quantity} between {treated_name} and {control_name}: "
            f"the interval includes 0 ({interval})."
        )
    verb = "raised" if effect.direction == "higher" else "lowered"
    subject = treated_name[:1].upper() + treated_name[1:]
    return f"{subject} {verb} the {quantity} against {control_name} ({interval})."
