"""Scores from training steps' own forward and backward: the part that knows no Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mda_lightning.callbacks.inverse_probe import CurvatureSettings, inverse_probe
from mda_lightning.influence import TrainingStepScorer
from mda_lightning.mechanisms import Mechanism
from mda_lightning.units import Head


class InRunScorer:
    """Score training batches for all units at once.

    Hooks are on the model from the first :meth:`refresh` until :meth:`remove`, and do something
    between :meth:`start` and :meth:`collect` only.

    Args:
        model: the language model that trains.
        mechanism: whose f is scored.
        units: heads.
    """

    def __init__(self, model: PreTrainedModel, mechanism: Mechanism, units: Sequence[Head]) -> None:
        self._model = model
        self._mechanism = mechanism
        self._units = list(units)
        self._scorer: TrainingStepScorer | None = None
        self._unembedding: torch.utils.hooks.RemovableHandle | None = None
        self._logits: Tensor | None = None
        self._listening = False

    @property
    def ready(self) -> bool:
        return self._scorer is not None

    def refresh(self, batches: Sequence[Tensor], settings: CurvatureSettings) -> dict[str, Any]:
        """Take curvature and probe gradient at the present weights; returns provenance.

        Raises:
            CurvatureError: they are not finite.
        """
        ihvp, provenance = inverse_probe(
            self._model, self._mechanism, self._units, batches, settings
        )
        if self._scorer is None:
            self._scorer = TrainingStepScorer(self._model, self._units, self._mechanism.block_names)
            unembedding: nn.Module = self._model.get_output_embeddings()  # type: ignore[no-untyped-call]
            self._unembedding = unembedding.register_forward_hook(self._keep_logits)
        self._scorer.set_ihvp(ihvp)
        return provenance

    def start(self) -> None:
        """Before a batch's forward."""
        assert self._scorer is not None
        self._logits, self._listening = None, True
        self._scorer.start()

    def collect(
        self, tokens: Tensor, weights: Tensor | None, *, factor: float
    ) -> tuple[Tensor, Tensor] | None:
        """After the batch's backward: scores [B, U, K] and mean loss [B], on the CPU.

        Args:
            tokens: [B, T+1].
            weights: [B] of the samples in the loss; one of weight 0 left no gradient, so its score
                is NaN.
            factor: what the loss must be multiplied by to become the sum over all positions.

        Returns:
            None where no backward passed through the model.
        """
        self._listening = False
        logits, self._logits = self._logits, None
        if self._scorer is None:
            return None
        scale = torch.full((len(tokens),), factor, device=tokens.device)
        if weights is not None:
            own = weights.to(scale)
            scale = torch.where(own > 0, scale / own, torch.nan)
        scores = self._scorer.collect(scale)
        if scores is None:
            return None
        # An overflow under fp16 leaves inf, which would be sorted to the top.
        scores = torch.where(torch.isfinite(scores), scores, torch.nan)
        return scores.float().cpu(), _loss_per_sample(logits, tokens).cpu()

    def remove(self) -> None:
        """Take every hook off; may be called more than once."""
        self._listening, self._logits = False, None
        if self._scorer is not None:
            self._scorer.remove()
            self._scorer = None
        if self._unembedding is not None:
            self._unembedding.remove()
            self._unembedding = None

    def _keep_logits(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._listening:
            self._logits = output.detach()


@torch.no_grad()
def _loss_per_sample(logits: Tensor | None, tokens: Tensor) -> Tensor:
    """Mean cross-entropy over positions [B]; NaN where the forward gave no logits to read."""
    batch, length = len(tokens), tokens.shape[1] - 1
    if logits is None or logits.dim() != 3 or logits.shape[0] != batch:
        return torch.full((batch,), torch.nan)
    if logits.shape[1] not in (length, length + 1):
        return torch.full((batch,), torch.nan)
    flat = logits[:, :length].float().flatten(0, 1)
    loss = F.cross_entropy(flat, tokens[:, 1:].flatten(), reduction="none")
    return loss.view(batch, length).mean(1)
