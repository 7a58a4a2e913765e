"""From a metric's evaluations to how hard the policies push."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mda_lightning.callbacks.metric_table import Measurement
from mda_lightning.callbacks.steering.reference_curve import Over
from mda_lightning.callbacks.steering.targets import Target
from mda_lightning.units import Head

_SATURATED = 20  # evaluations in a row


class Aim(NamedTuple):
    """What a target said at its last evaluation; None where there is none."""

    mu: float | None = None
    reference: float | None = None
    push: float | None = None


class Aiming:
    """A target, asked once an evaluation; without one, policies act in full.

    Args:
        target: or None.
        over: how μ of several heads becomes one number.

    Attributes:
        aim: what it said last.
    """

    def __init__(self, target: Target | None, over: Over) -> None:
        self.target, self._over = target, over
        self.forget()

    def forget(self) -> None:
        """Begin a new run."""
        self.aim = Aim()
        self._evaluated_at = -1
        self._n_saturated = 0
        if self.target is not None:
            self.target.forget()

    def prepare(self, mechanism: str, units: Sequence[Head], first: int, last: int) -> None:
        """Before the first step of a fit.

        Args:
            units: empty where they are known only later.
            first, last: steps of this fit at which some policy may act; none where the last is
                before the first.

        Raises:
            ValueError: the target cannot tell what to aim at in these steps.
        """
        self._n_saturated = 0
        if self.target is not None:
            self.target.prepare(mechanism, units, self._over)
            if first <= last:
                self.target.check_covers(first, last)

    def take(self, latest: Measurement | None, units: Sequence[Head]) -> bool:
        """Ask the target, if this is an evaluation that it has not seen; whether it was."""
        if self.target is None or latest is None or not units:
            return False
        if latest.step == self._evaluated_at:
            return False
        values = np.array([latest.value[unit.layer, unit.head] for unit in units], np.float64)
        mu = float(values.mean() if self._over == "mean" else values.max())
        if math.isfinite(mu) and not self.target.knows(latest.step):
            return False  # measured before its curve begins
        self._evaluated_at = latest.step
        if not math.isfinite(mu):
            warnings.warn(
                f"{latest.metric} is not finite at step {latest.step}: no push until it is "
                "measured again",
                stacklevel=2,
            )
            self.aim = Aim(push=0.0)
            return True
        push = self.target.push(latest.step, mu)
        self.aim = Aim(mu, push.reference, push.strength)
        self._n_saturated = self._n_saturated + 1 if abs(push.strength) >= 1 else 0
        if self.target.is_graded and self._n_saturated == _SATURATED:
            warnings.warn(
                f"step {latest.step}: the target has asked for a full push at {_SATURATED} "
                f"evaluations in a row ({latest.metric} is {mu:.3g}, aimed at "
                f"{push.reference:.3g}): the policies are too weak to hold it; raise their share, "
                "or full_at",
                stacklevel=2,
            )
        return True

    def strength(self, direction: int, step: int) -> float:
        """How strongly a policy of this direction acts at ``step``; 0 or less, not at all."""
        if self.target is None:
            return 1.0
        return direction * (self.aim.push or 0.0) if self.target.holds(step) else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "evaluated_at": self._evaluated_at,
            "aim": list(self.aim),
            "target": None if self.target is None else self.target.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._evaluated_at = int(state["evaluated_at"])
        self.aim = Aim(*state["aim"])
        if self.target is not None and state["target"] is not None:
            self.target.load_state_dict(state["target"])
