"""What is to be changed in a training stream: plans, and their matched random controls.

A :class:`Plan` says which samples, in which steps, and how; a
:class:`mda_lightning.schedule.Schedule` turns a base order and a plan into batches.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from mda_lightning.interventions.from_scores import plan_from_scores
    from mda_lightning.interventions.selection import select

__all__ = [
    "Insert",
    "Mask",
    "Operation",
    "Plan",
    "Prune",
    "Replace",
    "Source",
    "operation_from",
    "plan_from_scores",
    "select",
]

_FROM_SCORES = {"plan_from_scores": "from_scores", "select": "selection"}


def __getattr__(name: str) -> Any:
    """What reads score tables is imported when it is asked for: they take pandas."""
    if name not in _FROM_SCORES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FROM_SCORES[name]}"), name)
