"""A page that shows a training run while it goes on: values in, HTML out.

The page is one file that needs nothing beside it: curves are SVG, the grid of heads is a table, and
a browser reads it again by itself until the run is over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from mda_lightning import __version__
from mda_lightning.analysis.charts import Track, line_chart
from mda_lightning.analysis.page import page_environment

RunState = Literal["training", "finished", "stopped"]
Grid = NDArray[np.float32]


@dataclass(frozen=True)
class Event:
    """Something that happened at a step."""

    step: int
    text: str


@dataclass(frozen=True)
class WindowMark:
    """A window of a head; ``end`` is None while it is open."""

    head: str
    start: int
    end: int | None


@dataclass(frozen=True)
class HeadsView:
    """One metric of all heads: the curves of the chosen ones, and all of them at ``step``.

    Attributes:
        metric: its key.
        step: of the last measurement.
        now, se: [L, H] at that step.
        tracks: the chosen heads over steps.
        chance: the metric's chance value, if it has one.
        windows: to be marked in the curves.
    """

    metric: str
    step: int
    now: Grid
    se: Grid
    tracks: Sequence[Track]
    chance: float | None = None
    windows: Sequence[WindowMark] = ()

    @property
    def chart(self) -> Markup:
        return line_chart(
            self.tracks,
            label=f"{self.metric} of the highest heads over optimizer steps",
            chance=self.chance,
            spans=[(w.start, w.end) for w in self.windows],
            least_top=0.2 if self.chance is not None else 0.0,
        )

    @property
    def scale(self) -> tuple[float, float]:
        """The values at the two ends of the colours."""
        finite = self.now[np.isfinite(self.now)]
        low, top = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        if low < 0.0:
            return -max(top, -low), max(top, -low)
        least = 0.0 if self.chance is None else max(0.2, 2 * self.chance)
        return 0.0, max(top, least) or 1.0

    @property
    def rows(self) -> list[list[Cell]]:
        low, top = self.scale
        best = float(np.nanmax(self.now)) if np.isfinite(self.now).any() else math.nan
        return [
            [
                Cell(
                    layer, head, float(value), float(self.se[layer, head]), low, top, value == best
                )
                for head, value in enumerate(row)
            ]
            for layer, row in enumerate(self.now)
        ]

    @property
    def ramp(self) -> str:
        """The colours as a CSS gradient."""
        return ", ".join(_colour(t, diverging=self.scale[0] < 0) for t in np.linspace(0, 1, 9))


@dataclass(frozen=True)
class Cell:
    """One head in the grid."""

    layer: int
    head: int
    value: float
    se: float
    low: float
    top: float
    is_best: bool

    @property
    def words(self) -> str:
        name = f"L{self.layer}H{self.head}"
        if not math.isfinite(self.value):
            return f"{name}: not finite"
        spread = f" ± {self.se:.3g}" if math.isfinite(self.se) else ""
        return f"{name}: {self.value:.4g}{spread}"

    @property
    def short(self) -> str:
        if not math.isfinite(self.value):
            return "–"
        if self.top < 0.1:
            return f"{self.value:.0e}".replace("e-0", "e-") if self.value else "0"
        text = f"{self.value:.2f}"
        if text.startswith(("0.", "-0.")):
            text = text.replace("0.", ".", 1)
        return ".00" if text == "-.00" else text

    @property
    def style(self) -> str:
        if not math.isfinite(self.value):
            return ""
        part = (self.value - self.low) / (self.top - self.low)
        colour = _colour(part, diverging=self.low < 0)
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
        return f"background:{colour};color:{'#111' if light else '#fff'}"


@dataclass(frozen=True)
class ScalarView:
    """A number of the whole model over steps."""

    metric: str
    track: Track

    @property
    def chart(self) -> Markup:
        return line_chart(
            [self.track],
            label=f"{self.metric} over optimizer steps",
            width=360,
            height=190,
            name_ends=False,
        )

    @property
    def words(self) -> str:
        value = float(self.track.values[-1])
        if not math.isfinite(value):
            return "not finite"
        error = None if self.track.errors is None else float(self.track.errors[-1])
        known = error is not None and math.isfinite(error)
        return f"{value:.4g}" + (f" ± {error:.2g}" if known else "")


@dataclass(frozen=True)
class LiveView:
    """Everything the page shows.

    Attributes:
        title, subtitle: of the run.
        state: whether the run goes on; ``detail`` says why it stopped.
        step, n_steps: completed, and planned (None: not known).
        steps_per_second: since this process began to train; None before it is known.
        measured_step, written_at: of the last measurement; ISO time of this page.
        measuring_share: part of the wall time spent on measuring and on this page.
        rate: how often heads are measured, in words.
        refresh_seconds: after which a browser reads the page again while the run goes on.
    """

    title: str
    subtitle: str
    state: RunState
    detail: str
    step: int
    n_steps: int | None
    steps_per_second: float | None
    measured_step: int | None
    written_at: str
    measuring_share: float | None
    rate: str
    refresh_seconds: int
    heads: Sequence[HeadsView]
    scalars: Sequence[ScalarView]
    events: Sequence[Event]

    @property
    def seconds_left(self) -> float | None:
        if self.n_steps is None or not self.steps_per_second:
            return None
        return max(self.n_steps - self.step, 0) / self.steps_per_second

    @property
    def done(self) -> float | None:
        return None if not self.n_steps else min(self.step / self.n_steps, 1.0)


def live_page(view: LiveView) -> str:
    """The page as HTML."""
    template = page_environment().get_template("live.html.j2")
    return template.render(view=view, version=__version__)


# Nine colours each of cividis and of PuOr, as in the pictures: told apart under every common form
# of colour blindness. Written down here, since importing matplotlib takes longer than the page.
_CIVIDIS = "00224e 1a386f 434e6c 61656f 7d7c78 9b9476 bcae6c dec958 fee838"
_DIVERGING = "2d004b 5f3a91 9990bf cfcfe5 f7f7f6 fed59f ee9b39 bd6109 7f3b08"


def _colour(part: float, *, diverging: bool) -> str:
    """The colour at ``part`` in [0, 1] of the scale, interpolated, as ``#rrggbb``."""
    anchors = (_DIVERGING if diverging else _CIVIDIS).split()
    place = min(max(part, 0.0), 1.0) * (len(anchors) - 1)
    low = min(int(place), len(anchors) - 2)
    channels = [
        int(anchors[low][i : i + 2], 16) * (1 - place + low)
        + int(anchors[low + 1][i : i + 2], 16) * (place - low)
        for i in (0, 2, 4)
    ]
    return "#" + "".join(f"{round(channel):02x}" for channel in channels)
