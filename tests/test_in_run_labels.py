"""In-run scores whatever the training makes of its labels: of the sum over what counts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from in_run_fits import HEADS, INDUCTION, StillModule, assert_close, ihvp_of, score, scoring
from in_run_fits import values_of as scores_of
from models import random_neox
from torch import Tensor
from training import MODEL_VOCABULARY, Rows

from mda_lightning.architectures import describe
from mda_lightning.influence import replay_scores

TOKENS = Rows(256).tokens[:16]


def whole(tokens: Tensor) -> Tensor:
    """Labels [B, T] as the tokens have them."""
    return tokens[:, 1:].clone()


def padded(tokens: Tensor) -> Tensor:
    """Sequences of different lengths, that of a batch's first by far the shortest."""
    labels = whole(tokens)
    for row, own in enumerate(labels):
        own[4 + 3 * (row % 4) :] = -100
    return labels


def prompts(tokens: Tensor) -> Tensor:
    """The first half is not trained on."""
    labels = whole(tokens)
    labels[:, :8] = -100
    return labels


class Labelled(StillModule):
    """A loss of given labels and the logits, each [B, T(, V)]."""

    def __init__(self, labels: Callable[[Tensor], Tensor], loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.labels, self.loss = labels, loss

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        tokens = batch["tokens"].clamp_min(0)
        logits = self.net["lm"](input_ids=tokens[:, :-1], use_cache=False).logits
        return self.loss(logits.float(), self.labels(tokens))


def of_the_batch(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def of_samples(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over samples of the mean over their positions."""
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (each.sum(1) / (labels >= 0).sum(1)).mean()


def over_all(logits: Tensor, labels: Tensor) -> Tensor:
    """A sum over what counts, over the number of all positions."""
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean()


def tenfold(logits: Tensor, labels: Tensor) -> Tensor:
    return 10 * of_the_batch(logits, labels)


def brute_force(labels: Callable[[Tensor], Tensor], n: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Autograd of one sample's summed loss at a time, in the order of batches of 4."""
    model = random_neox(seed=0, vocab_size=MODEL_VOCABULARY)
    ihvp, layout = ihvp_of(model, HEADS, [TOKENS[:4]]), describe(model)
    values, losses = [], []
    for first in range(0, n, 4):
        for row in range(4):
            tokens = TOKENS[first : first + 4]
            own = labels(tokens)[row]
            logits = model(input_ids=tokens[row : row + 1, :-1]).logits[0]
            loss = F.cross_entropy(logits, own, reduction="sum", ignore_index=-100)
            losses.append(float(loss) / int((own >= 0).sum()))
            model.zero_grad()
            loss.backward()
            found = torch.zeros(len(HEADS), len(INDUCTION.block_names))
            for u, head in enumerate(HEADS):
                for k, name in enumerate(INDUCTION.block_names):
                    block, start = layout.block(head, name), 0
                    for module, rows in block.parts:
                        grad = model.get_submodule(module).weight.grad[rows, block.columns]
                        found[u, k] -= (grad * ihvp[head, name][start : start + len(grad)]).sum()
                        start += len(grad)
            values.append(found.numpy())
    return np.stack(values), np.array(losses)


@pytest.mark.parametrize(
    ("labels", "loss", "told"),
    [
        (whole, of_the_batch, False),
        (padded, over_all, False),
        (padded, of_the_batch, True),
        (padded, of_samples, True),
        (prompts, of_the_batch, True),
        (whole, tenfold, True),
    ],
)
def test_scores_are_of_the_sum_over_the_positions_that_count(
    tmp_path: Path, labels: Any, loss: Any, told: bool
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = score(tmp_path, Labelled(labels, loss), scoring(), max_steps=4)
    values, losses = brute_force(labels)
    assert_close(scores_of(table), values)
    np.testing.assert_allclose(table.frame("L0H0")["loss"], losses, rtol=1e-5)
    said = [str(one.message) for one in caught if "weighs a position" in str(one.message)]
    assert len(said) == told
    assert table.provenance["loss_scale_steps"] == {"measured" if told else "expected": 4}


def test_accumulated_and_scaled_alike(tmp_path: Path) -> None:
    table = score(
        tmp_path,
        Labelled(padded, of_the_batch),
        scoring(),
        max_steps=2,
        accumulate_grad_batches=2,
        precision="bf16-mixed",
    )
    found, values = scores_of(table).sum(2), brute_force(padded)[0].sum(2)
    for unit in range(2):
        assert np.polyfit(values[:, unit], found[:, unit], 1)[0] == pytest.approx(1, abs=0.05)


def test_a_sample_of_which_nothing_counts_scores_zero(tmp_path: Path) -> None:
    def first_only(tokens: Tensor) -> Tensor:
        labels = whole(tokens)
        labels[1:] = -100
        return labels

    table = score(tmp_path, Labelled(first_only, of_the_batch), scoring(), max_steps=4)
    found = scores_of(table)
    first = np.arange(16) % 4 == 0
    assert_close(found[first], brute_force(whole)[0][first])
    assert (found[~first] == 0).all() and table.frame("L0H0")["loss"][~first].isna().all()


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten(), label_smoothing=0.1),
        lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten(), label_smoothing=0.01),
        lambda x, y: (
            F.cross_entropy(x.transpose(1, 2), y, reduction="none") * torch.linspace(0.1, 1.9, 16)
        ).mean(),
    ],
    ids=["label smoothing", "a little of it", "weights of positions"],
)
def test_a_scale_that_cannot_be_read_is_told(tmp_path: Path, loss: Any) -> None:
    """Scores are then of that loss, by the factor that was expected."""
    with pytest.warns(UserWarning, match="does not tell how the training loss is scaled") as told:
        table = score(tmp_path, Labelled(whole, loss), scoring(), max_steps=4)
    assert len([one for one in told if "does not tell" in str(one.message)]) == 1
    assert table.provenance["loss_scale_steps"] == {"unread": 4}
    model = random_neox(seed=0, vocab_size=MODEL_VOCABULARY)
    ihvp = ihvp_of(model, HEADS, [TOKENS[:4]])
    loss(model(input_ids=TOKENS[:1, :-1]).logits, TOKENS[:1, 1:]).mul(16).backward()
    block = describe(model).block(HEADS[1], "O")
    (part,) = block.parts
    gradient = model.get_submodule(part.module).weight.grad[part.rows, block.columns]
    expected = -float((gradient * ihvp[HEADS[1], "O"]).sum())
    assert table.frame("L1H1")["O"][0] == pytest.approx(expected, rel=1e-4)


class Filled(Rows):
    """Tokens that end before the row does, filled up with -1."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = super().__getitem__(i)
        tokens = row["tokens"].clone()
        tokens[5 + 3 * (i % 4) :] = -1
        return row | {"tokens": tokens}


def test_tokens_that_are_filled_up(tmp_path: Path) -> None:
    """Not part of the samples, nor of the curvature; the mean is over the rest."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*weighs a position")
        table = score(
            tmp_path, Labelled(padded, of_the_batch), scoring(), data=Filled(64), max_steps=4
        )
    data = Filled(64)
    rows = torch.stack([data[i]["tokens"] for i in range(16)])
    model = random_neox(seed=0, vocab_size=MODEL_VOCABULARY)
    expected = replay_scores(model, ihvp_of(model, HEADS, [rows[:4]]), [rows])
    assert_close(scores_of(table), expected.values.numpy(), 1e-4)  # few positions: a poor curvature
    np.testing.assert_allclose(table.frame("L0H0")["loss"], expected.loss, rtol=1e-5)


class LeftFilled(Rows):
    def __getitem__(self, i: int) -> dict[str, Any]:
        row = super().__getitem__(i)
        tokens = row["tokens"].clone()
        tokens[: i % 4] = -1
        return row | {"tokens": tokens}


def test_tokens_that_are_filled_up_on_the_left_are_refused(tmp_path: Path) -> None:
    module = Labelled(whole, of_the_batch)
    with pytest.raises(ValueError, match=r"a token id -1 before real ones; .* on the right"):
        score(tmp_path, module, scoring(active=(5, 6)), data=LeftFilled(64), max_steps=4)
