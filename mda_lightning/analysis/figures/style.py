"""One look for all figures: colours, sizes, and a canvas that leaves no global state behind.

Colours are Okabe and Ito's, lightened for dark pages: told apart by every common form of colour
blindness. Hue names the operation (mask, insert); treated is solid and its random control dashed,
so nothing rests on colour alone. Sizes are chosen so that a figure at half its size still reads.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WIDTH = 7.0
"""Inches; at the default resolution 1120 pixels, shown at half that or less."""

DPI = 160
TEXT = 13.0
SMALL = 11.5


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    name: str
    page: str
    ink: str
    muted: str
    grid: str
    shade: str
    accent: str
    operations: tuple[tuple[str, str], ...]
    spare: tuple[str, ...]

    def colour(self, arm: str) -> str:
        """The hue of an arm: its operation's, the ink for the baseline."""
        operation = arm.rpartition("-")[0]
        if not operation:
            return self.ink
        named = dict(self.operations)
        if operation in named:
            return named[operation]
        return self.spare[sum(operation.encode()) % len(self.spare)]


LIGHT = Theme(
    name="light",
    page="#ffffff",
    ink="#1b1f24",
    muted="#57606a",
    grid="#e3e6ea",
    shade="#eceff3",
    accent="#0072B2",
    operations=(("mask", "#C24E00"), ("insert", "#0072B2")),
    spare=("#007A5C", "#A94A86", "#8A6D00"),
)
DARK = Theme(
    name="dark",
    page="#14171b",
    ink="#e8eaed",
    muted="#a4acb6",
    grid="#2c3138",
    shade="#22272e",
    accent="#56B4E9",
    operations=(("mask", "#F28E3C"), ("insert", "#56B4E9")),
    spare=("#2FBF9B", "#DE8FC0", "#E0C341"),
)


def canvas(
    theme: Theme, height: float, *, rows: int = 1, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of the house width with ``rows`` stacked, dressed axes."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor=theme.page)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, 1, squeeze=False, sharex=sharex)
    axes = [row[0] for row in grid]
    for ax in axes:
        dress(ax, theme)
    return figure, axes


def dress(ax: Axes, theme: Theme) -> None:
    """Quiet axes: two spines, a faint grid behind the data, ink that suits the page."""
    ax.set_facecolor(theme.page)
    ax.set_axisbelow(True)
    ax.grid(True, color=theme.grid, linewidth=0.8)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.muted)
    ax.tick_params(colors=theme.muted, labelcolor=theme.ink, labelsize=SMALL, width=0.8)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_color(theme.ink)
        label.set_fontsize(TEXT)
    ax.title.set_color(theme.ink)
    ax.title.set_fontsize(TEXT)


def legend(ax: Axes, theme: Theme, *, columns: int = 3) -> None:
    """A legend above the axes, so that it never covers data."""
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=SMALL,
        labelcolor=theme.ink,
        borderaxespad=0.2,
        handlelength=2.2,
        columnspacing=1.4,
    )


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    # The canvas writes what it draws once; Figure.savefig lays out and draws twice.
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return buffer.getvalue()
