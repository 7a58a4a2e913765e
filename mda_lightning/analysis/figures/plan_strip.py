"""A figure of what a plan changes in the stream, step by step."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mda_lightning.analysis.figures.style import LIGHT, SMALL, Theme, canvas
from mda_lightning.schedule.strip import KINDS, Kind, Strip

_HUES: dict[Kind, str] = {
    "masked": "mask-",
    "reweighted": "reweight-",
    "pruned": "prune-",
    "inserted": "insert-",
    "replaced": "replace-",
}


def plan_strip(strip: Strip, *, whole: Strip | None = None, theme: Theme = LIGHT) -> Figure:
    """Share of the places that a plan masks, inserts or replaces, one panel a kind, by step.

    Args:
        strip: of the steps to show.
        whole: of the whole run, whose length is then named.
    """
    kinds = [kind for kind in KINDS if strip.counts[kind].any()] or ["masked"]
    figure, axes = canvas(theme, 0.9 + 1.25 * len(kinds), rows=len(kinds), sharex=True)
    edges = strip.edges.astype(np.float64)
    for ax, kind in zip(axes, kinds, strict=True):
        share = strip.counts[kind] / strip.places
        ax.stairs(share, edges, fill=True, color=theme.colour(_HUES[kind]), linewidth=0)
        ax.set_ylim(0.0, max(float(share.max()) * 1.12, 1e-9))
        ax.yaxis.set_major_locator(MaxNLocator(3))
        ax.set_ylabel(kind)
        ax.grid(False, axis="x")
        total, n_places = int(strip.counts[kind].sum()), int(strip.places.sum())
        ax.set_title(
            f"share of the places: {total:,} of {n_places:,}",
            loc="right",
            fontsize=SMALL,
            color=theme.muted,
        )
    axes[-1].set_xlim(edges[0], edges[-1])
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    of = "" if whole is None or whole is strip else f" of {int(whole.edges[-1]):,}"
    axes[-1].set_xlabel(f"optimizer step{of}")
    return figure
