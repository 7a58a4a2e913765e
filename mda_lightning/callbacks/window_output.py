"""Where a window is written down: ``window.json`` and W&B's summary."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from mda_lightning.callbacks.loggers import log_summary
from mda_lightning.files import write_json
from mda_lightning.window import WINDOW_NAME


class WindowOutput:
    """Writes the report of a window; a file that cannot be written is told once."""

    def __init__(self) -> None:
        self._has_told = False

    def begin(self) -> None:
        """A fit begins."""
        self._has_told = False

    def write(self, trainer: pl.Trainer, folder: Path | None, report: dict[str, Any]) -> None:
        """Write ``window.json``."""
        if not trainer.is_global_zero or folder is None:
            return
        try:
            write_json(folder / WINDOW_NAME, report)
        except OSError as error:
            if not self._has_told:
                self._has_told = True
                warnings.warn(
                    f"CriticalWindow: {WINDOW_NAME} could not be written to {folder} ({error}); "
                    "training goes on, and it is tried again at the next turn and at the end",
                    stacklevel=4,
                )

    def summarise(self, trainer: pl.Trainer, report: dict[str, Any]) -> None:
        """Put the window into W&B's summary of the run."""
        metric, window = report["mechanism"], report["window"] or {}
        log_summary(
            trainer,
            {
                f"{metric}/window_status": report["status"],
                f"{metric}/window_target": report["target"],
                f"{metric}/window_start": window.get("start"),
                f"{metric}/window_end": window.get("end"),
            },
        )
