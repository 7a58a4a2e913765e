"""A GPT-NeoX in which one head's Q and K, V, and O are linear layers of their own.

Other libraries take whole linear layers. Cut out of the fused projections, one head's weights are
such layers, and what those libraries make of them is what ours makes of the head.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GPTNeoXForCausalLM

from mda_lightning.architectures import BlockName
from mda_lightning.mechanisms import InductionHead
from mda_lightning.probes import repeated_sequences
from mda_lightning.units import Head


class _SplitRows(nn.Module):
    """A fused query, key and value projection; one head's rows come from ``qk`` and ``v``."""

    def __init__(self, fused: nn.Linear, head: int, width: int) -> None:
        super().__init__()
        first = 3 * head * width
        self.before = _part(fused.weight[:first])
        self.qk = _part(fused.weight[first : first + 2 * width])
        self.v = _part(fused.weight[first + 2 * width : first + 3 * width])
        self.after = _part(fused.weight[first + 3 * width :])
        self.bias = nn.Parameter(fused.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.before(x), self.qk(x), self.v(x), self.after(x)]
        return torch.cat(parts, dim=-1) + self.bias


class _SplitColumns(nn.Module):
    """An output projection; what one head puts in comes from ``o``."""

    def __init__(self, dense: nn.Linear, head: int, width: int) -> None:
        super().__init__()
        self._own = slice(head * width, (head + 1) * width)
        self.o = _part(dense.weight[:, self._own])
        self.before = _part(dense.weight[:, : self._own.start])
        self.after = _part(dense.weight[:, self._own.stop :])
        self.bias = nn.Parameter(dense.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        before, own, after = x.tensor_split((self._own.start, self._own.stop), dim=-1)
        # Contiguous, as the input of a layer that other code reads usually is.
        out: Tensor = self.o(own.contiguous()) + self.before(before) + self.after(after)
        return out + self.bias


def _part(weight: Tensor) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    return linear


def split_head(model: GPTNeoXForCausalLM, unit: Head) -> GPTNeoXForCausalLM:
    """A copy that computes the same, with the head's weights in layers of their own."""
    split = copy.deepcopy(model).eval()
    width = model.config.hidden_size // model.config.num_attention_heads
    attention = split.gpt_neox.layers[unit.layer].attention
    attention.query_key_value = _SplitRows(attention.query_key_value, unit.head, width)
    attention.dense = _SplitColumns(attention.dense, unit.head, width)
    return split


def split_names(unit: Head) -> dict[BlockName, str]:
    """Dotted names of the head's layers in :func:`split_head`'s copy, by block."""
    attention = f"gpt_neox.layers.{unit.layer}.attention"
    return {
        "QK": f"{attention}.query_key_value.qk",
        "V": f"{attention}.query_key_value.v",
        "O": f"{attention}.dense.o",
    }


@dataclass(frozen=True)
class CopyProbe:
    """The sequences of a ``copy_logprob`` probe in which every target weighs alike.

    Attributes:
        tokens: int64 [M, S].
        is_target: bool [M, S], tokens that are to be predicted.
        weight: of each; f = weight · Σ log p(target).
    """

    tokens: Tensor
    is_target: Tensor
    weight: float


def copy_probe(mechanism: InductionHead) -> CopyProbe:
    """The sequences behind ``mechanism``'s f, drawn with its settings.

    Raises:
        ValueError: it is not ``copy_logprob`` on sequences of one length, or has no token ids.
    """
    if mechanism.probe_function != "copy_logprob" or len(set(mechanism.length)) > 1:
        raise ValueError("needs probe_function='copy_logprob' and length=(n, n)")
    if mechanism.token_ids is None:
        raise ValueError("needs token_ids")
    probes = repeated_sequences(
        mechanism.token_ids,
        seed=mechanism.probe_seed,
        n_sequences=mechanism.n_probe_sequences,
        length=mechanism.length,
        repeats=mechanism.repeats,
    )
    is_target = torch.zeros_like(probes.tokens, dtype=torch.bool)
    is_target[probes.sequence, probes.query + 1] = True
    return CopyProbe(probes.tokens, is_target, float(probes.weight[0]))
