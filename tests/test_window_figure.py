"""The figure of critical windows: what it shows of synthetic curves, and that all of it fits."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from mda_lightning.analysis.figures.style import DARK, LIGHT, png_bytes
from mda_lightning.analysis.figures.window_picture import Picture
from mda_lightning.analysis.figures.windows import windows_figure
from mda_lightning.window import Window, WindowEvent

STEPS = np.arange(0, 2000, 10)
UNITS = ["L0H0", "L0H1", "L1H0", "L1H1"]


def rise(middle: float, height: float) -> np.ndarray:
    return 0.05 + height / (1.0 + np.exp(-(STEPS - middle) / 40.0))


CURVES = np.column_stack([rise(1000, 0.6), rise(600, 0.3), np.full(200, 0.06), np.full(200, 0.04)])


def window(unit: int, start: int, end: int | None, **more: Any) -> Window:
    """One that closed at the level, unless said otherwise."""
    fields: dict[str, Any] = {
        "midpoint": None if end is None else (start + end) // 2,
        "end_reason": None if end is None else "level",
        "state": "RISING" if end is None else "FORMED",
        "censored": end is None,
        "start_censored": False,
        "floor": 0.05,
        "threshold": 0.1,
    }
    return Window(unit_index=unit, start=start, end=end, **(fields | more))


FITTED = {
    "refined_start": 912,
    "refined_midpoint": 1000,
    "refined_end": 1088,
    "midpoint_interval": (980, 1020),
}
TARGET = window(0, 900, 1100, **FITTED)
OTHER = window(1, 500, 700)


def draw(values: np.ndarray = CURVES, **options: Any) -> Figure:
    given: dict[str, Any] = {
        "units": UNITS,
        "windows": [OTHER, TARGET],
        "targets": [TARGET],
        "metric": "induction",
        "floor": 0.05,
        "opens_at": 0.1,
    }
    steps = options.pop("steps", STEPS)
    return windows_figure(steps, values, values, **(given | options))


def texts(figure: Figure) -> list[str]:
    """Everything written, ticks left out."""
    found = [figure.get_suptitle()]
    for ax in figure.axes:
        found += [text.get_text() for text in ax.texts]
        legend = ax.get_legend()
        found += [text.get_text() for text in legend.get_texts()] if legend else []
    return [text for text in found if text]


def line_at(ax: Axes, step: float) -> bool:
    return any(list(line.get_xdata()) == [step, step] for line in ax.lines)


def outside(figure: Figure) -> list[str]:
    """Texts that reach beyond the page."""
    png_bytes(figure)
    page = figure.bbox
    found = []
    for ax in figure.axes:
        legend = ax.get_legend()
        drawn = [*ax.texts, *(legend.get_texts() if legend else [])]
        low, high = sorted(ax.get_ylim())  # matplotlib keeps ticks beyond, which it does not draw
        drawn += [tick for tick in ax.get_yticklabels() if low <= tick.get_position()[1] <= high]
        drawn += [ax.xaxis.label, ax.yaxis.label]
        for text in drawn:
            box = text.get_window_extent()
            if text.get_text() and text.get_visible() and not (
                box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1 and box.y0 >= page.y0 - 1
            ):  # fmt: skip
                found.append(text.get_text())
    box = figure._suptitle.get_window_extent()
    return [*found, *([] if box.x1 <= page.x1 else [figure.get_suptitle()])]


def test_the_targets_window_and_its_refinement_are_where_they_are() -> None:
    figure = draw()
    ax, rows = figure.axes
    shaded = [patch.get_extents().transformed(ax.transData.inverted()) for patch in ax.patches]
    assert [(round(box.x0), round(box.x1)) for box in shaded] == [(900, 1100)]
    assert all(line_at(ax, step) for step in (900, 1000, 1100))
    across = {tuple(line.get_xdata()): line for line in ax.lines if len(line.get_xdata()) == 2}
    assert across[980, 1020].get_linewidth() > across[912, 1088].get_linewidth()
    levels = [line.get_ydata()[0] for line in ax.lines if list(line.get_xdata()) == [0, 1]]
    assert sorted(levels) == [0.05, 0.1]
    said = texts(figure)
    assert "L0H0: steps 900 to 1,100, ended as it held the level" in said[0]
    assert "midpoint of the fit 1,000, nominal 95% interval 980 to 1,020" in said[0]
    assert {"start", "mid", "end", "chance 0.05", "opens above 0.1", "L0H0, smoothed"} <= set(said)
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in rows.patches]
    assert bars == [(500, 700), (900, 1100)]
    assert [label.get_text() for label in rows.get_yticklabels()] == ["L0H0", "L0H1"]


def test_named_units_differ_without_colour() -> None:
    others = [window(unit, 500, 700) for unit in range(1, 4)]
    figure = draw(windows=[*others, TARGET])
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) == len(STEPS)]
    lines = [line for line in curves if line.get_linestyle() != "None"]
    assert len(lines) == 4
    assert len({str(line._unscaled_dash_pattern) for line in lines}) == 4
    assert set(UNITS) <= {text.get_text() for text in figure.axes[0].texts}
    greys = sorted(float(np.dot(to_rgb(line.get_color()), (0.3, 0.59, 0.11))) for line in lines)
    assert greys[-1] < 0.75, "a line that is lighter is lost on white paper"


def test_lapses_hand_overs_and_open_windows_are_marked() -> None:
    lapse = WindowEvent("lapsed", 1, 1200, 500, "lapsed")
    handed = WindowEvent("handed_over", 1, 1200, 500, None, 0)
    rising = window(2, 1500, None)
    figure = draw(windows=[OTHER, TARGET, rising], events=[lapse, handed])
    rows = figure.axes[1]
    marks = {
        line.get_marker(): line.get_xdata()[0] for line in rows.lines if len(line.get_xdata()) == 1
    }
    assert marks["X"] == 1200 and marks[">"] == STEPS[-1]
    formed = {tuple(line.get_xdata()) for line in rows.lines}
    assert (700, 1200) in formed and (1100, STEPS[-1]) in formed
    arrows = [text for text in rows.texts if text.arrow_patch is not None]
    assert [(arrow.xyann, arrow.xy) for arrow in arrows] == [((1200, 1), (1200, 0))]
    assert {"lapsed", "still open", "handed over"} <= set(texts(figure))
    assert not {"lapsed", "still open", "handed over"} & set(texts(draw()))


def test_only_the_surroundings_of_a_short_window_are_shown() -> None:
    steps = STEPS * 100
    cut = draw(steps=steps)
    low, high = cut.axes[0].get_xlim()
    assert low <= 500 and 1100 <= high < 10_000
    assert "(of 0 to 199,000)" in cut.axes[1].get_xlabel()
    whole = draw(steps=steps, windows=[window(0, 900, None)], targets=[window(0, 900, None)])
    assert whole.axes[0].get_xlim()[1] >= 199_000


def broken_line(values: np.ndarray) -> np.ndarray:
    figure = draw(values[:, None], units=["L0H0"], windows=[], targets=[])
    lines = [line for line in figure.axes[0].lines if line.get_linestyle() == "-"]
    return np.asarray(lines[0].get_ydata(), dtype=float)


def test_a_line_goes_over_single_missing_values_and_breaks_at_many() -> None:
    values = CURVES[:, 0].copy()
    values[20:22] = np.nan
    assert np.isfinite(broken_line(values)).all()
    values[100:120] = np.nan
    assert np.isnan(broken_line(values)).sum() == 1


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dark": {"theme": DARK},
    "one point": {"steps": STEPS[:1], "values": CURVES[:1], "windows": [], "targets": []},
    "nothing finite": {"values": CURVES * np.nan, "windows": [], "targets": []},
    "flat at zero": {
        "values": CURVES * 0.0, "windows": [], "targets": [], "floor": 0.0, "opens_at": 0.1,
    },
    "open": {"windows": [window(0, 900, None)], "targets": [window(0, 900, None)]},
    "open from the first": {
        "windows": [window(0, 0, None, start_censored=True)],
        "targets": [window(0, 0, None, start_censored=True)],
    },
    "lapsed": {
        "windows": [window(0, 900, 1100, end_reason="lapsed", state="LAPSED")],
        "targets": [window(0, 900, 1100, end_reason="lapsed", state="LAPSED")],
    },
    "at the very end": {"windows": [window(0, 1900, 1990)], "targets": [window(0, 1900, 1990)]},
    "large numbers": {
        "steps": STEPS * 700,
        "units": ["L11H10", "L11H11", "L12H10", "L12H13"],
        "windows": [window(0, 630_000, 770_000, refined_start=1, refined_midpoint=701_234,
                           refined_end=900_000, midpoint_interval=(601_234, 801_234))],
        "targets": [window(0, 630_000, 770_000, refined_start=1, refined_midpoint=701_234,
                           refined_end=900_000, midpoint_interval=(601_234, 801_234))],
    },
    "a loss": {
        "values": 6.24 - CURVES * 5, "floor": 6.24, "opens_at": 5.74, "falls": True,
        "metric": "val/loss",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_draws_without_a_warning_and_nothing_leaves_the_page(case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw(**CASES[case])
        assert outside(figure) == []


def test_a_falling_metric_is_named_by_how_low_it_got() -> None:
    figure = draw(6.24 - CURVES * 5, floor=6.24, opens_at=5.74, falls=True, windows=[TARGET])
    assert "opens below 5.74" in texts(figure)
    picture = Picture(
        STEPS.astype(float), 6.24 - CURVES, 6.24 - CURVES, UNITS, [], [], [], 6.24, 5.7, True, LIGHT
    )
    assert picture.named == [0, 1, 2]


def test_a_thousand_heads() -> None:
    """Few are named, the rest are thin and pale; rows of windows are limited and counted."""
    values = np.random.default_rng(0).normal(0.05, 0.005, (len(STEPS), 1000))
    values[:, :20] += CURVES[:, :1]
    units = [f"L{i // 32}H{i % 32}" for i in range(1000)]
    windows = [window(i, 900 + i, 1100 + i) for i in range(20)]
    figure = draw(values, units=units, windows=windows, targets=windows[:1])
    ax, rows = figure.axes
    assert len(ax.collections[0].get_segments()) == 995
    assert len(rows.get_yticklabels()) == 8 and "and 12 more" in texts(figure)
    assert outside(figure) == []
    assert max(figure.get_size_inches()) < 8.5


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert png_bytes(draw()) == png_bytes(draw())
