"""What every HTML page of this package is made with: one template environment, one set of filters.

Pages need nothing beside themselves: styles and pictures are inside, there is no script, and text
reaches a page only through the template's escaping.
"""

from __future__ import annotations

import base64
import math
from datetime import datetime
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def page_environment() -> Environment:
    """The templates of this package, compiled once a process."""
    environment = Environment(
        loader=PackageLoader("mda_lightning.analysis", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        inline=_inline, number=_number, step=_step, duration=_duration, moment=_moment
    )
    return environment


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _number(value: float | None, digits: int = 3) -> str:
    known = value is not None and math.isfinite(value)
    return f"{value:.{digits}f}" if known else "–"


def _step(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(float(seconds)), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{float(seconds):.1f} s"


def _moment(text: str) -> str:
    """``2026-01-05 10:00 UTC`` of an ISO time; any other text as it is."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    return when.strftime("%Y-%m-%d %H:%M %Z").strip()
