"""What the metric is to do: how hard a policy pushes, decided whenever it is measured."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from mda_lightning.callbacks.steering.reference_curve import Over, ReferenceCurve, heads_of
from mda_lightning.units import Head


class Push(NamedTuple):
    """What a target asks for.

    Attributes:
        strength: in [-1, 1]; above 0 the unit is to rise. Policies scale their share by it.
        reference: the value that was aimed at; NaN where there is none.
    """

    strength: float
    reference: float


class Target(ABC):
    """Decides at every evaluation of μ whether and how hard the policies push."""

    #: Ways in which it may push: 1 up, -1 down.
    directions: ClassVar[tuple[int, ...]] = (1, -1)
    #: Whether a push between nothing and all is usual, so that a full one for long says something.
    is_graded: ClassVar[bool] = False

    def prepare(self, mechanism: str, units: Sequence[Head], over: Over) -> None:  # noqa: B027
        """Read what is needed, before the first step.

        Args:
            mechanism: whose μ it is.
            units: whose.
            over: how theirs become one number.
        """

    def check_covers(self, first: int, last: int) -> None:  # noqa: B027
        """Refuse steps ``first`` to ``last`` that the target says nothing of.

        Raises:
            ValueError: which steps.
        """

    def knows(self, step: int) -> bool:
        """Whether it can judge a value that was measured at ``step``."""
        return True

    def holds(self, step: int) -> bool:
        """Whether the last push still counts at ``step``."""
        return True

    @abstractmethod
    def push(self, step: int, mu: float) -> Push:
        """What to do after ``step`` updates, given a finite μ; called once an evaluation."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments, as JSON values."""

    def state_dict(self) -> dict[str, float | int | None]:
        """What a resumed run must know; primitives."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take up a saved state."""

    def forget(self) -> None:  # noqa: B027
        """Begin a new run."""


class HoldCurve(Target):
    """Keep μ on a reference curve: of an earlier run, or given point by point.

    With e = reference - μ, the push is 0 while |e| <= tolerance, grows linearly beyond it and is
    ±1 from |e| = full_at on. With ``integral`` above 0 the sum of e over evaluations, times it, is
    added: what is missing for long is pushed harder. The sum does not grow while the push is ±1.

    Args:
        curve: the ``unit_metrics.parquet`` of an earlier run (or its folder), or points
            ``[[step, value], ...]``; linear in between.
        unit: unit or units of the earlier run whose curve it is; None for those that are steered.
        tolerance: by how much μ may be off without any push, in the metric's units.
        full_at: by how much it is off when the push is full.
        integral: weight of the summed error.

    Raises:
        ValueError: a number out of range, or a curve that is none.
    """

    is_graded = True

    def __init__(
        self,
        curve: str | os.PathLike[str] | Sequence[Sequence[float]],
        *,
        unit: str | Sequence[str] | None = None,
        tolerance: float = 0.01,
        full_at: float = 0.05,
        integral: float = 0.0,
    ) -> None:
        if not 0 <= tolerance < full_at < math.inf:
            raise ValueError(f"tolerance={tolerance}, full_at={full_at}: 0 <= tolerance < full_at")
        if not 0 <= integral < math.inf:
            raise ValueError(f"integral={integral}: 0 or more")
        self.tolerance, self.full_at, self.integral = tolerance, full_at, integral
        self._given = curve
        self._units = heads_of(unit)
        is_path = isinstance(curve, (str, os.PathLike))
        self._curve = None if is_path else ReferenceCurve.of_points(curve)  # type: ignore[arg-type]
        self._sum = 0.0

    def prepare(self, mechanism: str, units: Sequence[Head], over: Over) -> None:
        if isinstance(self._given, (str, os.PathLike)):
            own = units if self._units is None else self._units
            if not own:
                raise ValueError(
                    "HoldCurve does not know whose curve to read: units='target' is known only "
                    "later; give it unit='L1H2', of the earlier run"
                )
            self._curve = ReferenceCurve.of_table(self._given, mechanism, own, over)

    def check_covers(self, first: int, last: int) -> None:
        assert self._curve is not None
        self._curve.check_covers(first, last)

    def knows(self, step: int) -> bool:
        assert self._curve is not None
        return self._curve.covers(step)

    def push(self, step: int, mu: float) -> Push:
        assert self._curve is not None
        reference = self._curve.at(step)
        error = reference - mu
        off = max(abs(error) - self.tolerance, 0.0) / (self.full_at - self.tolerance)
        proportional = math.copysign(off, error)
        wanted = proportional + self.integral * (self._sum + error)
        if abs(wanted) < 1.0 or wanted * error < 0:
            self._sum += error
        strength = proportional + self.integral * self._sum
        return Push(min(max(strength, -1.0), 1.0), reference)

    def settings(self) -> dict[str, Any]:
        given: Any = self._given
        path = isinstance(given, (str, os.PathLike))
        points = None if path else [[float(s), float(v)] for s, v in given]
        return {
            "target": "HoldCurve",
            "curve": str(given) if path else points,
            "unit": None if self._units is None else [str(unit) for unit in self._units],
            "tolerance": self.tolerance,
            "full_at": self.full_at,
            "integral": self.integral,
        }

    def state_dict(self) -> dict[str, float | int | None]:
        return {"sum": self._sum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sum = float(state["sum"])

    def forget(self) -> None:
        self._sum = 0.0


class ReachLevel(Target):
    """Reach a level earlier: push up until μ has been there once, and then no more.

    Args:
        level: of μ.

    Raises:
        ValueError: not finite.

    Attributes:
        reached_at: the step of the evaluation at which it was first there; None before.
    """

    directions = (1,)

    def __init__(self, level: float) -> None:
        if not math.isfinite(level):
            raise ValueError(f"level={level}: a number")
        self.level = level
        self.reached_at: int | None = None

    def push(self, step: int, mu: float) -> Push:
        if self.reached_at is None and mu >= self.level:
            self.reached_at = step
        return Push(1.0 if self.reached_at is None else 0.0, self.level)

    def settings(self) -> dict[str, Any]:
        return {"target": "ReachLevel", "level": self.level}

    def state_dict(self) -> dict[str, float | int | None]:
        return {"reached_at": self.reached_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        found = state["reached_at"]
        self.reached_at = None if found is None else int(found)

    def forget(self) -> None:
        self.reached_at = None


class DelayLevel(Target):
    """Reach a level later: push down before a step, whenever μ comes near the level.

    Args:
        level: of μ, above 0.
        until_step: from this step on there is no push.
        near: the share of the level from which on it is pushed; 0 pushes at any μ.

    Raises:
        ValueError: a number out of range.
    """

    directions = (-1,)

    def __init__(self, level: float, until_step: int, *, near: float = 0.5) -> None:
        if not 0 < level < math.inf:
            raise ValueError(f"level={level}: above 0")
        if until_step < 1:
            raise ValueError(f"until_step={until_step}: at least 1")
        if not 0 <= near <= 1:
            raise ValueError(f"near={near}: a share of the level, in [0, 1]")
        self.level, self.until_step, self.near = level, until_step, near

    def holds(self, step: int) -> bool:
        return step < self.until_step

    def push(self, step: int, mu: float) -> Push:
        pushes = step < self.until_step and (self.near == 0 or mu >= self.near * self.level)
        return Push(-1.0 if pushes else 0.0, self.level)

    def settings(self) -> dict[str, Any]:
        return {
            "target": "DelayLevel",
            "level": self.level,
            "until_step": self.until_step,
            "near": self.near,
        }
