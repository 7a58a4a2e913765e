"""Saved checkpoints: what an argument names, in which order, and loading one at a time."""

from mda_lightning.checkpoints.arguments import find_checkpoints
from mda_lightning.checkpoints.checkpoint import Checkpoint, step_in
from mda_lightning.checkpoints.folder import ModelFolder
from mda_lightning.checkpoints.hub import HubRevision
from mda_lightning.checkpoints.state_file import StateFile

__all__ = [
    "Checkpoint",
    "HubRevision",
    "ModelFolder",
    "StateFile",
    "find_checkpoints",
    "step_in",
]
