"""The held-out loss: transformers' own, a mean over rows with its error, and which rows."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import random_neox

from mda_lightning.corpora import TokenRows
from mda_lightning.measures import MEASURES, measure
from mda_lightning.metrics import TextLoss


def rows(n: int, length: int, *, seed: int = 0, vocab: int = 40) -> torch.Tensor:
    return torch.randint(vocab, (n, length), generator=torch.Generator().manual_seed(seed))


def test_it_is_the_loss_that_transformers_computes() -> None:
    model, tokens = random_neox(), rows(5, 26)
    with torch.no_grad():
        each = [float(model(row[None], labels=row[None]).loss) for row in tokens]
        whole = float(model(tokens, labels=tokens).loss)
    found = measure("held_out_loss", text=tokens).measure(model)
    assert list(found) == ["held_out_loss"]
    mean, se = found["held_out_loss"]
    assert mean.shape == se.shape == ()
    assert float(mean) == pytest.approx(whole, abs=1e-5)
    assert float(mean) == pytest.approx(float(np.mean(each)), abs=1e-5)
    assert float(se) == pytest.approx(float(np.std(each, ddof=1) / math.sqrt(5)), abs=1e-5)
    assert float(se) > 1e-4


def test_it_is_a_plain_loop_over_positions() -> None:
    model, tokens = random_neox(), rows(2, 9)
    total = 0.0
    with torch.no_grad():
        for row in tokens:
            for t in range(8):
                logits = model(row[None, : t + 1]).logits[0, -1]
                total += float(F.cross_entropy(logits[None], row[t + 1 : t + 2]))
    found = measure("held_out_loss", text=tokens).measure(model)["held_out_loss"]
    assert float(found.mean) == pytest.approx(total / 16, abs=1e-5)


def test_rows_of_two_updates_count_alike_and_the_model_stays_as_it_was() -> None:
    model, tokens = random_neox().train(), rows(7, 26)
    whole = TextLoss(tokens)
    whole.update(model)
    parts = TextLoss()
    parts.update(model, tokens[:2])
    parts.update(model, tokens[2:])
    for one, other in zip(whole.compute(), parts.compute(), strict=True):
        torch.testing.assert_close(one, other)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match="made without token rows"):
        TextLoss().update(model)


def test_rows_are_the_texts_own_as_long_as_the_model_reads(tmp_path: Path) -> None:
    model = random_neox()
    corpus = TokenRows.write(tmp_path / "rows", rows(9, 31).numpy(), vocab_size=40, provenance={})
    one = measure("held_out_loss", text=corpus, n_rows=4)
    assert one.rows(model).shape == (4, 31)
    found = one.measure(model)["held_out_loss"].mean
    assert one.settings()["n_rows"] == 4 and one.settings()["rows_sha256"]
    assert replace(one, context=10).rows(model).shape == (4, 11)
    short = random_neox()
    short.config.max_position_embeddings = 16
    assert one.rows(short).shape == (4, 17)
    with pytest.raises(ValueError, match="context of 20 tokens is longer than the model's 16"):
        replace(one, context=20).check(short)
    small = random_neox(vocab_size=20)
    with pytest.raises(ValueError, match=r"token ids 0\.\.39, the model has 0\.\.19"):
        one.check(small)
    assert float(found) > 0 and MEASURES["held_out_loss"].name == "held_out_loss"
