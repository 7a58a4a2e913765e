"""Attention probabilities at chosen entries, without changing how the model trains.

Training keeps its own attention (SDPA, flash). Inside :func:`capture_attention` the model uses a
registered function that computes the same attention explicitly and keeps only the asked entries;
on leaving, the former implementation is back, bit for bit. :func:`attention_at` reads a probe set
at the least cost: short sequences are not padded to the longest, and the forward ends as soon
as the last layer's pattern is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from mda_lightning.probes import ProbeSet

_NAME = "mda_capture"
_BUCKETS = 3


class _AllPatternsRead(Exception):
    """Ends a forward whose remainder nobody needs."""


@dataclass
class AttentionCapture:
    """Collected attention probabilities.

    Attributes:
        sequence, query, key: int64 [E], the entries to keep (0-based positions).
        last_layer: the forward ends once this layer's pattern is read; None runs it to its end.
        layers: layer index -> probabilities float32 [E, heads], part of the autograd graph when
            gradients are enabled.
    """

    sequence: Tensor
    query: Tensor
    key: Tensor
    last_layer: int | None = None
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
    sliding_window: int | None = None,
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
    scores = torch.matmul(query * scale, key.transpose(2, 3))
    unseen = _unseen(scores.shape[-1], sliding_window, scores.device)
    lowest = torch.finfo(scores.dtype).min
    # In place where no gradient needs the scores: half of a short probe's time is memory.
    needed = scores.requires_grad
    scores = scores.masked_fill(unseen, lowest) if needed else scores.masked_fill_(unseen, lowest)
    pattern = torch.softmax(scores, dim=-1, dtype=torch.float32)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    capture.layers[layer] = pattern[capture.sequence, :, capture.query, capture.key]
    if layer == capture.last_layer:
        raise _AllPatternsRead
    out = torch.matmul(pattern.to(query.dtype), value).transpose(1, 2).contiguous()
    return out, pattern


@lru_cache(maxsize=64)
def _unseen(length: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Keys that a query does not see, bool [length, length]: later ones, and too early ones."""
    with torch.inference_mode(False):  # kept, and a backward may need it
        unseen = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        if sliding_window is not None:
            unseen |= torch.ones_like(unseen).tril(-sliding_window)
    return unseen


AttentionInterface.register(_NAME, _capturing_attention)


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Within the block ``model`` computes attention by the registered function ``name``.

    Raises:
        ValueError: the model's attention implementation cannot be switched.
    """
    former = model.config._attn_implementation
    if former == name:
        yield
        return
    try:
        model.set_attn_implementation(name)
        now = model.config._attn_implementation
        if now != name:
            raise ValueError(
                f"the attention implementation of {type(model).__name__} cannot be switched to "
                f"{name!r} (it stays {now!r}), so its heads cannot be looked at; load the model "
                "with attn_implementation='sdpa' or 'eager'"
            )
        yield
    finally:
        model.set_attn_implementation(former)


@contextmanager
def capture_attention(
    model: PreTrainedModel,
    sequence: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    last_layer: int | None = None,
) -> Iterator[AttentionCapture]:
    """Within the block, forwards of ``model`` keep the attention at the given entries.

    With ``last_layer`` the block ends, without an error, once that layer's pattern is read.

    Args:
        model: a Hugging Face model whose attention implementation can be switched.
        sequence: int64 [E], row of the batch.
        query: int64 [E], position that attends.
        key: int64 [E], position attended to.
        last_layer: the layer after which nothing is needed; None for a whole forward.

    Raises:
        ValueError: the model's attention implementation cannot be switched.
    """
    device = model.device
    capture = AttentionCapture(sequence.to(device), query.to(device), key.to(device), last_layer)
    with attention_implementation(model, _NAME):
        token = _active.set(capture)
        try:
            with suppress(_AllPatternsRead):
                yield capture
        finally:
            _active.reset(token)


def attention_at(model: PreTrainedModel, probes: ProbeSet) -> Tensor:
    """Attention probabilities at a probe set's entries, float32 [E, L, heads].

    Differentiable where gradients are enabled, and then read in one forward, so that hooks on the
    model see one. The model runs in the mode it is in, without its unembedding.
    """
    last_layer = int(model.config.num_hidden_layers) - 1
    buckets = probes.by_length(1 if torch.is_grad_enabled() else _BUCKETS)
    found = []
    with attention_implementation(model, _NAME):  # once for all
        for part in buckets:
            with capture_attention(
                model, part.sequence, part.query, part.key, last_layer=last_layer
            ) as capture:
                model.base_model(input_ids=part.tokens.to(model.device), use_cache=False)
            found.append(capture.stacked())
    order = torch.cat([part.entries for part in buckets]).argsort()
    return torch.cat(found)[order.to(model.device)]
