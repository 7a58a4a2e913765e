"""Interpretable units and their names: ``L3H3`` is head 3 of layer 3 (both counted from 0)."""

from __future__ import annotations

import re
from dataclasses import dataclass

_HEAD = re.compile(r"L(\d+)H(\d+)")


@dataclass(frozen=True, order=True)
class Head:
    """One attention head: ``layer`` and ``head`` count from 0, as in the paper (App. E.1)."""

    layer: int
    head: int

    def __post_init__(self) -> None:
        if self.layer < 0 or self.head < 0:
            raise ValueError(f"layer {self.layer}, head {self.head}: both count from 0 upwards")

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


def parse_unit(text: str) -> Head:
    """Read a unit's name, the inverse of ``str(unit)``.

    Raises:
        ValueError: the text is not a unit's name; the message shows the form.
    """
    match = _HEAD.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} is not a unit: write a head as L<layer>H<head>, for example L3H3"
        )
    return Head(int(match[1]), int(match[2]))
