"""Scores that are a mean attention probability over the entries of a probe set (App. C, Eq. 15)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import check_token_ids, describe, real_token_ids
from mda_lightning.attention import attention_at
from mda_lightning.metrics.over_sequences import MeanOverSequences, UnitScores
from mda_lightning.modes import evaluating
from mda_lightning.probes import ProbeSet, random_sequences, repeated_sequences


def attention_per_sequence(model: PreTrainedModel, probes: ProbeSet) -> Tensor:
    """Mean attention over each sequence's entries, float32 [N, L, heads].

    Differentiable where gradients are enabled; runs the model without its unembedding and in the
    mode it is in.
    """
    return probes.per_sequence(attention_at(model, probes))


class AttentionScore(MeanOverSequences):
    """Mean attention over a probe set's entries, for every head at once.

    ``update(model)`` evaluates the probe set on a model; ``compute()`` gives :class:`UnitScores`.
    States are sums over sequences, so ranks may hold different probe sets. Usable on any
    checkpoint, without Lightning.

    Args:
        probes: the probe set.
        n_layers: layers of the model to be measured.
        n_heads: heads per layer.
    """

    higher_is_better = True

    def __init__(self, probes: ProbeSet, *, n_layers: int, n_heads: int, **kwargs: Any) -> None:
        super().__init__(n_layers, n_heads, **kwargs)
        self.probes = probes

    @torch.no_grad()
    def update(self, model: PreTrainedModel) -> None:
        """Add the probe set, evaluated on ``model``."""
        check_token_ids(model, self.probes.tokens)
        with evaluating(model):
            self.add(attention_per_sequence(model, self.probes))

    def compute(self) -> UnitScores:
        """Mean over sequences and its standard error, [L, heads] each."""
        return self.scores()


class InductionScore(AttentionScore):
    """Induction score of every head (App. C): see :func:`repeated_sequences` for the parameters."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        token_ids: Sequence[int] | Tensor | None = None,
        seed: int = 0,
        n_sequences: int = 100,
        length: tuple[int, int] = (8, 20),
        repeats: int = 2,
        bos: int | None = None,
        **kwargs: Any,
    ) -> None:
        layout = describe(model)
        probes = repeated_sequences(
            real_token_ids(model) if token_ids is None else token_ids,
            seed=seed,
            n_sequences=n_sequences,
            length=length,
            repeats=repeats,
            bos=bos,
        )
        super().__init__(probes, n_layers=layout.n_layers, n_heads=layout.n_heads, **kwargs)


class PreviousTokenScore(AttentionScore):
    """Previous-token score of every head (Eq. 15): see :func:`random_sequences`."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        token_ids: Sequence[int] | Tensor | None = None,
        seed: int = 0,
        n_sequences: int = 100,
        length: tuple[int, int] = (16, 40),
        bos: int | None = None,
        **kwargs: Any,
    ) -> None:
        layout = describe(model)
        probes = random_sequences(
            real_token_ids(model) if token_ids is None else token_ids,
            seed=seed,
            n_sequences=n_sequences,
            length=length,
            bos=bos,
        )
        super().__init__(probes, n_layers=layout.n_layers, n_heads=layout.n_heads, **kwargs)
