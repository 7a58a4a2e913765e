"""What the metrics have in common: a mean over sequences and its standard error."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class UnitScores(NamedTuple):
    """Mean over sequences and its standard error, float32, each [L, heads], or 0-dim."""

    mean: Tensor
    se: Tensor


def summarise(total: Tensor, total_squares: Tensor, count: Tensor | int) -> UnitScores:
    """Mean and standard error from sums over sequences (sample variance, n − 1).

    The error of a single sequence is not known: NaN.
    """
    n = torch.as_tensor(count, dtype=torch.float64, device=total.device)
    mean = total / n
    spread = (total_squares - n * mean**2).clamp(min=0)
    return UnitScores(mean.float(), (spread / (n - 1) / n).sqrt().float())


class MeanOverSequences(Metric):
    """A metric whose states are sums over sequences, so that ranks may hold different ones.

    Args:
        shape: of one sequence's values.
    """

    full_state_update = False
    total: Tensor
    total_squares: Tensor
    count: Tensor

    def __init__(self, *shape: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zeros = torch.zeros(shape, dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("total_squares", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        """Add sequences, [N, *shape]."""
        values = values.to(self.total.device).double()  # some devices have no float64
        self.total += values.sum(0)
        self.total_squares += values.square().sum(0)
        self.count += len(values)

    def scores(self) -> UnitScores:
        """Mean and standard error over the sequences added, [*shape] each."""
        return summarise(self.total, self.total_squares, self.count)
