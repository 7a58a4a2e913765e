"""Each sample's loss from a few columns of its logits and of their gradient.

A training step computes softmax and cross-entropy once; doing it a second time, or keeping the
logits until the step is over, costs much where the vocabulary is large. But the gradient that the
step's backward hands down already holds the softmax. With l the logits of a position, y its label,
p = softmax(l) and s what the loss of that position is multiplied by,

    g_j = s (p_j − [j = y]),

so for any column j that is not the label

    s = exp(l_y − l_j) g_j − g_y,      −log p_y = log s − log g_j + l_j − l_y.

Both are read from the label's column and the most probable of a few fixed ones. A position without
a gradient in any of them is no part of the loss: its label is ignored, or its weight is 0. Two
columns that disagree tell of another loss (label smoothing, distillation). A term of the logits'
normaliser Z alone (z-loss) cannot be told: with z log² Z, s is right and −log p_y is too low by
log(1 + 2 z log Z).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mda_lightning.influence.training_taps import kept_of

#: Where the gradient of the logits is in one of these, else in low precision.
_PRECISE = (torch.float64, torch.float32)
# How far two columns may differ in a position, in nats, on average over a sample; in low precision
# also in their mean, beyond 3 standard errors: rounding leaves it near 0, another loss does not.
_AGREEMENT, _LOW_PRECISION_AGREEMENT, _LOW_PRECISION_BIAS = 1e-4, 0.1, 0.003
# How far the positions of a sample may be from one scale, on average.
_UNIFORM, _LOW_PRECISION_UNIFORM = 0.01, 0.05
# How well a scale is known.
_UNCERTAINTY, _LOW_PRECISION_UNCERTAINTY = 1e-3, 0.01
#: Logits in float32 at once, in numbers (32 MiB).
_CHUNK_NUMBERS = 2**23
_IGNORED = -100


class LogitLoss(NamedTuple):
    """What a batch's gradient says of its loss.

    Attributes:
        loss: [B], mean cross-entropy over the positions that count, in nats; NaN where it cannot be
            read, or none counts.
        scale: [B], what the loss of each of them was multiplied by; NaN where it cannot be read or
            is not the same for all.
        counted: int64 [B], how many positions count: those with a gradient.
        uncertainty: of a scale, relative.
    """

    loss: Tensor
    scale: Tensor
    counted: Tensor
    uncertainty: float


def read_columns(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's column and a few fixed ones [B, T', 1 + K] of logits [B, T', V].

    Args:
        logits: T' is T, or more where the step also predicts past the last label.
        labels: int64 [B, T]; below 0 where there is none.
    """
    kept = kept_of(logits)
    count = kept.shape[-1] - 1
    apart = logits.shape[-1] // count
    kept[..., 1:] = logits[..., : count * apart : apart]
    length = labels.shape[1]
    kept[:, length:, 0] = 0.0
    place = labels.clamp_min(0)[..., None]
    kept[:, :length, 0] = logits[:, :length].gather(2, place)[..., 0].to(kept.dtype)
    return kept


def loss_from_gradient(kept: Tensor, delta: Tensor, labels: Tensor) -> LogitLoss:
    """Loss and scale of each sample.

    Args:
        kept: of :func:`read_columns`.
        delta: ∂(training loss)/∂logits [B, T', V].
        labels: int64 [B, T].
    """
    length, precise = labels.shape[1], delta.dtype in _PRECISE
    logits, gradient = kept[:, :length], read_columns(delta, labels)[:, :length]
    counted = (gradient != 0).any(-1)  # also where it is NaN
    of_label, of_others = logits[..., :1], logits[..., 1:]
    # The label's own column, where it is among the others, has a gradient below 0.
    high, place = gradient[..., 1:].topk(2, dim=-1)
    ahead = of_label - of_others.gather(2, place)
    scales = ahead.exp() * high - gradient[..., :1]
    each = scales.log() - high.log() - ahead
    # Without a label there is no cross-entropy, whatever gradient there is.
    read = counted & torch.isfinite(each).all(-1) & (labels >= 0)
    n_counted, n_read = counted.sum(1), read.sum(1)

    def mean(values: Tensor) -> Tensor:
        return torch.where(read, values, 0.0).sum(1) / n_read

    difference = each[..., 0] - each[..., 1]
    agree = mean(difference.abs()) <= (_AGREEMENT if precise else _LOW_PRECISION_AGREEMENT)
    if not precise:
        error = (mean(difference.square()) / n_read).sqrt()
        agree &= mean(difference).abs() <= _LOW_PRECISION_BIAS + 3 * error
    loss = torch.where(agree & (n_read == n_counted), mean(each[..., 0]), torch.nan)
    # A tiny probability may have no gradient in low precision; most positions tell the scale.
    scale = _median(torch.where(read, scales[..., 0], torch.inf), n_read)
    spread = mean((scales[..., 0] / scale[:, None] - 1).abs())
    uniform = spread <= (_UNIFORM if precise else _LOW_PRECISION_UNIFORM)
    scale = torch.where(agree & uniform & (2 * n_read > n_counted), scale, torch.nan)
    uncertainty = _UNCERTAINTY if precise else _LOW_PRECISION_UNCERTAINTY
    return LogitLoss(loss, scale, n_counted, uncertainty)


def _median(values: Tensor, n_read: Tensor) -> Tensor:
    """The lower median [B] of the n_read smallest of [B, T]; torch.median is not deterministic."""
    middle = (n_read - 1).clamp_min(0).div(2, rounding_mode="floor")
    return values.sort(1).values.gather(1, middle[:, None])[:, 0]


def direct_loss(logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Mean cross-entropy [n] of the n chosen samples, a stretch of positions at a time.

    Args:
        logits: [B, T', V].
        labels: int64 [B, T]; below 0 where there is none, which is left out.
        rows: int64 [n].
    """
    step = max(1, _CHUNK_NUMBERS // logits.shape[-1])
    total = torch.zeros(len(rows), device=logits.device)
    for place, row in enumerate(rows.tolist()):
        for first in range(0, labels.shape[1], step):
            own = labels[row, first : first + step]
            chunk = logits[row, first : first + len(own)].float()
            own = own.masked_fill(own < 0, _IGNORED)
            total[place] += F.cross_entropy(chunk, own, ignore_index=_IGNORED, reduction="sum")
    return total / (labels[rows] >= 0).sum(1)
