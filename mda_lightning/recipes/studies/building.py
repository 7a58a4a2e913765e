"""What every run of a study is built of: model, data, monitor, Trainer.

All are ordinary uses of the package's own callbacks and data module; nothing here that a user's
script could not do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from mda_lightning.base_order import BaseOrder
from mda_lightning.callbacks import (
    UnitMonitor,
)
from mda_lightning.checkpoints import find_checkpoints
from mda_lightning.corpora import TokenRows
from mda_lightning.datamodules import TokenDataModule
from mda_lightning.files import write_json
from mda_lightning.interventions import Plan
from mda_lightning.measures import measure
from mda_lightning.mechanisms import Mechanism, mechanism
from mda_lightning.pretraining import PythiaModule
from mda_lightning.recipes.studies.jobs import stop_if_alone
from mda_lightning.recipes.studies.settings import StudySettings
from mda_lightning.recipes.studies.study_corpus import filled_in

_PROGRESS_SECONDS = 0.5
_RESUME = "resume"


class ProgressFile(pl.Callback):
    """Write ``progress.json`` for the process that waits for this one, a few times a second."""

    def __init__(self, folder: Path, title: str, metric: str) -> None:
        self._path = folder / "progress.json"
        self._title, self._metric = title, metric
        self._due = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + _PROGRESS_SECONDS
        stop_if_alone()
        best = trainer.callback_metrics.get(f"{self._metric}/max")
        remark = "" if best is None or math.isnan(float(best)) else f"highest {float(best):.2f}"
        write_json(
            self._path,
            {
                "phase": self._title,
                "done": trainer.global_step,
                "total": trainer.max_steps,
                "remark": remark,
            },
        )


def corpora_of(spec: Mapping[str, Any]) -> tuple[TokenRows, TokenRows | None]:
    """The training rows and the held-out ones of a job."""
    held_out = spec.get("held_out")
    return TokenRows.open(spec["corpus"]), TokenRows.open(held_out) if held_out else None


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that a killed run left, or None."""
    found = sorted((folder / _RESUME).glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    return str(found[-1]) if found else None


def build_monitor(
    settings: StudySettings,
    rows: TokenRows,
    folder: Path,
    *,
    held_out: TokenRows | None = None,
    quiet_every_n_steps: int | None = None,
) -> UnitMonitor:
    """Every head's μ, and companions on fewer sequences. Arms keep one rate, to be comparable."""
    monitor = settings.monitor
    ids = rows.token_ids.tolist()
    every, half = monitor.companions_every_n_steps, max(2, monitor.n_sequences // 2)
    text: Any = rows if held_out is None else held_out
    n_rows = min(monitor.text_rows, len(text))
    icl: dict[str, Any] = {"text": text, "n_rows": n_rows}
    if (named := settings.corpus.icl_text) is not None:
        icl = {
            "text": filled_in(named, "corpus.icl_text"),
            "tokenizer": str(rows.folder / "tokenizer.json"),
            "n_rows": monitor.text_rows,
        }
    watched: dict[str, dict[str, Any]] = {
        "previous_token": {"n_sequences": half, "token_ids": ids},
        "induction": {"n_sequences": half, "token_ids": ids},
        "ablation": {"n_sequences": half, "token_ids": tuple(ids)},
        "icl": icl,
    }
    if held_out is not None:
        watched["held_out_loss"] = {"text": held_out, "n_rows": n_rows}
    return UnitMonitor(
        [study_mechanism(settings, rows)],
        measures=[
            measure(name, every_n_steps=every, **values)
            for name, values in watched.items()
            if name != settings.mechanism
        ],
        every_n_steps=monitor.every_n_steps,
        quiet_every_n_steps=quiet_every_n_steps,
        folder=str(folder),
    )


def study_mechanism(
    settings: StudySettings, rows: TokenRows, *, probe_function: str | None = None
) -> Mechanism:
    """The mechanism with the study's probe sets."""
    return mechanism(
        settings.mechanism,
        token_ids=rows.token_ids.tolist(),
        n_sequences=settings.monitor.n_sequences,
        probe_function=probe_function or settings.scoring.probe_function,
    )


def build_module(settings: StudySettings, rows: TokenRows, seed: int) -> PythiaModule:
    """The study's model, with its initial weights.

    Raises:
        ValueError: weights of a later step than 0, which have no optimizer state.
    """
    training, model = settings.training, settings.model
    module = PythiaModule(
        model.dimensions,
        vocab_size=rows.vocab_size if model.size is None else None,
        seq_len=rows.row_length - 1,
        init_seed=seed,
        learning_rate=training.learning_rate,
        schedule=training.schedule,
        warmup_steps=training.warmup_steps,
        total_steps=training.schedule_steps or training.max_steps,
    )
    if model.weights is not None:
        load_weights(module, model.weights, fresh_optimizer=model.fresh_optimizer)
    return module


def load_weights(module: PythiaModule, name: str, *, fresh_optimizer: bool) -> None:
    """Begin from a checkpoint's weights instead of the initialisation.

    Raises:
        ValueError: not one checkpoint, one of another shape, or of a later step than 0 while
            ``fresh_optimizer`` is false.
    """
    found = find_checkpoints([name])
    if len(found) != 1:
        raise ValueError(f"model.weights {name} are {len(found)} checkpoints; name one")
    step = found[0].step
    if step not in (0, None) and not fresh_optimizer:
        raise ValueError(
            f"model.weights {found[0].label} are of step {step} and have no optimizer state: the "
            "run would go on with AdamW's moments at 0, unlike the run that they come from; begin "
            "at step 0, or allow it with model.fresh_optimizer: true"
        )
    loaded = found[0].load(torch.float32)
    try:
        module.model.load_state_dict(loaded.state_dict())
    except RuntimeError as error:
        raise ValueError(f"{found[0].label} does not fit the model: {error}") from error


def build_data(
    settings: StudySettings,
    rows: TokenRows,
    seed: int,
    *,
    plan: Plan | None = None,
    folder: Path | None = None,
    branch: bool = False,
) -> TokenDataModule:
    """The study's stream, changed by a plan or as it is, and its ledger if a folder is named."""
    order = study_order(settings, rows, seed)
    return TokenDataModule(
        rows,
        batch_size=order.batch_size,
        n_steps=order.n_steps,
        seed=seed,
        shuffle=order.shuffle,
        plan=plan,
        branch=branch or plan is not None,
        folder=None if folder is None else str(folder),
        ledger=folder is not None,
    )


def study_order(settings: StudySettings, rows: TokenRows, seed: int) -> BaseOrder:
    """The order of a seed's base run."""
    training = settings.training
    return BaseOrder(
        len(rows), training.batch_size, training.max_steps, seed, settings.corpus.shuffle
    )


def build_trainer(
    settings: StudySettings,
    folder: Path,
    spec: Mapping[str, Any],
    *,
    max_steps: int,
    callbacks: Sequence[pl.Callback],
    logged: bool = True,
) -> pl.Trainer:
    """The Trainer of a base run or an arm; ``logged`` ones also keep checkpoints to resume from."""
    training = settings.training
    every = training.checkpoint_every_n_steps if logged else 0
    micro_batches = training.batch_size // (training.micro_batch or training.batch_size)
    own: list[pl.Callback] = [*callbacks, ProgressFile(folder, "training", settings.mechanism)]
    if every:
        # Of these the latest alone is kept.
        own.append(ModelCheckpoint(folder / _RESUME, every_n_train_steps=every, save_top_k=1))
    return pl.Trainer(
        accelerator=training.accelerator,
        devices=1,
        precision=training.precision,  # type: ignore[arg-type]  # Lightning checks the text
        accumulate_grad_batches=micro_batches,
        max_steps=max_steps,
        logger=_loggers(folder, spec) if logged else False,
        callbacks=own,
        log_every_n_steps=50,
        enable_checkpointing=bool(every),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def _loggers(folder: Path, spec: Mapping[str, Any]) -> list[Logger]:
    loggers: list[Logger] = [CSVLogger(str(folder), name="", version="csv")]
    if spec["wandb"] != "off":
        from lightning.pytorch.loggers import WandbLogger

        loggers.append(
            WandbLogger(
                name=spec["name"],
                project=spec["wandb_project"],
                group=spec["group"],
                save_dir=str(folder),
                offline=spec["wandb"] == "offline",
            )
        )
    return loggers
