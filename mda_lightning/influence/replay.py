"""Scores at a model's present weights: Algorithm 1, and each position's part."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import BlockName, describe, modules_of
from mda_lightning.curvature import Fisher, SubspaceEKFAC
from mda_lightning.curvature.estimate import CurvatureEstimate
from mda_lightning.curvature.factors import DampingRule
from mda_lightning.gradients import BlockVector, probe_gradients, sequence_backward, zero_probes
from mda_lightning.influence.projection import Projection, Target
from mda_lightning.mechanisms import Mechanism
from mda_lightning.units import Head

#: IHVPs by the name of the mechanism whose f they are of.
IHVPs = Mapping[str, BlockVector]


@dataclass(frozen=True)
class Scores:
    """Influence scores.

    Attributes:
        units: the heads, in the order of the second axis.
        blocks: block names, in the order of the third axis.
        values: float32 [N, U, K]; sum over K for a unit's score (Eq. 19). NaN where a gradient of
            the sample is not finite.
        loss: float32 [N], mean over the sequence's positions, in nats a token.
    """

    units: tuple[Head, ...]
    blocks: tuple[BlockName, ...]
    values: Tensor
    loss: Tensor


class ReplayScorer:
    """Scores of batches at a model's present weights, for several mechanisms at once.

    Args:
        model: a causal language model.
        ihvps: by mechanism, (H + λ)⁻¹∇f per (unit, block). A unit whose ∇f is zero throughout has
            scores of exactly 0; :func:`zero_probes` finds those.
    """

    def __init__(self, model: PreTrainedModel, ihvps: IHVPs) -> None:
        self.model = model
        self._projection = Projection(model, ihvps)
        self.targets = self._projection.targets

    def score(self, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Scores [B, U, K] by mechanism and mean loss [B], on the CPU, of tokens [B, T+1]."""
        projection = self._projection
        backward = sequence_backward(self.model, projection.names, tokens)
        out = torch.zeros(len(tokens), projection.width, device=backward.loss.device)
        for name in projection.names:
            projection.add(out, name, backward.inputs[name], backward.deltas[name])
        loss, finite = backward.mean_loss, backward.is_finite()
        out[~finite], loss[~finite] = torch.nan, torch.nan
        values = {name: own.float().cpu() for name, own in projection.split(out).items()}
        return values, loss.float().cpu()


@overload
def replay_scores(
    model: PreTrainedModel,
    ihvp: BlockVector,
    batches: Iterable[Tensor],
    *,
    progress: Callable[[int], None] | None = ...,
) -> Scores: ...


@overload
def replay_scores(
    model: PreTrainedModel,
    ihvp: IHVPs,
    batches: Iterable[Tensor],
    *,
    progress: Callable[[int], None] | None = ...,
) -> dict[str, Scores]: ...


def replay_scores(
    model: PreTrainedModel,
    ihvp: BlockVector | IHVPs,
    batches: Iterable[Tensor],
    *,
    progress: Callable[[int], None] | None = None,
) -> Scores | dict[str, Scores]:
    """Scores at the model's present weights, in the order of ``batches``.

    Args:
        model: a causal language model.
        ihvp: (H + λ)⁻¹∇f per (unit, block), as :meth:`SubspaceEKFAC.solve` returns; or several of
            them by name, which then share each sample's forward and backward.
        batches: token batches int64 [B, T+1]; negative numbers fill up shorter sequences.
        progress: called with the number of sequences after each batch.

    Returns:
        Scores, or scores by name.

    Raises:
        ValueError: no batch, or units with different blocks.
    """
    several = {str(k): v for k, v in ihvp.items() if isinstance(v, dict)}
    scorer = ReplayScorer(model, several or {"": cast(BlockVector, ihvp)})
    for name, own in (several or {"": cast(BlockVector, ihvp)}).items():
        broken = list(dict.fromkeys(str(unit) for (unit, _), v in own.items() if v.isnan().any()))
        if broken:
            of = f" of {name}" if name else ""
            warnings.warn(
                f"the IHVP{of} is NaN for {', '.join(broken)}: so are their scores", stacklevel=2
            )
    found: list[tuple[dict[str, Tensor], Tensor]] = []
    for tokens in batches:
        found.append(scorer.score(tokens))
        if progress is not None:
            progress(len(tokens))
    scores = _joined(scorer.targets, found)
    return scores if several else scores[""]


def fit_and_score(
    model: PreTrainedModel,
    mechanisms: Mapping[str, Mechanism],
    units: Sequence[Head],
    batches: Sequence[Tensor],
    *,
    kind: Literal["ekfac", "kfac", "identity"] = "ekfac",
    fisher: Fisher = "sampled",
    seed: int = 0,
    damping: float = 0.1,
    damping_rule: DampingRule = "relative",
    n_curvature: int | None = None,
    memory: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[SubspaceEKFAC | None, dict[str, Scores]]:
    """Curvature and scores on the same samples (Algorithm 1), in one pass over them.

    Each sample has one forward; those that the curvature is estimated on keep their gradients until
    it is known. Where these do not fit into ``memory``, there is a pass for each.

    Args:
        mechanisms: by name.
        batches: token batches int64 [B, T+1].
        kind: "identity" is the plain dot product, without curvature.
        n_curvature: sequences that the curvature is estimated on: the first batches that hold so
            many; None takes all.
        model, units, fisher, seed, damping, damping_rule, memory, progress: as for
            :meth:`SubspaceEKFAC.fit`.

    Returns:
        The curvature (None for "identity") and the scores by mechanism.
    """
    batches = list(batches)
    probes = {name: probe_gradients(model, own, units) for name, own in mechanisms.items()}
    for name, probe in probes.items():
        if zero := zero_probes(probe):
            warnings.warn(
                f"the gradient of {name}'s f is zero in {', '.join(map(str, zero))}: nothing can "
                "be attributed to them, every score is 0",
                stacklevel=2,
            )
    if kind == "identity":
        return None, replay_scores(model, probes, batches, progress=progress)
    blocks = list(dict.fromkeys(b for own in mechanisms.values() for b in own.block_names))
    estimate = CurvatureEstimate(
        model, units, blocks, kind=kind, fisher=fisher, seed=seed, memory=memory, keep_data=True
    )
    n_first = 0
    for tokens in batches:
        if n_curvature is not None and estimate.n_sequences >= n_curvature:
            break
        estimate.add(tokens)
        n_first += 1
        if progress is not None:
            progress(len(tokens))
    curvature = SubspaceEKFAC.of(estimate, damping=damping, damping_rule=damping_rule)
    ihvps = {name: curvature.solve(probe) for name, probe in probes.items()}
    if estimate.data_gradients is None:
        return curvature, replay_scores(model, ihvps, batches, progress=progress)
    projection = Projection(model, ihvps)
    found = []
    for formed, loss in estimate.data_gradients:
        values = {}
        for name, target in projection.targets.items():
            columns = [
                -estimate.regions.of_block(block, formed).flatten(1)
                @ ihvps[name][block.unit, block.name].flatten()
                for block in describe(model).blocks(target.units, target.blocks)
            ]
            shape = (len(loss), len(target.units), len(target.blocks))
            values[name] = torch.stack(columns, dim=1).view(shape).float().cpu()
        found.append((values, loss.float().cpu()))
    scorer = ReplayScorer(model, ihvps)
    for tokens in batches[n_first:]:
        found.append(scorer.score(tokens))
        if progress is not None:
            progress(len(tokens))
    return curvature, _joined(projection.targets, found)


def token_scores(model: PreTrainedModel, ihvp: BlockVector, tokens: Tensor) -> Scores:
    """Each position's part of its sample's score: −δ[t]ᵀ V x[t].

    Position t is where the head's weights are used: a row of the query, key and value projection
    reads the residual stream at t, the output projection writes to it. The parts sum to the
    sample's score.

    Args:
        model: a causal language model.
        ihvp: (H + λ)⁻¹∇f per (unit, block).
        tokens: int64 [N, T+1], the chosen samples.

    Returns:
        ``values`` [N, T, U, K] (0 where a shorter sample has ended) and ``loss`` [N, T].
    """
    scorer = ReplayScorer(model, {"": ihvp})
    target, layout = scorer.targets[""], describe(model)
    blocks = layout.blocks(target.units, target.blocks)
    names = modules_of(blocks)
    values, losses = [], []
    for row in tokens[:, None]:
        backward = sequence_backward(model, names, row)
        parts = []
        for block in blocks:
            x, delta = block.of_input(backward.inputs), block.of_output(backward.deltas)
            vector = ihvp[block.unit, block.name].to(x)
            parts.append(-((delta @ vector) * x).sum(-1))
        shape = (1, -1, len(target.units), len(target.blocks))
        values.append(torch.stack(parts, dim=-1).reshape(shape).float().cpu())
        losses.append(backward.loss.float().cpu())
    return Scores(target.units, target.blocks, torch.cat(values), torch.cat(losses))


def _joined(
    targets: Mapping[str, Target], found: Sequence[tuple[dict[str, Tensor], Tensor]]
) -> dict[str, Scores]:
    if not found:
        raise ValueError("no samples to score")
    loss = torch.cat([own for _, own in found])
    n_broken = int(torch.isnan(loss).sum())
    if n_broken:
        first = torch.isnan(loss).nonzero()[:5, 0].tolist()
        warnings.warn(
            f"{n_broken} of {len(loss)} samples have a gradient that is not finite and no score "
            f"(NaN): the first are numbers {', '.join(map(str, first))}",
            stacklevel=3,
        )
    return {
        name: Scores(
            target.units, target.blocks, torch.cat([values[name] for values, _ in found]), loss
        )
        for name, target in targets.items()
    }
