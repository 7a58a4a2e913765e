"""Numbers of the whole model against μ across the arms of a study (Figure 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mda_lightning.analysis.comparison_values import Coupling
from mda_lightning.analysis.comparison_words import metric_name
from mda_lightning.analysis.figures.comparison import WIDE, operation_colour
from mda_lightning.analysis.figures.style import DPI, LIGHT, SMALL, Theme, dress
from mda_lightning.analysis.study import BASELINE, DeclaredArm


def coupling_figure(
    couplings: Sequence[Coupling],
    declared: Mapping[str, DeclaredArm],
    *,
    metric: str,
    theme: Theme = LIGHT,
) -> Figure:
    """One panel a number: differences of the number against differences of μ.

    Small points are arms of one seed, large ones an arm's mean over seeds, hollow ones random
    controls, the cross the untouched run. The line has the mean slope over seeds.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not couplings:
        raise ValueError("no number of the whole model was measured; leave the figure out")
    figure = Figure(figsize=(WIDE, 4.3), dpi=DPI, layout="constrained", facecolor=theme.page)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(2, len(couplings)), squeeze=False)[0]
    for ax, one in zip(panels, couplings, strict=False):
        _panel(ax, one, declared, theme)
        ax.set_xlabel(f"difference in {metric_name(metric)}", fontsize=SMALL)
        ax.set_ylabel(f"difference in\n{one.quantity.name}, nats", fontsize=SMALL)
    for ax in panels[len(couplings) :]:
        ax.remove()
    _legend(figure, couplings, declared, theme)
    return figure


def _panel(ax: Axes, one: Coupling, declared: Mapping[str, DeclaredArm], theme: Theme) -> None:
    dress(ax, theme)
    ax.tick_params(labelsize=SMALL - 1)
    ax.axhline(0.0, color=theme.muted, linewidth=0.8, zorder=1)
    ax.axvline(0.0, color=theme.muted, linewidth=0.8, zorder=1)
    arms = dict.fromkeys(arm for _, arm, _, _ in one.points)
    for arm in arms:
        points = np.array([(x, y) for _, name, x, y in one.points if name == arm])
        colour = theme.ink if arm == BASELINE else operation_colour(theme, declared[arm].do)
        face = theme.page if declared[arm].is_random else colour
        if len(points) > 1 and not (arm == BASELINE and one.centred_on == BASELINE):
            ax.scatter(
                points[:, 0],
                points[:, 1],
                s=13,
                facecolor=face,
                edgecolor=colour,
                linewidth=0.8,
                alpha=0.5,
                zorder=2,
            )
        ax.scatter(
            points[:, 0].mean(),
            points[:, 1].mean(),
            s=90 if arm == BASELINE else 62,
            marker="P" if arm == BASELINE else "o",
            facecolor=face,
            edgecolor=colour,
            linewidth=1.8 if face == theme.page else 0.8,
            zorder=4,
        )
    if one.slope is not None:
        x = np.array([point[2] for point in one.points])
        y = np.array([point[3] for point in one.points])
        ends = np.array([x.min(), x.max()])
        ax.plot(
            ends, y.mean() + one.slope.mean * (ends - x.mean()), color=theme.muted, linewidth=1.6,
            linestyle=(0, (5, 2)), zorder=3,
        )  # fmt: skip
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(5))


def _legend(
    figure: Figure,
    couplings: Sequence[Coupling],
    declared: Mapping[str, DeclaredArm],
    theme: Theme,
) -> None:
    arms = dict.fromkeys(arm for one in couplings for _, arm, _, _ in one.points)
    operations = dict.fromkeys(declared[arm].do for arm in arms if arm != BASELINE)
    marks = [
        Line2D([], [], color=operation_colour(theme, do), marker="o", linestyle="", label=do)
        for do in operations
    ]
    control = Line2D([], [], color=theme.muted, marker="o", linestyle="", label="random control")
    control.set_markerfacecolor(theme.page)
    marks.append(control)
    if BASELINE in arms:
        marks.append(
            Line2D([], [], color=theme.ink, marker="P", linestyle="", label="untouched run")
        )
    figure.legend(
        handles=marks,
        loc="outside upper left",
        ncols=len(marks),
        frameon=False,
        fontsize=SMALL - 1,
        labelcolor=theme.ink,
    )
