"""Which samples made this head: scores of a run's own training data."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from transformers import PreTrainedModel

from mda_lightning.architectures import describe, find_language_model
from mda_lightning.callbacks.attachment import (
    build_mechanism,
    check_strategy,
    is_rehearsal,
    state_key,
    warn_of_other_folder,
)
from mda_lightning.callbacks.loggers import log_file
from mda_lightning.callbacks.probe_scope import probe_scope
from mda_lightning.callbacks.scoring.batch_fields import BatchFields
from mda_lightning.callbacks.scoring.curvature_data import CurvatureSet
from mda_lightning.callbacks.scoring.needs import (
    Estimator,
    check_alone,
    check_arguments,
    check_names,
    check_not_wrapped,
    check_setup,
    monitor_before,
    window_before,
)
from mda_lightning.callbacks.scoring.output import (
    provenance_of,
    scores_folder,
    warn_of_nothing,
    write_replay,
)
from mda_lightning.callbacks.scoring.replay_bar import replay_bar
from mda_lightning.callbacks.scoring.scored import Scored, ScoredSamples
from mda_lightning.callbacks.scoring.training_scores import (
    TrainingScores,
    TrainingScoresSettings,
)
from mda_lightning.callbacks.scoring.when import Active, When
from mda_lightning.callbacks.window_replay import WindowData, replay_window
from mda_lightning.curvature import Fisher
from mda_lightning.influence.inverse_probes import CurvatureSettings
from mda_lightning.mechanisms import Mechanism
from mda_lightning.pretraining.run_folder import run_folder
from mda_lightning.units import Head, parse_unit
from mda_lightning.window import Edge

# Of n_curvature="auto".
_TOLERANCE, _MOST_CURVATURE = 0.98, 1024


class InfluenceScoring(pl.Callback):
    """Score the samples of a run for mechanisms' heads; positive promotes the head.

    ``in_run``: every training step scores its own samples from its own forward and backward, at the
    weights they were trained on. Needs a sample id and the tokens in the batch. ``replay``: once
    the window has closed (or the fit has ended inside it), all samples of the window are scored at
    the checkpoints that :class:`CriticalWindow` kept. Needs a
    :class:`~mda_lightning.datamodules.TokenDataModule`. The two never share a table.

    A sample's row carries the step of its update (0-based, the ``global_step`` before it) and the
    step of the refresh that it was scored by.

    ==============================  ==============================================================
    logged                          meaning
    ==============================  ==============================================================
    ``<mechanism>/scored``          samples scored so far on this rank, at every refresh (in_run)
    ``influence/refresh_seconds``   what the refresh took (in_run)
    artifact (W&B)                  a mechanism's score table, at the end
    ==============================  ==============================================================

    In the run's folder: ``scores/<mechanism>/``, a :class:`~mda_lightning.store.ScoreTable` each,
    which grows whenever a checkpoint is saved and is complete at the end.

    Args:
        mechanism: a name, a Mechanism with its settings, or several, which share the hooks and the
            training's backward. A name takes the monitor's, if it measures that one. Each follows
            its own window.
        estimator: see above.
        active: when in-run scoring is on: inside the window that CriticalWindow announces, from its
            first warning on; always; or in steps [first, last).
        units: heads such as ``["L1H2"]``, "all", or "target": the window's own targets (replay).
        refresh_every: steps between refreshes of curvature and probe gradient (in_run).
        n_curvature: sequences that the curvature is estimated on. "auto" (replay) takes as many, up
            to 1,024, as it takes until scores correlate to 0.98 with those of half as many.
        curvature_set: what these are drawn from, evenly spread (in_run): a corpus folder, its
            TokenRows, or token ids [N, T+1], the same on all ranks; None takes the latest that were
            trained on.
        curvature: "ekfac", "kfac", or "identity" for the plain dot product with ∇f.
        fisher, damping, seed: of the curvature.
        replay_at: the kept checkpoints whose scores are averaged, of "start", "mid", "end".
        replay_batch_size: sequences at once in replay, and of a ``curvature_set``; None takes as
            many as half of the free memory holds, and 32 of the set.
        sample_id_key, tokens_key, weight_key: names in the batch; tokens_key None takes ``tokens``
            or ``input_ids``.
        loss_reduction: how the training loss is made of token losses: their mean over the batch
            ("mean"), or their sum ("sum"). Where the gradient tells otherwise (labels are ignored,
            say), that is what counts, and a warning says so.
        model: dotted name of the language model inside the LightningModule; None finds the one.
        token_ids: as for UnitMonitor.
        folder: where to write; None is the monitor's folder, or ``mda/`` in the logger's.

    Raises:
        ValueError, UnsupportedTrainerError: at once, at ``setup`` or before the first step, for
            what cannot work; at the first scored step, where no gradient comes by.
        MissingFieldError: at the first batch, where it lacks the sample id or the tokens.
    """

    def __init__(
        self,
        mechanism: str | Mechanism | Sequence[str | Mechanism] = "induction",
        *,
        estimator: Estimator = "in_run",
        active: Active = "window",
        units: Sequence[str] | Literal["all", "target"] = "all",
        refresh_every: int = 200,
        n_curvature: int | Literal["auto"] = 128,
        curvature_set: CurvatureSet | None = None,
        curvature: Literal["ekfac", "kfac", "identity"] = "ekfac",
        fisher: Fisher = "sampled",
        damping: float = 0.1,
        seed: int = 0,
        replay_at: Sequence[Edge] = ("start", "mid", "end"),
        replay_batch_size: int | None = None,
        sample_id_key: str = "sample_id",
        tokens_key: str | None = None,
        weight_key: str = "weight",
        loss_reduction: Literal["mean", "sum"] = "mean",
        model: str | None = None,
        token_ids: Sequence[int] | None = None,
        folder: str | None = None,
    ) -> None:
        super().__init__()
        # As many as it takes, in replay.
        tolerance = _TOLERANCE if n_curvature == "auto" else None
        self._curvature = CurvatureSettings(curvature, fisher, damping, seed, tolerance=tolerance)
        check_arguments(
            estimator=estimator,
            units=units,
            active=active,
            replay_at=replay_at,
            has_curvature_set=curvature_set is not None,
            counts={
                "refresh_every": refresh_every,
                "n_curvature": n_curvature,
                "replay_batch_size": replay_batch_size,
            },
            loss_reduction=loss_reduction,
            curvature=self._curvature,
        )
        self.estimator = estimator
        self.folder: Path | None = None
        self._former_folder: str | None = None  # of the run that is resumed
        self._given: list[str | Mechanism] = (
            list(mechanism)
            if isinstance(mechanism, Sequence) and not isinstance(mechanism, str)
            else [mechanism]
        )
        self._scored = [Scored(build_mechanism(one, token_ids)) for one in self._given]
        check_names([one.mechanism for one in self._scored])
        self._token_ids = token_ids
        self._unit_names: tuple[str, ...] | None = (
            None if isinstance(units, str) else tuple(str(parse_unit(unit)) for unit in units)
        )
        self._n_curvature = _MOST_CURVATURE if n_curvature == "auto" else n_curvature
        self._replay_at = tuple(replay_at)
        self._only_target = units == "target"
        self._replay_batch_size = replay_batch_size
        self._when = When(active)
        self._training = TrainingScores(
            TrainingScoresSettings(
                when=self._when,
                fields=BatchFields(sample_id_key, tokens_key, weight_key),
                loss_reduction=loss_reduction,
                refresh_every=refresh_every,
                n_curvature=self._n_curvature,
                curvature_set=curvature_set,
                batch_size=replay_batch_size or 32,
                curvature=self._curvature,
            )
        )
        self._model_name = model
        self._wanted_folder = folder
        self._model: PreTrainedModel | None = None
        self._units: list[Head] = []
        self._replayed: set[str] = set()
        described = [one.mechanism.settings() | {"name": one.name} for one in self._scored]
        arguments = {"mechanism": described, "estimator": estimator, "active": self._when.active}
        self._state_key = state_key("InfluenceScoring", arguments | {"units": self._unit_names})

    @property
    def mechanism_names(self) -> tuple[str, ...]:
        """Of the mechanisms that are scored."""
        return tuple(one.name for one in self._scored)

    @property
    def units(self) -> tuple[Head, ...]:
        """Heads that are scored, in the order of the scores' axis; known from ``setup`` on."""
        return tuple(self._units)

    def subscribe(self, follow: Callable[[ScoredSamples], None]) -> Callable[[], None]:
        """Call ``follow`` with every micro-batch of this rank that is scored (in_run).

        From then on checkpoints hold the IHVPs too, so that a resumed run scores bit for bit as the
        uninterrupted one does. Returns what ends the subscription.
        """
        return self._training.subscribe(follow)

    # -- Lightning ----------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        """Rows are on disk; this is what it takes to go on with them."""
        return {
            "schema_version": 2,
            **self._training.state(),
            "replayed": sorted(self._replayed),
            "folder": str(self.folder or self._former_folder),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._training.restore(state_dict)
        self._former_folder = state_dict["folder"]
        warn_of_other_folder("InfluenceScoring", self._former_folder, self.folder)
        self._replayed = set(state_dict["replayed"])

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
        for given, one in zip(self._given, self._scored, strict=True):
            one.window = window_before(trainer, self, one.name)
            one.writer = None
            if isinstance(given, str) and monitor is not None and self._token_ids is None:
                one.mechanism = monitor.mechanism(given) or one.mechanism
        if self._wanted_folder is None and monitor is not None and monitor.folder is not None:
            self.folder = monitor.folder
        else:
            self.folder = run_folder(trainer, self._wanted_folder)
        check_alone(trainer, self, self.mechanism_names)
        for one in self._scored:
            check_setup(
                trainer,
                pl_module,
                mechanism=one.mechanism,
                estimator=self.estimator,
                by_window=self._when.by_window,
                window=one.window,
            )
            one.mechanism.check(self._model)
        if self.estimator == "in_run":
            self._training.check(self._model)
        if trainer.global_step == 0:
            # A checkpoint's state, if there is one, is loaded after this.
            self._training.forget()
            self._replayed = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.estimator == "in_run":
            assert self._model is not None and self.folder is not None
            check_not_wrapped(pl_module)
            self._training.begin(trainer, self._model, self._scored, self._units, self.folder)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.estimator == "in_run":
            self._training.before_batch(trainer, pl_module, batch)
            return
        for one in self._scored:
            if one.name not in self._replayed and one.phase == "closed":
                self._replay(trainer, pl_module, one)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rows are complete here, before any callback may save a checkpoint of this step."""
        if self.estimator == "in_run":
            self._training.after_backward(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._training.flush()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._training.remove()
        if is_rehearsal(trainer):
            return
        if self.estimator == "in_run":
            self._training.finish(trainer)
            return
        for one in self._scored:
            if one.name not in self._replayed:
                self._replay(trainer, pl_module, one)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._training.remove()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._training.remove()
        self._model = None
        for one in self._scored:
            one.window = one.writer = None

    # -- replay -------------------------------------------------------------------------------

    def _replay(self, trainer: pl.Trainer, pl_module: pl.LightningModule, one: Scored) -> None:
        assert self._model is not None and self.folder is not None and one.window is not None
        found, kept = one.window.window, one.window.checkpoints
        usable = [edge for edge in self._replay_at if edge in kept]
        if found is None or found[1].end_reason == "lapsed" or not usable:
            why = "the run has no window with checkpoints", "window.json says why"
            warn_of_nothing(one.mechanism, *why)
            self._replayed.add(one.name)
            return
        window, units = found[1], self._units
        if self._only_target:
            units = [unit for unit, _ in one.window.target_windows]
        end = trainer.global_step if window.end is None else window.end
        source: Any = trainer.datamodule  # type: ignore[attr-defined]
        folder = scores_folder(self.folder, one.mechanism)
        work = folder.with_name(f".{folder.name}.replay")
        with probe_scope(self._model), replay_bar(trainer, one.name) as progress:
            rows, facts = replay_window(
                self._model,
                pl_module,
                {edge: kept[edge] for edge in usable},
                WindowData.read(source.rows, source.schedule, start=window.start, end=end),
                mechanism=one.mechanism,
                units=units,
                n_curvature=self._n_curvature,
                batch_size=self._replay_batch_size,
                settings=self._curvature,
                work=work,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                progress=progress,
            )
        sharing = describe(self._model).sharing
        provenance = provenance_of(trainer, one.mechanism, one.window, **facts, sharing=sharing)
        table = write_replay(trainer, folder, rows, units, one.mechanism, provenance)
        if table is not None:
            shutil.rmtree(work, ignore_errors=True)
            log_file(trainer, table.folder, name=f"{one.name}-scores", kind="influence-scores")
        self._replayed.add(one.name)  # only now: interrupted before, a resumed run scores again
