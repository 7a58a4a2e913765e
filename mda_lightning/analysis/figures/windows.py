"""Critical windows on a metric's curves: the targets, the other units, and what became of each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

from mda_lightning.analysis.figures.style import LIGHT, SMALL, Theme, canvas, dress
from mda_lightning.analysis.figures.window_picture import Picture
from mda_lightning.window import Window, WindowEvent

Floats = NDArray[np.float64]

_HEAD = re.compile(r"L\d+H\d+")
_MOST_POINTS = 400_000
_FEW_POINTS = 15
_REASONS = {"level": "ended as it held the level", "plateau": "ended on a plateau"}
_NARROW = 0.04
"""Least distance of the midpoint from either edge, as a share of the axis, to be named there."""


def windows_figure(
    steps: ArrayLike,
    values: ArrayLike,
    smooth: ArrayLike,
    *,
    units: Sequence[str],
    windows: Sequence[Window] = (),
    targets: Sequence[Window] = (),
    events: Sequence[WindowEvent] = (),
    metric: str,
    floor: float,
    opens_at: float,
    falls: bool = False,
    theme: Theme = LIGHT,
) -> Figure:
    """Curves of a metric with the first target's window; below, the windows of all units in rows.

    In the curves' panel the window is shaded; above the curves a line spans the refined window, 10%
    to 90% of the fitted rise, its thick part the nominal 95% interval of the fit's midpoint. In a
    row a bar is a window (filled: a target's), the thin line after it the time that the unit stayed
    formed. Where closed windows are a small part of a long run, only their surroundings are shown.

    Args:
        steps: [S] ascending.
        values: [S, U] the metric, in its own units; NaN where nothing was measured.
        smooth: [S, U] its EMA.
        units: names, [U]; windows and events refer to them by index.
        windows: every window; ``targets``: of the targets, the most important first.
        events: what happened; lapses and hand-overs are marked.
        floor: the metric's chance value.
        opens_at: the value beyond which the first target's window opened, or would open.
        falls: whether forming is a fall.
    """
    picture = Picture(
        np.asarray(steps, np.float64),
        np.asarray(values, np.float64),
        np.asarray(smooth, np.float64),
        *(units, windows, targets, events, floor, opens_at, falls, theme),
    )
    rows = picture.rows
    below = 0.25 + 0.3 * len(rows) if rows else 0.0
    figure, (ax,) = canvas(theme, 4.5 + below)
    if rows:
        ax.remove()
        ax, strip = figure.subplots(2, 1, height_ratios=(3.2, below), sharex=True)
        dress(ax, theme)
        dress(strip, theme)
        ax.tick_params(labelbottom=False)
        _draw_rows(strip, picture)
        marks = _row_marks(picture)
        if marks:
            _explain(strip, marks, theme, lift=0.1)
    entries = _draw_curves(ax, picture)
    if targets:
        entries |= _draw_window(ax, picture, targets[0])
    _name_lines(ax, picture)
    _explain(ax, entries, theme, lift=1.5 if targets else 0.2)
    lowest = strip if rows else ax
    lowest.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    lowest.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    of_all = f" (of {steps_words(picture.steps[0], picture.steps[-1])})" if picture.is_cut else ""
    lowest.set_xlabel(f"optimizer steps completed{of_all}")
    ax.set_ylabel(metric)
    figure.suptitle(_title(picture), x=0.01, ha="left", color=theme.ink, fontsize=SMALL)
    return figure


def steps_words(first: float, last: float) -> str:
    """Two steps in words."""
    return f"{first:,.0f} to {last:,.0f}"


def _title(picture: Picture) -> str:
    last = picture.steps[-1]
    if not picture.targets:
        return f"no window opened by step {last:,.0f}"
    window = picture.targets[0]
    unit = picture.units[window.unit_index]
    if window.end is None:
        return f"{unit}: rising since step {window.start:,}, still open at the last, {last:,.0f}"
    ended = _REASONS.get(window.end_reason or "", "lapsed")
    said = f"{unit}: steps {steps_words(window.start, window.end)}, {ended}"
    if window.refined_midpoint is None:
        return said if window.midpoint is None else f"{said}\nhalfway up at {window.midpoint:,}"
    said += f"\nmidpoint of the fit {window.refined_midpoint:,}"
    if window.midpoint_interval is not None:
        said += f", nominal 95% interval {steps_words(*window.midpoint_interval)}"
    return said


def _draw_curves(ax: Axes, picture: Picture) -> dict[str, Any]:
    """Legend entries: label -> what stands for it."""
    theme, named = picture.theme, picture.named
    n, n_units = picture.values.shape
    entries: dict[str, Any] = {}
    few: dict[str, Any] = {"marker": "o", "markersize": 4.0} if n < _FEW_POINTS else {}
    for place in reversed(range(len(named))):
        ax.plot(*picture.track(named[place]), **picture.style(place), **few, zorder=3 - 0.1 * place)
    if named:
        dots: dict[str, Any] = {"linestyle": "", "marker": "o", "markeredgewidth": 0}
        dots |= {"color": theme.accent, "alpha": 0.5}
        size = 3.4 if n <= 150 else 2.4
        ax.plot(picture.steps, picture.values[:, named[0]], **dots, markersize=size, zorder=2.5)
        whose = "" if n_units == 1 else f"{picture.units[named[0]]}, "
        entries[f"{whose}smoothed"] = (
            Line2D([], [], **picture.style(0)),
            Line2D([], [], **dots | {"alpha": 0.9}, markersize=6.0),
        )
    measured = np.flatnonzero(np.isfinite(picture.values).any(axis=0)).tolist()
    others = [i for i in measured if i not in named]
    if others:
        stride = max(1, n * len(others) // _MOST_POINTS)
        lines = [np.column_stack(picture.track(i, stride=stride)) for i in others]
        shade = float(np.clip(20.0 / len(others), 0.12, 0.6))
        ax.add_collection(
            LineCollection(lines, colors=theme.muted, linewidths=0.8, alpha=shade, zorder=1.5)
        )
        are_heads = all(_HEAD.fullmatch(unit) for unit in picture.units)
        entries["other heads" if are_heads else "others"] = Line2D(
            [], [], color=theme.muted, linewidth=0.8
        )
    way = "below" if picture.falls else "above"
    for label, value, colour, dashes in (
        (f"opens {way}", picture.opens_at, theme.ink, (0, (1, 1.5))),
        ("chance", picture.floor, theme.muted, (0, (6, 3))),
    ):
        style: dict[str, Any] = {"color": colour, "linewidth": 1.3, "linestyle": dashes}
        ax.axhline(value, **style, zorder=1.1)
        entries[f"{label} {value:.3g}"] = Line2D([], [], **style)
    ax.set_xlim(*picture.range)
    ax.set_ylim(*_reach(picture, named))
    return entries


def _reach(picture: Picture, named: Sequence[int]) -> tuple[float, float]:
    """Limits of the value axis, with room on top for the bracket of the refined window."""
    low, high = picture.range
    inside = (picture.steps >= low) & (picture.steps <= high)
    lines = np.array([picture.floor, picture.opens_at])
    dots = picture.values[inside][:, named[:1]].ravel()
    every = np.concatenate([picture.smooth[inside].ravel(), lines, dots])
    every = every[np.isfinite(every)]
    bottom, top = float(every.min()), float(every.max())
    bottom = 0.0 if 0.0 <= bottom < 0.35 * top else bottom
    span = (top - bottom) or 1.0
    above = 0.17 if picture.targets else 0.05
    return bottom - (0.0 if bottom == 0.0 else 0.04 * span), top + above * span


def _draw_window(ax: Axes, picture: Picture, window: Window) -> dict[str, Any]:
    """The window's edges and refinement; legend entries as of :func:`_draw_curves`."""
    theme, (low, high) = picture.theme, picture.range
    end = float(picture.steps[-1] if window.end is None else window.end)
    ax.axvspan(window.start, end, color=theme.shade, linewidth=0, zorder=0)
    first = "first step" if window.start_censored else "start"
    marks: list[tuple[float, str, Any, str]] = [(window.start, first, "-", "right")]
    if window.end is not None:
        last = "lapsed" if window.end_reason == "lapsed" else "end"
        marks.append((end, last, "-", "left"))
    if window.midpoint is not None:
        beside = min(window.midpoint - window.start, end - window.midpoint)
        name = "mid" if beside >= _NARROW * (high - low) else ""
        marks.append((window.midpoint, name, (0, (1, 2)), "center"))
    for step, name, dashes, side in marks:
        ax.axvline(step, color=theme.ink, linewidth=1.1, linestyle=dashes, zorder=1.2)
        ax.annotate(
            name, (step, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", ha=side, va="bottom", color=theme.ink, fontsize=SMALL,
        )  # fmt: skip
    return _draw_fit(ax, theme, window)


def _draw_fit(ax: Axes, theme: Theme, window: Window) -> dict[str, Any]:
    start, middle, end = window.refined_start, window.refined_midpoint, window.refined_end
    if start is None or middle is None or end is None:
        return {}
    across: dict[str, Any] = {"transform": ax.get_xaxis_transform()}
    height = [0.94, 0.94]
    thin: dict[str, Any] = {"color": theme.ink, "linewidth": 1.4, "marker": "|", "markersize": 9}
    thick: dict[str, Any] = {"color": theme.ink, "linewidth": 5.0, "solid_capstyle": "butt"}
    dot: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 6.0}
    dot |= {"markerfacecolor": theme.page, "markeredgecolor": theme.ink}
    ax.plot([start, end], height, **thin, **across, zorder=4)
    if window.midpoint_interval is not None:
        ax.plot(window.midpoint_interval, height, **thick, **across, zorder=4.1)
    ax.plot([middle], height[:1], **dot, **across, zorder=4.2)
    return {"10 to 90% of fit": (Line2D([], [], **thin), Line2D([], [], **dot))}


def _name_lines(ax: Axes, picture: Picture) -> None:
    """Unit names at the right end of their lines, moved apart."""
    if len(picture.units) == 1:
        return
    low, high = ax.get_ylim()
    ends = []
    for place, unit in enumerate(picture.named):
        steps, smooth = picture.track(unit)
        inside = np.flatnonzero(np.isfinite(smooth) & (steps <= picture.range[1]))
        if len(inside):
            ends.append(((float(smooth[inside[-1]]) - low) / (high - low), place, unit))
    ends.sort()
    apart, heights = 0.065, [share for share, _, _ in ends]
    for _ in range(200):  # push neighbours apart by halves until none overlap
        for i in range(len(heights) - 1):
            lack = apart - (heights[i + 1] - heights[i])
            if lack > 1e-3:
                heights[i] -= lack / 2
                heights[i + 1] += lack / 2
    shift = max(0.0, 0.02 - min(heights, default=1.0))
    for height, (_, place, unit) in zip(heights, ends, strict=True):
        ax.annotate(
            picture.units[unit], (1.0, height + shift), xycoords="axes fraction", xytext=(5, 0),
            textcoords="offset points", va="center", color=picture.style(place)["color"],
            fontsize=SMALL, fontweight="bold" if place == 0 else "normal", annotation_clip=False,
        )  # fmt: skip


def _draw_rows(ax: Axes, picture: Picture) -> None:
    theme, rows, last = picture.theme, picture.rows, float(picture.steps[-1])
    ax.grid(False, axis="y")
    targets, named = {w.unit_index for w in picture.targets}, picture.named
    fell = picture.lapses
    for window in picture.windows:
        if window.unit_index not in rows:
            continue
        row = rows.index(window.unit_index)
        is_target = window in picture.targets
        colour = theme.muted
        if window.unit_index in named:
            colour = picture.style(named.index(window.unit_index))["color"]
        end = last if window.end is None else float(window.end)
        ax.barh(
            row, end - window.start, left=window.start, height=0.52, zorder=3, linewidth=1.2,
            facecolor=colour if is_target else theme.page, edgecolor=colour,
        )  # fmt: skip
        if window.midpoint is not None:
            ax.plot([window.midpoint] * 2, [row - 0.26, row + 0.26], color=theme.page
                    if is_target else colour, linewidth=1.6, zorder=3.5)  # fmt: skip
        if window.end is None:
            ax.plot([last], [row], marker=">", markersize=7, color=colour, zorder=4, clip_on=False)
            continue
        lapse = fell.get((window.unit_index, window.start))
        formed_until = last if lapse is None else lapse
        ax.plot([end, formed_until], [row] * 2, color=colour, linewidth=1.6, zorder=2)
        if lapse is not None:
            ax.plot([lapse], [row], marker="X", markersize=8, color=theme.ink, zorder=4,
                    markeredgecolor=theme.page, linestyle="")  # fmt: skip
    for event in picture.events:
        if event.kind == "handed_over" and event.unit_index in rows and event.to_index in rows:
            ends = (rows.index(event.unit_index), rows.index(event.to_index))
            bow = 0.25 if ends[1] < ends[0] else -0.25
            ax.annotate(
                "", (event.step, ends[1]), (event.step, ends[0]),
                arrowprops={"arrowstyle": "-|>", "color": theme.ink, "linewidth": 1.3,
                            "connectionstyle": f"arc3,rad={bow}", "mutation_scale": 12},
                zorder=5,
            )  # fmt: skip
    ax.set_yticks(range(len(rows)), [picture.units[i] for i in rows])
    for label, unit in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if unit in targets else "normal")
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    more = len({w.unit_index for w in picture.windows}) - len(rows)
    if more > 0:
        ax.annotate(
            f"and {more} more", (1.0, 0.0), xycoords="axes fraction", xytext=(5, 2),
            textcoords="offset points", color=theme.muted, fontsize=SMALL, annotation_clip=False,
        )  # fmt: skip


def _row_marks(picture: Picture) -> dict[str, Any]:
    """Legend entries of the marks that occur in the rows."""
    theme, entries = picture.theme, {}
    mark: dict[str, Any] = {"linestyle": "", "color": theme.ink, "markersize": 8}
    if picture.lapses:
        entries["lapsed"] = Line2D([], [], **mark, marker="X", markeredgecolor=theme.page)
    if any(w.end is None for w in picture.windows):
        entries["still open"] = Line2D([], [], **mark, marker=">")
    if any(event.kind == "handed_over" for event in picture.events):
        entries["handed over"] = Line2D([], [], **mark, marker=r"$\downarrow$")
    return entries


def _explain(ax: Axes, entries: dict[str, Any], theme: Theme, *, lift: float) -> None:
    """A legend above the axes, ``lift`` lines over them."""
    ax.legend(
        handles=list(entries.values()), labels=list(entries), loc="lower left",
        bbox_to_anchor=(-0.05, 1.0), ncols=3, frameon=False, fontsize=SMALL,
        labelcolor=theme.ink, borderaxespad=lift, handlelength=1.9, handletextpad=0.5,
        columnspacing=1.1, labelspacing=0.3, handler_map={tuple: HandlerTuple(ndivide=1)},
    )  # fmt: skip
