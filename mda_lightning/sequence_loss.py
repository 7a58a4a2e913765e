"""Next-token loss of each position, without ever holding a batch's full logits.

The unembedding and the softmax run over chunks of positions; what is kept is each position's loss
and, where asked for, the gradient with respect to the final hidden states, from which the backward
through the model starts.

For logits h Wᵀ with probabilities p, ∂CE/∂h = p W − W[label]. The product p W is the costly part
and does not depend on the label: the data's labels and sampled ones share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Logits held at once, in numbers (32 MiB in float32).
_CHUNK_NUMBERS = 2**23
#: Neighbouring tokens whose probabilities are summed before the cumulative sum.
_BIN = 256


class HiddenLoss(NamedTuple):
    """What the backward through the model starts from.

    Attributes:
        loss: [B, T], of the data's labels (of the sampled ones where there are no others), in nats;
            0 at positions that are not real.
        gradient: ∂(Σ loss)/∂hidden [B, T, d_model] for the data's labels, or None.
        sampled: the same for labels sampled from the model, or None.
    """

    loss: Tensor
    gradient: Tensor | None
    sampled: Tensor | None


def loss_at_hidden(
    unembedding: nn.Module,
    hidden: Tensor,
    labels: Tensor | None,
    *,
    uniform: Tensor | None = None,
    real: Tensor | None = None,
) -> HiddenLoss:
    """Cross-entropy of each position and its gradient with respect to the final hidden states.

    Args:
        unembedding: maps [n, d_model] to logits [n, V]; its parameters get no gradient.
        hidden: [B, T, d_model]; the logits at position t predict ``labels[:, t]``.
        labels: int64 [B, T], the data's; None where only sampled ones are wanted.
        uniform: float32 [B, T] in [0, 1), to sample labels from the model (the sampled Fisher):
            position (b, t) takes the token at which the model's cumulative distribution passes
            ``uniform[b, t]``.
        real: bool [B, T], positions that count; None for all.

    Raises:
        ValueError: neither labels nor uniform.
    """
    if labels is None and uniform is None:
        raise ValueError("give labels, uniform to sample them, or both")
    batch, length, width = hidden.shape
    flat = hidden.detach().reshape(-1, width)
    loss = torch.empty(len(flat), dtype=torch.float32, device=flat.device)
    gradient = None if labels is None else torch.empty_like(flat)
    sampled = None if uniform is None else torch.empty_like(flat)
    chunk_of = (
        _LinearChunk(unembedding) if _is_linear(unembedding, flat) else _AnyChunk(unembedding)
    )
    for part in _chunks(unembedding, len(flat)):
        chunk = chunk_of(flat[part])
        wanted: list[tuple[Tensor | None, Tensor | None]] = [
            (gradient, None if labels is None else labels.reshape(-1)[part]),
            (sampled, None if uniform is None else chunk.sample(uniform.reshape(-1)[part])),
        ]
        for out, target in reversed(wanted):  # the data's loss is the one that stays
            if out is not None and target is not None:
                loss[part], out[part] = chunk.loss_and_gradient(target.clamp_min(0))
    if real is not None:
        loss.mul_(real.reshape(-1))
        for out in (gradient, sampled):
            if out is not None:
                out.mul_(real.reshape(-1, 1))
    shape = (batch, length, width)
    return HiddenLoss(
        loss.view(batch, length),
        None if gradient is None else gradient.view(shape),
        None if sampled is None else sampled.view(shape),
    )


def _is_linear(unembedding: nn.Module, hidden: Tensor) -> bool:
    plain = type(unembedding).forward is nn.Linear.forward
    hooked = bool(unembedding._forward_hooks or unembedding._forward_pre_hooks)
    return plain and not hooked and unembedding.weight.dtype == hidden.dtype


class _AnyChunk:
    """Logits of some positions by calling the unembedding, and gradients by autograd."""

    def __init__(self, unembedding: nn.Module) -> None:
        self._unembedding = unembedding

    def __call__(self, hidden: Tensor) -> _AnyChunk:
        self._hidden = hidden.clone().requires_grad_(True)
        with torch.enable_grad():
            self._logits = _logits(self._unembedding, self._hidden)
        return self

    def sample(self, uniform: Tensor) -> Tensor:
        return inverse_cdf(torch.softmax(self._logits.detach(), dim=-1), uniform)

    def loss_and_gradient(self, target: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            each = F.cross_entropy(self._logits, target, reduction="none")
            gradient = torch.autograd.grad(each.sum(), self._hidden, retain_graph=True)[0]
        return each.detach(), gradient


class _LinearChunk:
    """The same in closed form for a plain linear unembedding, in two buffers used again."""

    def __init__(self, unembedding: nn.Module) -> None:
        self._weight: Tensor = unembedding.weight.detach()  # type: ignore[operator]
        bias = unembedding.bias
        self._bias = bias.detach() if isinstance(bias, Tensor) else None
        self._buffers: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> _LinearChunk:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        if self._buffers is None or len(self._buffers[0]) < len(hidden):
            shape = (len(hidden), len(self._weight))
            self._buffers = (
                hidden.new_empty(shape),
                hidden.new_empty(shape, dtype=wide),
            )
        logits, p = (buffer[: len(hidden)] for buffer in self._buffers)
        torch.mm(hidden, self._weight.T, out=logits)
        if self._bias is not None:
            logits += self._bias
        self._logits = logits
        self._p = torch.softmax(logits, dim=-1, dtype=wide, out=p)
        self._mean = self._p.to(hidden.dtype) @ self._weight
        return self

    @torch.no_grad()
    def sample(self, uniform: Tensor) -> Tensor:
        return inverse_cdf(self._p, uniform)

    @torch.no_grad()
    def loss_and_gradient(self, target: Tensor) -> tuple[Tensor, Tensor]:
        chosen = self._p.gather(1, target[:, None])[:, 0]
        each = -chosen.log()
        tiny = chosen < 1e-30  # its logarithm has lost digits, or is infinite
        if bool(tiny.any()):
            each[tiny] = F.cross_entropy(
                self._logits[tiny].to(each.dtype), target[tiny], reduction="none"
            )
        return each.float(), self._mean - self._weight[target]


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


def inverse_cdf(p: Tensor, uniform: Tensor) -> Tensor:
    """One token per row of probabilities [n, V], where the cumulative distribution passes it.

    The distribution is summed in bins first and only the bin that is met is gone through: a
    cumulative sum over a whole vocabulary costs as much as the softmax.

    Args:
        p: [n, V].
        uniform: [n] in [0, 1).
    """
    size = p.shape[1]
    whole = size // _BIN * _BIN
    bins = p[:, :whole].reshape(len(p), -1, _BIN).sum(-1)
    if whole < size:
        bins = torch.cat([bins, p[:, whole:].sum(-1, keepdim=True)], dim=1)
    cumulative = bins.double().cumsum(1)
    # The last value is 1 up to rounding: scaling by it keeps the draw inside the vocabulary.
    threshold = uniform.double()[:, None] * cumulative[:, -1:]
    which = torch.searchsorted(cumulative, threshold, right=True).clamp_max(bins.shape[1] - 1)
    before = (cumulative - bins).gather(1, which)
    place = which * _BIN + torch.arange(_BIN, device=p.device)
    inside = p.gather(1, place.clamp_max(size - 1)).double().cumsum(1)
    offset = torch.searchsorted(inside, threshold - before, right=True).clamp_max(_BIN - 1)
    return (which * _BIN + offset)[:, 0].clamp_max(size - 1)
