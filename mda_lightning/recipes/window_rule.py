"""The thresholds of ``mda-lightning window``: read, and checked against the values they are for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mda_lightning.window import Followed, WindowRule

Floats = NDArray[np.float64]
Setting = float | int | tuple[int, int] | None


def read_setting(text: str) -> tuple[str, Setting]:
    """A threshold as ``KEY=VALUE``; ``level=none`` is None, two numbers have a comma between.

    Raises:
        ValueError: no such threshold, or no such value of it.
    """
    name, separator, value = (part.strip() for part in text.partition("="))
    _check_names({name: None})
    if not separator or not value:
        raise ValueError(f"{text!r}: write KEY=VALUE, for example {name}=0.2")
    default = getattr(WindowRule(), name)
    if name == "level" and value.casefold() == "none":
        return name, None
    try:
        if isinstance(default, tuple):
            first, last = (int(part) for part in value.split(","))
            return name, (first, last)
        number = int(value) if isinstance(default, int) else float(value)
        if not math.isfinite(number):
            raise ValueError(f"{number} is not finite")
        return name, number
    except ValueError:
        kind = (
            "two whole numbers, such as 10,40"
            if isinstance(default, tuple)
            else "a whole number"
            if isinstance(default, int)
            else "a finite number"
        )
        way = "; level=none closes on a plateau only" if name == "level" else ""
        raise ValueError(f"{name}={value}: it must be {kind}{way}") from None


def _check_names(given: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(WindowRule)]
    for name in given:
        if name not in known:
            raise ValueError(f"{name!r} is no threshold; there are: {', '.join(known)}")


def rule_for(
    metric: str, seen: Floats, followed: Followed, given: Mapping[str, Setting]
) -> tuple[WindowRule, list[str]]:
    """The thresholds for a metric, and what is to be said of them.

    The defaults are those of a score between 0 and 1. Where a distance is followed there is no
    level unless one is given, and a formed unit opens another window ``minimum_up`` further on.

    Args:
        seen: the values that the detector is given.
        given: those that are not the default.

    Raises:
        ValueError: thresholds that contradict each other or the floor, or a default that can mean
            nothing for values like these.
    """
    _check_names(given)
    settings: dict[str, Any] = dict(given)
    finite = np.abs(seen[np.isfinite(seen)])
    reach = float(finite.max()) if finite.size else 0.0
    if followed.follows == "value":
        return _absolute(metric, reach, followed.floor, WindowRule(**settings), settings)
    way = "below" if followed.falls else "above"
    if "minimum_up" not in given and reach > 1.0:
        raise ValueError(
            f"{metric} moves up to {reach:.4g} from its floor {followed.floor:g}, so that the "
            f"default threshold, for scores between 0 and 1, means nothing: say how far {way} the "
            f"floor a window opens, --rule minimum_up=X, for example {float(f'{reach / 10:.1g}'):g}"
        )
    settings.setdefault("level", None)
    if "minimum_up" in given:
        settings.setdefault("minimum_rise", given["minimum_up"])
    if not settings.get("minimum_up", WindowRule.minimum_up) > 0.0:
        raise ValueError(
            f"minimum_up={settings['minimum_up']}: {metric} is followed by how far it is {way} its "
            f"floor of {followed.floor:g}, so give a number above 0"
        )
    return WindowRule(**settings), [
        f"followed is how far it is {way} its floor {followed.floor:g}: thresholds are of that"
    ]


def _absolute(
    metric: str, reach: float, floor: float, rule: WindowRule, given: Mapping[str, Any]
) -> tuple[WindowRule, list[str]]:
    if not rule.minimum_up > 0.0:
        raise ValueError(f"minimum_up={rule.minimum_up} must be above 0: rearm multiplies it")
    if rule.level is not None and rule.level <= floor:
        raise ValueError(
            f"level={rule.level} is not above the floor {floor:g} of {metric}: a window would "
            "close as it opens; give --rule level=none, or a higher one"
        )
    if reach > 1.0 and not {"minimum_up", "level"} <= set(given):
        return rule, [
            f"values reach {reach:.4g}, and the thresholds minimum_up={rule.minimum_up} and "
            f"level={rule.level} are for scores between 0 and 1; --rule sets others"
        ]
    return rule, []
