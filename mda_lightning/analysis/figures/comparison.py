"""The one figure of a study: mean curves of its arms, and beside them what they came to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from mda_lightning.analysis.comparison_selections import direction_of, strength
from mda_lightning.analysis.comparison_values import (
    ArmComparison,
    ComparisonValues,
)
from mda_lightning.analysis.comparison_words import metric_name, shortened
from mda_lightning.analysis.figures.style import DPI, LIGHT, SMALL, Theme, dress
from mda_lightning.analysis.study import BASELINE

Floats = NDArray[np.float64]

WIDE = 10.5
"""Inches: curves and differences side by side."""

_SMALL = SMALL - 1.0
_NAME = 38
_BANDS_UP_TO = 4


@dataclass(frozen=True)
class Family:
    """Arms that are held against the same other arm, strongest effect first."""

    other: str
    do: str
    arms: tuple[ArmComparison, ...]


def families(comparison: ComparisonValues) -> list[Family]:
    """Arms with values, by what they are held against and by operation."""
    found: dict[tuple[str, str], list[ArmComparison]] = {}
    for one in comparison.arms:
        if one.final.effect is not None or _tracks(comparison, one.arm):
            found.setdefault((one.other, comparison.study.declared[one.arm].do), []).append(one)
    return [
        Family(other, do, tuple(sorted(arms, key=partial(_strength, comparison), reverse=True)))
        for (other, do), arms in found.items()
    ]


def operation_colour(theme: Theme, do: str) -> str:
    """The hue of an operation."""
    spare = dict(zip(("replace", "prune", "steer"), theme.spare, strict=False))
    return {**spare, **dict(theme.operations)}.get(do, theme.muted)


def shades(theme: Theme, do: str, count: int) -> list[str]:
    """One colour an arm, all of the operation's hue, from deep to pale."""
    hue = np.array(to_rgb(operation_colour(theme, do)))
    if count == 1:
        return [operation_colour(theme, do)]
    deep = 0.60 * hue + 0.40 * np.array(to_rgb(theme.ink))
    pale = 0.45 * hue + 0.55 * np.array(to_rgb(theme.page))
    parts = np.linspace(0.0, 2.0, count)
    mixed = [deep + (hue - deep) * p if p <= 1 else hue + (pale - hue) * (p - 1) for p in parts]
    return [to_hex((float(red), float(green), float(blue))) for red, green, blue in mixed]


def comparison_figure(comparison: ComparisonValues, *, theme: Theme = LIGHT) -> Figure | None:
    """One row for the arms that share a control: their mean curves, and their differences.

    Left, mean μ since the window's start, over the seeds that all of the row have: treated solid,
    control dashed, untouched run thin; bands are standard errors over seeds, drawn for up to four
    arms. Right, in the same colours, final differences from the control: dots are seeds, the
    diamond and bar the mean and its 95% interval; hollow, the control against the untouched run.

    Returns:
        ``None`` when no arm has a curve.
    """
    rows = families(comparison)
    if not rows:
        return None
    least = 1.55 if len(rows) <= 6 else 1.2
    heights = [max(least, 0.45 + 0.30 * (len(row.arms) + (row.other != BASELINE))) for row in rows]
    figure = Figure(
        figsize=(WIDE, 0.95 + sum(heights)), dpi=DPI, layout="constrained", facecolor=theme.page
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(
        len(rows), 2, squeeze=False, width_ratios=(1.15, 1.0), height_ratios=heights, sharex="col"
    )
    lowest, highest = math.inf, -math.inf
    for row, (left, right) in zip(rows, grid, strict=True):
        for ax in (left, right):
            dress(ax, theme)
            ax.tick_params(labelsize=_SMALL)
        colours = dict(
            zip([one.arm for one in row.arms], shades(theme, row.do, len(row.arms)), strict=True)
        )
        low, high = _curves(left, comparison, row, colours, theme)
        lowest, highest = min(lowest, low), max(highest, high)
        _dots(right, comparison, row, colours, theme)
    margin = 0.06 * (highest - lowest or 0.1)
    for left in grid[:, 0]:
        left.set_ylim(lowest - margin, highest + margin)
        left.yaxis.set_major_locator(MaxNLocator(4))
    score = metric_name(comparison.study.metric)
    reach = _reach(comparison)
    grid[-1, 1].set_xlim(-1.08 * reach, 1.08 * reach)
    grid[-1, 1].xaxis.set_major_locator(MaxNLocator(5))
    grid[-1, 0].set_xlabel("optimizer steps since the window's start", fontsize=SMALL)
    grid[-1, 1].set_xlabel(f"difference in {score}", fontsize=SMALL)
    grid[0, 0].set_title(
        f"{score} of the target head", fontsize=_SMALL, loc="left", color=theme.muted
    )
    _legend(figure, theme)
    return figure


def _curves(
    ax: Axes, comparison: ComparisonValues, row: Family, colours: dict[str, str], theme: Theme
) -> tuple[float, float]:
    """Draw a family's curves; the range of what was drawn."""
    study = comparison.study
    ends = [
        seed.window.end - seed.window.start
        for seed in study.seeds
        if seed.seed in comparison.outcomes
        and seed.window.end is not None
        and seed.window.start is not None
    ]
    if ends:
        ax.axvspan(0, max(ends), color=theme.shade, linewidth=0, zorder=0)
        for end in sorted(set(ends)):
            ax.axvline(end, color=theme.muted, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    drawn: list[float] = []
    others = [name for name in dict.fromkeys((BASELINE, row.other)) if name not in colours]
    names = [*others, *reversed([one.arm for one in row.arms])]
    seeds = _seeds_of_all(comparison, names)
    for name in names:
        grid, table = _mean(_tracks(comparison, name, seeds))
        if not grid.size:
            continue
        colour = colours.get(name, theme.ink if name == BASELINE else theme.muted)
        mean = table.mean(axis=0)
        ax.plot(
            grid,
            mean,
            color=colour,
            linewidth=1.1 if name == BASELINE else 1.9,
            linestyle="-" if name in colours or name == BASELINE else (0, (4, 2)),
            zorder=3 if name in colours else 4,
        )
        drawn += [float(mean.min()), float(mean.max())]
        if len(table) > 1 and len(row.arms) <= _BANDS_UP_TO and name != BASELINE:
            error = table.std(axis=0, ddof=1) / math.sqrt(len(table))
            ax.fill_between(grid, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
            drawn += [float((mean - error).min()), float((mean + error).max())]
    if study.chance is not None:
        ax.axhline(study.chance, color=theme.muted, linewidth=0.8, linestyle=(0, (6, 3)), zorder=1)
    return min(drawn, default=0.0), max(drawn, default=0.1)


def _dots(
    ax: Axes, comparison: ComparisonValues, row: Family, colours: dict[str, str], theme: Theme
) -> None:
    ax.grid(False, axis="y")
    ax.axvline(0.0, color=theme.ink, linewidth=1.0)
    control = next(
        (one for one in comparison.against_baseline if one.arm == row.other != BASELINE), None
    )
    shown = [*row.arms, *([control] if control is not None else [])]
    for place, one in enumerate(shown):
        effect = one.final.effect
        if effect is None:
            continue
        hollow = one is control
        colour = theme.muted if hollow else colours[one.arm]
        offsets = np.linspace(-0.16, 0.16, effect.n) if effect.n > 1 else np.zeros(1)
        ax.scatter(
            effect.differences,
            place + offsets,
            s=20,
            facecolor=theme.page if hollow else colour,
            edgecolor=colour,
            linewidth=0.9,
            alpha=0.65,
            zorder=3,
        )
        if effect.n > 1:
            ax.plot([effect.low, effect.high], [place] * 2, color=colour, linewidth=2.2, zorder=4)
            ax.plot(
                [effect.mean], [place], marker="D", markersize=6.5, color=colour,
                markeredgecolor=theme.page, zorder=5,
            )  # fmt: skip
    names = [shortened(one.arm, _NAME) for one in shown]
    longest = max(map(len, names))
    ax.set_yticks(range(len(shown)), names)
    for label, one in zip(ax.get_yticklabels(), shown, strict=True):
        label.set_color(theme.muted if one is control else theme.ink)
    ax.tick_params(axis="y", length=0, labelsize=_SMALL - (2.0 if longest > 22 else 0.0))
    ax.set_ylim(max(len(shown), 2) - 0.4, -0.6)
    ax.spines["left"].set_visible(False)
    held = "the untouched run" if row.other == BASELINE else row.other
    ax.set_title(f"against {shortened(held, 38)}", fontsize=_SMALL, loc="left", color=theme.muted)


def _legend(figure: Figure, theme: Theme) -> None:
    entries = [
        Line2D([], [], color=theme.ink, linewidth=1.1, label="untouched run"),
        Line2D([], [], color=theme.accent, linewidth=1.9, label="treated"),
        Line2D([], [], color=theme.muted, linewidth=1.9, linestyle=(0, (4, 2)), label="control"),
        Line2D([], [], color=theme.accent, marker="D", markersize=6, label="mean and 95% interval"),
        Line2D(
            [],
            [],
            color=theme.muted,
            marker="o",
            markerfacecolor=theme.page,
            markersize=4.5,
            linestyle="",
            label="a seed (hollow: control, against the untouched run)",
        ),
    ]
    figure.legend(
        handles=entries,
        loc="outside upper left",
        ncols=len(entries),
        frameon=False,
        fontsize=_SMALL,
        labelcolor=theme.ink,
        columnspacing=1.2,
        handlelength=1.8,
    )


def _seeds_of_all(comparison: ComparisonValues, names: Sequence[str]) -> set[int]:
    """Seeds that have all of the arms that any seed has; means over others would not compare."""
    having = [{s for s, arms in comparison.outcomes.items() if name in arms} for name in names]
    having = [seeds for seeds in having if seeds]
    every = set.intersection(*having) if having else set()
    return every or set.union(*having, set())


def _tracks(
    comparison: ComparisonValues, arm: str, seeds: set[int] | None = None
) -> list[tuple[Floats, Floats]]:
    """An arm's curve of every seed, steps since the window's start."""
    tracks = []
    for seed in comparison.study.seeds:
        if seeds is not None and seed.seed not in seeds:
            continue
        one = comparison.outcomes.get(seed.seed, {}).get(arm)
        if one is not None and seed.window.start is not None:
            steps = np.asarray(one.curve[0], dtype=np.float64) - seed.window.start
            tracks.append((steps, np.asarray(one.curve[1], dtype=np.float64)))
    return tracks


def _mean(tracks: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """Steps of the first curve inside every curve's range, and all curves there, [seeds, S]."""
    if not tracks:
        return np.empty(0), np.empty((0, 0))
    low = max(steps[0] for steps, _ in tracks)
    high = min(steps[-1] for steps, _ in tracks)
    first = tracks[0][0]
    grid = first[(first >= low) & (first <= high)]
    return grid, np.stack([np.interp(grid, steps, values) for steps, values in tracks])


def _strength(comparison: ComparisonValues, one: ArmComparison) -> float:
    return strength(one.final, direction_of(comparison.study.declared[one.arm]) or -1)


def _reach(comparison: ComparisonValues) -> float:
    effects = [
        one.final.effect
        for one in (*comparison.arms, *comparison.against_baseline)
        if one.final.effect is not None
        and (one in comparison.arms or not comparison.study.declared[one.arm].is_treated)
    ]
    dots = [abs(d) for effect in effects for d in effect.differences]
    # An interval of two seeds may be far wider than everything else; it is cut at the edge then.
    bars = [abs(v) for e in effects if e.n > 2 for v in (e.low, e.high)]
    return max([0.02, *dots, *bars])
