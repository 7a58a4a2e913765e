"""The shapes that are measured, with random weights of a fixed seed."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from mda_lightning.pretraining import PythiaModule
from mda_lightning.recipes.studies.quickstart import QUICKSTART


def pythia_14m() -> PreTrainedModel:
    """Pythia-14M: 6 layers, 4 heads, d_model 128, vocabulary 50,304, contexts of 2,048."""
    torch.manual_seed(0)
    return PythiaModule("pythia-14m").model.eval()


def pythia_160m() -> PreTrainedModel:
    """Pythia-160M: 12 layers, 12 heads, d_model 768, vocabulary 50,304, contexts of 2,048."""
    torch.manual_seed(0)
    return PythiaModule("pythia-160m").model.eval()


def small_neox(n_layers: int = 6, n_heads: int = 4, d_model: int = 128) -> GPTNeoXForCausalLM:
    """A GPT-NeoX with a vocabulary of 8,192, whose unembedding does not outweigh its layers."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=8192,
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        intermediate_size=4 * d_model,
        max_position_embeddings=2048,
    )
    return GPTNeoXForCausalLM(config).eval()


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


def random_tokens(n: int, length: int, vocabulary: int) -> Tensor:
    """Random token ids int64 [n, length + 1], without the first two of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, vocabulary, (n, length + 1), generator=generator)
