"""Which samples made this head: scores of a run's own training data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from transformers import PreTrainedModel

from mda_lightning.architectures import describe, find_language_model
from mda_lightning.callbacks.attachment import (
    UnsupportedTrainerError,
    build_mechanism,
    check_strategy,
    is_rehearsal,
    state_key,
    warn_of_other_folder,
)
from mda_lightning.callbacks.batch_fields import BatchFields, HeldBatch
from mda_lightning.callbacks.critical_window import CriticalWindow
from mda_lightning.callbacks.in_run import InRunScorer
from mda_lightning.callbacks.inverse_probe import CurvatureSettings
from mda_lightning.callbacks.loggers import log_scalars, run_folder
from mda_lightning.callbacks.probe_scope import probe_scope
from mda_lightning.callbacks.recent_sequences import RecentSequences
from mda_lightning.callbacks.score_output import warn_of_nothing, write_scores
from mda_lightning.callbacks.score_rows import RowBlock, ScoreRows, inside
from mda_lightning.callbacks.scoring_needs import (
    Estimator,
    check_not_compiled,
    check_replay,
    check_setup,
    monitor_before,
    to_summed_loss,
    window_before,
)
from mda_lightning.callbacks.when import Active, When
from mda_lightning.callbacks.window_replay import WindowData, replay_window
from mda_lightning.curvature import Fisher
from mda_lightning.influence import weights_hash
from mda_lightning.mechanisms import Mechanism
from mda_lightning.units import Head, parse_unit
from mda_lightning.window import Edge, Phase

SCORES_NAME = "scores.parquet"


class InfluenceScoring(pl.Callback):
    """Score the samples of a run for a mechanism's heads; positive promotes the head.

    ``in_run``: every training step scores its own samples from its own forward and backward, at the
    weights they were trained on. Needs a sample id and the tokens in the batch. ``replay``: once
    the window has closed (or the fit has ended inside it), all samples of the window are scored at
    the checkpoints that :class:`CriticalWindow` kept. Needs a
    :class:`~mda_lightning.datamodules.TokenDataModule`. The two never share a table.

    A sample's row carries the step of its update: 0-based, the ``global_step`` before it.

    ==============================  ==============================================================
    logged, per mechanism           meaning
    ==============================  ==============================================================
    ``<mechanism>/scored``          samples scored so far on this rank, at every refresh (in_run)
    artifact (W&B)                  the score table, at the end
    ==============================  ==============================================================

    In the run's folder: ``scores.parquet``, a :class:`~mda_lightning.store.ScoreTable`; until the
    end, in-run rows are in ``scores.parts/``, which stays while the run could be carried on.

    Args:
        mechanism: a name, or a Mechanism with its settings. A name takes the monitor's, if it
            measures that one.
        estimator: see above.
        active: when in-run scoring is on: inside the window that CriticalWindow announces, from its
            first warning on; always; or in steps [first, last).
        units: heads such as ``["L1H2"]``, "all", or "target": the window's own targets (replay).
        refresh_every: steps between refreshes of curvature and probe gradient (in_run).
        n_curvature: sequences that the curvature is estimated on.
        curvature: "ekfac", or "identity" for the plain dot product with ∇f.
        fisher, damping, seed: of the curvature.
        replay_at: the kept checkpoints whose scores are averaged, of "start", "mid", "end".
        replay_batch_size: sequences at once in replay.
        sample_id_key, tokens_key, weight_key: names in the batch; tokens_key None takes ``tokens``
            or ``input_ids``.
        loss_reduction: how the training loss is made of token losses: their mean over the batch
            ("mean"), or their sum ("sum").
        model: dotted name of the language model inside the LightningModule; None finds the one.
        token_ids: as for UnitMonitor.
        folder: where to write; None is the monitor's folder, or ``mda/`` in the logger's.

    Raises:
        ValueError, UnsupportedTrainerError: at ``setup``, for what cannot work.
        MissingFieldError: at the first batch, where it lacks the sample id or the tokens.
    """

    def __init__(
        self,
        mechanism: str | Mechanism = "induction",
        *,
        estimator: Estimator = "in_run",
        active: Active = "window",
        units: Sequence[str] | Literal["all", "target"] = "all",
        refresh_every: int = 200,
        n_curvature: int = 128,
        curvature: Literal["ekfac", "identity"] = "ekfac",
        fisher: Fisher = "sampled",
        damping: float = 0.1,
        seed: int = 0,
        replay_at: Sequence[Edge] = ("start", "mid", "end"),
        replay_batch_size: int = 32,
        sample_id_key: str = "sample_id",
        tokens_key: str | None = None,
        weight_key: str = "weight",
        loss_reduction: Literal["mean", "sum"] = "mean",
        model: str | None = None,
        token_ids: Sequence[int] | None = None,
        folder: str | None = None,
    ) -> None:
        super().__init__()
        if min(refresh_every, n_curvature, replay_batch_size) < 1:
            raise ValueError("refresh_every, n_curvature and replay_batch_size are at least 1")
        self.estimator = estimator
        self.folder: Path | None = None
        self._former_folder: str | None = None  # of the run that is resumed
        self._given = mechanism
        self._mechanism = build_mechanism(mechanism, token_ids)
        self._token_ids = token_ids
        self._when = When(active)
        self._unit_names: tuple[str, ...] | None = (
            None if isinstance(units, str) else tuple(str(parse_unit(unit)) for unit in units)
        )
        self._refresh_every = refresh_every
        self._settings = CurvatureSettings(curvature, fisher, damping, seed)
        self._n_curvature = n_curvature
        check_replay(replay_at, only_target=units == "target", estimator=estimator)
        self._replay_at = tuple(replay_at)
        self._only_target = units == "target"
        self._replay_batch_size = replay_batch_size
        self._fields = BatchFields(sample_id_key, tokens_key, weight_key)
        self._loss_reduction = loss_reduction
        self._model_name = model
        self._wanted_folder = folder
        self._model: PreTrainedModel | None = None
        self._units: list[Head] = []
        self._window: CriticalWindow | None = None
        self._scorer: InRunScorer | None = None
        self._rows: ScoreRows | None = None
        self._recent = RecentSequences(n_curvature)
        self._refreshes: list[dict[str, Any]] = []
        self._curvature: dict[str, Any] = {}
        self._checked_batch = False
        self._batch: HeldBatch | None = None  # the one that is being listened to
        self._done = False
        described = self._mechanism.settings() | {"name": self._mechanism.name}
        arguments = {"mechanism": described, "estimator": estimator, "active": self._when.active}
        self._state_key = state_key("InfluenceScoring", arguments | {"units": self._unit_names})

    # -- Lightning ----------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        """Rows are in shards on disk; this is what it takes to go on with them."""
        return {
            "schema_version": 1,
            "recent": self._recent.state(),
            "refreshes": [dict(one) for one in self._refreshes],
            "curvature": dict(self._curvature),
            "done": self._done,
            "folder": str(self.folder or self._former_folder),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recent.restore(state_dict["recent"])
        self._refreshes = [dict(one) for one in state_dict["refreshes"]]
        self._curvature = dict(state_dict["curvature"])
        self._former_folder = state_dict["folder"]
        warn_of_other_folder("InfluenceScoring", self._former_folder, self.folder)
        self._done = bool(state_dict["done"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_strategy(trainer, "InfluenceScoring")
        self._model = find_language_model(pl_module, self._model_name)
        layout = describe(self._model)
        names = self._unit_names
        self._units = layout.heads if names is None else [parse_unit(n) for n in names]
        for unit in self._units:
            layout.check(unit)
        monitor = monitor_before(trainer, self)
        self._window = window_before(trainer, self, self._mechanism.name)
        if isinstance(self._given, str) and monitor is not None and self._token_ids is None:
            self._mechanism = monitor.mechanism(self._given) or self._mechanism
        if self._wanted_folder is None and monitor is not None and monitor.folder is not None:
            self.folder = monitor.folder
        else:
            self.folder = run_folder(trainer, self._wanted_folder)
        self._rows = ScoreRows(self.folder / "scores.parts", rank=trainer.global_rank)
        check_setup(
            trainer,
            pl_module,
            mechanism=self._mechanism,
            estimator=self.estimator,
            by_window=self._when.by_window,
            window=self._window,
        )
        if trainer.global_step == 0:
            # A checkpoint's state, if there is one, is loaded after this.
            self._recent = RecentSequences(self._n_curvature)
            self._refreshes, self._done = [], False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._model is not None and self._rows is not None
        if self.estimator == "in_run":
            check_not_compiled(pl_module)
            if not is_rehearsal(trainer):
                self._rows.discard_from(trainer.global_step)
        self._scorer = InRunScorer(self._model, self._mechanism, self._units)
        self._checked_batch = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.estimator == "replay":
            if not self._done and self._window is not None and self._window.phase == "closed":
                self._replay(trainer, pl_module)
            return
        assert self._scorer is not None
        step = trainer.global_step
        self._recent.add(self._fields.read_tokens(batch), self._fields.read_weights(batch))
        if not self._checked_batch:
            self._fields.read_ids(batch)  # a missing id is an error now, not when a window opens
            self._checked_batch = True
        if not self._when.is_on(step, self._phase):
            if self._when.is_over(step, self._phase):
                self._scorer.remove()
            return
        last = self._refreshes[-1] if self._refreshes and self._scorer.ready else None
        due = self._recent.is_due(step, last=last, every=self._refresh_every)
        if trainer.strategy.reduce_boolean_decision(due, all=False):
            self._refresh(trainer, pl_module, step)
        if self._scorer.ready:
            self._batch = self._fields.read(batch)
            self._scorer.start()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rows are complete here, before any callback may save a checkpoint of this step."""
        batch, self._batch = self._batch, None
        if batch is None:
            return
        assert self._scorer is not None and self._rows is not None
        factor = to_summed_loss(trainer, batch.tokens, reduction=self._loss_reduction)
        scored = self._scorer.collect(batch.tokens, batch.weights, factor=factor)
        if scored is None:
            raise UnsupportedTrainerError(
                f"step {trainer.global_step} left no gradient at the heads of "
                f"{type(self._model).__name__}: the training step did not run it, or they are "
                "frozen; use estimator='replay', or score another model with model='...'"
            )
        values, loss = scored
        steps = np.full(len(batch.ids), trainer.global_step, np.int64)
        self._rows.add(RowBlock(batch.ids.numpy(), steps, values.numpy(), loss.numpy()))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._rows is not None and not is_rehearsal(trainer):
            self._rows.flush()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._let_go()
        if is_rehearsal(trainer):
            return
        if self.estimator == "replay":
            if not self._done:
                self._replay(trainer, pl_module)
        else:
            self._write_in_run(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._let_go()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go()
        self._model = self._window = None

    # -- in run -------------------------------------------------------------------------------

    def _let_go(self) -> None:
        self._batch = None
        if self._scorer is not None:
            self._scorer.remove()

    @property
    def _phase(self) -> Phase:
        return "before" if self._window is None else self._window.phase

    def _refresh(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        assert self._scorer is not None and self._model is not None and self._rows is not None
        batches = self._recent.batches()
        if not batches:
            return  # nothing but masked samples so far
        if trainer.world_size > 1:
            batches = trainer.strategy.broadcast(batches)  # one curvature for all ranks
        with probe_scope(self._model):
            self._curvature = self._scorer.refresh(batches, self._settings)
        self._refreshes.append(
            {
                "step": step,
                "n_sequences": sum(map(len, batches)),
                "n_held": self._recent.n_held,
                "weights_hash": weights_hash(self._model),
            }
        )
        scored = {f"{self._mechanism.name}/scored": float(self._rows.n_held)}
        log_scalars(trainer, module, scored, step=step, monitorable=True)

    def _write_in_run(self, trainer: pl.Trainer) -> None:
        assert self._rows is not None
        self._rows.flush()
        trainer.strategy.barrier("InfluenceScoring")
        if not trainer.is_global_zero:
            return
        rows = self._rows.all()
        found = None if self._window is None else self._window.window
        n_outside = 0
        if rows is not None and self._when.by_window:
            if found is None:
                rows = None  # warnings that came to nothing
            else:
                rows, n_outside = inside(rows, found[1].start, found[1].end)
        if rows is None or not len(rows.sample_id):
            if self._when.by_window:
                warn_of_nothing("no window opened", "window.json says how far the heads came")
            else:
                warn_of_nothing(
                    f"active={self._when.active}", f"the run ended at {trainer.global_step}"
                )
            return
        facts = {
            **self._curvature,
            "refreshes": self._refreshes,
            "refresh_every": self._refresh_every,
            "active": self._when.active,
            "n_masked_or_not_finite": int(np.isnan(rows.values).any(axis=(1, 2)).sum()),
        }
        self._write(trainer, rows, facts | {"n_outside_window": n_outside})
        if self._when.is_over(trainer.global_step, self._phase):
            self._rows.clear()  # else a run that is carried on needs them

    # -- replay -------------------------------------------------------------------------------

    def _replay(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._model is not None and self._window is not None
        found, kept = self._window.window, self._window.checkpoints
        usable = [edge for edge in self._replay_at if edge in kept]
        if found is None or found[1].end_reason == "lapsed" or not usable:
            warn_of_nothing("the run has no window with checkpoints", "window.json says why")
            self._done = True
            return
        window = found[1]
        if self._only_target:
            self._units = [one for one, _ in self._window.target_windows]
        end = trainer.global_step if window.end is None else window.end
        source: Any = trainer.datamodule  # type: ignore[attr-defined]
        with probe_scope(self._model):
            rows, facts = replay_window(
                self._model,
                pl_module,
                {edge: kept[edge] for edge in usable},
                WindowData.read(source.rows, source.schedule, start=window.start, end=end),
                mechanism=self._mechanism,
                units=self._units,
                n_curvature=self._n_curvature,
                batch_size=self._replay_batch_size,
                settings=self._settings,
            )
        if trainer.is_global_zero:
            self._write(trainer, rows, facts)
        self._done = True  # only now: interrupted before, a resumed run scores again

    def _write(self, trainer: pl.Trainer, rows: RowBlock, facts: dict[str, Any]) -> None:
        assert self.folder is not None and self._model is not None
        write_scores(
            self.folder / SCORES_NAME,
            rows,
            trainer=trainer,
            mechanism=self._mechanism,
            units=self._units,
            estimator=self.estimator,
            window=self._window,
            facts=facts | {"sharing": describe(self._model).sharing},
        )
