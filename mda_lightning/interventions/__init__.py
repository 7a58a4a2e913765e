"""What is to be changed in a training stream: plans, and their matched random controls.

A :class:`Plan` says which samples, in which steps, and how; a
:class:`mda_lightning.schedule.Schedule` turns a base order and a plan into batches.
"""

from mda_lightning.interventions.operations import (
    Insert,
    Mask,
    Operation,
    Prune,
    Replace,
    operation_from,
)
from mda_lightning.interventions.plan import Plan
from mda_lightning.interventions.sources import Source

__all__ = [
    "Insert",
    "Mask",
    "Operation",
    "Plan",
    "Prune",
    "Replace",
    "Source",
    "operation_from",
]
