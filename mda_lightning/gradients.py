"""Gradients of blocks of weights: of each training sequence, and of a probe function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import (
    Block,
    BlockName,
    describe,
    input_columns,
    modules_of,
    unembedding,
)
from mda_lightning.mechanisms import Mechanism
from mda_lightning.modes import evaluating, frozen
from mda_lightning.sequence_loss import loss_at_hidden
from mda_lightning.taps import Taps
from mda_lightning.units import Head

#: Gradient, IHVP or any other vector of the parameter subspace: one matrix [o, i] per block.
BlockVector = dict[tuple[Head, BlockName], Tensor]


class SequenceBackward(NamedTuple):
    """One batch's forward and backwards.

    Attributes:
        inputs: layer inputs x [B, T, in] by dotted name; positions that are not real are 0.
        deltas: gradients δ [B, T, out] at the layers' outputs of the loss with the data's labels;
            empty where it was not asked for.
        sampled: the same with labels sampled from the model.
        loss: float32 [B, T], of the data's labels where they were asked for.
        real: bool [B, T], the positions that count.
    """

    inputs: dict[str, Tensor]
    deltas: dict[str, Tensor]
    sampled: dict[str, Tensor]
    loss: Tensor
    real: Tensor

    @property
    def mean_loss(self) -> Tensor:
        """Mean over a sequence's real positions, float32 [B]."""
        return self.loss.sum(1) / self.real.sum(1)

    def is_finite(self) -> Tensor:
        """bool [B]: whether a sequence's loss and all of its x and δ are finite."""
        found = torch.isfinite(self.loss).all(1)
        for values in (self.inputs, self.deltas, self.sampled):
            for tensor in values.values():
                # A sum is finite only if all terms are, and is far cheaper than a test of each.
                wide = torch.promote_types(tensor.dtype, torch.float32)
                found = found & torch.isfinite(tensor.sum(dim=(1, 2), dtype=wide))
        return found


def sequence_backward(
    model: PreTrainedModel,
    names: Sequence[str],
    tokens: Tensor,
    *,
    uniform: Tensor | None = None,
    data: bool = True,
) -> SequenceBackward:
    """Forward and truncated backward of the loss summed over positions, at fixed weights.

    The backward starts at the unembedding and stops at the lowest layer in ``names``; nothing is
    written to ``.grad``. Sequences do not mix, so δ[b] belongs to sequence b alone. The data's
    labels and sampled ones share the forward.

    Args:
        model: a causal language model.
        names: dotted names of the Linear layers to read.
        tokens: int64 [B, T+1]; position t predicts token t+1. A sequence shorter than the batch is
            filled up on the right with negative numbers, which count for nothing.
        uniform: float32 [B, T], for a backward with labels sampled from the model.
        data: whether there is a backward with the data's labels.

    Raises:
        ValueError: a negative token with a real one after it, or a sequence of fewer than 2 tokens.
    """
    tokens = tokens.to(model.device, torch.int64)
    labels = tokens[:, 1:]
    real = _real_positions(tokens)
    whole = bool(real.all())
    with evaluating(model), frozen(model), torch.enable_grad(), Taps(model, names) as taps:
        out = model.base_model(
            input_ids=tokens[:, :-1].clamp_min(0), use_cache=False, return_dict=True
        )
        hidden = out.last_hidden_state
        end = loss_at_hidden(
            unembedding(model),
            hidden,
            labels if data else None,
            uniform=uniform,
            real=None if whole else real,
        )
        deltas, sampled = {}, {}
        if end.sampled is not None:
            sampled = taps.gradients(hidden, grad_output=end.sampled, retain_graph=data)
        if end.gradient is not None:
            deltas = taps.gradients(hidden, grad_output=end.gradient)
        inputs = dict(taps.inputs)
    if not whole:
        inputs = {name: x * real[..., None].to(x) for name, x in inputs.items()}
    return SequenceBackward(inputs, deltas, sampled, end.loss, real)


def _real_positions(tokens: Tensor) -> Tensor:
    """bool [B, T]: positions whose token and whose next token are there."""
    there = tokens >= 0
    if bool((there[:, 1:] & ~there[:, :-1]).any()):
        raise ValueError("a negative token stands before a real one; fill up on the right only")
    if not bool(there[:, 1].all()):
        row = int((~there[:, 1]).nonzero()[0, 0])
        raise ValueError(
            f"sequence {row} of the batch has fewer than 2 tokens, so nothing is predicted in it; "
            "leave it out"
        )
    return there[:, 1:]


class GradientRegions:
    """The parts of linear layers' gradients that some blocks lie in, formed once for all of them.

    Args:
        blocks: of any units.

    Attributes:
        names: dotted names of the layers.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._regions: dict[str, tuple[slice, slice]] = {}
        for block in blocks:
            for part in block.parts:
                own = (part.rows, block.columns)
                self._regions[part.module] = tuple(  # type: ignore[assignment]
                    slice(min(a.start, b.start), max(a.stop, b.stop))
                    for a, b in zip(self._regions.get(part.module, own), own, strict=True)
                )
        self.names = list(self._regions)

    def form(self, inputs: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """G_i = Σ_t δ[t] x[t]ᵀ of each sequence in each layer's region: [B, rows, columns].

        Args:
            inputs, deltas: x [B, T, in] and δ [B, T, out] by dotted name of the layer.
        """
        found = {}
        for name, (rows, columns) in self._regions.items():
            x, delta = input_columns(inputs[name], columns), deltas[name][..., rows]
            if x.dtype != torch.float64:
                x = x.float()
            found[name] = torch.bmm(delta.to(x.dtype).transpose(1, 2), x)
        return found

    def of_block(self, block: Block, formed: Mapping[str, Tensor]) -> Tensor:
        """One block's G_i [B, o, i] out of what :meth:`form` returned."""
        found = []
        for part in block.parts:
            rows, columns = self._regions[part.module]
            found.append(
                formed[part.module][
                    :,
                    part.rows.start - rows.start : part.rows.stop - rows.start,
                    block.columns.start - columns.start : block.columns.stop - columns.start,
                ]
            )
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def probe_gradients(
    model: PreTrainedModel, mechanism: Mechanism, units: Sequence[Head]
) -> BlockVector:
    """∇f of a mechanism's probe function in each unit's blocks: {(unit, block): [o, i]}.

    One f for all heads has one backward. Where every head has an f of its own, a backward per layer
    serves that layer's heads: a head's attention pattern does not depend on its neighbours'
    weights. Where it does, by keys that a group of heads shares or a norm across heads, those heads
    have a backward each. Gradients through other heads' values, in layers between, are all there.

    Raises:
        ValueError: f does not depend on the model's weights.
    """
    layout = describe(model)
    blocks = layout.blocks(units, mechanism.block_names)
    found: BlockVector = {}
    with (
        evaluating(model),
        frozen(model),
        torch.enable_grad(),
        Taps(model, modules_of(blocks)) as taps,
    ):
        value = mechanism.probe(model)
        if not value.requires_grad:
            raise ValueError(
                f"the probe function of {mechanism.name!r} does not depend on the model's weights "
                "(its value has no gradient): it has no valid target, or detaches on the way"
            )
        per_head = value.dim() > 0
        together: dict[tuple[int, int], list[Block]] = {}
        for block in blocks:
            turn = block.unit.head % layout.entangled if per_head else 0
            together.setdefault((block.unit.layer if per_head else 0, turn), []).append(block)
        for (layer, turn), own in together.items():
            scalar = value[layer, turn :: layout.entangled].sum() if per_head else value
            wanted = modules_of(own)
            deltas = taps.gradients(scalar, wanted, retain_graph=True)
            regions = GradientRegions(own)
            formed = regions.form(_as_one(taps.inputs, wanted), _as_one(deltas, wanted))
            for block in own:
                found[block.unit, block.name] = regions.of_block(block, formed)[0].clone()
    return found


def zero_probes(probe: BlockVector) -> list[Head]:
    """Units whose ∇f is zero in all of their blocks: nothing can be attributed to them."""
    units = dict.fromkeys(unit for unit, _ in probe)
    return [u for u in units if not any(bool(v.any()) for (o, _), v in probe.items() if o == u)]


def _as_one(values: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """All sequences in a row as one: [1, B·T, features]."""
    return {name: values[name].detach().flatten(0, 1)[None] for name in names}
