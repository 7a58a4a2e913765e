"""A run's scores as one table, with all that is needed to read it later."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from mda_lightning.callbacks.attachment import versions
from mda_lightning.callbacks.critical_window import CriticalWindow
from mda_lightning.callbacks.loggers import log_file
from mda_lightning.callbacks.score_rows import RowBlock
from mda_lightning.callbacks.scoring_needs import Estimator
from mda_lightning.mechanisms import Mechanism
from mda_lightning.store import ScoreTable
from mda_lightning.units import Head


def write_scores(
    path: Path,
    rows: RowBlock,
    *,
    trainer: pl.Trainer,
    mechanism: Mechanism,
    units: Sequence[Head],
    estimator: Estimator,
    window: CriticalWindow | None,
    facts: Mapping[str, Any],
) -> None:
    """Write a :class:`~mda_lightning.store.ScoreTable` and keep it with the loggers.

    Its provenance is ``facts`` of the estimator and: the mechanism and its settings, the window and
    its head, the stream's hashes where the data module has them, versions, and what the sign means.
    ``facts`` say under ``sharing`` which weights heads have in common, if any.
    """
    data: Any = getattr(trainer, "datamodule", None)
    found = None if window is None else window.window
    provenance = {
        "mechanism": mechanism.name,
        "mechanism_settings": mechanism.settings(),
        "sign": "positive: training on the sample promotes the unit",
        "window": None
        if found is None
        else {"unit": str(found[0]), "start": found[1].start, "end": found[1].end},
        "data": data.state_dict() if hasattr(data, "schedule") else None,
        "versions": versions(),
        **facts,
    }
    ScoreTable.write(
        path,
        sample_id=rows.sample_id,
        step=rows.step,
        units=[str(unit) for unit in units],
        blocks=list(mechanism.block_names),
        values=rows.values,
        loss=rows.loss,
        estimator=estimator,
        provenance=provenance,
    )
    log_file(trainer, path, name=f"{mechanism.name}-scores", kind="influence-scores")


def warn_of_nothing(why: str, more: str) -> None:
    """Say that a run ended without a score, and where to look."""
    warnings.warn(f"InfluenceScoring scored no sample: {why}; {more}", stacklevel=3)
