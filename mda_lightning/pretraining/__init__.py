"""Pythia's pretraining: model sizes, initialisation, optimizer, schedule, loss."""

from mda_lightning.pretraining.module import PythiaModule
from mda_lightning.pretraining.sizes import PYTHIA_SIZES, PythiaSize

__all__ = ["PYTHIA_SIZES", "PythiaModule", "PythiaSize"]
