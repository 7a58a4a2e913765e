"""Recorded curves of our own runs, what the eye reads in them and what the detector finds.

``python -m benchmarks.window_gallery`` prints the table and draws the figure.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mda_lightning.analysis.figures.style import LIGHT
from mda_lightning.files import atomic_path
from mda_lightning.window import MechanismWindow, Window

CURVES = Path(__file__).with_name("window_curves.parquet")
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "window-gallery.png"
_COLUMNS = 4


@dataclass(frozen=True)
class Reading:
    """A rise as read from a plot of the curves alone, to the nearest 50 steps.

    ``start`` is where the curve has left the band that it lay in, ``end`` where it has come to rest
    or has passed 0.4, whichever comes first; None where the run ends before.
    """

    run: str
    metric: str
    unit: str
    start: int
    end: int | None


#: Read from plots without the detector's marks, by someone who had seen those of an earlier version
#: on most of these runs.
BY_EYE = tuple(
    Reading(*one)
    for one in (
        ("heads-8", "induction", "L2H4", 3050, 5400),
        ("heads-8", "induction", "L2H6", 3900, 5400),
        ("layers-4", "induction", "L3H2", 5050, 6600),
        ("rate-0.005", "induction", "L2H1", 2900, 4250),
        ("rate-0.02", "induction", "L2H0", 6850, None),
        ("records-seed-0", "induction", "L1H0", 3600, 3850),
        ("records-rate-0.015", "induction", "L2H3", 3850, 4350),
        ("rotary-0.25", "induction", "L2H2", 4050, 5250),
        ("seed-0", "induction", "L2H0", 3350, 4350),
        ("seed-1", "induction", "L2H1", 5500, 6900),
        ("width-128-decay", "induction", "L2H1", 4500, None),
        ("width-96", "induction", "L2H3", 3700, 4350),
        ("heads-8", "previous_token", "L1H0", 550, 950),
        ("heads-8", "previous_token", "L1H0", 4300, 5800),
        ("layers-2", "previous_token", "L1H2", 500, 1000),
        ("layers-4", "previous_token", "L2H0", 300, 750),
        ("layers-4", "previous_token", "L2H0", 5800, 6800),
        ("rate-0.005", "previous_token", "L1H1", 350, 900),
        ("rate-0.005", "previous_token", "L1H1", 3500, 4400),
        ("rate-0.02", "previous_token", "L1H0", 200, 900),
        ("records-rate-0.015", "previous_token", "L1H2", 150, 800),
        ("records-rate-0.015", "previous_token", "L1H2", 3950, 4400),
        ("records-seed-0", "previous_token", "L0H0", 3400, 3900),
        ("records-seed-1", "previous_token", "L1H2", 150, 1100),
        ("rotary-0.25", "previous_token", "L1H1", 500, 1100),
        ("rotary-0.25", "previous_token", "L1H1", 4700, 5500),
        ("seed-0", "previous_token", "L1H2", 250, 1000),
        ("seed-0", "previous_token", "L1H2", 3750, 4500),
        ("seed-1", "previous_token", "L1H1", 500, 1000),
        ("seed-1", "previous_token", "L1H1", 6300, 7200),
        ("width-128-decay", "previous_token", "L1H0", 200, 1000),
        ("width-48", "previous_token", "L2H0", 600, 1600),
        ("width-96", "previous_token", "L1H2", 250, 700),
        ("width-96", "previous_token", "L1H2", 3850, 4550),
    )
)


@dataclass(frozen=True)
class Panel:
    """One kind of head in one run."""

    run: str
    metric: str
    curves: pd.DataFrame
    """Rows are steps, columns units."""
    chance: float
    follower: MechanismWindow[str]

    def windows(self, unit: str) -> list[Window]:
        place = self.follower.units.index(unit)
        return [w for w in self.follower.detector.windows() if w.unit_index == place]


def panels(path: Path = CURVES) -> list[Panel]:
    """Every run and kind in the file, with the detector's windows."""
    table = pd.read_parquet(path)
    found = []
    for (run, metric), rows in table.groupby(["run", "metric"], sort=False):
        curves = rows.pivot_table(index="step", columns="unit", values="value")
        chance = float(rows["chance"].iloc[0])
        follower = MechanismWindow(list(curves.columns), chance=chance)
        for step, values in zip(curves.index, curves.to_numpy(), strict=True):
            follower.update(int(step), values)
        found.append(Panel(str(run), str(metric), curves, chance, follower))
    return found


def nearest(panel: Panel, reading: Reading) -> Window | None:
    """The detector's window of the same unit that starts nearest to the reading."""
    windows = panel.windows(reading.unit)
    return min(windows, key=lambda w: abs(w.start - reading.start), default=None)


def rows(found: list[Panel]) -> list[str]:
    """A Markdown table: the readings beside what was found."""
    lines = [
        "| run | head | kind | by eye | detector | logistic, 10-90% | why it ended |",
        "|---|---|---|---|---|---|---|",
    ]
    by_name = {(panel.run, panel.metric): panel for panel in found}
    for one in BY_EYE:
        window = nearest(by_name[one.run, one.metric], one)
        if window is None:
            found_words = ("none", "", "")
        else:
            fit = (
                ""
                if window.refined_start is None
                else _span(window.refined_start, window.refined_end)
            )
            found_words = (_span(window.start, window.end), fit, window.end_reason or "still open")
        kind = one.metric.replace("_", " ")
        cells = (one.run, one.unit, kind, _span(one.start, one.end), *found_words)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def targets(found: list[Panel]) -> list[str]:
    """A Markdown table: the mechanism's own target and window, and how many heads have windows."""
    lines = [
        "| run | kind | the mechanism's target and window | heads with a window | of |",
        "|---|---|---|---|---|",
    ]
    for panel in found:
        window = panel.follower.window
        words = (
            "none" if window is None else f"{window[0]}, {_span(window[1].start, window[1].end)}"
        )
        risen = {w.unit_index for w in panel.follower.detector.windows()}
        kind, n_units = panel.metric.replace("_", " "), len(panel.curves.columns)
        lines.append(f"| {panel.run} | {kind} | {words} | {len(risen)} | {n_units} |")
    return lines


def _span(start: int, end: int | None) -> str:
    return f"{start:,} to {'...' if end is None else f'{end:,}'}"


def draw(found: list[Panel]) -> Figure:
    """All panels: curves, the leading unit's windows, the readings as triangles below."""
    n_rows = math.ceil(len(found) / _COLUMNS)
    figure = Figure(figsize=(15, 2.3 * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, _COLUMNS, squeeze=False).ravel()
    for ax, panel in zip(axes, found, strict=False):
        _draw_panel(ax, panel)
    for ax in axes[len(found) :]:
        ax.set_axis_off()
    return figure


def _draw_panel(ax: Axes, panel: Panel) -> None:
    lead = max(panel.curves.columns, key=lambda unit: float(panel.curves[unit].max()))
    highest = panel.curves.max().sort_values(ascending=False).index
    for unit in reversed(highest[:4]):
        style = {"color": LIGHT.accent, "linewidth": 1.1} if unit == lead else {"color": "#b6bcc4"}
        ax.plot(panel.curves.index, panel.curves[unit], **{"linewidth": 0.7, **style})
    ax.axhline(panel.chance, color=LIGHT.muted, linestyle=":", linewidth=0.9)
    last = int(panel.curves.index[-1])
    for window in panel.windows(lead):
        end = last if window.end is None else window.end
        ax.axvspan(window.start, end, color="#f0b46a", alpha=0.35, linewidth=0)
        if window.midpoint is not None:
            ax.axvline(window.midpoint, color=LIGHT.ink, linestyle="--", linewidth=0.8)
        if window.refined_start is not None and window.refined_end is not None:
            shown = min(window.refined_end, last)
            ax.plot(
                [window.refined_start, shown],
                [1.0, 1.0],
                color=LIGHT.ink,
                linewidth=3,
                solid_capstyle="butt",
                transform=ax.get_xaxis_transform(),
                clip_on=False,
            )
    for one in BY_EYE:
        if (one.run, one.metric, one.unit) == (panel.run, panel.metric, lead):
            steps = [step for step in (one.start, one.end) if step is not None]
            ax.plot(
                steps,
                [0.0] * len(steps),
                "^",
                color="#b3261e",
                markersize=7,
                transform=ax.get_xaxis_transform(),
                clip_on=False,
            )
    ax.set_title(f"{panel.run}: {panel.metric.replace('_', ' ')} {lead}", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.set_xlim(0, last)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def main() -> int:
    """Print the table, draw the figure."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.window_gallery", description=__doc__
    )
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    found = panels()
    print("\n".join([*rows(found), "", *targets(found)]))
    drawn = io.BytesIO()
    draw(found).savefig(drawn, dpi=80)
    with atomic_path(options.figure) as part:
        Image.open(drawn).convert("RGB").quantize(64).save(part, format="PNG", optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
