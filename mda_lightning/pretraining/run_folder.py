"""Where a run's files lie."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger


def run_folder(trainer: pl.Trainer, folder: str | None = None) -> Path:
    """Where a run writes: ``folder``, or ``mda/`` in the first logger's folder; on all ranks.

    Without a logger it is ``mda/`` under ``trainer.default_root_dir``.
    """
    chosen = Path(folder) if folder is not None else _logger_folder(trainer) / "mda"
    return Path(trainer.strategy.broadcast(str(chosen)))


def _logger_folder(trainer: pl.Trainer) -> Path:
    logger: Logger | None = trainer.loggers[0] if trainer.loggers else None
    if logger is None or logger.save_dir is None:
        return Path(trainer.default_root_dir)
    if (log_dir := getattr(logger, "log_dir", None)) is not None:
        return Path(log_dir)
    version = logger.version
    parts = [logger.name, f"version_{version}" if isinstance(version, int) else version]
    return Path(logger.save_dir, *(str(part) for part in parts if part))
