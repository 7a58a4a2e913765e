"""Each sample's loss from a few columns of its logits and of their gradient.

A training step computes softmax and cross-entropy once; doing it a second time, or keeping the
logits until the step is over, costs much where the vocabulary is large. But the gradient that the
step's backward hands down already holds the softmax. With l the logits of a position, y its label,
p = softmax(l) and s what the loss of that position is multiplied by,

    g_j = s (p_j − [j = y]),

so for any column j that is not the label

    s = exp(l_y − l_j) g_j − g_y,      −log p_y = log s − log g_j + l_j − l_y.

Both are read from the label's column and the most probable of a few fixed ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mda_lightning.training_taps import kept_of

# How far two columns may differ in a sample's mean loss, in nats: rounding, and what a loss that
# is not plain cross-entropy (label smoothing, say) makes of them.
_AGREEMENT = {torch.float64: 1e-3, torch.float32: 1e-3}
_LOW_PRECISION_AGREEMENT = 0.1
#: Logits in float32 at once, in numbers (32 MiB).
_CHUNK_NUMBERS = 2**23


class LogitLoss(NamedTuple):
    """What a batch's gradient says of its loss.

    Attributes:
        loss: [B], mean cross-entropy over the positions, in nats; NaN where it cannot be read.
        scale: [B], mean over the positions of what their loss was multiplied by.
    """

    loss: Tensor
    scale: Tensor


def read_columns(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's column and a few fixed ones [B, T', 1 + K] of logits [B, T', V].

    Args:
        logits: T' is T, or more where the step also predicts past the last label.
        labels: int64 [B, T].
    """
    kept = kept_of(logits)
    count = kept.shape[-1] - 1
    apart = logits.shape[-1] // count
    kept[..., 1:] = logits[..., : count * apart : apart]
    length = labels.shape[1]
    kept[:, length:, 0] = 0.0
    kept[:, :length, 0] = logits[:, :length].gather(2, labels[..., None])[..., 0].to(kept.dtype)
    return kept


def loss_from_gradient(kept: Tensor, delta: Tensor, labels: Tensor) -> LogitLoss:
    """Loss and scale of each sample.

    Args:
        kept: of :func:`read_columns`.
        delta: ∂(training loss)/∂logits [B, T', V].
        labels: int64 [B, T].
    """
    length = labels.shape[1]
    logits, gradient = kept[:, :length], read_columns(delta, labels)[:, :length]
    of_label, of_others = logits[..., :1], logits[..., 1:]
    # The label's own column, where it is among the others, has a gradient below 0.
    high, place = gradient[..., 1:].topk(2, dim=-1)
    ahead = of_label - of_others.gather(2, place)
    scale = ahead.exp() * high - gradient[..., :1]
    each = scale.log() - high.log() - ahead
    apart = (each[..., 0] - each[..., 1]).abs().mean(1)
    loss = each[..., 0].mean(1)
    limit = _AGREEMENT.get(delta.dtype, _LOW_PRECISION_AGREEMENT)
    readable = torch.isfinite(loss) & (apart <= limit)
    return LogitLoss(torch.where(readable, loss, torch.nan), scale[..., 0].mean(1))


def direct_loss(logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Mean cross-entropy [n] of the n chosen samples, a stretch of positions at a time.

    Args:
        logits: [B, T', V].
        labels: int64 [B, T].
        rows: int64 [n].
    """
    step = max(1, _CHUNK_NUMBERS // logits.shape[-1])
    total = torch.zeros(len(rows), device=logits.device)
    for place, row in enumerate(rows.tolist()):
        for first in range(0, labels.shape[1], step):
            own = labels[row, first : first + step]
            chunk = logits[row, first : first + len(own)].float()
            total[place] += F.cross_entropy(chunk, own, reduction="sum")
    return total / labels.shape[1]
