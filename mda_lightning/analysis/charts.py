"""Curves as inline SVG, of a few hundred points each: no library and no script is needed.

Colours are the page's own variables (``--c0``, ``--ink``, ...), so a chart suits light and dark
pages alike; each curve also carries its name at its end, and after six the dashes change.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

MOST_POINTS = 400
N_COLOURS = 6
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_CHARACTER = 7.0  # width of a digit at the chart's font size
_LINE = 14.0

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Track:
    """A named curve: steps [n] ascending, values [n], and their standard errors [n] or None."""

    name: str
    steps: NDArray[np.int64]
    values: Floats
    errors: Floats | None = None


def decimated(values: Floats, most: int = MOST_POINTS) -> NDArray[np.int64]:
    """Indices of at most ``most`` points that keep a curve's shape, ascending.

    The curve is cut into stretches and of each its lowest and highest point stay, so that no peak
    is lost; first and last always stay. Points that are not finite stay where a stretch has
    nothing else: they are gaps.
    """
    n = len(values)
    if n <= most:
        return np.arange(n)
    stretches = (most - 2) // 2
    width = math.ceil(n / stretches)
    padded = np.full(stretches * width, np.nan)
    padded[:n] = np.where(np.isfinite(values), values, np.nan)
    pieces = padded.reshape(stretches, width)
    starts = np.arange(stretches) * width
    lowest = starts + np.where(np.isnan(pieces), np.inf, pieces).argmin(1)
    highest = starts + np.where(np.isnan(pieces), -np.inf, pieces).argmax(1)
    kept = np.unique(np.concatenate([[0, n - 1], lowest, highest]))
    return kept[kept < n]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most ``most`` round numbers (1, 2 or 5 times a power of ten apart) in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(m * power for m in (1, 2, 5, 10, 20) if _count(low, high, m * power) <= most)
    first = math.ceil(low / apart - 1e-9)
    return [round(i * apart, 12) for i in range(first, first + _count(low, high, apart))]


def _count(low: float, high: float, apart: float) -> int:
    return math.floor(high / apart + 1e-9) - math.ceil(low / apart - 1e-9) + 1


def line_chart(
    tracks: Sequence[Track],
    *,
    label: str,
    chance: float | None = None,
    spans: Sequence[tuple[int, int | None]] = (),
    least_top: float = 0.0,
    width: int = 720,
    height: int = 250,
    name_ends: bool = True,
) -> Markup:
    """Curves over steps, each with a band of its value ± standard error where it has one.

    The vertical axis holds the bands too.

    Args:
        tracks: the curves; without any there are axes only.
        label: what a screen reader says it is.
        chance: a dashed level.
        spans: (start, end) shaded, their edges drawn; an end of None is the right edge.
        least_top: the vertical axis reaches at least this, and 0, where it is above 0.
        width, height: in user units, of which text is 12 high; the page scales the whole.
        name_ends: whether the curves' names and last values stand at their ends.
    """
    shown = [(track, decimated(track.values)) for track in tracks]
    low, high = _range(tracks, chance=chance, least_top=least_top)
    last = max((int(t.steps[-1]) for t in tracks if len(t.steps)), default=0)
    first = min((int(t.steps[0]) for t in tracks if len(t.steps)), default=0)
    # A chart of two short axes still needs round numbers between them.
    if last == first:
        last = first + 1
    levels = ticks(low, high, max(3, height // 45))
    texts = [_level(v, levels) for v in levels]
    names = [f"{t.name} {_last(t):.3g}" if name_ends else "" for t in tracks]
    left = 10.0 + _CHARACTER * max(map(len, texts))
    right = width - (10.0 if not name_ends else 30.0 + _CHARACTER * max(map(len, names), default=0))
    upper, lower = 10.0, height - 42.0

    def x(step: float) -> float:
        return left + (right - left) * (step - first) / (last - first)

    def y(value: float) -> float:
        return lower - (lower - upper) * (value - low) / (high - low)

    box = f"0 0 {width} {height}"
    parts = [f'<svg class="chart" viewBox="{box}" role="img" aria-label="{escape(label)}">']
    for start, end in spans:
        a = x(max(start, first))
        b = x(min(last if end is None else end, last))
        parts.append(f'<rect class="span" x="{a:.1f}" y="{upper}" width="{max(b - a, 1):.1f}" '
                     f'height="{lower - upper:.1f}"/>')  # fmt: skip
        edges = [a] if end is None else [a, b]
        parts += [f'<path class="edge" d="M{e:.1f} {upper}V{lower}"/>' for e in edges]
    for value, text in zip(levels, texts, strict=True):
        parts.append(f'<path class="grid" d="M{left:.1f} {y(value):.1f}H{right:.1f}"/>')
        parts.append(
            f'<text x="{left - 5:.1f}" y="{y(value) + 4:.1f}" text-anchor="end">{text}</text>'
        )
    marks = ticks(first, last, max(3, int(right - left) // 60))
    for value in (v for v in marks if v == int(v)):
        parts.append(f'<path class="tick" d="M{x(value):.1f} {lower}v5"/>')
        anchor = "end" if x(value) > right - 16 else "start" if x(value) < left + 6 else "middle"
        parts.append(
            f'<text x="{x(value):.1f}" y="{lower + 18}" text-anchor="{anchor}">{value:,.0f}</text>'
        )
    parts.append(f'<path class="axis" d="M{left:.1f} {lower}H{right:.1f}"/>')
    parts.append(
        f'<text x="{(left + right) / 2:.1f}" y="{height - 6}" text-anchor="middle">'
        "optimizer steps completed</text>"
    )
    # An id holds for the whole page: charts of another label or another size need their own.
    clip = f"plot-{zlib.crc32(f'{label} {left} {right} {upper} {lower}'.encode()):08x}"
    if any(track.errors is not None for track in tracks):
        parts.append(
            f'<clipPath id="{clip}"><rect x="{left:.1f}" y="{upper}" width="{right - left:.1f}" '
            f'height="{lower - upper:.1f}"/></clipPath>'
        )
    for i, (track, at) in enumerate(shown):
        if track.errors is not None:
            parts += _band(track, at, x=x, y=y, clip=clip)
        parts.append(_curve(track, at, i, x=x, y=y))
    if chance is not None:
        parts.append(f'<path class="chance" d="M{left:.1f} {y(chance):.1f}H{right:.1f}"/>')
    if name_ends:
        parts += _end_names(tracks, names, x=x, y=y, right=right, bounds=(upper + 4, lower))
    parts.append("</svg>")
    return Markup("".join(parts))


def _range(
    tracks: Sequence[Track], *, chance: float | None, least_top: float
) -> tuple[float, float]:
    values = np.concatenate([np.zeros(0), *(edge for t in tracks for edge in _edges(t))])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if chance is not None:
        low, high = min(low, chance), max(high, chance)
    if least_top > 0.0:
        low, high = min(low, 0.0), max(high, least_top)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return (0.0 if least_top > 0.0 and low == 0.0 else low - pad), high + pad


def _edges(track: Track) -> list[Floats]:
    """Values, and values less and plus their errors; some may be not finite."""
    values = track.values.astype(np.float64)
    if track.errors is None:
        return [values]
    errors = np.where(np.isfinite(track.errors), track.errors, 0.0)
    return [values, values - errors, values + errors]


def _level(value: float, levels: Sequence[float]) -> str:
    apart = abs(levels[1] - levels[0]) if len(levels) > 1 else abs(value) or 1.0
    if not 1e-4 < apart < 1e5:
        return f"{value:.1e}"
    return f"{value:,.{max(0, -math.floor(math.log10(apart) + 1e-9))}f}"


def _last(track: Track) -> float:
    finite = track.values[np.isfinite(track.values)]
    return float(finite[-1]) if len(finite) else math.nan


def _curve(track: Track, at: NDArray[np.int64], i: int, *, x: Any, y: Any) -> str:
    pieces, pen = [], "M"
    for step, value in zip(track.steps[at].tolist(), track.values[at].tolist(), strict=True):
        if math.isfinite(value):
            pieces.append(f"{pen}{x(step):.1f} {y(value):.1f}")
            pen = "L"
        else:
            pen = "M"
    alone = ""
    if len(pieces) == 1:
        pieces.append("h0")  # a point, drawn by its round cap
        alone = " alone"
    dashes = _DASHES[i // N_COLOURS % len(_DASHES)]
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<path class="curve k{i % N_COLOURS}{alone}"{dash} d="{"".join(pieces)}">'
        f"<title>{escape(track.name)}</title></path>"
    )


def _band(track: Track, at: NDArray[np.int64], *, x: Any, y: Any, clip: str) -> list[str]:
    assert track.errors is not None
    known = at[np.isfinite(track.values[at]) & np.isfinite(track.errors[at])]
    if len(known) < 2:
        return []
    steps, values, errors = track.steps[known], track.values[known], track.errors[known]
    above = [f"{x(s):.1f} {y(v):.1f}" for s, v in zip(steps, values + errors, strict=True)]
    below = [f"{x(s):.1f} {y(v):.1f}" for s, v in zip(steps, values - errors, strict=True)]
    outline = "L".join(above + below[::-1])
    return [f'<path class="band" clip-path="url(#{clip})" d="M{outline}Z"/>']


def _end_names(
    tracks: Sequence[Track],
    names: Sequence[str],
    *,
    x: Any,
    y: Any,
    right: float,
    bounds: tuple[float, float],
) -> list[str]:
    """Names beside the curves' ends, moved apart so that none covers another."""
    ends = [(y(_last(t)), i) for i, t in enumerate(tracks) if math.isfinite(_last(t))]
    ends.sort()
    places: list[float] = []
    for wanted, _ in ends:
        places.append(max(wanted, places[-1] + _LINE if places else bounds[0]))
    ceiling = bounds[1]
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - _LINE
    parts = []
    for (wanted, i), place in zip(ends, places, strict=True):
        parts.append(
            f'<path class="leader k{i % N_COLOURS}" '
            f'd="M{right:.1f} {wanted:.1f}L{right + 14:.1f} {place:.1f}h6"/>'
        )
        parts.append(f'<text x="{right + 24:.1f}" y="{place + 4:.1f}">{escape(names[i])}</text>')
    return parts
