"""What OnlineSteering is made of: policies, targets, decisions."""

from mda_lightning.callbacks.steering.amplify import Amplify
from mda_lightning.callbacks.steering.decisions import Decisions
from mda_lightning.callbacks.steering.from_scores import FromScores
from mda_lightning.callbacks.steering.policies import Policy
from mda_lightning.callbacks.steering.suppress import Suppress
from mda_lightning.callbacks.steering.targets import DelayLevel, HoldCurve, ReachLevel, Target

__all__ = [
    "Amplify",
    "Decisions",
    "DelayLevel",
    "FromScores",
    "HoldCurve",
    "Policy",
    "ReachLevel",
    "Suppress",
    "Target",
]
