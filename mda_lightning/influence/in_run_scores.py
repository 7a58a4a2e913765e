"""Scores of a training step's samples from that step's own forward and backward (SPEC §5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import BlockName, describe, unembedding
from mda_lightning.gradients import BlockVector
from mda_lightning.influence.logit_loss import (
    LogitLoss,
    direct_loss,
    loss_from_gradient,
    read_columns,
)
from mda_lightning.influence.projection import Projection
from mda_lightning.influence.training_taps import TrainingTaps, kept_of
from mda_lightning.units import Head

_ONE = ""  # the name of a mechanism that is scored alone


class StepScores(NamedTuple):
    """What one backward said of its B samples, where the model is.

    Attributes:
        values: by mechanism, float32 [B, U, K]; NaN where no gradient came to a unit's layers.
        loss: float32 [B], mean over the positions that count (a label that is ignored leaves no
            gradient), in nats; NaN where the step's logits were not to be seen, or the loss is not
            their cross-entropy. A term of the logits' normaliser alone (z-loss) goes unnoticed and
            makes it a little too low.
        scale: float32 [B], what the loss of each of these positions was multiplied by in what was
            differentiated, read from the gradient of the logits; NaN where that cannot be read, or
            positions are weighted differently.
        counted: int64 [B], how many positions count, or -1 where that is not to be seen.
        uncertainty: of a scale, relative.
    """

    values: dict[str, Tensor]
    loss: Tensor
    scale: Tensor
    counted: Tensor
    uncertainty: float

    def scaled(self, factor: Tensor) -> dict[str, Tensor]:
        """The values times ``factor`` [B]."""
        return {name: own * factor[:, None, None] for name, own in self.values.items()}


class TrainingStepScorer:
    """Scores the samples of each training step from that step's own forward and backward.

    Call :meth:`set_ihvp`, then :meth:`start` before a forward, and :meth:`collect` after its
    backward. Training is not changed; see
    :class:`~mda_lightning.influence.training_taps.TrainingTaps`.

    Args:
        model: the language model inside the module that trains.
        units: what is to be scored; fixed for the scorer's life.
        blocks: all blocks that any mechanism is to be scored in.
    """

    def __init__(
        self, model: PreTrainedModel, units: Sequence[Head], blocks: Sequence[BlockName]
    ) -> None:
        self._model = model
        self.units, self.blocks = tuple(units), tuple(blocks)
        wanted = describe(model).blocks(units, blocks)
        self._names = list(dict.fromkeys(name for block in wanted for name in block.modules))
        self._projection: Projection | None = None
        self._tokens: Tensor | None = None
        self._masked: Tensor | None = None
        self._forget()
        self._taps = TrainingTaps(model, self._names, self, unembedding=unembedding(model))

    def set_ihvp(self, ihvp: BlockVector | Mapping[str, BlockVector]) -> None:
        """Score from now on with this IHVP, or these of several mechanisms by name.

        Raises:
            ValueError: units or blocks that this scorer does not listen to.
        """
        alone = any(isinstance(key, tuple) for key in ihvp)
        named: Mapping[str, BlockVector] = {_ONE: ihvp} if alone else ihvp  # type: ignore[dict-item, assignment]
        projection = Projection(self._model, named)
        for target in projection.targets.values():
            if target.units != self.units or set(target.blocks) - set(self.blocks):
                raise ValueError("the IHVP is for other units or blocks than this scorer")
        self._projection = projection

    def start(self, tokens: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Before a forward: forget what was held and listen.

        Args:
            tokens: int64 [B, T+1], whose loss the step computes; without them it is not told.
            weights: [B]. The loss of a sample of weight 0, which leaves no gradient, is computed in
                the forward.
        """
        self._forget()
        self._tokens = tokens
        if tokens is not None and weights is not None:
            self._masked = (weights == 0).nonzero()[:, 0].to(tokens.device)
        self._taps.listening = self._projection is not None

    def listen(self) -> None:
        """Before a forward that is not to be scored: only hear whether its backward comes by."""
        self._forget()
        self._taps.listening = True

    def heard(self) -> bool:
        """After the backward: whether anything came by since :meth:`listen`."""
        self._taps.listening = False
        seen = bool(self._seen)
        self._forget()
        return seen

    def collect(self, scale: Tensor | float) -> Tensor | None:
        """After the backward: scores [B, U, K] of the only mechanism, or None if no backward came.

        Args:
            scale: what the step's loss must be multiplied by, per sample [B] or in all, to become
                the sum over the sample's positions: T·B for a mean over all tokens of the batch,
                times the gradient accumulation and divided by the loss scale.
        """
        found = self.collect_all(scale)
        return None if found is None else found.values[_ONE]

    def collect_all(self, scale: Tensor | float) -> StepScores | None:
        """As :meth:`collect`, of every mechanism, with the losses.

        Raises:
            ValueError: the backward was of another number of samples than ``tokens``.
        """
        self._taps.listening = False
        partial, loss, projection = self._partial, self._loss, self._projection
        if partial is None or projection is None:
            self._forget()
            return None
        unseen = projection.columns_of(set(self._names) - self._seen)
        n_tokens = len(partial) if self._tokens is None else len(self._tokens)
        self._forget()
        if len(partial) != n_tokens:
            raise ValueError(
                f"the model's backward was of {len(partial)} samples, its batch has {n_tokens}; a "
                "step must run each sample of its batch through the model, in order"
            )
        factor = torch.as_tensor(scale, dtype=partial.dtype, device=partial.device)
        partial *= factor.reshape(-1, 1)
        if unseen:
            partial[:, unseen] = torch.nan
        if loss is None:
            nothing = partial.new_full((len(partial),), torch.nan)
            unseen_count = torch.full((len(partial),), -1, device=partial.device)
            loss = LogitLoss(nothing, nothing, unseen_count, 0.0)
        return StepScores(
            projection.split(partial),
            loss.loss.float(),
            loss.scale.float(),
            loss.counted,
            loss.uncertainty,
        )

    def remove(self) -> None:
        """Take the hooks off; may be called more than once."""
        self._taps.remove()
        self._forget()

    def _forget(self) -> None:
        self._tokens = self._masked = None
        self._partial: Tensor | None = None
        self._seen: set[str] = set()
        self._direct: Tensor | None = None
        self._loss: LogitLoss | None = None

    # -- what the taps tell --------------------------------------------------------------------

    def layer(self, name: str, x: Tensor, delta: Tensor) -> None:
        """Score by one layer."""
        self._seen.add(name)
        if self._projection is None:
            return
        if self._partial is None:
            self._partial = torch.zeros(len(x), self._projection.width, device=x.device)
        if len(x) != len(self._partial):
            raise ValueError(
                f"{name} ran on {len(x)} samples after {len(self._partial)} in the same step; "
                "in-run scoring needs every forward of a step to be of the same samples"
            )
        self._projection.add(self._partial, name, x, delta)

    def logits(self, logits: Tensor) -> Tensor:
        """Read the columns that the loss follows from, and the loss of masked samples."""
        if not self._is_of_tokens(logits):
            return kept_of(logits).fill_(torch.nan)
        assert self._tokens is not None
        labels = self._tokens[:, 1:]
        if self._masked is not None and len(self._masked):
            self._direct = direct_loss(logits, labels, self._masked)
        return read_columns(logits, labels)

    def logit_gradient(self, kept: Tensor, delta: Tensor) -> None:
        """Read the step's loss from the gradient."""
        if not self._is_of_tokens(delta):
            return
        assert self._tokens is not None
        found = loss_from_gradient(kept, delta, self._tokens[:, 1:])
        if self._direct is not None and self._masked is not None:
            found.loss[self._masked] = self._direct.to(found.loss)
        self._loss = found

    def _is_of_tokens(self, logits: Tensor) -> bool:
        if self._tokens is None or logits.dim() != 3:
            return False
        batch, length = self._tokens.shape
        return logits.shape[0] == batch and logits.shape[1] in (length - 1, length)
