"""Scores of a run's samples as they are trained on, for the mechanisms that are active."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import check_token_ids, describe
from mda_lightning.callbacks.attachment import UnsupportedTrainerError, is_rehearsal
from mda_lightning.callbacks.loggers import log_file, log_scalars
from mda_lightning.callbacks.probe_scope import probe_scope
from mda_lightning.callbacks.scoring.batch_fields import (
    BatchFields,
    HeldBatch,
    filled_on_the_left,
)
from mda_lightning.callbacks.scoring.curvature_data import (
    CurvatureSet,
    RecentSequences,
    fixed_sequences,
)
from mda_lightning.callbacks.scoring.in_run import BatchScores, InRunScorer
from mda_lightning.callbacks.scoring.needs import nothing_came, to_summed_loss
from mda_lightning.callbacks.scoring.not_finite import NotFinite
from mda_lightning.callbacks.scoring.output import provenance_of, scores_folder, warn_of_nothing
from mda_lightning.callbacks.scoring.scored import Scored, ScoredSamples
from mda_lightning.callbacks.scoring.when import When
from mda_lightning.influence import weights_hash
from mda_lightning.influence.inverse_probes import CurvatureSettings
from mda_lightning.store import ScoreRows, ScoreWriter
from mda_lightning.units import Head


@dataclass(frozen=True)
class TrainingScoresSettings:
    """See :class:`~mda_lightning.callbacks.InfluenceScoring`."""

    when: When
    fields: BatchFields
    loss_reduction: Literal["mean", "sum"]
    refresh_every: int
    n_curvature: int
    curvature_set: CurvatureSet | None
    batch_size: int
    curvature: CurvatureSettings


class TrainingScores:
    """In-run scoring of one fit at a time; its state outlives a fit.

    Args:
        settings: how.

    Attributes:
        refreshes: step, mechanisms, number of sequences, weights' hash and seconds of each refresh.
    """

    def __init__(self, settings: TrainingScoresSettings) -> None:
        self._settings = settings
        self._recent = RecentSequences(settings.n_curvature)
        self.refreshes: list[dict[str, Any]] = []
        self._curvature: dict[str, Any] = {}
        self._scored: list[Scored] = []
        self._scorer: InRunScorer | None = None
        self._fixed: list[Tensor] | None = None
        self._batch: HeldBatch | None = None  # the one that is being listened to
        self._listening_for: tuple[str, ...] = ()
        # Of this fit. The first batch and the first backward are checked before a window opens.
        self._checked_batch = self._checking_backward = False
        self._scales: Counter[str] = Counter()  # steps by what became of the loss's scale
        self._subscribers: list[Callable[[ScoredSamples], None]] = []
        # Once somebody acts on the scores, a resumed run must go on with the very same IHVPs.
        self._is_exact = False
        self._former: Mapping[str, Any] | None = None

    def subscribe(self, follow: Callable[[ScoredSamples], None]) -> Callable[[], None]:
        """Call ``follow`` with every micro-batch that is scored; returns what ends it."""
        self._is_exact = True
        self._subscribers.append(follow)
        return lambda: self._subscribers.remove(follow)

    # -- state --------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "recent": self._recent.state(),
            "refreshes": [dict(one) for one in self.refreshes],
            "curvature": dict(self._curvature),
        }
        if self._is_exact:
            ihvps = self._former if self._scorer is None else self._scorer.state()
            state["exact"] = {"recent": self._recent.exact_state(), "ihvps": ihvps}
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        self._recent.restore(state["recent"])
        self.refreshes = [dict(one) for one in state["refreshes"]]
        self._curvature = dict(state["curvature"])
        if "exact" in state:
            self._recent.restore_exactly(state["exact"]["recent"])
            self._former, self._is_exact = state["exact"]["ihvps"], True

    def forget(self) -> None:
        """A new run; a checkpoint's state, if there is one, is loaded after this."""
        self._recent = RecentSequences(self._settings.n_curvature)
        self.refreshes, self._curvature = [], {}
        self._former, self._scorer = None, None

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a fixed set of sequences that the model cannot read.

        Raises:
            ValueError: ids that it does not have, or no sequences.
            FileNotFoundError: a folder without any.
        """
        for tokens in self._fixed_sequences() or []:
            if filled_on_the_left(tokens):
                raise ValueError("curvature_set has an id below 0 before real ones")
            try:
                check_token_ids(model, tokens.clamp_min(0))
            except ValueError as error:
                raise ValueError(f"curvature_set: {error}") from error

    # -- a fit --------------------------------------------------------------------------------

    def begin(
        self,
        trainer: pl.Trainer,
        model: PreTrainedModel,
        scored: Sequence[Scored],
        units: Sequence[Head],
        folder: Path,
    ) -> None:
        """Put the hooks on; rows that a resumed run will score again are dropped.

        Raises:
            ValueError: the folder holds other scores.
        """
        self._model, self._units, self._folder = model, list(units), folder
        self._scored = list(scored)
        self._checked_batch = self._checking_backward = False
        self._scales.clear()
        for one in self._scored:
            if not is_rehearsal(trainer) and scores_folder(folder, one.mechanism).exists():
                self._writer(trainer, one).discard_from(trainer.global_step)
            one.not_finite = NotFinite()
        self._fixed = self._fixed_sequences()
        self._scorer = InRunScorer(model, {one.name: one.mechanism for one in scored}, units)
        if self._former is not None:
            self._scorer.restore(self._former)
            self._former = None

    def before_batch(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
        """Refresh where it is due, and listen if a mechanism is active."""
        assert self._scorer is not None
        fields, when, step = self._settings.fields, self._settings.when, trainer.global_step
        active = [one for one in self._scored if when.is_on(step, one.phase)]
        if not active and all(when.is_over(step, one.phase) for one in self._scored):
            self._scorer.remove()
            return
        if self._fixed is None:
            self._recent.add(fields.read_tokens(batch), fields.read_weights(batch))
        if not self._checked_batch:
            fields.check(batch)
            self._checked_batch = True
            if not active:
                self._checking_backward = True
                self._scorer.listen()
        if not active:
            return
        due = self._is_due(step, [one.name for one in active])
        if trainer.strategy.reduce_boolean_decision(due, all=False):
            self._refresh(trainer, module, active)
        held = fields.read(batch)
        self._listening_for = self._scorer.start(
            [one.name for one in active], held.tokens, held.weights
        )
        self._batch = held if self._listening_for else None

    def after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Rows are complete here, before any callback may save a checkpoint of this step."""
        step, scorer = trainer.global_step, self._scorer
        batch, self._batch = self._batch, None
        if scorer is not None and self._checking_backward:
            self._checking_backward = False
            if not scorer.heard():
                raise UnsupportedTrainerError(nothing_came(step, self._model))
        if batch is None or scorer is None:
            return
        factor = to_summed_loss(trainer, batch.tokens, reduction=self._settings.loss_reduction)
        found = scorer.collect(batch.tokens, batch.weights, factor=factor)
        if found is None:
            raise UnsupportedTrainerError(nothing_came(step, self._model))
        self._check_scale(found, step)
        for one in self._scored:
            if one.name not in self._listening_for:
                continue
            values = found.values[one.name]
            scored = [u for u in self._units if u not in scorer.unscored[one.name]]
            one.not_finite.look(one.name, step, batch, values, self._units, scored)
            at = (step, scorer.taken_at[one.name])
            for follow in list(self._subscribers):
                follow(ScoredSamples(one.name, *at, batch.ids, values))
            if is_rehearsal(trainer):
                continue
            steps = [np.full(len(batch.ids), number, np.int64) for number in at]
            self._writer(trainer, one).add(
                ScoreRows(batch.ids.numpy(), steps[0], values.numpy(), found.loss.numpy(), steps[1])
            )

    def flush(self) -> None:
        """What is in memory goes to disk, as a checkpoint that is saved now has seen it."""
        for one in self._scored:
            if one.writer is not None:
                one.writer.flush()

    def finish(self, trainer: pl.Trainer) -> None:
        """At the end of a fit: every mechanism's table, or why there is none."""
        self.flush()
        counts = [
            int(trainer.strategy.reduce(_as_tensor(one, trainer), reduce_op="sum"))
            for one in self._scored
        ]
        trainer.strategy.barrier("InfluenceScoring")
        for one, count in zip(self._scored, counts, strict=True):
            if trainer.is_global_zero:
                self._finish(trainer, one, count)

    def remove(self) -> None:
        """Take every hook off; may be called more than once."""
        self._batch, self._fixed = None, None
        if self._scorer is not None:
            self._scorer.remove()

    # -- parts --------------------------------------------------------------------------------

    def _fixed_sequences(self) -> list[Tensor] | None:
        own = self._settings
        if own.curvature_set is None:
            return None
        return fixed_sequences(own.curvature_set, count=own.n_curvature, batch_size=own.batch_size)

    def _writer(self, trainer: pl.Trainer, one: Scored) -> ScoreWriter:
        if one.writer is None:
            one.writer = ScoreWriter(
                scores_folder(self._folder, one.mechanism),
                units=[str(unit) for unit in self._units],
                blocks=list(one.mechanism.block_names),
                estimator="in_run",
                rank=trainer.global_rank,
                world_size=trainer.world_size,
            )
        return one.writer

    def _is_due(self, step: int, names: Sequence[str]) -> bool:
        assert self._scorer is not None
        if not all(name in self._scorer.taken_at for name in names):
            return True
        oldest = min(self._scorer.taken_at[name] for name in names)
        if self._fixed is not None:
            return step - oldest >= self._settings.refresh_every
        last = next(one for one in self.refreshes if one["step"] == oldest)
        return self._recent.is_due(step, last=last, every=self._settings.refresh_every)

    def _refresh(
        self, trainer: pl.Trainer, module: pl.LightningModule, active: Sequence[Scored]
    ) -> None:
        assert self._scorer is not None
        began, step = time.perf_counter(), trainer.global_step
        batches = self._recent.batches() if self._fixed is None else self._fixed
        if trainer.world_size > 1 and self._fixed is None:
            batches = trainer.strategy.broadcast(batches)  # one curvature for all ranks
        if not batches:
            return  # nothing but masked samples so far
        batches = [tokens.to(self._model.device) for tokens in batches]
        names = [one.name for one in active]
        with probe_scope(self._model):
            self._curvature = self._scorer.refresh(
                names, batches, self._settings.curvature, step=step
            )
        seconds = time.perf_counter() - began
        self.refreshes.append(
            {
                "step": step,
                "mechanisms": names,
                "n_sequences": sum(map(len, batches)),
                "n_held": self._recent.n_held,
                "weights_hash": weights_hash(self._model),
                "seconds": round(seconds, 3),
            }
        )
        scalars = {"influence/refresh_seconds": seconds}
        for one in active:
            scalars[f"{one.name}/scored"] = float(one.writer.n_held if one.writer else 0)
        log_scalars(trainer, module, scalars, step=step, monitorable=True)

    def _check_scale(self, found: BatchScores, step: int) -> None:
        scale = found.scale
        self._scales[scale.kind] += 1
        if self._scales[scale.kind] > 1 or scale.kind == "expected":
            return
        reduction = self._settings.loss_reduction
        if scale.kind == "unread":
            told = (
                f"at step {step} the gradient of the logits does not tell how the training loss is "
                f"scaled (it is not a plain cross-entropy of all positions alike, or never forms "
                f"logits). Scores go by loss_reduction={reduction!r} and the samples' weights "
                "alone; they are too large or too small if the loss has others"
            )
        else:
            told = (
                f"at step {step} the training loss weighs a position {scale.ratio:.3g} times as "
                f"much as loss_reduction={reduction!r} and the samples' weights say (labels that "
                "are ignored do that; it may vary from step to step). Scores are divided by the "
                "scale that is read from the gradient, and are of the sum over the positions "
                "that count"
            )
        warnings.warn(f"{told}. This is said once a fit", stacklevel=2)

    def _finish(self, trainer: pl.Trainer, one: Scored, n_not_finite: int) -> None:
        when = self._settings.when
        window = None if one.window is None else one.window.window
        if when.by_window and window is None:
            # Warnings that came to nothing; a run that is carried on needs their rows.
            why = "no window opened", "window.json says how far the heads came"
            warn_of_nothing(one.mechanism, *why)
            return
        if one.writer is None or not one.writer.n_held:
            why = f"active={when.active}", f"the run ended at step {trainer.global_step}"
            warn_of_nothing(one.mechanism, *why)
            return
        steps = None
        if when.by_window and window is not None:
            steps = (window[1].start, window[1].end)
        table = one.writer.finish(
            provenance_of(
                trainer,
                one.mechanism,
                one.window,
                **self._curvature,
                refreshes=[r for r in self.refreshes if one.name in r["mechanisms"]],
                refresh_every=self._settings.refresh_every,
                curvature_data=self._curvature_data(),
                active=when.active,
                # Of this fit; the table's own count has masked samples and earlier fits in it.
                n_not_finite=n_not_finite,
                # Of this fit and rank 0.
                loss_scale_steps=dict(self._scales),
                sharing=describe(self._model).sharing,
            ),
            steps=steps,
        )
        log_file(trainer, table.folder, name=f"{one.name}-scores", kind="influence-scores")

    def _curvature_data(self) -> str:
        given = self._settings.curvature_set
        if given is None:
            return "the latest training sequences before each refresh"
        hash_of = getattr(given, "content_hash", None)
        return f"a fixed set: {hash_of or (given if not isinstance(given, Tensor) else 'tokens')}"


def _as_tensor(one: Scored, trainer: pl.Trainer) -> Tensor:
    return torch.tensor(float(one.not_finite.n_samples), device=trainer.strategy.root_device)
