"""Gradients of blocks of weights: of each training sequence, and of a probe function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import Block, BlockName, describe, unembedding
from mda_lightning.mechanisms import Mechanism
from mda_lightning.modes import evaluating, frozen
from mda_lightning.sequence_loss import loss_at_hidden
from mda_lightning.taps import Taps
from mda_lightning.units import Head

#: Gradient, IHVP or any other vector of the parameter subspace: one matrix [o, i] per block.
BlockVector = dict[tuple[Head, BlockName], Tensor]


class SequenceBackward(NamedTuple):
    """A batch's layer inputs x [B, T, in], output gradients δ [B, T, out], token losses [B, T]."""

    inputs: dict[str, Tensor]
    deltas: dict[str, Tensor]
    loss: Tensor


def sequence_backward(
    model: PreTrainedModel,
    names: Sequence[str],
    tokens: Tensor,
    *,
    uniform: Tensor | None = None,
) -> SequenceBackward:
    """Forward and truncated backward of the loss summed over positions, at fixed weights.

    The backward starts at the unembedding and stops at the lowest layer in ``names``; nothing is
    written to ``.grad``. Sequences do not mix, so δ[b] belongs to sequence b alone.

    Args:
        model: a causal language model.
        names: dotted names of the Linear layers to read.
        tokens: int64 [B, T+1]; position t predicts token t+1.
        uniform: float32 [B, T] to sample labels from the model; None takes the data's labels.
    """
    tokens = tokens.to(model.device, torch.int64)
    with evaluating(model), frozen(model), torch.enable_grad(), Taps(model, names) as taps:
        out = model.base_model(input_ids=tokens[:, :-1], use_cache=False, return_dict=True)
        hidden = out.last_hidden_state
        labels = None if uniform is not None else tokens[:, 1:]
        end = loss_at_hidden(unembedding(model), hidden, labels, uniform=uniform)
        deltas = taps.gradients(hidden, grad_output=end.gradient)
        return SequenceBackward(dict(taps.inputs), deltas, end.loss)


def sequence_gradients(
    block: Block, inputs: Mapping[str, Tensor], deltas: Mapping[str, Tensor]
) -> Tensor:
    """G_i = Σ_t δ[t] x[t]ᵀ of one block, for each sequence: [B, o, i].

    Args:
        block: the block.
        inputs, deltas: x [B, T, in] and δ [B, T, out] by dotted name of the layer.
    """
    x = block.of_input(inputs)
    delta = block.of_output(deltas).to(x.dtype)
    return torch.bmm(delta.transpose(1, 2), x)


def probe_gradients(
    model: PreTrainedModel, mechanism: Mechanism, units: Sequence[Head]
) -> BlockVector:
    """∇f of a mechanism's probe function in each unit's blocks: {(unit, block): [o, i]}.

    Where every head has an f of its own, one backward per layer serves that layer's heads: a head's
    attention pattern does not depend on its neighbours' weights. Where it does, by keys that a
    group of heads shares or a norm across heads, those heads have a backward each. Gradients
    through other heads' values, in layers between, are all there.
    """
    layout = describe(model)
    blocks = layout.blocks(units, mechanism.block_names)
    found: BlockVector = {}
    names = [name for block in blocks for name in block.modules]
    with evaluating(model), frozen(model), torch.enable_grad(), Taps(model, names) as taps:
        value = mechanism.probe(model)
        per_head = value.dim() > 0
        together: dict[tuple[int, int], list[Block]] = {}
        for block in blocks:
            turn = block.unit.head % layout.entangled if per_head else 0
            together.setdefault((block.unit.layer, turn), []).append(block)
        for (layer, turn), own in together.items():
            scalar = value[layer, turn :: layout.entangled].sum() if per_head else value
            wanted = dict.fromkeys(name for block in own for name in block.modules)
            deltas = taps.gradients(scalar, wanted, retain_graph=True)
            for block in own:
                gradient = sequence_gradients(block, taps.inputs, deltas).sum(0)
                found[block.unit, block.name] = gradient.detach()
    return found
