"""Watch every head of a language model while it trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import ModelLayout, describe, find_language_model
from mda_lightning.callbacks.attachment import (
    build_mechanism,
    check_strategy,
    is_rehearsal,
    state_key,
    versions,
)
from mda_lightning.callbacks.heatmap import heads_over_steps, write_png
from mda_lightning.callbacks.loggers import (
    LiveTable,
    define_summaries,
    log_image,
    log_scalars,
    run_folder,
)
from mda_lightning.callbacks.metric_table import COLUMNS, MetricTable
from mda_lightning.callbacks.probe_scope import probe_scope
from mda_lightning.files import atomic_path
from mda_lightning.mechanisms import Mechanism

TABLE_NAME = "unit_metrics.parquet"


@dataclass(frozen=True)
class Measurement:
    """One metric of all heads after ``step`` updates; ``value`` and ``se`` are [L, H]."""

    step: int
    metric: str
    value: NDArray[np.float32]
    se: NDArray[np.float32]


class UnitMonitor(pl.Callback):
    """Measure every head before the first step and after every ``every_n_steps`` optimizer steps.

    The monitor needs nothing of the batches: it runs its own probe sequences. It leaves no trace in
    training (:func:`mda_lightning.callbacks.probe_scope.probe_scope`).

    ==============================  ==============================================================
    logged, per mechanism           meaning
    ==============================  ==============================================================
    ``<mechanism>/max``             highest head's score
    ``<mechanism>/mean``            mean over all heads
    ``<mechanism>/L<l>H<h>``        the ``top_k`` heads that have been highest so far
    ``<mechanism>/heads`` (image)   heads by steps, every ``write_every_n_steps`` and at the end
    ``unit_metrics`` (W&B table)    all heads: step, layer, head, metric, value, se
    ==============================  ==============================================================

    In the run's folder: ``unit_metrics.parquet`` (the same columns) and ``<mechanism>.png``.

    Args:
        mechanisms: names, or :class:`~mda_lightning.mechanisms.Mechanism` objects.
        every_n_steps: optimizer steps between measurements.
        model: dotted name of the language model inside the LightningModule; None finds the one.
        token_ids: token ids that probe sequences are drawn from; None takes those of the model's
            tokenizer as far as its configuration tells.
        top_k: heads logged as scalars; all heads are in the table.
        folder: where to write; None is ``mda/`` in the first logger's folder.
        write_every_n_steps: steps between rewritings of the files; they are also written at the
            end and on an exception.

    Raises:
        ValueError: an unknown mechanism, or two of one name.
        UnsupportedModelError, UnsupportedTrainerError: at ``setup``.
    """

    def __init__(
        self,
        mechanisms: Sequence[str | Mechanism] = ("induction", "previous_token"),
        *,
        every_n_steps: int = 10,
        model: str | None = None,
        token_ids: Sequence[int] | None = None,
        top_k: int = 4,
        folder: str | None = None,
        write_every_n_steps: int = 500,
    ) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: measure at least every step, 1")
        self.every_n_steps = every_n_steps
        self.mechanisms = [build_mechanism(wanted, token_ids) for wanted in mechanisms]
        names = [m.name for m in self.mechanisms]
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"mechanisms {names}: give at least one, each of another name")
        self.table = MetricTable()
        self.folder: Path | None = None
        self.layout: ModelLayout | None = None
        self._model_name = model
        # Kept: Lightning asks for the key at every hook of every step.
        self._state_key = state_key("UnitMonitor", {"mechanisms": self._settings(), "model": model})
        self._model: PreTrainedModel | None = None
        self._top_k = top_k
        self._wanted_folder = folder
        self._write_every = write_every_n_steps
        self._subscribers: list[Callable[[Measurement], None]] = []
        self._seen_step = -1
        self._highest: dict[str, NDArray[np.float32]] = {}
        self._live_table = LiveTable("unit_metrics", COLUMNS)
        self._sent: dict[str, int] = {}
        self._reported: set[str] = set()

    # -- for other code -----------------------------------------------------------------------

    def latest(self, metric: str) -> Measurement | None:
        """The last measurement of a mechanism by name, or None before the first."""
        found = self.table.latest(metric)
        return None if found is None else Measurement(found[0], metric, found[1], found[2])

    def subscribe(self, follow: Callable[[Measurement], None]) -> Callable[[], None]:
        """Call ``follow`` with every measurement; returns what ends the subscription."""
        self._subscribers.append(follow)
        return lambda: self._subscribers.remove(follow)

    def mechanism(self, name: str) -> Mechanism | None:
        """The mechanism of that name, if this monitor measures it."""
        return next((m for m in self.mechanisms if m.name == name), None)

    # -- Lightning ----------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        return {"schema_version": 1, "table": self.table.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.table.load_state_dict(state_dict["table"])
        self._take_up_table()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_strategy(trainer, "UnitMonitor")
        self._model = find_language_model(pl_module, self._model_name)
        self.layout = describe(self._model)
        self.folder = run_folder(trainer, self._wanted_folder)
        if trainer.global_step == 0:
            # A checkpoint's table, if there is one, is loaded after this.
            self.table = MetricTable()
            self._take_up_table()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        define_summaries(trainer, {f"{m.name}/max": "max" for m in self.mechanisms})
        self._seen_step = trainer.global_step
        last = max((self.table.last_step(m) or 0 for m in self.table.metrics), default=-1)
        if last < trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self._measure(trainer, pl_module, trainer.global_step, in_batch=False)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step == self._seen_step:
            return  # a micro-batch of an accumulated step
        self._seen_step = step
        if step % self.every_n_steps == 0:
            self._measure(trainer, pl_module, step, in_batch=True)
        if step % self._write_every == 0:
            self._write(trainer, step, images=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, trainer.global_step, images=True)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._write(trainer, trainer.global_step, images=False)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._model = None

    # -- what it does -------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {m.name: m.settings() for m in self.mechanisms}

    def _take_up_table(self) -> None:
        self._sent = {m: len(self.table.curves(m)[0]) for m in self.table.metrics}
        self._highest = {m: self.table.curves(m)[1].max(0) for m in self.table.metrics}

    def _measure(
        self, trainer: pl.Trainer, module: pl.LightningModule, step: int, *, in_batch: bool
    ) -> None:
        assert self._model is not None
        measured: list[Measurement] = []
        with probe_scope(self._model):
            for mechanism in self.mechanisms:
                scores = mechanism.scores(self._model)
                grids = (_grid(scores.mean), _grid(scores.se))
                if trainer.world_size > 1:
                    # Decisions follow from these numbers, so every rank has rank 0's.
                    grids = trainer.strategy.broadcast(grids)
                measured.append(Measurement(step, mechanism.name, *grids))
        scalars: dict[str, float] = {}
        for one in measured:
            self._report_missing(one)
            self.table.append(step, one.metric, one.value, one.se)
            scalars |= self._scalars(one)
        log_scalars(trainer, module, scalars, step=step, monitorable=in_batch)
        for one in measured:
            for follow in list(self._subscribers):
                follow(one)

    def _scalars(self, one: Measurement) -> dict[str, float]:
        if not np.isfinite(one.value).any():
            return {}
        known = self._highest.get(one.metric, one.value)
        highest = self._highest[one.metric] = np.fmax(known, one.value)
        _, heads = one.value.shape
        top = np.argsort(-np.nan_to_num(highest, nan=-np.inf).reshape(-1), kind="stable")
        chosen = sorted(int(i) for i in top[: self._top_k])
        return {
            f"{one.metric}/max": float(np.nanmax(one.value)),
            f"{one.metric}/mean": float(np.nanmean(one.value)),
            **{
                f"{one.metric}/L{i // heads}H{i % heads}": float(one.value.reshape(-1)[i])
                for i in chosen
            },
        }

    def _report_missing(self, one: Measurement) -> None:
        broken = np.flatnonzero(~np.isfinite(one.value).all(axis=1))
        if len(broken) and one.metric not in self._reported:
            self._reported.add(one.metric)
            warnings.warn(
                f"{one.metric} is not finite at step {one.step} in layer {int(broken[0])}"
                f"{' and later ones' if len(broken) > 1 else ''}: the model's activations are not; "
                "training goes on, and the table keeps NaN there",
                stacklevel=2,
            )

    def _write(self, trainer: pl.Trainer, step: int, *, images: bool) -> None:
        if is_rehearsal(trainer) or not trainer.is_global_zero or self.folder is None:
            return
        if not self.table.metrics:
            return
        provenance = {
            "mechanisms": self._settings(),
            "every_n_steps": self.every_n_steps,
            "model_type": self.layout.model_type if self.layout else None,
            "versions": versions(),
        }
        self.table.write(self.folder / TABLE_NAME, provenance=provenance)
        for metric in self.table.metrics if images else ():
            steps, values = self.table.curves(metric)
            image = heads_over_steps(steps, values, metric=metric)
            with atomic_path(self.folder / f"{metric}.png") as part:
                write_png(image, part)
            log_image(trainer, f"{metric}/heads", image, step=step)
            new = self.table.rows(metric, self._sent.get(metric, 0))
            self._live_table.send(trainer, new, step=step)
            self._sent[metric] = len(steps)


def _grid(values: Tensor) -> NDArray[np.float32]:
    return values.detach().float().cpu().numpy()
