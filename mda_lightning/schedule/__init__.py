"""The training stream as a pure function: step -> sample ids, weights, provenance."""

from mda_lightning.base_order import BaseOrder
from mda_lightning.schedule.digest import StreamDigest
from mda_lightning.schedule.stream import BASE, INSERTED, REPLACED, Schedule, ScheduledBatch

__all__ = [
    "BASE",
    "INSERTED",
    "REPLACED",
    "BaseOrder",
    "Schedule",
    "ScheduledBatch",
    "StreamDigest",
]
