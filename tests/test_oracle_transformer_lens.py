"""Metrics on a GPT-NeoX against TransformerLens hooks on the same weights.

Needs TransformerLens 3 (``pip install "transformer-lens<4"``); 4 runs transformers' own modules and
would be no independent check.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import random_neox

from mda_lightning.metrics import ablation_drops, attention_per_sequence
from mda_lightning.metrics.icl import position_losses
from mda_lightning.probes import ablation_sequences, random_sequences, repeated_sequences

pytest.importorskip("transformer_lens")
try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_neox_weights
except ImportError:
    pytest.skip("needs TransformerLens 3", allow_module_level=True)


@pytest.fixture(params=[True, False], ids=["parallel", "sequential"])
def both(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A random GPT-NeoX and its weights in TransformerLens."""
    ours = random_neox(n_layers=3, n_heads=2, hidden_size=32, parallel=request.param)
    config = ours.config
    cfg = HookedTransformerConfig(
        n_layers=3,
        d_model=32,
        n_ctx=64,
        d_head=16,
        n_heads=2,
        d_mlp=64,
        d_vocab=40,
        act_fn="gelu_new",
        eps=config.layer_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=int(16 * config.rope_parameters["partial_rotary_factor"]),
        rotary_adjacent_pairs=False,
        rotary_base=int(config.rope_parameters["rope_theta"]),
        parallel_attn_mlp=request.param,
        normalization_type="LN",
        original_architecture="GPTNeoXForCausalLM",
    )
    theirs = HookedTransformer(cfg)
    with torch.no_grad():
        theirs.load_state_dict(convert_neox_weights(ours, cfg), strict=False)
    theirs.eval()
    tokens = torch.randint(0, 40, (3, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens), atol=1e-4, rtol=1e-4)
    return ours, theirs


def stripe(theirs: Any, tokens: torch.Tensor, entries: Any) -> torch.Tensor:
    _, cache = theirs.run_with_cache(tokens)
    return torch.stack([entries(cache["pattern", layer]) for layer in range(3)], 1)


@torch.no_grad()
def test_induction_score(both: tuple[Any, Any]) -> None:
    """Their idiom for repeats of one length: the diagonal 1 − L of the pattern."""
    ours, theirs = both
    length = 9
    probes = repeated_sequences(range(1, 40), seed=0, n_sequences=6, length=(length, length))
    found = attention_per_sequence(ours, probes)

    def diagonal(pattern: torch.Tensor) -> torch.Tensor:
        # Offset 1 − L runs over queries L−1 .. 2L−1; the definition starts at L+1 (1-based) and
        # leaves out the last query, which has nothing to copy.
        return pattern.diagonal(offset=1 - length, dim1=-2, dim2=-1)[..., 1:-1].mean(-1)

    expected = stripe(theirs, probes.tokens, diagonal)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_previous_token_score(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    probes = random_sequences(range(1, 40), seed=0, n_sequences=6, length=(12, 12))
    found = attention_per_sequence(ours, probes)
    expected = stripe(
        theirs, probes.tokens, lambda p: p.diagonal(offset=-1, dim1=-2, dim2=-1).mean(-1)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_ablation(both: tuple[Any, Any]) -> None:
    """hook_z zeroed, one head at a time."""
    ours, theirs = both
    probes = ablation_sequences(range(1, 40), seed=0, n_sequences=6, length=14)
    found = ablation_drops(ours, probes).logit
    rows = torch.arange(6)
    clean = theirs(probes.tokens)[rows, -1, probes.target]
    for layer in range(3):
        for head in range(2):

            def zero(z: torch.Tensor, hook: Any, head: int = head) -> torch.Tensor:
                z[:, :, head] = 0
                return z

            logits = theirs.run_with_hooks(
                probes.tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero)]
            )
            expected = clean - logits[rows, -1, probes.target]
            torch.testing.assert_close(found[:, layer, head], expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_position_losses(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    tokens = torch.randint(0, 40, (4, 31), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens, return_type="loss", loss_per_token=True)
    torch.testing.assert_close(position_losses(ours, tokens), expected, atol=1e-4, rtol=1e-4)
