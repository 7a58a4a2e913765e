"""The two kinds of training run in a counterfactual study: the base run, and an arm of it.

Both are ordinary uses of the package's own callbacks and data module; nothing here that a user's
script could not do.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, Logger

from mda_lightning.callbacks import CriticalWindow, InfluenceScoring, UnitMonitor
from mda_lightning.corpora import TokenRows
from mda_lightning.datamodules import TokenDataModule
from mda_lightning.files import read_json, write_json
from mda_lightning.interventions import Plan
from mda_lightning.measures import measure
from mda_lightning.mechanisms import Mechanism, mechanism
from mda_lightning.pretraining import PythiaModule
from mda_lightning.recipes.studies.settings import StudySettings

_PROGRESS_SECONDS = 0.5


def run_base(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train until the critical window has closed, and score the samples that fell into it.

    Returns:
        ``window.json`` as the callback wrote it, and the step at which training stopped.
    """
    settings, seed = StudySettings.from_dict(spec["settings"]), int(spec["seed"])
    rows = TokenRows.open(spec["corpus"])
    monitored = build_monitor(
        settings, rows, folder, quiet_every_n_steps=settings.monitor.quiet_every_n_steps
    )
    scoring = settings.scoring
    trainer = _trainer(
        folder,
        spec,
        max_steps=settings.training.max_steps,
        callbacks=[
            monitored,
            CriticalWindow(
                settings.mechanism,
                folder=str(folder),
                stop_when_closed=True,
                margin_steps=settings.training.margin_steps,
            ),
            InfluenceScoring(
                _mechanism(settings, rows),
                estimator=scoring.estimator,
                folder=str(folder),
                n_curvature=scoring.n_curvature,
                replay_at=scoring.replay_at,
                units="target" if scoring.estimator == "replay" else "all",
                curvature=scoring.curvature,
                fisher=scoring.fisher,
                damping=scoring.damping,
                seed=scoring.seed,
            ),
        ],
    )
    data = build_data(settings, rows, seed, folder=folder)
    trainer.fit(build_module(settings, rows, seed), datamodule=data)
    return {"window": read_json(folder / "window.json"), "stopped_at": trainer.global_step}


def run_arm(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train from a checkpoint of the base run to the window's end, under a plan.

    Returns:
        The last step.
    """
    settings, seed = StudySettings.from_dict(spec["settings"]), int(spec["seed"])
    rows = TokenRows.open(spec["corpus"])
    plan = Plan.load(spec["plan"]) if spec["plan"] else None
    data = build_data(settings, rows, seed, plan=plan, folder=folder)
    trainer = _trainer(
        folder,
        spec,
        max_steps=int(spec["end"]),
        callbacks=[build_monitor(settings, rows, folder)],
    )
    trainer.fit(build_module(settings, rows, seed), datamodule=data, ckpt_path=spec["checkpoint"])
    return {"stopped_at": trainer.global_step}


class ProgressFile(pl.Callback):
    """Write ``progress.json`` for the process that waits for this one, a few times a second."""

    def __init__(self, folder: Path, title: str, metric: str) -> None:
        self._path = folder / "progress.json"
        self._title, self._metric = title, metric
        self._due = 0.0
        self._parent = os.getppid()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + _PROGRESS_SECONDS
        if os.getppid() != self._parent:
            raise SystemExit("the process that waits for this one is gone")
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


def _mechanism(settings: StudySettings, rows: TokenRows) -> Mechanism:
    return mechanism(
        settings.mechanism,
        token_ids=rows.token_ids.tolist(),
        n_sequences=settings.monitor.n_sequences,
        probe_function=settings.scoring.probe_function,
    )


def build_monitor(
    settings: StudySettings,
    rows: TokenRows,
    folder: Path,
    *,
    quiet_every_n_steps: int | None = None,
) -> UnitMonitor:
    """Every head's μ, and companions on fewer sequences. Arms keep one rate, to be comparable."""
    monitor = settings.monitor
    ids = rows.token_ids.tolist()
    every, half = monitor.companions_every_n_steps, max(2, monitor.n_sequences // 2)
    watched = {
        "previous_token": {"n_sequences": half, "token_ids": ids},
        "ablation": {"n_sequences": half, "token_ids": tuple(ids)},
        "icl": {"text": rows, "n_rows": min(32, len(rows))},
    }
    return UnitMonitor(
        [_mechanism(settings, rows)],
        measures=[
            measure(name, every_n_steps=every, **values)
            for name, values in watched.items()
            if name != settings.mechanism
        ],
        every_n_steps=monitor.every_n_steps,
        quiet_every_n_steps=quiet_every_n_steps,
        folder=str(folder),
    )


def build_module(settings: StudySettings, rows: TokenRows, seed: int) -> PythiaModule:
    """The study's model, with its initial weights."""
    training = settings.training
    return PythiaModule(
        settings.model.dimensions,
        vocab_size=rows.vocab_size,
        seq_len=rows.row_length - 1,
        init_seed=seed,
        learning_rate=training.learning_rate,
        schedule=training.schedule,
        warmup_steps=training.warmup_steps,
        total_steps=training.max_steps,
    )


def build_data(
    settings: StudySettings,
    rows: TokenRows,
    seed: int,
    *,
    plan: Plan | None = None,
    folder: Path | None = None,
) -> TokenDataModule:
    """The study's stream, changed by a plan or as it is, and its ledger if a folder is named."""
    return TokenDataModule(
        rows,
        batch_size=settings.training.batch_size,
        n_steps=settings.training.max_steps,
        seed=seed,
        plan=plan,
        branch=plan is not None,
        folder=None if folder is None else str(folder),
        ledger=folder is not None,
    )


def _trainer(
    folder: Path, spec: dict[str, Any], *, max_steps: int, callbacks: list[pl.Callback]
) -> pl.Trainer:
    progress = ProgressFile(folder, "training", spec["settings"]["mechanism"])
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        logger=_loggers(folder, spec),
        callbacks=[*callbacks, progress],
        log_every_n_steps=50,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def _loggers(folder: Path, spec: dict[str, Any]) -> list[Logger]:
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
