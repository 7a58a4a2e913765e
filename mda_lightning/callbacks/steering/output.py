"""What a steered run leaves behind beside its audit table, and what is to be known of both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from mda_lightning.callbacks.attachment import versions
from mda_lightning.callbacks.steering.decisions import PLAN_NAME, DecisionWriter
from mda_lightning.callbacks.steering.policies import Policy
from mda_lightning.callbacks.steering.targets import Target
from mda_lightning.mechanisms import Mechanism


def n_decided(trainer: pl.Trainer) -> int:
    """Online operations of this run so far: what the data module has beyond its plan's."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return len(data.schedule.plan.operations) - len(data.plan.operations)


def write_all(trainer: pl.Trainer, writer: DecisionWriter) -> Path:
    """The decisions that are held, and the plan as it is now, which is returned."""
    writer.flush()
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    plan = data.schedule.plan.bound(corpus_hash=data.rows.content_hash, order=data.schedule.order)
    path: Path = plan.save(writer.folder / PLAN_NAME)
    return path


def provenance_of(
    trainer: pl.Trainer,
    mechanism: Mechanism,
    policies: Sequence[Policy],
    target: Target | None,
    **facts: Any,
) -> dict[str, Any]:
    """What decided, on which stream, and ``facts``; JSON values."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return {
        "mechanism": mechanism.name,
        "mechanism_settings": mechanism.settings(),
        "sign": "positive: training on the sample promotes the unit",
        "policies": {policy.name: policy.settings() for policy in policies},
        "target": None if target is None else target.settings(),
        "plan_hash": data.plan.content_hash,
        "corpus_hash": data.rows.content_hash,
        "order": data.schedule.order.describe(),
        "steps": len(data.schedule),
        "versions": versions(),
        **facts,
    }
