"""Pictures of every head: heads over steps, and layers by heads now; and of a number over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from mda_lightning.analysis.figures.style import LIGHT, SMALL, TEXT, Theme, canvas, dress

Floats = NDArray[np.float64]

LEAST_SCALE = 0.2
"""Colours and axes of attention scores reach at least this, so that noise at the floor looks like
no rise."""


def heads_heatmap(
    steps: ArrayLike,
    values: ArrayLike,
    *,
    units: Sequence[str],
    metric: str = "induction score",
    chance: float | None = None,
    least_scale: float = LEAST_SCALE,
    window: tuple[float | None, float | None, float | None] = (None, None, None),
    target: str | None = None,
    grid: tuple[int, int] | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """All heads (rows) over optimizer steps (columns), darkest to brightest from 0 to the peak.

    Values below 0, as ablation has them, give a scale that diverges from 0 instead.

    Args:
        steps: evaluation steps, ascending, [S].
        values: metric, [S, U].
        units: row names, [U].
        metric: as the colour bar is to name it.
        chance: drawn as a tick on the colour bar.
        least_scale: the colours reach at least this.
        window: (start, midpoint, end) of the target's critical window; ``None`` where unknown.
        target: head whose row is framed.
        grid: (layers, heads) draws the last evaluation beside, as layers by heads.
    """
    at = np.asarray(steps, dtype=np.float64)
    table = np.asarray(values, dtype=np.float64)
    rows = len(units)
    per_row = 0.34 if rows <= 12 else 0.24 if rows <= 40 else 0.12
    height = min(11.0, 1.9 + max(1.4, per_row * rows))
    figure, (ax,) = canvas(theme, height)
    if grid is not None:
        ax.remove()
        ax, beside = figure.subplots(1, 2, width_ratios=(3.0, 1.4))
        dress(ax, theme)
    ax.grid(False)
    style = _colours(table, least=max(least_scale, 2.0 * (chance or 0.0)))
    mesh = ax.pcolormesh(_edges(at), np.arange(rows + 1), table.T, **style)
    ax.set_ylim(rows, 0)
    stride = max(1, math.ceil(rows / 24))
    ax.set_yticks(np.arange(0, rows, stride) + 0.5, list(units)[::stride])
    ax.set_xlabel("optimizer steps completed")
    ax.set_ylabel("head")
    if grid is not None:
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        _now(beside, table[-1].reshape(grid), step=int(at[-1]), style=style, theme=theme)
    bar = figure.colorbar(mesh, ax=ax if grid is None else beside, pad=0.015, aspect=18)
    bar.set_label(metric, color=theme.ink, fontsize=TEXT)
    bar.ax.tick_params(colors=theme.muted, labelcolor=theme.ink, labelsize=SMALL)
    if chance is not None:
        bar.ax.axhline(chance, color="white", linewidth=3.2)
        bar.ax.axhline(chance, color="black", linewidth=1.4)
    if target is not None and target in units:
        _frame(ax, list(units).index(target), stride)
    for where, name, line in zip(window, ("start", "mid", "end"), ("-", ":", "-"), strict=True):
        if where is None:
            continue
        ax.axvline(where, color="white", linewidth=2.2, linestyle=line)
        ax.annotate(
            name,
            (where, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right" if name == "start" else "left" if name == "end" else "center",
            color=theme.ink,
            fontsize=SMALL,
        )
    return figure


def scalar_curve(
    steps: ArrayLike, values: ArrayLike, errors: ArrayLike, *, metric: str, theme: Theme = LIGHT
) -> Figure:
    """A number of the whole model over optimizer steps, [S] each, with its standard error."""
    at, mean, error = (np.asarray(one, dtype=np.float64) for one in (steps, values, errors))
    figure, (ax,) = canvas(theme, 3.0)
    ax.fill_between(at, mean - error, mean + error, color=theme.accent, alpha=0.2, linewidth=0)
    ax.plot(at, mean, color=theme.accent, linewidth=2.0, marker="o" if len(at) == 1 else "")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_xlabel("optimizer steps completed")
    ax.set_ylabel(metric)
    return figure


def _colours(table: Floats, *, least: float) -> dict[str, Any]:
    finite = table[np.isfinite(table)]
    low, top = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if low < 0.0:
        reach = max(top, -low, least)
        return {"cmap": "PuOr_r", "vmin": -reach, "vmax": reach}
    return {"cmap": "cividis", "vmin": 0.0, "vmax": max(top, least) or 1.0}


def _now(ax: Axes, values: Floats, *, step: int, style: dict[str, Any], theme: Theme) -> None:
    layers, heads = values.shape
    dress(ax, theme)
    ax.grid(False)
    ax.imshow(values, aspect="auto", interpolation="nearest", **style)
    for axis, count in ((ax.xaxis, heads), (ax.yaxis, layers)):
        stride = max(1, math.ceil(count / 6))
        axis.set_ticks(np.arange(0, count, stride))
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
    ax.set_title(f"step {step:,}", fontsize=SMALL)


def _frame(ax: Axes, row: int, stride: int) -> None:
    ax.add_patch(
        Rectangle(
            (0.0, row),
            1.0,
            1.0,
            transform=ax.get_yaxis_transform(),
            fill=False,
            edgecolor="white",
            linewidth=2.4,
            clip_on=False,
        )
    )
    if row % stride == 0:
        ax.get_yticklabels()[row // stride].set_fontweight("bold")


def _edges(steps: Floats) -> Floats:
    """Column edges halfway between evaluations, so that each colour sits on its step."""
    if steps.size == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])
