"""Leave out of every step the samples that would promote a unit most."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from mda_lightning.callbacks.steering.coming_scores import ComingScores
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
from mda_lightning.curvature import CurvatureError, Fisher, check_damping
from mda_lightning.influence.inverse_probes import CurvatureSettings
from mda_lightning.interventions import Mask
from mda_lightning.units import Head

_ROUNDING = 1e-6  # 0.3 of 10 samples are 3, also where 0.3 is a little less


@dataclass
class Suppress(Policy):
    """Score every coming batch before it is trained on, and mask its top share.

    A step then has two forwards, and a backward that stops at the lowest unit: the decision is
    taken at the very weights that the batch is trained on. All samples of the optimizer step are
    ranked together, whatever the ranks and micro-batches. What is not a whole sample of the share
    is carried over to the next step. Samples that the plan masks already are left alone; those to
    which it gives another weight are ranked by weight times score. No sample is masked whose score
    has the other sign, however large the share.

    Attributes:
        share: of the batch's samples, in (0, 1]; scaled by the target's push.
        which: "top" works against the unit, "bottom" promotes it.
        weight: by which that of masked samples is multiplied, in [0, 1).
        refresh_every: steps between refreshes of curvature and probe gradient.
        n_curvature: sequences that the curvature is estimated on: the latest that counted, and at
            first, where these are too few, those to come.
        curvature: "ekfac", "kfac", or "identity" for the plain dot product with ∇f.
        fisher, damping, seed: of the curvature.
        score_batch_size: sequences that are scored at once.
        name, active: as for :class:`Policy`.
    """

    share: float = 0.1
    which: Which = "top"
    weight: float = 0.0
    refresh_every: int = 200
    n_curvature: int = 128
    curvature: Literal["ekfac", "kfac", "identity"] = "ekfac"
    fisher: Fisher = "sampled"
    damping: float = 0.1
    seed: int = 0
    score_batch_size: int = 16

    why_nothing: ClassVar[str] = (
        "its share of the batches never came to a whole sample, or no sample had a finite score; "
        "see share"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.share)
        check_which(self.which)
        check_counts(
            refresh_every=self.refresh_every,
            n_curvature=self.n_curvature,
            score_batch_size=self.score_batch_size,
        )
        check_damping(self.damping)
        if self.curvature not in ("ekfac", "kfac", "identity"):
            raise ValueError(f"curvature={self.curvature!r}: 'ekfac', 'kfac' or 'identity'")
        Mask(np.zeros(1, np.int64), (0, 1), self.weight)  # refuses what is no weight
        if self.weight >= 1:
            raise ValueError(f"weight={self.weight}: in [0, 1); 1 would leave a sample as it is")
        self._coming = ComingScores(
            CurvatureSettings(self.curvature, self.fisher, self.damping, self.seed),
            refresh_every=self.refresh_every,
            n_curvature=self.n_curvature,
            group=self.score_batch_size,
        )
        self._carry = 0.0
        self._warned = self._warned_of_sign = False

    @property
    def direction(self) -> int:
        return -1 if self.which == "top" else 1

    def begin(self, run: SteeredRun, units: Sequence[Head]) -> None:
        self._warned = self._warned_of_sign = False
        self._coming.begin(run)

    def decide(
        self, run: SteeredRun, step: int, strength: float, units: Sequence[Head]
    ) -> Decision | None:
        batch = run.schedule.batch(step)
        counts = batch.weights > 0
        ids, first = np.unique(batch.sample_ids[counts], return_index=True)
        wanted = self.share * strength * int(counts.sum()) + self._carry
        count = math.floor(wanted + _ROUNDING)
        if count < 1:
            self._carry = wanted
            return None
        try:
            scores = self._coming.of(run, step, units, ids)
        except CurvatureError as error:
            self._warn(f"step {step}: {error}")
            return None
        if not np.isfinite(scores).any():
            self._warn(f"step {step}: no sample of the batch has a finite score")
            return None
        # A sample counts by its weight, which the plan may have changed.
        weighted = scores * batch.weights[counts][first]
        chosen = ranked(ids, weighted, self.which)[:count]
        missing = min(count, int(np.isfinite(scores).sum())) - len(chosen)
        if missing and not self._warned_of_sign:
            self._warned_of_sign = True
            name = f"{self.name}: step {step}"
            told = of_other_sign(name, self.which, missing, missing + len(chosen))
            warnings.warn(f"{told}. This is said once a fit", stacklevel=2)
        if not len(chosen):
            self._carry = min(wanted, 1.0)
            return None
        chosen = np.sort(chosen)
        masked = int(np.isin(batch.sample_ids[counts], ids[chosen]).sum())
        self._carry = min(wanted - masked, 1.0)
        window = (step, step + 1)
        operation = Mask(ids[chosen], window, self.weight, "all", "run", online=True)
        assert self._coming.taken_at is not None
        steps = [np.full(len(chosen), s, np.int64) for s in (step, self._coming.taken_at)]
        return Decision(self.name, operation, scores[chosen], steps[0], steps[1])

    def settings(self) -> dict[str, Any]:
        return {
            "policy": "Suppress",
            "share": self.share,
            "which": self.which,
            "weight": self.weight,
            "refresh_every": self.refresh_every,
            "n_curvature": self.n_curvature,
            "curvature": self.curvature,
            "fisher": self.fisher,
            "damping": self.damping,
            "seed": self.seed,
            "score_batch_size": self.score_batch_size,
            "active": self._when.active,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"carry": self._carry, "coming": self._coming.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._carry = float(state["carry"])
        self._coming.load_state_dict(state["coming"])

    def forget(self) -> None:
        self._carry = 0.0
        self._coming.forget()

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.name}: {text}. Nothing is masked where that is so; this is said once a fit",
                stacklevel=3,
            )
