"""Figure of linear datamodeling scores: one row a ranking, one dot a seed."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from mda_lightning.analysis.datamodeling import DatamodelingTable
from mda_lightning.analysis.figures.style import LIGHT, Theme, canvas


def datamodeling_scores(table: DatamodelingTable, *, theme: Theme = LIGHT) -> Figure:
    """Each ranking's LDS: dots are seeds with their interval over subsets, the diamond their mean.

    The bar of the diamond is the interval over seeds, where there are several.
    """
    rows = [one for one in table.rankings if one.per_seed]
    figure, (ax,) = canvas(theme, 1.4 + 0.75 * len(rows))
    ax.grid(False, axis="y")
    ax.axvline(0.0, color=theme.ink, linewidth=1.0)
    for row, one in enumerate(rows):
        known = [seed for seed in one.per_seed if math.isfinite(seed.value)]
        apart = 0.5 / max(len(known), 1)
        for place, seed in enumerate(known):
            y = row + 0.08 + apart * place
            if math.isfinite(seed.low):
                ax.plot([seed.low, seed.high], [y, y], color=theme.muted, linewidth=1.0)
            ax.plot(seed.value, y, "o", color=theme.muted, markersize=4.5)
        if known:
            y = row - 0.16
            if math.isfinite(one.low):
                ax.plot([one.low, one.high], [y, y], color=theme.accent, linewidth=3.0)
            ax.plot(one.mean, y, "D", color=theme.accent, markersize=8)
    ax.set_yticks(range(len(rows)), [one.ranking for one in rows])
    ax.set_ylim(len(rows) - 0.3, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("linear datamodeling score (Spearman)")
    return figure
