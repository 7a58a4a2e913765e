"""Figures of overlap: every pair of heads, or of ways to rank (the paper's figure 3b)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from mda_lightning.analysis.figures.style import LIGHT, SMALL, TEXT, Theme, canvas

MOST_NUMBERS = 12
"""Up to so many rows every cell states its number."""


def overlap_heatmap(
    below: ArrayLike,
    above: ArrayLike,
    *,
    names: Sequence[str],
    below_name: str,
    above_name: str,
    leading: int = 0,
    order: str = "",
    least_scale: float = 0.2,
    theme: Theme = LIGHT,
) -> Figure:
    """Two symmetric matrices in one square: one below the diagonal, the other above it.

    Args:
        below, above: in [-1, 1], [U, U]; NaN is left blank. Colours reach the largest value off
            the diagonal, ``least_scale`` at least; with values below 0 they diverge from 0.
        names: of rows and columns, [U].
        below_name, above_name: what the two triangles show.
        leading: a line is drawn after so many rows and columns; 0 draws none.
        order: how the rows are ordered, for the axis.
    """
    lower, upper = (np.asarray(one, dtype=np.float64) for one in (below, above))
    rows = len(names)
    shown = np.where(np.tri(rows, k=-1, dtype=bool), lower, upper)
    np.fill_diagonal(shown, np.nan)
    known = shown[np.isfinite(shown)]
    reach = max(least_scale, float(np.abs(known).max()) if known.size else 0.0)
    longest = max(map(len, names), default=0)
    figure, (ax,) = canvas(theme, 6.5 - 0.03 * max(0, longest - 5))
    ax.grid(False)
    diverging = bool(known.size) and float(known.min()) < -0.05
    mesh = ax.imshow(
        shown,
        cmap="PuOr_r" if diverging else "cividis",
        vmin=-reach if diverging else 0.0,
        vmax=reach,
        interpolation="nearest",
    )
    ax.set_facecolor(theme.shade)
    stride = max(1, math.ceil(rows / 24))
    ticks = np.arange(0, rows, stride)
    ax.set_yticks(ticks, list(names)[::stride])
    ax.set_xticks(ticks, list(names)[::stride])
    if longest > 6:
        ax.tick_params(axis="x", labelrotation=40)
        for label in ax.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    elif rows > 9 or longest > 3:
        ax.tick_params(axis="x", labelrotation=90)
    ax.tick_params(length=0 if rows <= 24 else 3)
    if rows <= MOST_NUMBERS:
        for i, j in np.argwhere(np.isfinite(shown)).tolist():
            value = shown[i, j]
            shade = abs(value) / reach if diverging else value / reach
            dark_cell = shade < 0.55 if not diverging else shade > 0.7
            ax.text(
                j, i, f"{value:.2f}".replace("0.", ".", 1).replace("-", "\N{MINUS SIGN}"),
                ha="center", va="center", fontsize=SMALL if rows <= 9 else 9.0,
                color="white" if dark_cell else "black",
            )  # fmt: skip
    if 0 < leading < rows:
        for line in (ax.axvline, ax.axhline):
            line(leading - 0.5, color=theme.page, linewidth=4.0)
            line(leading - 0.5, color=theme.ink, linewidth=1.6)
    ax.set_title(
        f"above the diagonal: {above_name}\nbelow the diagonal: {below_name}",
        loc="left",
        fontsize=SMALL,
        color=theme.ink,
    )
    if order:
        ax.set_ylabel(order)
    bar = figure.colorbar(mesh, ax=ax, pad=0.02, aspect=24, shrink=0.8)
    bar.ax.tick_params(colors=theme.muted, labelcolor=theme.ink, labelsize=SMALL)
    bar.set_label("overlap" if not diverging else "correlation", color=theme.ink, fontsize=TEXT)
    return figure
