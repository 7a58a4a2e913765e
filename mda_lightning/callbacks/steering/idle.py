"""Why a policy that never acted did not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from mda_lightning.callbacks.steering.aiming import Aiming
from mda_lightning.callbacks.steering.policies import Policy

Outcome = Literal["no unit", "not active", "no push", "nothing", "acted"]


class Outcomes:
    """What came of asking each policy, step by step.

    Args:
        policies: of the run.
    """

    def __init__(self, policies: Sequence[Policy]) -> None:
        self._policies = policies
        self._acted = Counter[str]()
        self.begin()

    def begin(self) -> None:
        """Count anew, for a fit; what was decided in an earlier one of the run is kept."""
        self._counts: dict[str, Counter[Outcome]] = {one.name: Counter() for one in self._policies}

    def forget(self) -> None:
        """Begin a new run."""
        self._acted = Counter()
        self.begin()

    def note(self, policy: Policy, outcome: Outcome) -> None:
        """A policy was asked at a step."""
        self._counts[policy.name][outcome] += 1
        self._acted[policy.name] += outcome == "acted"

    def idle(self, aiming: Aiming) -> list[str]:
        """A sentence for each policy that was asked and never decided anything."""
        return [
            f"{policy.name} never acted, so it steered nothing: {_why(policy, counts, aiming)}"
            for policy in self._policies
            if (counts := self._counts[policy.name]).total() and not self._acted[policy.name]
        ]

    def state_dict(self) -> dict[str, int]:
        return dict(self._acted)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._acted = Counter(state)


def _why(policy: Policy, counts: Counter[Outcome], aiming: Aiming) -> str:
    target, aim = type(aiming.target).__name__, aiming.aim
    n_steps = f"at {counts.total():,} steps" if counts.total() > 1 else "at 1 step"
    if counts["nothing"]:
        asked = f"{counts['nothing']:,} of them" if counts["nothing"] > 1 else "one of them"
        return f"asked {n_steps}, on at {asked}: {policy.why_nothing}"
    if counts["no push"]:
        way = "up" if policy.direction > 0 else "down"
        if aim.mu is None:
            return f"{target} had no finite value to go by; does UnitMonitor measure in time?"
        return (
            f"{target} never asked for a push {way}; the metric was {aim.mu:.3g} at last, aimed at "
            f"{aim.reference:.3g}"
        )
    if counts["no unit"]:
        return f"units='target', and CriticalWindow had no target {n_steps}"
    if policy.by_window:
        return f"active='window', and CriticalWindow saw no window {n_steps}"
    return f"active={policy.active!r} holds none of the steps of this fit"
