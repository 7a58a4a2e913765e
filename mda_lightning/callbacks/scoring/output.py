"""A run's scores of one mechanism as a table, with all that is needed to read it later."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from mda_lightning.callbacks.attachment import versions
from mda_lightning.callbacks.critical_window import CriticalWindow
from mda_lightning.mechanisms import Mechanism
from mda_lightning.store import ScoreRows, ScoreTable, ScoreWriter
from mda_lightning.units import Head

SCORES_FOLDER = "scores"


def scores_folder(folder: Path, mechanism: Mechanism) -> Path:
    """Where in a run's folder a mechanism's table is."""
    return folder / SCORES_FOLDER / mechanism.name


def provenance_of(
    trainer: pl.Trainer, mechanism: Mechanism, window: CriticalWindow | None, **facts: Any
) -> dict[str, Any]:
    """Whatever the estimator, and its own ``facts``.

    The mechanism and its settings, the window and its head, the stream's hashes where the data
    module has them, versions, and what the sign means. ``facts`` say under ``sharing`` which
    weights heads have in common, if any.
    """
    data: Any = getattr(trainer, "datamodule", None)
    found = None if window is None else window.window
    return {
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


def write_replay(
    trainer: pl.Trainer,
    folder: Path,
    rows: ScoreRows,
    units: Sequence[Head],
    mechanism: Mechanism,
    provenance: Mapping[str, Any],
) -> ScoreTable | None:
    """Write the rows of every rank as one table, which rank 0 gets back."""
    writer = ScoreWriter(
        folder,
        units=[str(unit) for unit in units],
        blocks=list(mechanism.block_names),
        estimator="replay",
        rank=trainer.global_rank,
        world_size=trainer.world_size,
    )
    writer.discard_from(-1)  # of an earlier, unfinished replay
    writer.add(rows)
    writer.flush()
    trainer.strategy.barrier("InfluenceScoring.replay")
    return writer.finish(provenance) if trainer.is_global_zero else None


def warn_of_nothing(mechanism: Mechanism, why: str, more: str) -> None:
    """Say that a run ended without a score, and where to look."""
    warnings.warn(
        f"InfluenceScoring scored no sample for {mechanism.name}: {why}; {more}", stacklevel=3
    )
