"""In-context learning: how much better late tokens of a text are predicted than early ones.

L[t] is the loss, in nats, of predicting token t+1 from tokens 0..t, positions counted from 0:

- gain = mean(L[0:50]) − L[500]; positive where context is used;
- Olsson's score = L[500] − L[50] (Olsson et al. 2022); negative where context is used.

In a context of T < 501 positions the two move: late = T − 1 and early = max(1, round(late / 10)).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import check_token_ids, unembedding
from mda_lightning.metrics.over_sequences import MeanOverSequences, UnitScores
from mda_lightning.modes import evaluating
from mda_lightning.sequence_loss import loss_of_hidden

LATE = 500
SMALLEST_CONTEXT = 20
_BATCH_TOKENS = 2**13


class ICLPositions(NamedTuple):
    """The positions that are compared: L[0:early], L[early] and L[late]."""

    early: int
    late: int

    @property
    def suffix(self) -> str:
        """What keys of the score end with: nothing, or ``@late`` where the context is short."""
        return "" if self.late == LATE else f"@{self.late}"


def icl_positions(context: int) -> ICLPositions:
    """The positions compared in a context of ``context`` predicted tokens.

    Raises:
        ValueError: the context is too short to have early and late tokens.
    """
    if context < SMALLEST_CONTEXT:
        raise ValueError(
            f"a context of {context} tokens is too short for the in-context-learning score: give "
            f"rows of at least {SMALLEST_CONTEXT + 1} tokens ({LATE + 2} for its usual positions)"
        )
    late = min(LATE, context - 1)
    return ICLPositions(max(1, round(late / 10)), late)


def position_losses(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Loss at each position, float32 [N, T], without a gradient and without full logits.

    Runs the model in the mode it is in, a few rows at a time.

    Args:
        model: a causal language model.
        tokens: int64 [N, T+1]; position t predicts token t+1.

    Raises:
        ValueError: rows longer than the model's context, or ids that it lacks.
    """
    check_tokens(model, tokens)
    found = []
    with torch.no_grad():
        size = max(1, _BATCH_TOKENS // (tokens.shape[1] - 1))
        for start in range(0, len(tokens), size):
            batch = tokens[start : start + size].to(model.device, torch.int64)
            out = model.base_model(input_ids=batch[:, :-1], use_cache=False, return_dict=True)
            hidden = out.last_hidden_state
            found.append(loss_of_hidden(unembedding(model), hidden, batch[:, 1:]))
    return torch.cat(found)


def check_tokens(model: PreTrainedModel, tokens: Tensor) -> None:
    """Check that ``model`` can predict rows [N, T+1].

    Raises:
        ValueError: no rows, rows longer than the model's context, or ids that it lacks.
    """
    if tokens.dim() != 2 or not len(tokens) or tokens.shape[1] < 2:
        raise ValueError(f"token rows are [N, T + 1] with T >= 1, got {tuple(tokens.shape)}")
    check_context(model, tokens.shape[1] - 1)
    check_token_ids(model, tokens)


def context_limit(model: PreTrainedModel) -> int | None:
    """Tokens that a model can read at once, or None where its configuration sets no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return None if limit is None else int(limit)


def check_context(model: PreTrainedModel, context: int) -> None:
    """Check that ``model`` can read ``context`` tokens.

    Raises:
        ValueError: it cannot.
    """
    limit = context_limit(model)
    if limit is not None and context > limit:
        raise ValueError(
            f"a context of {context} tokens is longer than the model's {limit} "
            f"(max_position_embeddings); give rows of at most {limit} tokens to read"
        )


def icl_per_sequence(losses: Tensor) -> Tensor:
    """Gain and Olsson's score of each sequence, [2, N], from the losses [N, T] of its positions.

    Raises:
        ValueError: fewer than 20 positions.
    """
    early, late = icl_positions(losses.shape[1])
    gain = losses[:, :early].mean(1) - losses[:, late]
    return torch.stack([gain, losses[:, late] - losses[:, early]])


class ICLScore(MeanOverSequences):
    """In-context-learning score of a model over rows of text.

    ``update(model)`` evaluates the rows given here, ``update(model, tokens)`` others of the same
    length. ``compute()`` gives :class:`UnitScores`, 0-dim, under ``"icl/gain"`` and
    ``"icl/olsson"``, or ``"icl/gain@127"`` and so on where the context is too short for position
    500. States are sums over sequences, so ranks may hold different rows.

    Args:
        tokens: int64 [N, T+1], or None to give them to ``update``.
        context: T, where ``tokens`` is None.

    Raises:
        ValueError: a context of fewer than 20 tokens, or neither argument.
    """

    def __init__(
        self, tokens: Tensor | None = None, *, context: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(2, **kwargs)
        if tokens is None and context is None:
            raise ValueError("give the token rows, or the context that later rows will have")
        self.tokens = tokens
        self.context = int(context or 0) if tokens is None else tokens.shape[1] - 1
        self.positions = icl_positions(self.context)

    @torch.no_grad()
    def update(self, model: PreTrainedModel, tokens: Tensor | None = None) -> None:
        """Add rows, by default those the metric was made with.

        Raises:
            ValueError: no rows, rows of another length, or rows that the model cannot take.
        """
        rows = self.tokens if tokens is None else tokens
        if rows is None:
            raise ValueError("this metric was made without token rows; give them to update()")
        if rows.shape[1] != self.context + 1:
            raise ValueError(
                f"rows of {rows.shape[1]} tokens do not fit a metric over a context of "
                f"{self.context}: position {self.positions.late} must mean the same in all; give "
                f"rows of {self.context + 1} tokens"
            )
        with evaluating(model):
            self.add(icl_per_sequence(position_losses(model, rows)).T)

    def compute(self) -> dict[str, UnitScores]:
        """Mean over sequences and its standard error by key, 0-dim each."""
        scores = self.scores()
        return {
            f"icl/{name}{self.positions.suffix}": UnitScores(scores.mean[i], scores.se[i])
            for i, name in enumerate(("gain", "olsson"))
        }
