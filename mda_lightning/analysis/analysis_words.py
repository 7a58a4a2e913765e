"""Numbers and findings of the analyses, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mda_lightning.analysis.datamodeling import Difference, seed_interval
from mda_lightning.analysis.effects import signed
from mda_lightning.analysis.overlap import BlockContrast, OverlapMatrix


def block_sentence(name: str, blocks: Sequence[BlockContrast], expected: float | None) -> str:
    """Whether the leading heads are a block of their own, over the seeds given.

    Args:
        expected: overlap of random sets; None leaves it out.
    """
    within, between = (
        float(np.mean([getattr(one, part) for one in blocks])) for part in ("within", "between")
    )
    mean, low, high = seed_interval([one.contrast for one in blocks])
    chance = "" if expected is None else f"; random sets {expected:.2f}"
    if len(blocks) == 1:
        return (
            f"{name}: {within:.2f} among the leading heads, {between:.2f} between them and the "
            f"others (p = {p_text(blocks[0].p_value)}, one seed{chance})."
        )
    clear = "a block of their own" if low > 0 else "no clear block over these seeds"
    return (
        f"{name}: {within:.2f} among the leading heads, {between:.2f} between them and the others: "
        f"{clear} (difference {signed(mean)}, 95% interval {signed(low)} to {signed(high)}, "
        f"{len(blocks)} seeds{chance})."
    )


def kinship_sentence(kinships: Sequence[float]) -> str:
    """Whether heads with a higher μ share more data with the target, over the seeds given."""
    mean, low, high = seed_interval(kinships)
    if len(kinships) == 1:
        return (
            "Over the other heads, μ and the overlap with the target have rank correlation "
            f"{signed(mean, 2)} (one seed)."
        )
    if low > 0:
        verdict = "The higher a head's μ, the more of its top samples are the target's"
    elif high < 0:
        verdict = "The higher a head's μ, the fewer of its top samples are the target's"
    else:
        verdict = "No clear relation of a head's μ with its overlap with the target"
    return (
        f"{verdict}: rank correlation {signed(mean, 2)} ({span(low, high)}, {len(kinships)} seeds)."
    )


def difference_sentence(one: Difference) -> str:
    """Which of two rankings predicts better; the interval over seeds decides, where it exists."""
    if len(one.per_seed) > 1:
        low, high, of = one.low, one.high, f"{len(one.per_seed)} seeds"
    else:
        _, _, low, high = one.per_seed[0]
        of = "one seed, interval over subsets"
    if low > 0:
        verdict = f"{one.ranking} predicts better than {one.other}"
    elif high < 0:
        verdict = f"{one.other} predicts better than {one.ranking}"
    else:
        verdict = f"No clear difference between {one.ranking} and {one.other}"
    return f"{verdict}: {signed(one.mean, 2)} ({span(low, high)}, {of})."


def strongest_pair(matrix: OverlapMatrix) -> str:
    """The pair whose top sets share most."""
    off = np.where(np.eye(len(matrix.names), dtype=bool), -np.inf, matrix.jaccard)
    i, j = sorted(np.unravel_index(int(off.argmax()), off.shape))
    pair = matrix.of(matrix.names[i], matrix.names[j])
    return (
        f"The largest overlap is that of {matrix.names[i]} and {matrix.names[j]}: "
        f"{pair.shared:,} of {pair.first:,} top samples shared, Jaccard {pair.jaccard:.2f}."
    )


def number(value: float, digits: int = 3) -> str:
    """With a real minus sign; a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def significant(value: float) -> str:
    """To three significant digits."""
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else "–"


def span(low: float, high: float) -> str:
    return f"{number(low, 2)} to {number(high, 2)}"


def p_text(value: float) -> str:
    """``0.032``, ``< 0.001``, or a dash."""
    if not math.isfinite(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
