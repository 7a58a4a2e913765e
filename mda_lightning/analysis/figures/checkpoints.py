"""Figures over checkpoints, one column each: their steps are too unevenly spaced for an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from mda_lightning.analysis.figures.style import LIGHT, SMALL, TEXT, Theme, canvas

_LABELS = 26
_LEAST_SCALE = 0.2
AT_STEP = "checkpoint, at optimizer step"


def checkpoint_heatmap(
    names: Sequence[str],
    values: ArrayLike,
    *,
    units: Sequence[str],
    metric: str,
    chance: float | None = None,
    repeated: Sequence[bool] = (),
    axis: str = AT_STEP,
    theme: Theme = LIGHT,
) -> Figure:
    """All heads (rows) over checkpoints (columns, evenly spaced).

    Colours run from 0 to the highest value; where values are negative, from blue over white at 0 to
    red. What is not finite is hatched.

    Args:
        names: column names, [n]; usually steps.
        values: [n, U].
        units: row names, [U].
        chance: of an attention score, drawn as a tick on the colour bar; noise around it is kept
            from looking like a rise.
        repeated: columns whose weights equal another's, [n]; an asterisk stands above them.
        axis: what the names are.
    """
    table = np.ma.masked_invalid(np.asarray(values, dtype=np.float64))
    rows = len(units)
    per_row = 0.34 if rows <= 12 else 0.24 if rows <= 40 else 0.12
    figure, (ax,) = canvas(theme, min(11.0, 2.4 + max(1.4, per_row * rows)))
    ax.grid(False)
    ax.patch.set(facecolor=theme.page, edgecolor=theme.muted, hatch="xxx")
    highest, lowest = (float(table.max()), float(table.min())) if table.count() else (0.0, 0.0)
    least = 1e-6 if chance is None else max(2.0 * chance, _LEAST_SCALE)
    top = max(highest, least)
    signed = lowest < -0.02 * top
    if signed:
        top = max(top, -lowest)
    mesh = ax.pcolormesh(
        np.arange(len(names) + 1),
        np.arange(rows + 1),
        table.T,
        cmap="RdBu_r" if signed else "cividis",
        vmin=-top if signed else 0.0,
        vmax=top,
    )
    ax.set_ylim(rows, 0)
    stride = max(1, math.ceil(rows / 24))
    ax.set_yticks(np.arange(0, rows, stride) + 0.5, list(units)[::stride])
    ax.set_ylabel("head")
    _name_columns(ax, names, repeated, axis, theme, offset=0.5)
    bar = figure.colorbar(mesh, ax=ax, pad=0.015, aspect=18)
    bar.set_label(metric, color=theme.ink, fontsize=TEXT)
    bar.ax.tick_params(colors=theme.muted, labelcolor=theme.ink, labelsize=SMALL)
    if chance is not None:
        bar.ax.axhline(chance, color="white", linewidth=3.2)
        bar.ax.axhline(chance, color="black", linewidth=1.4)
    return figure


def checkpoint_curve(
    names: Sequence[str],
    values: ArrayLike,
    errors: ArrayLike,
    *,
    metric: str,
    repeated: Sequence[bool] = (),
    axis: str = AT_STEP,
    theme: Theme = LIGHT,
) -> Figure:
    """A number of the whole model over checkpoints, [n], with its standard error, [n]."""
    figure, (ax,) = canvas(theme, 3.6)
    ax.errorbar(
        np.arange(len(names)),
        np.asarray(values, dtype=np.float64),
        yerr=np.asarray(errors, dtype=np.float64),
        color=theme.accent,
        marker="o",
        markersize=4,
        capsize=3,
    )
    ax.set_ylabel(metric)
    _name_columns(ax, names, repeated, axis, theme, offset=0.0)
    return figure


def _name_columns(
    ax: Axes,
    names: Sequence[str],
    repeated: Sequence[bool],
    axis: str,
    theme: Theme,
    *,
    offset: float,
) -> None:
    stride = max(1, math.ceil(len(names) / _LABELS))
    shown = range(0, len(names), stride)
    crowded = sum(len(names[i]) for i in shown) > 48
    ax.set_xticks(
        [i + offset for i in shown],
        [names[i] for i in shown],
        rotation=90 if crowded else 0,
    )
    for i in np.flatnonzero(repeated):
        ax.annotate(
            "*",
            (i + offset, 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            color=theme.ink,
            fontsize=TEXT,
        )
    note = "   (* weights equal another's)" if any(repeated) else ""
    ax.set_xlabel(f"{axis}{note}")
