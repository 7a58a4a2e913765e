"""One small dispatcher over Lightning's loggers, which have no common API for images and tables.

Scalars go to every logger with the step they belong to, and into ``trainer.callback_metrics``, so
that ``ModelCheckpoint`` and ``EarlyStopping`` can monitor them. Steps count completed optimizer
steps: a value with step k was measured on weights after k updates.

W&B is recognised by what its logger can do and is never imported unless its logger is there. Its
rows carry ``trainer/global_step``; ``step=`` of ``wandb.log`` is never used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from numpy.typing import NDArray

Summary = Literal["min", "max", "mean", "last"]
STEP_KEY = "trainer/global_step"


def log_scalars(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    values: Mapping[str, float],
    *,
    step: int,
    monitorable: bool,
) -> None:
    """Log ``values`` at ``step`` on every logger.

    ``monitorable`` puts them into ``trainer.callback_metrics`` too; Lightning allows that within a
    training batch's hooks only.
    """
    for name, value in values.items() if monitorable else ():
        # logger=False: Lightning's own rows come late and repeat stale values.
        module.log(name, value, logger=False, on_step=True, on_epoch=False, batch_size=1)
    for logger in trainer.loggers if values else ():
        logger.log_metrics(dict(values), step=step)


def define_metrics(
    trainer: pl.Trainer, families: Iterable[str], summaries: Mapping[str, Summary]
) -> None:
    """Tell W&B that keys go by ``trainer/global_step``, and what its run summary shows of some.

    Args:
        families: first parts of keys: ``icl`` and everything under ``icl/``.
        summaries: whole keys, and which statistic of each the summary keeps.
    """
    for run in _wandb_runs(trainer):
        for family in families:
            for key in (family, f"{family}/*"):
                run.define_metric(key, step_metric=STEP_KEY)
        for key, summary in summaries.items():
            run.define_metric(key, step_metric=STEP_KEY, summary=summary)


def log_summary(trainer: pl.Trainer, values: Mapping[str, str | int | float | None]) -> None:
    """Put ``values`` into W&B's summary of the run, one number or word each."""
    for run in _wandb_runs(trainer):
        run.summary.update(dict(values))


def log_image(
    trainer: pl.Trainer, key: str, image: Callable[[], NDArray[np.uint8]], *, step: int
) -> None:
    """Show ``image()`` [height, width, 3] on the loggers that can (W&B, TensorBoard)."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [image()], step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, image(), global_step=step, dataformats="HWC")


def alert(trainer: pl.Trainer, title: str, text: str) -> None:
    """Raise an alert on W&B; other loggers have none."""
    for run in _wandb_runs(trainer):
        run.alert(title=title, text=text)


def log_file(trainer: pl.Trainer, path: Path, *, name: str, kind: str) -> None:
    """Keep a file or a folder with the run as an artifact on W&B; elsewhere it is the record."""
    runs = _wandb_runs(trainer)
    if not runs or not path.exists():
        return
    import wandb

    for run in runs:
        artifact = wandb.Artifact(name, type=kind)
        (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
        run.log_artifact(artifact)


class LiveTable:
    """A long table on W&B that grows while training: only the new rows are sent each time."""

    def __init__(self, key: str, columns: Sequence[str]) -> None:
        self.key = key
        self._columns: list[Any] = list(columns)
        self._tables: dict[str, Any] = {}

    def send(
        self, trainer: pl.Trainer, new: Callable[[], Sequence[Sequence[Any]]], *, step: int
    ) -> None:
        """Append the rows ``new()`` and log them."""
        runs = _wandb_runs(trainer)
        rows = new() if runs else []
        if not rows:
            return
        import wandb

        for run in runs:
            table = self._tables.get(run.id)
            if table is None:
                # A table logged twice in W&B's default mode shows its first state only.
                table = wandb.Table(columns=self._columns, log_mode="INCREMENTAL")
                self._tables[run.id] = table
            at_once = wandb.Table.MAX_ARTIFACT_ROWS  # what goes beyond it W&B cuts off
            for first in range(0, len(rows), at_once):
                for row in rows[first : first + at_once]:
                    table.add_data(*row)
                run.log({self.key: table, STEP_KEY: step})


def _wandb_runs(trainer: pl.Trainer) -> list[Any]:
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]
