"""Lightning callbacks: watch heads form, find their windows, score the data that made them."""

from mda_lightning.callbacks.critical_window import CriticalWindow
from mda_lightning.callbacks.influence_scoring import InfluenceScoring
from mda_lightning.callbacks.online_steering import OnlineSteering
from mda_lightning.callbacks.scheduled_checkpoints import ScheduledCheckpoints
from mda_lightning.callbacks.unit_monitor import UnitMonitor

__all__ = [
    "CriticalWindow",
    "InfluenceScoring",
    "OnlineSteering",
    "ScheduledCheckpoints",
    "UnitMonitor",
]
