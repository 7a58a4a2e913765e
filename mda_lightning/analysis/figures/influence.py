"""Figures of influence: how scores are spread over samples, and where the top ones come from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from mda_lightning.analysis.composition import DomainShare
from mda_lightning.analysis.distributions import TailFit, top_count, top_share
from mda_lightning.analysis.figures.style import LIGHT, SMALL, Theme, canvas, legend


def score_distribution(
    scores: ArrayLike,
    *,
    unit: str = "",
    fraction: float = 0.10,
    tail: TailFit | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """Above: all scores, symmetric-log. Below: the positive ones by rank, log-log.

    The top ``fraction`` is shaded in both, and the lower panel states the share of all positive
    influence it holds; ``tail`` draws the fitted power law over the ranks it was fitted to.
    """
    values = np.asarray(scores, dtype=np.float64)
    ranked = np.sort(values)[::-1]
    count = top_count(values.size, fraction)
    edge = float(ranked[count - 1])
    label = f"top {fraction:.0%}"
    figure, (above, below) = canvas(theme, 7.0, rows=2)
    scale = float(np.median(np.abs(values[values != 0]))) if (values != 0).any() else 1.0
    reach = float(np.abs(values).max()) or 1.0
    above.set_xscale("symlog", linthresh=scale, linscale=0.8)
    high = scale * np.geomspace(1.0, max(reach / scale, 1.5), 28)
    bins = np.concatenate([-high[::-1], np.linspace(-scale, scale, 21)[1:-1], high]).tolist()
    for sign, colour, side in ((-1, theme.muted, "hinder"), (1, theme.accent, "promote")):
        counts = np.histogram(values[values < 0] if sign < 0 else values[values >= 0], bins)[0]
        above.stairs(counts, bins, fill=True, color=colour, alpha=0.85, label=side)
    above.axvline(0.0, color=theme.ink, linewidth=1.0)
    above.axvspan(edge, reach, color=theme.shade, zorder=0, linewidth=0, label=label)
    above.set_yscale("log")
    above.set_ylim(bottom=0.8)
    above.xaxis.set_major_formatter(_plain)
    above.yaxis.set_major_formatter(_plain)
    # A few ticks of our own: symlog's set overlaps around zero.
    ticks = [_rounded_down(reach)]
    ticks += [ticks[0] / 10] if ticks[0] / 10 > scale else []
    above.set_xticks(sorted([-tick for tick in ticks] + [0.0] + ticks))
    above.minorticks_off()
    above.set_xlabel(f"influence score on {unit or 'the unit'} (symmetric log scale)")
    above.set_ylabel("samples per bin")
    legend(above, theme, columns=3)
    positive = ranked[ranked > 0]
    if positive.size:
        share = top_share(values, fraction)
        below.loglog(
            np.arange(1, positive.size + 1) / values.size, positive, color=theme.accent,
            linewidth=2.4, label="positive scores",
        )  # fmt: skip
        below.axvspan(
            0.7 / values.size, count / values.size, color=theme.shade, zorder=0, linewidth=0
        )
        below.annotate(
            f"{label} of samples\n{share:.0%} of positive influence",
            (0.03, 0.06),
            xycoords="axes fraction",
            color=theme.ink,
            fontsize=SMALL,
        )
        if tail is not None:
            fractions = np.geomspace(1 / values.size, tail.n_tail / values.size, 50)
            law = tail.cutoff * (fractions * values.size / tail.n_tail) ** (
                -1.0 / (tail.exponent - 1.0)
            )
            below.loglog(
                fractions, law, color=theme.ink, linewidth=1.5, linestyle=(0, (4, 2)),
                label=f"power law, exponent {tail.exponent:.2f}",
            )  # fmt: skip
        below.set_xlim(0.7 / values.size, 1.0)
        below.set_ylim(bottom=max(positive[-1], 1e-4 * positive[0]) / 1.5)
        below.minorticks_off()
        below.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        below.yaxis.set_major_formatter(_plain)
        legend(below, theme, columns=2)
    below.set_xlabel("rank, as share of all scored samples (log scale)")
    below.set_ylabel("score")
    return figure


def _plain(value: float, _: float = 0.0) -> str:
    """Tick text without mathematics typesetting, which costs most of a figure's time."""
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def _rounded_down(value: float) -> float:
    """To one significant digit: 0.0273 gives 0.02."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(np.floor(value / power) * power)


def domain_composition(
    rows: Sequence[DomainShare], *, fraction: float = 0.10, theme: Theme = LIGHT
) -> Figure:
    """Share of each domain in the top set and among all scored samples, as paired bars.

    The whisker on the lower bar is the 95% range of a random set of the top set's size. With
    several seeds, dots are the seeds' own top shares.
    """
    figure, (ax,) = canvas(theme, 1.5 + 0.62 * len(rows))
    ax.grid(False, axis="y")
    for row, share in enumerate(rows):
        ax.barh(row - 0.2, share.top_share, height=0.36, color=theme.accent)
        ax.barh(row + 0.2, share.base_share, height=0.36, color=theme.muted, alpha=0.55)
        ax.plot(
            [share.chance_low, share.chance_high], [row + 0.2] * 2, color=theme.ink, linewidth=2.0
        )
        furthest = max(share.top_share, share.base_share, share.chance_high, *share.per_seed)
        if len(share.per_seed) > 1:
            ax.scatter(
                share.per_seed, [row - 0.2] * len(share.per_seed), s=20, facecolor=theme.page,
                edgecolor=theme.ink, linewidth=0.9, zorder=3,
            )  # fmt: skip
        ax.annotate(
            f"×{share.lift:.2g}",
            (furthest, row),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=theme.ink,
            fontsize=SMALL,
        )
    ax.set_yticks(range(len(rows)), [share.domain for share in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, ax.get_xlim()[1] * 1.08)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_xlabel("share of samples")
    ax.tick_params(axis="y", length=0)
    handles = [
        Patch(color=theme.accent, label=f"top {fraction:.0%}"),
        Patch(color=theme.muted, alpha=0.55, label="all scored"),
        ax.plot([], [], color=theme.ink, linewidth=2.0, label="random set, 95%")[0],
    ]
    ax.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False,
        fontsize=SMALL, labelcolor=theme.ink, borderaxespad=0.2, columnspacing=1.4,
    )  # fmt: skip
    return figure
