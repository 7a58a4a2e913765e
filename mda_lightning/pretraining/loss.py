"""Next-token loss with a weight per sample.

For a batch of B samples with weights w and T predicted tokens each,

    L_batch = (1 / B) sum_i w_i CE_i        L_kept = sum_i w_i CE_i / sum_i w_i

where CE_i is the mean cross-entropy of sample i over its T positions, in nats. A sample of weight 0
keeps its place and the denominator of ``"batch"`` stays the original batch size, so the others'
gradients are what they would have been. Labels are never set to -100: that renormalises over the
positions left, and is NaN when none are.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

Normalize: TypeAlias = Literal["batch", "kept"]


def sequence_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each sequence, [B], in float32 whatever the precision of the logits.

    Args:
        logits: [B, T, vocab]; position t predicts ``labels[:, t]``.
        labels: [B, T] int64, already shifted.
    """
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape).mean(dim=1)


def weighted_loss(losses: Tensor, weights: Tensor | None, *, normalize: Normalize) -> Tensor:
    """The scalar loss of one batch from its per-sequence ``losses`` [B] and ``weights`` [B].

    A batch whose weights are all 0 has loss 0 and gradient 0 under either normalisation.
    """
    if weights is None:
        return losses.mean()
    weights = weights.to(losses.dtype)
    total = (losses * weights).sum()
    if normalize == "batch":
        return total / len(weights)
    kept = weights.sum()
    return total / torch.where(kept > 0, kept, 1.0)
