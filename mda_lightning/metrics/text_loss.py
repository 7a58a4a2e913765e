"""Mean next-token loss on rows of text that are not trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.metrics.icl import position_losses
from mda_lightning.metrics.over_sequences import MeanOverSequences, UnitScores
from mda_lightning.modes import evaluating


class TextLoss(MeanOverSequences):
    """Cross-entropy of the next token in nats, mean over a row's positions, then over rows.

    ``update(model)`` evaluates the rows given here, ``update(model, tokens)`` others, of any
    length; every row counts alike. ``compute()`` gives :class:`UnitScores`, 0-dim: the mean and its
    standard error over rows. States are sums over rows, so ranks may hold different ones.

    Args:
        tokens: int64 [N, T+1], or None to give them to ``update``.
    """

    def __init__(self, tokens: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokens = tokens

    @torch.no_grad()
    def update(self, model: PreTrainedModel, tokens: Tensor | None = None) -> None:
        """Add rows, by default those the metric was made with.

        Raises:
            ValueError: no rows, or rows that the model cannot take.
        """
        rows = self.tokens if tokens is None else tokens
        if rows is None:
            raise ValueError("this metric was made without token rows; give them to update()")
        with evaluating(model):
            self.add(position_losses(model, rows).mean(1))

    def compute(self) -> UnitScores:
        """Mean over rows and its standard error, 0-dim each."""
        return self.scores()
