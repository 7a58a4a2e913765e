"""What arms did to every head: one small map of layers by heads for each arm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from mda_lightning.analysis.comparison_heads import grid_of
from mda_lightning.analysis.comparison_values import HeadEffects
from mda_lightning.analysis.comparison_words import metric_name, shortened
from mda_lightning.analysis.figures.comparison import WIDE
from mda_lightning.analysis.figures.style import DPI, LIGHT, SMALL, Theme, dress
from mda_lightning.analysis.study import BASELINE
from mda_lightning.units import parse_unit

MOST_MAPS = 24
LEAST_REACH = 0.02
_COLUMNS = 4


def head_maps(heads: Sequence[HeadEffects], *, metric: str, theme: Theme = LIGHT) -> Figure:
    """Mean final difference of every head, layers down and heads across, one map an arm.

    Colours diverge from 0 and are the same in all maps. A dot marks a head whose 95% interval
    excludes 0; a frame the target, dashed where other seeds have another one. A head that is the
    target in some seeds shows its difference in the others.

    Args:
        heads: at most :data:`MOST_MAPS` are drawn.
        metric: the study's.

    Raises:
        ValueError: there is nothing to draw.
    """
    shown = heads[:MOST_MAPS]
    if not shown:
        raise ValueError("no arm has heads to draw; leave the figure out")
    across = min(_COLUMNS, len(shown))
    down = math.ceil(len(shown) / across)
    (layers, width), _ = grid_of(shown[0])
    # Cells about as high as wide, within what a page bears.
    each = min(3.2, max(1.0, 0.8 * WIDE / across * layers / max(width, 1)))
    figure = Figure(
        figsize=(WIDE, 0.75 + down * (each + 0.45)),
        dpi=DPI,
        layout="constrained",
        facecolor=theme.page,
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False)
    means = [abs(e.effect.mean) for one in shown for e in one.effects.values() if e.effect]
    reach = max([LEAST_REACH, *means])
    places = list(grid.flat)
    images = [_map(ax, one, reach, theme) for ax, one in zip(places, shown, strict=False)]
    for ax in places[len(shown) :]:
        ax.remove()
    for row in grid[:, 0]:
        row.set_ylabel("layer", fontsize=SMALL, color=theme.ink)
    for ax in places[max(0, len(shown) - across) : len(shown)]:
        ax.set_xlabel("head", fontsize=SMALL, color=theme.ink)
    bar = figure.colorbar(images[0], ax=places[: len(shown)], pad=0.01, aspect=24, fraction=0.05)
    bar.set_label(f"difference in {metric_name(metric)}", color=theme.ink, fontsize=SMALL)
    bar.ax.tick_params(colors=theme.muted, labelcolor=theme.ink, labelsize=SMALL - 1)
    return figure


def _map(ax: Axes, one: HeadEffects, reach: float, theme: Theme) -> AxesImage:
    dress(ax, theme)
    ax.grid(False)
    (layers, heads), effects = grid_of(one)
    table = np.full((layers, heads), np.nan)
    for place, paired in effects.items():
        if paired.effect is not None:
            table[place] = paired.effect.mean
    ax.set_facecolor(theme.shade)
    image = ax.imshow(
        table, cmap="PuOr_r", vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest"
    )
    clear = [place for place, paired in effects.items() if paired.direction in ("higher", "lower")]
    if clear:
        rows, columns = zip(*clear, strict=True)
        size = max(5.0, min(28.0, 240.0 / max(layers, heads)))
        ax.scatter(columns, rows, s=size, color="black", edgecolor="white", linewidth=0.7)
    in_all = max(one.target_in.values(), default=0) == sum(one.target_in.values())
    style = "-" if in_all else (0, (2.0, 1.5))
    for unit in one.target_in:
        head = parse_unit(unit)
        # Light under dark, so that the frame shows on every colour and page.
        for colour, width, dashes in (("white", 4.0, "-"), ("#1b1f24", 2.0, style)):
            ax.add_patch(
                Rectangle(
                    (head.head - 0.5, head.layer - 0.5),
                    1,
                    1,
                    fill=False,
                    edgecolor=colour,
                    linewidth=width,
                    linestyle=dashes,
                    clip_on=False,
                    zorder=4,
                )
            )
    for axis, count in ((ax.xaxis, heads), (ax.yaxis, layers)):
        stride = max(1, math.ceil(count / 6))
        axis.set_ticks(np.arange(0, count, stride))
    ax.tick_params(labelsize=SMALL - 2.0)
    held = "untouched" if one.other == BASELINE else shortened(one.other, 24)
    ax.set_title(f"{shortened(one.arm, 24)}\n− {held}", fontsize=SMALL - 2.0, color=theme.ink)
    return image
