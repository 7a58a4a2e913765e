"""Scores of the batch that comes next, at the weights that it is to be trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mda_lightning.callbacks.probe_scope import probe_scope
from mda_lightning.callbacks.steering.policies import SteeredRun
from mda_lightning.callbacks.steering.recent_scores import all_rows
from mda_lightning.gradients import BlockVector
from mda_lightning.influence.inverse_probes import (
    CurvatureSettings,
    inverse_probes,
    warn_of_unscored,
)
from mda_lightning.influence.replay import ReplayScorer
from mda_lightning.units import Head, parse_unit

Ints = NDArray[np.int64]


class ComingScores:
    """Score whole batches with IHVPs that are taken anew every so many steps.

    A refresh takes the curvature on the latest samples that were trained on, as the schedule tells
    them, and, where these are too few, on the next to come. Samples are scored in groups of
    ``group`` in their order, shared out among the ranks, so that a score depends neither on the
    number of ranks nor on micro-batches. The IHVPs are part of the state: a resumed run goes on
    with the very same.

    Args:
        settings: of the curvature.
        refresh_every: steps from one refresh to the next.
        n_curvature: sequences of it.
        group: sequences at once.
    """

    def __init__(
        self, settings: CurvatureSettings, *, refresh_every: int, n_curvature: int, group: int
    ) -> None:
        self._settings = settings
        self._refresh_every, self._n_curvature, self._group = refresh_every, n_curvature, group
        self._ihvp: BlockVector = {}
        #: Step of the weights at which the IHVPs were taken; None before the first refresh.
        self.taken_at: int | None = None

    @property
    def units(self) -> list[Head]:
        """Of the IHVPs."""
        return list(dict.fromkeys(unit for unit, _ in self._ihvp))

    def of(
        self, run: SteeredRun, step: int, units: Sequence[Head], ids: Ints
    ) -> NDArray[np.float64]:
        """Scores [n] of samples ``ids`` [n], added up over units and blocks; the same on all ranks.

        NaN where a sample has no finite one.
        """
        due = self.taken_at is None or step - self.taken_at >= self._refresh_every
        if due or set(units) != set(self.units):
            self._refresh(run, step, units)
        groups = [ids[i : i + self._group] for i in range(0, len(ids), self._group)]
        trainer, scores, places = run.trainer, [], []
        with probe_scope(run.model):
            scorer = ReplayScorer(run.model, {"f": self._ihvp})
            for number, group in enumerate(groups):
                if number % trainer.world_size != trainer.global_rank:
                    continue
                values, _ = scorer.score(_tokens(run, group))
                scores.append(values["f"].double().sum((1, 2)))
                places.append(torch.arange(len(group)) + number * self._group)
        none = torch.zeros(0, dtype=torch.float64)
        mine = torch.stack([torch.cat([none, *places]), torch.cat([none, *scores])], 1)
        rows = all_rows(trainer, mine)
        found = np.full(len(ids), np.nan)
        found[rows[:, 0].long().numpy()] = rows[:, 1].numpy()
        return np.where(np.isfinite(found), found, np.nan)

    def state_dict(self) -> dict[str, Any]:
        return {
            "taken_at": self.taken_at,
            "ihvp": [[str(unit), block, v.cpu()] for (unit, block), v in self._ihvp.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.taken_at = state["taken_at"]
        self._ihvp = {(parse_unit(unit), block): v for unit, block, v in state["ihvp"]}

    def forget(self) -> None:
        """Begin a new run."""
        self.taken_at, self._ihvp = None, {}

    def begin(self, run: SteeredRun) -> None:
        """What was loaded goes to the model's device."""
        self._ihvp = {key: v.to(run.model.device) for key, v in self._ihvp.items()}

    def _refresh(self, run: SteeredRun, step: int, units: Sequence[Head]) -> None:
        ids = self._curvature_samples(run, step)
        cuts = range(self._group, len(ids), self._group)
        groups = [_tokens(run, group) for group in np.split(ids, cuts)]
        own = {"f": run.mechanism}
        with probe_scope(run.model):
            solved = inverse_probes(run.model, own, units, groups, self._settings)
        warn_of_unscored(solved, at=f" at step {step}")
        # A unit without a score must not take it from the others.
        lost = {*solved.zero["f"], *solved.broken["f"]}
        self._ihvp = {
            key: torch.zeros_like(v) if key[0] in lost and len(lost) < len(units) else v
            for key, v in solved.ihvps["f"].items()
        }
        self.taken_at = step

    def _curvature_samples(self, run: SteeredRun, step: int) -> Ints:
        """The newest that counted, in the order of the stream; where these are too few, more."""
        found: list[Ints] = []
        missing, at = self._n_curvature, step - 1
        while missing > 0 and at >= 0:
            batch = run.schedule.batch(at)
            ids = batch.sample_ids[batch.weights > 0][-missing:]
            found.insert(0, ids)
            missing, at = missing - len(ids), at - 1
        at = step
        while missing > 0 and at < len(run.schedule):
            batch = run.schedule.batch(at)
            found.append(batch.sample_ids[batch.weights > 0][:missing])
            missing, at = missing - len(found[-1]), at + 1
        if not sum(map(len, found)):
            found = [run.schedule.batch(step).sample_ids[: self._n_curvature]]
        return np.concatenate(found)


def _tokens(run: SteeredRun, ids: Ints) -> torch.Tensor:
    tokens = torch.from_numpy(np.asarray(run.rows.get(ids), np.int64))
    return tokens.to(run.model.device)
