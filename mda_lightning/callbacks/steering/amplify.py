"""Train again, soon, on the samples that have lately promoted a unit most."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mda_lightning.callbacks.steering.places import coming_window, that_fit
from mda_lightning.callbacks.steering.policies import (
    Decision,
    Ints,
    Policy,
    SteeredRun,
    Which,
    check_counts,
    check_share,
    check_which,
    of_other_sign,
    ranked,
)
from mda_lightning.callbacks.steering.recent_scores import RecentScores, StepRows
from mda_lightning.interventions import Insert
from mda_lightning.interventions.operations import Mode, Placement
from mda_lightning.units import Head


@dataclass
class Amplify(Policy):
    """Insert the top share of the recent in-run scores into the coming steps.

    The first decision waits until ``recent_steps`` steps have been scored. A sample scored several
    times in them counts once, with its mean. Inserted samples are scored again like any other.

    Attributes:
        share: of the samples that were scored lately, in (0, 1]; scaled by the target's push. Of
            them, those whose score has the sign of that end.
        which: "top" promotes the unit, "bottom" works against it.
        recent_steps: steps whose scores count.
        every_n_steps: steps from one insertion to the next; None takes ``over_steps``.
        over_steps: steps over which an insertion is spread, of the base order.
        copies: how often a sample is inserted.
        mode: "dispersed", uniformly over these steps, or "concentrated", all at once.
        placement: "replace" takes the places of base samples; "shift" moves these back, and those
            at the end out of the run, which stays as long as it was.
        name, active: as for :class:`Policy`.
    """

    share: float = 0.1
    which: Which = "top"
    recent_steps: int = 200
    every_n_steps: int | None = None
    over_steps: int = 200
    copies: int = 1
    mode: Mode = "dispersed"
    placement: Placement = "replace"

    needs_in_run_scores: ClassVar[bool] = True
    why_nothing: ClassVar[str] = (
        "the last recent_steps steps were never all scored with finite scores, or its share of "
        "them is no sample, or the coming steps had no place; see recent_steps and share"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.share)
        check_which(self.which)
        check_counts(
            recent_steps=self.recent_steps,
            every_n_steps=self.every_n_steps,
            over_steps=self.over_steps,
            copies=self.copies,
        )
        Insert(np.zeros(1, np.int64), (0, 1), self.mode, self.placement)  # refuses other words
        self.recent = RecentScores(self.recent_steps)
        self._units: list[Head] = []
        self._last: int | None = None
        self._waits_since: int | None = None
        self._warned: set[str] = set()

    @property
    def direction(self) -> int:
        return 1 if self.which == "top" else -1

    def follow(self, units: Sequence[Head], step: int) -> None:
        """Rows that are heard from now on are of these units, and of ``step`` or later."""
        self._units = list(units)
        self._warned = set()
        self.recent.drop_from(step)

    def hear(self, rows: StepRows) -> None:
        """A micro-batch has been scored."""
        self.recent.hear(rows)

    def decide(
        self, run: SteeredRun, step: int, strength: float, units: Sequence[Head]
    ) -> Decision | None:
        every = self.every_n_steps or self.over_steps
        if self._last is not None and step - self._last < every:
            return None
        ids, scores, steps, solved = self.recent.rows([self._units.index(u) for u in units])
        there = np.isfinite(scores)
        oldest = self.recent.oldest
        if not there.any() or oldest is None or step - oldest < self.recent_steps:
            self._wait(step)
            return None
        self._waits_since = None
        window = coming_window(run.schedule, step, self.over_steps)
        if window is None:
            return None
        ids, scores, steps, solved = ids[there], scores[there], steps[there], solved[there]
        samples, row = np.unique(ids, return_inverse=True)
        means = np.bincount(row, weights=scores) / np.bincount(row)
        last = np.zeros(len(samples), np.int64)
        np.maximum.at(last, row, np.arange(len(ids)))  # the latest row of each
        wanted = round(self.share * strength * len(samples))
        first = ranked(samples, means, self.which)[:wanted]
        if len(first) < wanted:
            missing = wanted - len(first)
            told = of_other_sign(f"{self.name}: step {step}", self.which, missing, wanted)
            self._warn("sign", told)
        chosen = np.sort(first[: self._that_fit(run, step, window, samples[first])])
        if not len(chosen):
            return None
        self._last = step
        operation = Insert(
            samples[chosen], window, self.mode, self.placement, self.copies, online=True
        )
        rows = last[chosen]
        return Decision(self.name, operation, means[chosen], steps[rows], solved[rows])

    def settings(self) -> dict[str, Any]:
        return {
            "policy": "Amplify",
            "share": self.share,
            "which": self.which,
            "recent_steps": self.recent_steps,
            "every_n_steps": self.every_n_steps or self.over_steps,
            "over_steps": self.over_steps,
            "copies": self.copies,
            "mode": self.mode,
            "placement": self.placement,
            "active": self._when.active,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "last": self._last,
            "waits_since": self._waits_since,
            "recent": self.recent.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last, self._waits_since = state["last"], state["waits_since"]
        self.recent.load_state_dict(state["recent"])

    def forget(self) -> None:
        self._last = self._waits_since = None
        self.recent.forget()

    def _wait(self, step: int) -> None:
        if self._waits_since is None:
            self._waits_since = step
        if step - self._waits_since > self.recent_steps:
            self._warn(
                "no scores",
                f"{self.name} is to act at step {step} and finds no in-run scores of all of steps "
                f"{step - self.recent_steps}..{step - 1}: nothing is inserted. Let "
                "InfluenceScoring be active there (active='always', say), or wait for its window "
                "with active='window'",
            )

    def _that_fit(self, run: SteeredRun, step: int, window: tuple[int, int], wanted: Ints) -> int:
        if window[1] - window[0] < self.over_steps:
            self._warn(
                "end",
                f"{self.name}: what is inserted from step {step} on would go beyond the end of the "
                f"run; it is put into the {window[1] - window[0]} steps that are left",
            )
        if self.placement == "shift":
            return len(wanted)
        room = that_fit(run.schedule, step, window, wanted, self.copies)
        if len(wanted) > room:
            self._warn(
                "room",
                f"{self.name}: at step {step} the next {window[1] - window[0]} steps have places "
                f"for {room} samples, {len(wanted)} were to be inserted; the rest is left out. "
                "Lower share or copies, or raise over_steps and every_n_steps",
            )
        return room

    def _warn(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(text, stacklevel=2)
