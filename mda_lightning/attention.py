"""Attention probabilities at chosen entries, without changing how the model trains.

Training keeps its own attention (SDPA, flash). Inside :func:`capture_attention` the model uses a
registered function that computes the same attention explicitly and keeps only the asked entries;
on leaving, the former implementation is back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

_NAME = "mda_capture"


@dataclass
class AttentionCapture:
    """Collected attention probabilities.

    Attributes:
        sequence, query, key: int64 [E], the entries to keep (0-based positions).
        layers: layer index -> probabilities float32 [E, heads], part of the autograd graph when
            gradients are enabled.
    """

    sequence: Tensor
    query: Tensor
    key: Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)

    def stacked(self) -> Tensor:
        """All layers, float32 [E, L, heads]."""
        return torch.stack([self.layers[i] for i in sorted(self.layers)], dim=1)


_active: ContextVar[AttentionCapture | None] = ContextVar("mda_attention_capture", default=None)


def _capturing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Plain causal attention, softmax in float32 as in the eager implementation.

    The mask is always the causal one: probe sequences are padded on the right only, and no real
    position attends to the right.
    """
    capture = _active.get()
    if capture is None:
        raise RuntimeError(
            f"attention implementation {_NAME!r} is in use outside capture_attention(); "
            "call model.set_attn_implementation('sdpa') to recover"
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    length = scores.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
    pattern = torch.softmax(scores, dim=-1, dtype=torch.float32)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    capture.layers[layer] = pattern[capture.sequence, :, capture.query, capture.key]
    out = torch.matmul(pattern.to(query.dtype), value).transpose(1, 2).contiguous()
    return out, pattern


AttentionInterface.register(_NAME, _capturing_attention)


@contextmanager
def capture_attention(
    model: PreTrainedModel, sequence: Tensor, query: Tensor, key: Tensor
) -> Iterator[AttentionCapture]:
    """Within the block, forwards of ``model`` keep the attention at the given entries.

    Args:
        model: a Hugging Face model whose attention implementation can be switched.
        sequence: int64 [E], row of the batch.
        query: int64 [E], position that attends.
        key: int64 [E], position attended to.

    Raises:
        ValueError: the model's attention implementation cannot be switched.
    """
    former = model.config._attn_implementation
    device = model.device
    capture = AttentionCapture(sequence.to(device), query.to(device), key.to(device))
    model.set_attn_implementation(_NAME)
    if model.config._attn_implementation != _NAME:
        raise ValueError(
            f"the attention implementation of {type(model).__name__} cannot be switched "
            f"(it stays {model.config._attn_implementation!r}), so its patterns cannot be read"
        )
    token = _active.set(capture)
    try:
        yield capture
    finally:
        _active.reset(token)
        model.set_attn_implementation(former)
