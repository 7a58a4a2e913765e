"""Small models for tests: random ones, and one built by hand that copies."""

from __future__ import annotations

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
)


def random_neox(
    *,
    seed: int = 0,
    vocab_size: int = 40,
    hidden_size: int = 16,
    n_layers: int = 2,
    n_heads: int = 2,
    std: float = 0.25,
    dtype: torch.dtype = torch.float32,
    parallel: bool = True,
) -> GPTNeoXForCausalLM:
    """A GPT-NeoX with normal random weights, biases included."""
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=64,
        hidden_act="gelu_new",
        use_parallel_residual=parallel,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoXForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(1 + 0.1 * noise if "norm.weight" in name else noise)
    return model.to(dtype).eval()


#: Families that are not GPT-NeoX, with the settings that make a small one; grouped queries where
#: the family has them, and head widths that do not add up to the model's.
OTHER_FAMILIES = {
    "gpt2": {"n_positions": 64, "n_inner": 32},
    "llama": {"num_key_value_heads": 2, "attention_bias": True},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "olmo2": {"num_key_value_heads": 2},
}


def random_model(family: str, *, seed: int = 0, n_layers: int = 2) -> PreTrainedModel:
    """A small random model of any supported family: 4 heads, vocabulary 40, width 16."""
    if family == "gpt_neox":
        return random_neox(seed=seed, n_layers=n_layers, n_heads=4)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    if family != "gpt2":
        sizes |= {"intermediate_size": 32, "max_position_embeddings": 64}
    config = CONFIG_MAPPING[family](**sizes, **OTHER_FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.25
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_norm else noise)
    return model.eval()


COPY_VOCABULARY = 24


def copying_neox() -> GPTNeoXForCausalLM:
    """A two-layer GPT-NeoX whose weights are written by hand so that it copies.

    L0H0 attends to the previous token (constant queries and keys, whose rotary phases agree at
    distance 1) and writes that token's identity; L1H0 attends to the position whose *previous*
    token is the present one, and writes the token it finds there, which the unembedding reads.
    Ids 0..23; residual dimensions 0..23 token, 24..47 previous token, 48..71 output.
    """
    v, d, width = COPY_VOCABULARY, 128, 64
    config = GPTNeoXConfig(
        vocab_size=v,
        hidden_size=d,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4,
        max_position_embeddings=64,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoXForCausalLM(config).eval()
    rotary = width // 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm.weight" in name else 0.0)
        model.get_input_embeddings().weight[:, :v] = torch.eye(v)
        first, second = (layer.attention for layer in model.gpt_neox.layers)
        # L0H0. A pair (a, b) of rotary dimensions turns by its angle per position: a query that is
        # turned back by one step agrees with the key one position before.
        angle = 10000.0 ** (-torch.arange(0, rotary, 2) / rotary)
        strength = 10.0
        query = torch.cat([torch.cos(-angle), torch.sin(-angle)]) * strength
        key = torch.cat([torch.ones_like(angle), torch.zeros_like(angle)]) * strength
        first.query_key_value.bias[:rotary] = query
        first.query_key_value.bias[width : width + rotary] = key
        first.query_key_value.weight[2 * width : 2 * width + v, :v] = torch.eye(v)
        first.dense.weight[v : 2 * v, :v] = torch.eye(v)
        # L1H0. Content in the dimensions that rotary leaves alone.
        content = slice(rotary, rotary + v)
        second.query_key_value.weight[content, :v] = 60 * torch.eye(v)
        second.query_key_value.weight[width + rotary : width + rotary + v, v : 2 * v] = torch.eye(v)
        second.query_key_value.weight[2 * width : 2 * width + v, :v] = torch.eye(v)
        second.dense.weight[2 * v : 3 * v, :v] = 60 * torch.eye(v)
        model.get_output_embeddings().weight[:, 2 * v : 3 * v] = 5 * torch.eye(v)
    return model
