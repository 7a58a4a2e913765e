"""Figures of training: the target head per arm, effects per seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from mda_lightning.analysis.effects import Effect
from mda_lightning.analysis.figures.heads import LEAST_SCALE
from mda_lightning.analysis.figures.style import LIGHT, Theme, canvas, legend

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ArmCurve:
    """The target head's metric in one arm of one seed; ``steps`` on the figure's own axis."""

    arm: str
    steps: ArrayLike
    values: ArrayLike


@dataclass(frozen=True)
class Comparison:
    """A treated arm against its control, with one difference per seed."""

    arm: str
    control: str
    effect: Effect


def arm_curves(
    curves: Sequence[ArmCurve],
    *,
    metric: str = "induction",
    chance: float | None = None,
    windows: Sequence[tuple[float, float | None]] = (),
    measured_at: Sequence[float] = (),
    relative: bool = False,
    theme: Theme = LIGHT,
) -> Figure:
    """The target head in every arm; one panel per operation, each with the baseline.

    Thin lines are seeds, thick ones their mean where every seed of the arm has a value, and the
    band is the standard error over seeds. Treated arms are solid, random controls dashed.

    Args:
        curves: one per arm and seed, all on the axis named by ``relative``.
        windows: (start, end) per seed, on the same axis; ends differ between seeds.
        measured_at: where the arms are compared.
        relative: whether steps count from each seed's window start.
    """
    operations = list(
        dict.fromkeys(c.arm.rpartition("-")[0] for c in curves if c.arm.rpartition("-")[0])
    )
    panels = operations or [""]
    figure, axes = canvas(theme, 1.0 + 2.9 * len(panels), rows=len(panels), sharex=True)
    lowest, highest = 0.0, LEAST_SCALE
    for ax, operation in zip(axes, panels, strict=True):
        starts = [start for start, _ in windows]
        ends = [end for _, end in windows if end is not None]
        if starts and ends:
            ax.axvspan(min(starts), max(ends), color=theme.shade, linewidth=0, zorder=0)
            for end in sorted(set(ends)):
                ax.axvline(end, color=theme.muted, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        if chance is not None:
            ax.axhline(chance, color=theme.muted, linewidth=1.0, linestyle=(0, (6, 3)))
        arms = [
            arm
            for arm in dict.fromkeys(curve.arm for curve in curves)
            if arm.rpartition("-")[0] in ("", operation)
        ]
        for arm in arms:
            mine = [curve for curve in curves if curve.arm == arm]
            colour = theme.colour(arm)
            control = arm.endswith("-random")
            width = 1.6 if arm.rpartition("-")[0] == "" else 2.4
            dashes = (0, (4, 2)) if control else "-"
            grid, table = _on_common_steps(mine)
            if len(mine) > 1:
                for curve in mine:
                    ax.plot(
                        np.asarray(curve.steps),
                        np.asarray(curve.values),
                        color=colour,
                        alpha=0.30,
                        linewidth=0.9,
                        linestyle=dashes,
                    )
            if grid.size:
                mean = table.mean(axis=0)
                ax.plot(grid, mean, color=colour, linewidth=width, linestyle=dashes, label=arm)
                if len(mine) > 1:
                    error = table.std(axis=0, ddof=1) / math.sqrt(len(mine))
                    ax.fill_between(
                        grid, mean - error, mean + error, color=colour, alpha=0.16, linewidth=0
                    )
            highest = max(highest, *(float(np.nanmax(np.asarray(c.values))) for c in mine))
        if measured_at:
            # On the seeds' common axis each has a place of its own: at its window's end.
            places = sorted(set(ends)) if relative and ends else [float(np.mean(measured_at))]
            ax.plot(
                places,
                [0.0] * len(places),
                linestyle="",
                marker="^",
                color=theme.ink,
                markersize=9,
                clip_on=False,
                transform=ax.get_xaxis_transform(),
                zorder=5,
            )
        ax.set_ylabel(f"{metric} score")
        legend(ax, theme)
    for ax in axes:
        ax.set_ylim(lowest, highest * 1.06)
    known = [(start, end) for start, end in windows if end is not None]
    if known:
        # Before the branch the arms are the base run; a third of a window of it is enough to see.
        first, last = min(start for start, _ in known), max(end for _, end in known)
        beyond = max(float(np.asarray(c.steps)[-1]) for c in curves)
        axes[-1].set_xlim(first - (last - first) / 3, max(last, beyond) + (last - first) * 0.03)
    axes[-1].set_xlabel(
        "optimizer steps since the window's start" if relative else "optimizer steps completed"
    )
    return figure


def _on_common_steps(curves: Sequence[ArmCurve]) -> tuple[Floats, Floats]:
    """Steps of the first curve inside every curve's range, and all curves there, [seeds, S]."""
    tracks = [
        (np.asarray(c.steps, dtype=np.float64), np.asarray(c.values, dtype=np.float64))
        for c in curves
    ]
    low = max(steps[0] for steps, _ in tracks)
    high = min(steps[-1] for steps, _ in tracks)
    first = tracks[0][0]
    grid = first[(first >= low) & (first <= high)]
    return grid, np.stack([np.interp(grid, steps, values) for steps, values in tracks])


def effect_dots(
    comparisons: Sequence[Comparison], *, metric: str = "induction", theme: Theme = LIGHT
) -> Figure:
    """Per-seed differences treated - control as dots, with their mean and 95% interval."""
    figure, (ax,) = canvas(theme, 1.3 + 0.95 * max(1, len(comparisons)))
    ax.grid(False, axis="y")
    ax.axvline(0.0, color=theme.ink, linewidth=1.2)
    for row, comparison in enumerate(comparisons):
        effect = comparison.effect
        colour = theme.colour(comparison.arm)
        hollow = comparison.arm.endswith("-random")
        offsets = np.linspace(-0.13, 0.13, effect.n) if effect.n > 1 else np.zeros(1)
        ax.scatter(
            effect.differences,
            row + (0.16 if effect.n > 1 else 0.0) + offsets,
            s=48,
            facecolor=theme.page if hollow else colour,
            edgecolor=colour,
            linewidth=1.4,
            alpha=0.9,
            zorder=3,
        )
        if effect.n > 1:
            ax.plot([effect.low, effect.high], [row - 0.2] * 2, color=colour, linewidth=2.6)
            ax.plot(
                [effect.mean], [row - 0.2], marker="D", markersize=9, color=colour,
                markeredgecolor=theme.page, zorder=4,
            )  # fmt: skip
    ax.set_yticks(range(len(comparisons)), [f"{c.arm}\nvs {c.control}" for c in comparisons])
    ax.set_ylim(max(1, len(comparisons)) - 0.45, -0.55)
    ax.set_xlabel(f"difference in {metric} score (treated minus control)")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    reach = max(
        [0.02, *(abs(d) for c in comparisons for d in c.effect.differences)]
        + [abs(v) for c in comparisons for v in (c.effect.low, c.effect.high) if math.isfinite(v)]
    )
    ax.set_xlim(-1.12 * reach, 1.12 * reach)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return figure
