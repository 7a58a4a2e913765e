"""Next-token loss of each position, without ever holding a batch's full logits.

The unembedding and the softmax run over chunks of positions; what is kept is each position's loss
and, where asked for, the gradient with respect to the final hidden states, from which the backward
through the model starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Logits held at once, in numbers (32 MiB in float32).
_CHUNK_NUMBERS = 2**23


class HiddenLoss(NamedTuple):
    """Loss per position [B, T] and ∂(sum of it)/∂hidden [B, T, d_model]."""

    loss: Tensor
    gradient: Tensor


def loss_at_hidden(
    unembedding: nn.Module,
    hidden: Tensor,
    labels: Tensor | None,
    *,
    uniform: Tensor | None = None,
) -> HiddenLoss:
    """Cross-entropy of each position and its gradient with respect to the final hidden states.

    Args:
        unembedding: maps [n, d_model] to logits [n, V]; its parameters get no gradient.
        hidden: [B, T, d_model]; the logits at position t predict ``labels[:, t]``.
        labels: int64 [B, T], or None to sample them from the model itself (the sampled Fisher).
        uniform: float32 [B, T] in [0, 1), needed when labels are sampled: position (b, t) takes the
            token at which the model's cumulative distribution passes ``uniform[b, t]``.
    """
    batch, length, width = hidden.shape
    flat = hidden.detach().reshape(-1, width)
    loss = torch.empty(len(flat), dtype=torch.float32, device=flat.device)
    gradient = torch.empty_like(flat)
    for part in _chunks(unembedding, len(flat)):
        with torch.enable_grad():
            chunk = flat[part].requires_grad_(True)
            logits = _logits(unembedding, chunk)
            if labels is None:
                assert uniform is not None
                target = _inverse_cdf(logits.detach(), uniform.reshape(-1)[part])
            else:
                target = labels.reshape(-1)[part]
            each = F.cross_entropy(logits, target, reduction="none")
            gradient[part] = torch.autograd.grad(each.sum(), chunk)[0]
        loss[part] = each.detach().to(loss.dtype)
    return HiddenLoss(loss.view(batch, length), gradient.view(batch, length, width))


@torch.no_grad()
def loss_of_hidden(unembedding: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each position, float32 [B, T], and nothing for a backward.

    Args:
        unembedding: maps [n, d_model] to logits [n, V].
        hidden: [B, T, d_model]; the logits at position t predict ``labels[:, t]``.
        labels: int64 [B, T].
    """
    flat, target = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    loss = torch.empty(len(flat), dtype=torch.float32, device=flat.device)
    for part in _chunks(unembedding, len(flat)):
        logits = _logits(unembedding, flat[part])
        loss[part] = F.cross_entropy(logits, target[part], reduction="none").to(loss.dtype)
    return loss.view(labels.shape)


def _chunks(unembedding: nn.Module, n: int) -> Iterator[slice]:
    vocabulary = getattr(unembedding, "out_features", None) or 2**16
    step = max(1, _CHUNK_NUMBERS // int(vocabulary))
    for start in range(0, n, step):
        yield slice(start, start + step)


def _logits(unembedding: nn.Module, hidden: Tensor) -> Tensor:
    logits: Tensor = unembedding(hidden)
    return logits if logits.dtype == torch.float64 else logits.float()


def _inverse_cdf(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token per row of logits [n, V], where the cumulative distribution passes ``uniform``."""
    cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1)
    # The last value is 1 up to rounding: scaling by it keeps the draw inside the vocabulary.
    threshold = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return index.clamp_max(logits.shape[-1] - 1)
