"""Pythia's initialisation, drawn from a generator of its own.

NeoX v1.0, ``megatron/model/init_functions.py``, with ``d`` the model's width and ``L`` its depth:

==============  ==============================  =================================
weights         ``small_wang``                  ``scaled_normal`` (NeoX defaults)
==============  ==============================  =================================
embeddings,     small_init: sqrt(2 / (5 d))     0.02
QKV, MLP in
attention and   wang_init: 2 / (L sqrt(d))      0.02 / sqrt(2 L)
MLP out
==============  ==============================  =================================

These are standard deviations of a normal of mean 0. Biases are 0, LayerNorm weights 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mda_lightning.pretraining.sizes import Initialisation


def build_model(
    config: PreTrainedConfig,
    *,
    seed: int,
    initialisation: Initialisation = "small_wang",
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """A causal language model of ``config`` in float32, its weights a function of ``seed`` alone.

    A GPT-NeoX gets Pythia's initialisation; another architecture its library's own, seeded. The
    state of torch's global generators is the same before and after.

    Raises:
        ValueError: transformers has no causal language model for this configuration.
    """

    auto_model: Any = AutoModelForCausalLM  # its factory is not annotated
    is_neox = config.model_type == "gpt_neox"
    with _own_rng(seed), no_init_weights() if is_neox else nullcontext():
        model: PreTrainedModel = auto_model.from_config(
            config, attn_implementation=attn_implementation, dtype=torch.float32
        )
    if is_neox:
        model.tie_weights()
        initialise_pythia_(model, seed=seed, initialisation=initialisation)
    return model


@torch.no_grad()
def initialise_pythia_(
    model: PreTrainedModel, *, seed: int, initialisation: Initialisation = "small_wang"
) -> None:
    """Fill every parameter of a GPT-NeoX in place; buffers (rotary frequencies) are left alone.

    Numbers are drawn on the CPU in float32 in an order fixed here, so the weights are the same on
    every device, in every release of transformers, and for every precision up to rounding. On the
    meta device nothing is drawn.

    Raises:
        RuntimeError: the model has a parameter this recipe does not know.
    """
    config: Any = model.config
    network: Any = model
    inner, outer = initial_stds(
        config.hidden_size, config.num_hidden_layers, initialisation=initialisation
    )
    generator = torch.Generator().manual_seed(seed)
    filled: set[int] = set()

    def normal_(weight: Tensor, std: float) -> None:
        if not weight.is_meta:
            drawn = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
            weight.copy_(drawn.normal_(0.0, std, generator=generator))
        filled.add(id(weight))

    def constant_(parameter: Tensor | None, value: float) -> None:
        if parameter is not None:
            parameter.fill_(value)
            filled.add(id(parameter))

    normal_(network.get_input_embeddings().weight, inner)
    for layer in network.gpt_neox.layers:
        normal_(layer.attention.query_key_value.weight, inner)
        normal_(layer.attention.dense.weight, outer)
        normal_(layer.mlp.dense_h_to_4h.weight, inner)
        normal_(layer.mlp.dense_4h_to_h.weight, outer)
    unembedding = network.get_output_embeddings().weight
    if id(unembedding) not in filled:  # else tied to the embedding
        normal_(unembedding, inner)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            constant_(module.weight, 1.0)
            constant_(module.bias, 0.0)
        elif isinstance(module, nn.Linear):
            constant_(module.bias, 0.0)

    unknown = [name for name, p in model.named_parameters() if id(p) not in filled]
    if unknown:
        raise RuntimeError(
            f"Pythia's initialisation does not say how to fill {unknown[0]!r} "
            f"({len(unknown)} such parameters); this release of transformers changed GPT-NeoX"
        )


def initial_stds(
    hidden_size: int, n_layers: int, *, initialisation: Initialisation
) -> tuple[float, float]:
    """Standard deviations of (embeddings, QKV and MLP input; attention and MLP output)."""
    if initialisation == "scaled_normal":
        return 0.02, 0.02 / math.sqrt(2 * n_layers)
    return math.sqrt(2 / (5 * hidden_size)), 2 / (n_layers * math.sqrt(hidden_size))


@contextmanager
def _own_rng(seed: int) -> Iterator[None]:
    """Global generators seeded inside and as they were outside.

    transformers draws from the global generator of the device a model is built on; only that
    device's state needs to be put aside.
    """
    device = torch.get_default_device()
    devices = [] if device.type in ("cpu", "meta") else [device.index or 0]
    kind = "cuda" if device.type in ("cpu", "meta") else device.type
    with torch.random.fork_rng(devices=devices, device_type=kind):
        torch.manual_seed(seed)
        yield
