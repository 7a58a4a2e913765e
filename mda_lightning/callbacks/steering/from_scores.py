"""A schedule from an earlier run's scores, decided piece by piece while the run goes on."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from mda_lightning.callbacks.steering.places import coming_window, that_fit
from mda_lightning.callbacks.steering.policies import (
    Decision,
    Policy,
    SteeredRun,
    Which,
    check_counts,
    check_share,
    check_which,
    of_other_sign,
    ranked,
)
from mda_lightning.callbacks.steering.reference_curve import heads_of
from mda_lightning.interventions import Insert, Mask
from mda_lightning.interventions.operations import Mode, Placement
from mda_lightning.store import ScoreTable
from mda_lightning.units import Head

Ints = NDArray[np.int64]


@dataclass
class FromScores(Policy):
    """Mask, or insert, the samples that ranked first in an earlier run's score table.

    "mask": of the samples of every coming step, those that are in the table's top share get
    ``weight``. "insert": ``per_step`` samples a step of the table's top share are put into the next
    ``every_n_steps`` steps, the first in rank first, and from the front again once all have been.
    A target's push scales the share of a mask, and the number that is inserted; what it has put
    into the next steps stays there when the push ends.

    Attributes:
        scores: the table or its folder; of the corpus that this run is trained on.
        action: see above.
        share: of the samples of the table that have a finite score, in (0, 1]; of them, those whose
            score has the sign of that end.
        which: "top", the highest scores first, or "bottom".
        unit: unit or units of the earlier run, whose scores are added up; None takes those that
            this run is steered by.
        every_n_steps: steps that one insertion is about.
        weight: of a mask, in [0, 1).
        per_step: inserted samples a step.
        mode, placement: of insertions, as for :class:`Amplify`.
        name, active: as for :class:`Policy`.
    """

    scores: str | os.PathLike[str] | ScoreTable
    action: Literal["mask", "insert"] = "mask"
    share: float = 0.1
    which: Which = "top"
    unit: str | Sequence[str] | None = None
    every_n_steps: int = 50
    weight: float = 0.0
    per_step: float = 1.0
    mode: Mode = "dispersed"
    placement: Placement = "replace"

    why_nothing: ClassVar[str] = (
        "no sample of the table's top share came in these steps, for a mask, or there was no whole "
        "sample or no place for an insertion; see share, per_step, and in which steps the earlier "
        "run scored"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.action not in ("mask", "insert"):
            raise ValueError(f"action={self.action!r}: 'mask' or 'insert'")
        check_share(self.share)
        check_which(self.which)
        check_counts(every_n_steps=self.every_n_steps)
        if not 0 < self.per_step < np.inf:
            raise ValueError(f"per_step={self.per_step}: above 0")
        one = np.zeros(1, np.int64)
        Mask(one, (0, 1), self.weight)  # these refuse other words and weights
        Insert(one, (0, 1), self.mode, self.placement)
        self._units = heads_of(self.unit)
        self._ranked: Ints = one[:0]
        self._scores: NDArray[np.float64] = np.zeros(0)
        self._steps: Ints = one[:0]
        self._count = 0  # the first in rank that are of the share
        self._until = 0  # inserted so far
        self._cursor = 0
        self._carry = 0.0

    @property
    def direction(self) -> int:
        return 1 if (self.which == "top") == (self.action == "insert") else -1

    def begin(self, run: SteeredRun, units: Sequence[Head]) -> None:
        given = self.scores
        table = given if isinstance(given, ScoreTable) else ScoreTable.open(given)
        own = self._units or list(units)
        if not own:
            raise ValueError(
                f"{self.name} does not know whose scores of {table.folder} count: units='target' "
                "is known only later; give it unit='L1H2'"
            )
        data = table.provenance.get("data") or {}
        corpus = data.get("corpus_hash")
        if corpus is not None and corpus != run.corpus_hash:
            raise ValueError(
                f"{table.folder} has scores of corpus {corpus[:12]}, this run has "
                f"{run.corpus_hash[:12]}: its sample ids mean other text here; use scores of "
                "this corpus"
            )
        ids, together = table.mean_scores(str(own[0]))
        for unit in own[1:]:
            together = together + table.mean_scores(str(unit))[1]
        known = ids < len(run.rows)
        if self.action == "insert" and not known.all():
            warnings.warn(
                f"{self.name}: {int((~known).sum())} of the {len(ids)} samples of {table.folder} "
                "are no rows of the corpus, and are not inserted",
                stacklevel=4,
            )
            ids, together = ids[known], together[known]
        order = ranked(ids, together, self.which)
        if not len(order):
            sign = "above" if self.which == "top" else "below"
            raise ValueError(
                f"{table.folder} has no sample with a finite score {sign} 0 of "
                f"{', '.join(map(str, own))}"
            )
        self._ranked, self._scores = ids[order], together[order]
        share = max(1, round(self.share * int(np.isfinite(together).sum())))
        self._count = min(share, len(order))
        if share > len(order):
            text = of_other_sign(self.name, self.which, share - len(order), share)
            warnings.warn(text, stacklevel=4)

    def decide(
        self, run: SteeredRun, step: int, strength: float, units: Sequence[Head]
    ) -> Decision | None:
        if step < self._until:
            return None
        if self.action == "mask":
            operation: Mask | Insert | None = self._mask(run, step, round(self._count * strength))
        else:
            operation = self._insert(run, step, self._count, strength)
            self._until = step + self.every_n_steps
        if operation is None:
            return None
        by_id = np.argsort(self._ranked)
        place = by_id[np.searchsorted(self._ranked, operation.sample_ids, sorter=by_id)]
        none = np.full(len(place), -1, np.int64)
        return Decision(self.name, operation, self._scores[place], none, none)

    def settings(self) -> dict[str, Any]:
        given = self.scores
        folder = given.folder if isinstance(given, ScoreTable) else Path(given)
        return {
            "policy": "FromScores",
            "scores": str(folder),
            "action": self.action,
            "share": self.share,
            "which": self.which,
            "unit": None if self._units is None else [str(unit) for unit in self._units],
            "every_n_steps": self.every_n_steps,
            "weight": self.weight,
            "per_step": self.per_step,
            "mode": self.mode,
            "placement": self.placement,
            "active": self._when.active,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"until": self._until, "cursor": self._cursor, "carry": self._carry}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._until, self._cursor = int(state["until"]), int(state["cursor"])
        self._carry = float(state["carry"])

    def forget(self) -> None:
        self._until, self._cursor, self._carry = 0, 0, 0.0

    def _mask(self, run: SteeredRun, step: int, count: int) -> Mask | None:
        # Of one step each: whether the next is masked, its own push says.
        batch = run.schedule.batch(step)
        chosen = np.intersect1d(batch.sample_ids[batch.weights > 0], self._ranked[:count])
        if not len(chosen):
            return None
        return Mask(chosen, (step, step + 1), self.weight, "all", "run", online=True)

    def _insert(self, run: SteeredRun, step: int, count: int, strength: float) -> Insert | None:
        left = self.steps(run.end)[1] + 1 - step
        window = coming_window(run.schedule, step, min(self.every_n_steps, left))
        if window is None:
            return None
        wanted = self.per_step * strength * (window[1] - window[0]) + self._carry
        whole = math.floor(wanted + 1e-6)  # 0.1 of 30 steps are 3, rounding or not
        chosen = self._ranked[(self._cursor + np.arange(min(whole, count))) % count]
        if self.placement == "replace":
            chosen = chosen[: that_fit(run.schedule, step, window, chosen)]
        self._carry = wanted - whole
        if not len(chosen):
            return None
        self._cursor = (self._cursor + len(chosen)) % count
        return Insert(chosen, window, self.mode, self.placement, online=True)
