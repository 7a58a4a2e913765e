"""How a metric that falls, or that lies below 0, is followed by what only rises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Follows = Literal["value", "value - floor", "floor - value"]
N = TypeVar("N", float, NDArray[np.float64])


@dataclass(frozen=True)
class Followed:
    """What the detector is given of a metric, and back.

    A rule's thresholds lie above 0, and one of them multiplies another (``rearm``). So a metric
    that falls, or whose floor is below 0, is followed by its distance from the floor.
    """

    follows: Follows
    floor: float

    @classmethod
    def of(cls, floor: float, *, falls: bool) -> Followed:
        """For a metric with this chance value, which forms by rising or by falling."""
        if falls:
            return cls("floor - value", floor)
        return cls("value" if floor >= 0.0 else "value - floor", floor)

    @property
    def falls(self) -> bool:
        return self.follows == "floor - value"

    @property
    def chance(self) -> float:
        """The floor as the detector sees it."""
        return self.floor if self.follows == "value" else 0.0

    def seen(self, values: N) -> N:
        """What the detector is given."""
        return self._sign * (values - self._origin)

    def own(self, seen: N) -> N:
        """Back in the metric's units."""
        return self._sign * seen + self._origin

    @property
    def _sign(self) -> float:
        return -1.0 if self.falls else 1.0

    @property
    def _origin(self) -> float:
        return self.floor - self.chance
