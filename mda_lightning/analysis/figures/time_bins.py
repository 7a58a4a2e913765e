"""Figure of influence over training steps (the paper's figures 3c and 8)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from mda_lightning.analysis.figures.style import LIGHT, SMALL, Theme, canvas, legend
from mda_lightning.analysis.time_bins import TimeBin

QUANTILES = (0.99, 0.9, 0.5, 0.1, 0.01)


def influence_over_steps(
    bins: Sequence[TimeBin],
    *,
    steps: ArrayLike,
    scores: ArrayLike,
    sliding: Sequence[TimeBin] = (),
    unit: str = "",
    fraction: float = 0.10,
    theme: Theme = LIGHT,
) -> Figure:
    """Top samples a bin, net drive and mean a bin, and the spread of scores in each.

    Args:
        bins: side by side.
        steps, scores: of every sample, [N], from which the quantiles are.
        sliding: windows of the same width whose centres lie closer, for the thin lines.
        unit: the head.
        fraction: what the top set is.
    """
    figure, (share, mean, spread) = canvas(theme, 8.2, rows=3, sharex=True)
    known = [one for one in bins if one.n]
    left = np.array([one.start for one in known])
    right = np.array([one.stop for one in known])
    middle = (left + right) / 2
    for axis in (share, mean, spread):
        axis.grid(False, axis="x")
    share.hlines(
        [one.top_share for one in known], left, right, color=theme.accent, linewidth=3.0,
        label=f"in the top {fraction:.0%}",
    )  # fmt: skip
    for number, one in enumerate(known):
        share.fill_between(
            [one.start, one.stop], one.low / one.n, one.high / one.n, color=theme.muted,
            alpha=0.3, linewidth=0, label="random set, 95%" if number == 0 else None,
        )  # fmt: skip
    if sliding:
        centres = [(one.start + one.stop) / 2 for one in sliding]
        share.plot(
            centres, [one.top_share for one in sliding], color=theme.ink, linewidth=1.0,
            label="sliding window",
        )  # fmt: skip
    highest = max(max(one.top_share, one.high / one.n) for one in [*known, *sliding] if one.n)
    share.set_ylim(0, min(1.0, 1.15 * highest))
    share.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    share.set_ylabel("top samples")
    legend(share, theme, columns=3)

    half = 1.96 * np.nan_to_num([one.error for one in known])
    centre = np.array([one.mean for one in known])
    mean.axhline(0.0, color=theme.ink, linewidth=1.0)
    mean.errorbar(
        middle, centre, yerr=half, fmt="o", color=theme.accent, markersize=5, capsize=3,
        linewidth=1.8, label="mean of the bin, 95%",
    )  # fmt: skip
    if sliding:
        mean.plot(centres, [one.mean for one in sliding], color=theme.ink, linewidth=1.0)
    mean.yaxis.set_major_locator(MaxNLocator(5))
    mean.yaxis.set_major_formatter(_short)
    mean.set_ylabel("mean influence")
    legend(mean, theme, columns=2)

    at, values = np.asarray(steps), np.asarray(scores, dtype=np.float64)
    table = np.array(
        [
            np.quantile(values[(at >= one.start) & (at < one.stop)], QUANTILES)
            for one in known
        ]
    )  # fmt: skip
    scale = float(np.median(np.abs(values))) or 1.0
    spread.set_yscale("symlog", linthresh=scale, linscale=0.8)
    for row, quantile in enumerate(QUANTILES):
        middle_one = quantile == 0.5
        spread.hlines(
            table[:, row], left, right, color=theme.ink if middle_one else theme.accent,
            linewidth=2.4 if middle_one else 1.8,
        )  # fmt: skip
        spread.annotate(
            f"{quantile:.0%}", (1.0, table[-1, row]), xycoords=("axes fraction", "data"),
            xytext=(4, 0), textcoords="offset points", va="center", color=theme.ink,
            fontsize=SMALL,
        )  # fmt: skip
    spread.axhline(0.0, color=theme.muted, linewidth=0.8)
    extreme = float(np.abs(table).max())
    tick = _rounded(max(extreme, scale))
    spread.set_yticks([-tick, 0.0, tick])
    spread.minorticks_off()
    spread.yaxis.set_major_formatter(_short)
    spread.set_ylabel("quantiles of influence")
    spread.set_xlabel(f"optimizer step at which a sample was trained on{f', {unit}' * bool(unit)}")
    spread.set_xlim(left[0], right[-1])
    spread.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    return figure


def _short(value: float, _: float = 0.0) -> str:
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def _rounded(value: float) -> float:
    power = 10.0 ** np.floor(np.log10(value))
    return float(np.floor(value / power) * power)
