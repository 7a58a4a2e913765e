"""The shapes that are measured, with random weights of a fixed seed."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from mda_lightning.pretraining import PythiaModule
from mda_lightning.recipes.quickstart import QUICKSTART


def pythia_14m() -> PreTrainedModel:
    """Pythia-14M: 6 layers, 4 heads, d_model 128, vocabulary 50,304, contexts of 2,048."""
    torch.manual_seed(0)
    return PythiaModule("pythia-14m").model.eval()


def quickstart_model() -> PreTrainedModel:
    """The quickstart's model."""
    torch.manual_seed(0)
    return quickstart_module().model.eval()


def quickstart_module() -> PythiaModule:
    """The quickstart's LightningModule."""
    return PythiaModule(
        QUICKSTART.model.dimensions,
        vocab_size=QUICKSTART.corpus.vocab_size,
        seq_len=QUICKSTART.corpus.sequence_length,
    )
