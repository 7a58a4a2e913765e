"""How many sequences go through a model at once, within a memory budget."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.free_memory import free_memory
from mda_lightning.gradients import sequence_backward

#: Positions at once beyond which a batch gains nothing.
_ENOUGH = {"cpu": 2**13, "cuda": 2**18}
#: Logits, probabilities and what is small, whatever the batch.
_FIXED = 2**27
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class MemoryBudgetError(ValueError):
    """One sequence alone needs more than the budget."""


def sequence_bytes(model: PreTrainedModel, names: Sequence[str], length: int) -> int:
    """Bytes that one sequence's forward and truncated backward hold at once.

    Measured on one sequence of ``length`` tokens: what autograd saves, the layer inputs, outputs
    and gradients that are read, and four times the largest activation for what comes and goes.

    Args:
        model: at any weights.
        names: the layers that are read.
        length: T.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}
    held: list[Tensor] = []  # keeps storages alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage.nbytes()
            held.append(tensor.detach())
        return tensor

    tokens = torch.ones(1, length + 1, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backward = sequence_backward(model, names, tokens)
    read = sum(x.nbytes for x in backward.inputs.values())
    read += 3 * sum(d.nbytes for d in backward.deltas.values())
    return sum(seen.values()) + read + 4 * max(seen.values(), default=0)


def micro_batch(
    model: PreTrainedModel,
    names: Sequence[str],
    *,
    length: int,
    memory: int | None = None,
    reserved: int = 0,
) -> int:
    """Sequences at once for :func:`sequence_backward` within ``memory`` bytes, at least 1.

    No more than 8,192 positions on a CPU, 262,144 on a GPU: beyond those it gets no faster. The
    scores do not depend on it, but for rounding.

    Args:
        model: where it computes counts.
        names: the layers that are read.
        length: T.
        memory: beyond the model's own weights; None takes half of what is free.
        reserved: bytes of it that are for something else.

    Raises:
        MemoryBudgetError: one sequence does not fit.
    """
    budget = free_memory(model.device) // 2 if memory is None else memory
    one = sequence_bytes(model, names, length)
    fixed = _FIXED + reserved
    if budget < fixed + one:
        raise MemoryBudgetError(
            f"a memory budget of {in_words(budget)} is too small: one sequence of {length} tokens "
            f"needs about {in_words(fixed + one)} beside the model; give more memory, shorter "
            "sequences or fewer heads in low layers"
        )
    enough = _ENOUGH.get(model.device.type, _ENOUGH["cpu"]) // length
    return max(1, min((budget - fixed) // one, enough))


def parse_bytes(text: str) -> int:
    """Bytes from a text such as "4GiB", "500 MB" or "2e9"; K, M, G, T are powers of 1,024.

    Raises:
        ValueError: it is no such text, or less than 1.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    try:
        amount = float(match[1]) * _UNITS[match[2].upper()] if match else math.nan
    except ValueError:
        amount = math.nan
    if not 1 <= amount < 2**60:
        raise ValueError(f"{text!r} is no amount of memory; write for example 4GiB or 500MiB")
    return int(amount)


def in_words(n_bytes: int) -> str:
    """ "1.5 GiB", "300 MiB"."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"
