"""Influence scores of training samples on units (Eq. 2; SPEC §5).

    s(z) = −∇L(z)ᵀ (H + λ)⁻¹ ∇f,   L summed over positions.

**Positive: training on z promotes the unit.** A gradient step on z moves θ along −∇L(z), and f with
it by −∇fᵀ∇L(z), here in the metric of the curvature.

Two estimators, never mixed: *replay* at one fixed θ (:func:`replay_scores`), and *in-run* at the θ
a sample was trained on, from the training step's own forward and backward
(:class:`TrainingStepScorer`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mda_lightning.architectures import BlockName, describe
from mda_lightning.curvature import SubspaceEKFAC
from mda_lightning.gradients import BlockVector, probe_gradients, sequence_backward
from mda_lightning.projection import Projection
from mda_lightning.taps import TrainingTaps
from mda_lightning.units import Head

__all__ = [
    "Scores",
    "SubspaceEKFAC",
    "TrainingStepScorer",
    "probe_gradients",
    "replay_scores",
    "weights_hash",
]


@dataclass(frozen=True)
class Scores:
    """Influence scores.

    Attributes:
        units: the heads, in the order of the second axis.
        blocks: block names, in the order of the third axis.
        values: float32 [N, U, K]; sum over K for a unit's score (Eq. 19).
        loss: float32 [N], mean over the sequence's positions, in nats a token.
    """

    units: tuple[Head, ...]
    blocks: tuple[BlockName, ...]
    values: Tensor
    loss: Tensor


def replay_scores(
    model: PreTrainedModel,
    ihvp: BlockVector,
    batches: Iterable[Tensor],
    *,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Scores at the model's present weights, in the order of ``batches``.

    Args:
        model: a causal language model.
        ihvp: (H + λ)⁻¹∇f per (unit, block), as :meth:`SubspaceEKFAC.solve` returns.
        batches: token batches int64 [B, T+1].
        progress: called with the number of sequences after each batch.

    Raises:
        ValueError: no batch, or units with different blocks.
    """
    projection = Projection(model, {"": ihvp})
    target = projection.targets[""]
    values, losses = [], []
    for tokens in batches:
        backward = sequence_backward(model, projection.names, tokens)
        out = torch.zeros(len(tokens), projection.width, device=backward.loss.device)
        for name in projection.names:
            projection.add(out, name, backward.inputs[name], backward.deltas[name])
        values.append(projection.split(out)[""].cpu())
        losses.append(backward.loss.mean(1).float().cpu())
        if progress is not None:
            progress(len(tokens))
    if not values:
        raise ValueError("no samples to score")
    return Scores(target.units, target.blocks, torch.cat(values), torch.cat(losses))


class TrainingStepScorer:
    """Scores the samples of each training step from that step's own forward and backward.

    Set ``ihvp``, let the training step run its forward and backward, then :meth:`collect`. Training
    is not changed: the hooks read and compute, and nothing is added to the graph.

    Args:
        model: the language model inside the module that trains.
        units, blocks: what is to be scored; fixed for the scorer's life.
    """

    def __init__(
        self, model: PreTrainedModel, units: Sequence[Head], blocks: Sequence[BlockName]
    ) -> None:
        self._model = model
        self.units, self.blocks = tuple(units), tuple(blocks)
        names = [n for block in describe(model).blocks(units, blocks) for n in block.modules]
        self._projection: Projection | None = None
        self._partial: Tensor | None = None
        self._taps = TrainingTaps(model, names, self._consume)
        self._taps.enabled = False

    def set_ihvp(self, ihvp: BlockVector) -> None:
        """Score from now on with this IHVP; it must have the scorer's units and blocks."""
        projection = Projection(self._model, {"": ihvp})
        target = projection.targets[""]
        if target.units != self.units or target.blocks != self.blocks:
            raise ValueError("the IHVP is for other units or blocks than this scorer")
        self._projection = projection

    def start(self) -> None:
        """Before the step's forward: forget what was held and listen."""
        self._partial = None
        self._taps.enabled = self._projection is not None

    def collect(self, scale: Tensor | float) -> Tensor | None:
        """After the step's backward: scores [B, U, K], or None if no backward came by.

        Args:
            scale: what the step's loss must be multiplied by, per sample [B] or in all, to become
                the sum over the sample's positions: T·B for a mean over all tokens of the batch,
                times the gradient accumulation and divided by the loss scale.
        """
        self._taps.enabled = False
        partial, self._partial = self._partial, None
        if partial is None:
            return None
        factor = torch.as_tensor(scale, dtype=partial.dtype, device=partial.device)
        scores = partial.unflatten(1, (len(self.units), len(self.blocks)))
        return scores * factor.reshape(-1, 1, 1)

    def remove(self) -> None:
        """Take the hooks off; may be called more than once."""
        self._taps.remove()

    def _consume(self, name: str, x: Tensor, delta: Tensor) -> None:
        assert self._projection is not None
        if self._partial is None:
            self._partial = torch.zeros(len(x), self._projection.width, device=x.device)
        self._projection.add(self._partial, name, x, delta)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        data = tensor.detach().cpu().contiguous()
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b"")
    return digest.hexdigest()
