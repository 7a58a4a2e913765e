"""The number of sequences at once, within a memory budget."""

from __future__ import annotations

import pytest
from models import random_neox

from mda_lightning import micro_batch as module
from mda_lightning.architectures import describe
from mda_lightning.free_memory import free_memory
from mda_lightning.micro_batch import MemoryBudgetError, micro_batch, parse_bytes, sequence_bytes
from mda_lightning.units import Head


def _names(model, *layers: int) -> list[str]:
    layout = describe(model)
    blocks = layout.blocks([Head(layer, 0) for layer in layers], ("QK", "V", "O"))
    return list(dict.fromkeys(name for block in blocks for name in block.modules))


def test_more_layers_and_longer_sequences_need_more() -> None:
    model = random_neox(n_layers=4)
    low, high = _names(model, 0, 1, 2, 3), _names(model, 3)
    assert sequence_bytes(model, high, 32) < sequence_bytes(model, low, 32)
    assert sequence_bytes(model, low, 32) < sequence_bytes(model, low, 64)
    # At least what the truncated graph saves: x and δ of the layers read.
    assert sequence_bytes(model, low, 32) > 4 * 32 * 4 * (16 + 48 + 16 + 16)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_batch_is_what_fits_and_no_more(monkeypatch) -> None:
    model = random_neox()
    names = _names(model, 0, 1)
    one = sequence_bytes(model, names, 32)
    fixed = module._FIXED
    assert micro_batch(model, names, length=32, memory=fixed + one) == 1
    assert micro_batch(model, names, length=32, memory=fixed + 7 * one + one // 2) == 7
    assert micro_batch(model, names, length=32, memory=2**40) == 2**13 // 32
    with pytest.raises(MemoryBudgetError, match=r"128 MiB is too small: one sequence of 32 tokens"):
        micro_batch(model, names, length=32, memory=fixed)
    monkeypatch.setattr(module, "free_memory", lambda device: 2 * (fixed + 3 * one))
    assert micro_batch(model, names, length=32) == 3


def test_memory_is_read_from_text_and_from_the_machine() -> None:
    assert parse_bytes("4GiB") == parse_bytes("4 gb") == parse_bytes("4G") == 4 * 2**30
    assert parse_bytes("1.5MiB") == 3 * 2**19 and parse_bytes("2e9") == 2 * 10**9
    for text in ("much", "", "-1G", "0", "4 GHz"):
        with pytest.raises(ValueError, match="write for example 4GiB"):
            parse_bytes(text)
    assert 2**20 < free_memory(random_neox().device) < 2**50
