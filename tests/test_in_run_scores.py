"""The parts of in-run scoring: what is kept, the loss read from the gradient, what is not there."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import random_neox
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mda_lightning.influence import probe_gradients, replay_scores
from mda_lightning.influence.in_run_scores import TrainingStepScorer
from mda_lightning.influence.logit_loss import direct_loss, loss_from_gradient, read_columns
from mda_lightning.influence.projection import Projection
from mda_lightning.mechanisms import mechanism
from mda_lightning.units import Head

INDUCTION = mechanism("induction", token_ids=range(1, 40), probe_function="copy_logprob")
UNITS = [Head(0, 1), Head(1, 0)]
BLOCKS = INDUCTION.block_names


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(1, 40, (5, 13), generator=torch.Generator().manual_seed(2))


def scorer_of(model: Any) -> TrainingStepScorer:
    scorer = TrainingStepScorer(model, UNITS, BLOCKS)
    scorer.set_ihvp(probe_gradients(model, INDUCTION, UNITS))
    return scorer


def memory(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def step_loss(model: Any, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


# -- what is kept ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
def test_neither_logits_nor_what_a_checkpoint_drops_is_kept(
    tokens: Tensor, scored: bool, checkpoint: bool
) -> None:
    """Once the forward is over, with the whole graph still there; as without scores."""
    model = random_neox().train()
    if checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    alive: dict[str, StorageWeakRef] = {}
    layer = model.gpt_neox.layers[1].attention.dense
    layer.register_forward_hook(lambda _, args, out: alive.update(x=memory(args[0])))
    model.lm_head.register_forward_hook(lambda _, args, out: alive.update(logits=memory(out)))
    scorer = scorer_of(model)
    if scored:
        scorer.start(tokens)
    loss = step_loss(model, tokens)
    gc.collect()
    assert alive["logits"].expired()
    assert alive["x"].expired() == checkpoint
    loss.backward()
    assert (scorer.collect_all(1.0) is not None) == scored
    scorer.remove()


def test_nothing_is_saved_for_the_backward_that_training_does_not_save(tokens: Tensor) -> None:
    def saved(scored: bool) -> int:
        model, storages = random_neox().train(), {}
        scorer = scorer_of(model)
        if scored:
            scorer.start(tokens)

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = step_loss(model, tokens)
        loss.backward()
        return sum(storages.values())

    assert saved(True) == saved(False) > 0


def test_nothing_is_left_after_the_backward(tokens: Tensor) -> None:
    """Also where the loss is never differentiated."""
    model = random_neox().train()
    alive: list[StorageWeakRef] = []
    layer = model.gpt_neox.layers[0].attention.query_key_value
    layer.register_forward_hook(lambda _, args, out: alive.append(memory(args[0])))
    scorer = scorer_of(model)
    for differentiate in (True, False):
        scorer.start(tokens)
        loss = step_loss(model, tokens)
        if differentiate:
            loss.backward()
            gc.collect()
            assert alive[-1].expired()  # while the loss, and so the graph, is there
        assert (scorer.collect_all(1.0) is not None) == differentiate
        del loss
        gc.collect()
        assert alive[-1].expired()


def test_what_follows_may_write_into_the_layers_outputs(tokens: Tensor) -> None:
    """In place, as a user's own code may."""
    model = random_neox().train()
    expected = replay_scores(model, probe_gradients(model, INDUCTION, UNITS), [tokens])
    scorer = scorer_of(model)
    scorer.start(tokens)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    logits *= 1.0
    logits[..., 0] += 0.0
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    found = scorer.collect_all(float(tokens[:, 1:].numel()))
    assert found is not None
    scale = float(expected.values.abs().max())
    torch.testing.assert_close(found.values[""], expected.values, rtol=0, atol=1e-5 * scale)


def test_a_deep_copy_is_not_heard(tokens: Tensor) -> None:
    """A teacher, say, whose backward passes in the same step."""
    model = random_neox().train()
    expected = replay_scores(model, probe_gradients(model, INDUCTION, UNITS), [tokens])
    scorer = scorer_of(model)
    teacher = copy.deepcopy(model)
    scorer.start(tokens)
    step_loss(teacher, tokens).backward()
    assert scorer.collect_all(1.0) is None
    scorer.start(tokens)
    (step_loss(model, tokens) + 3.0 * step_loss(teacher, tokens[:2])).backward()
    found = scorer.collect_all(float(tokens[:, 1:].numel()))
    assert found is not None
    scale = float(expected.values.abs().max())
    torch.testing.assert_close(found.values[""], expected.values, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(found.loss, expected.loss)


# -- the loss --------------------------------------------------------------------------------------


def differentiated(logits: Tensor, loss: Any) -> tuple[Tensor, Tensor]:
    """Logits in their dtype, and the gradient of a loss of them."""
    leaf = logits.clone().requires_grad_(True)
    return leaf.detach(), torch.autograd.grad(loss(leaf), leaf)[0]


@pytest.mark.parametrize("vocabulary", [5, 8, 60, 5000])
@pytest.mark.parametrize("spread", [0.1, 3.0, 12.0])
@pytest.mark.parametrize("further", [0, 1])
def test_the_loss_read_from_the_gradient_is_cross_entropy(
    vocabulary: int, spread: float, further: int
) -> None:
    """From flat to nearly certain predictions, whatever the scale; and what the scale was."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 20 + further, vocabulary, generator=generator) * spread
    labels = torch.randint(0, vocabulary, (3, 20), generator=generator)
    weight = torch.tensor([0.5, 1.0, 3.0]) * 1e-3

    def each(x: Tensor) -> Tensor:
        return F.cross_entropy(x[:, :20].transpose(1, 2), labels, reduction="none").mean(1)

    values, gradient = differentiated(logits, lambda x: (each(x) * weight).sum())
    found = loss_from_gradient(read_columns(values, labels), gradient, labels)
    torch.testing.assert_close(found.loss, each(logits), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.scale, weight / 20, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_read_from_low_precision_as_well_as_that_allows(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 200, 300, generator=generator) * 2).to(dtype)
    labels = torch.randint(0, 300, (3, 200), generator=generator)
    values, gradient = differentiated(
        logits, lambda x: F.cross_entropy(x.float().flatten(0, 1), labels.flatten()) * 1024
    )
    found = loss_from_gradient(read_columns(values, labels), gradient, labels)
    expected = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none").mean(1)
    torch.testing.assert_close(found.loss, expected, rtol=1e-3, atol=0)


def test_a_loss_that_is_something_else_is_not_read() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 30, 50, generator=generator)
    labels = torch.randint(0, 50, (2, 30), generator=generator)
    losses = {
        "label smoothing": lambda x: F.cross_entropy(
            x.flatten(0, 1), labels.flatten(), label_smoothing=0.1
        ),
        "squares": lambda x: x.square().mean(),
        "nothing": lambda x: 0.0 * x.sum(),
    }
    for name, loss in losses.items():
        values, gradient = differentiated(logits, loss)
        found = loss_from_gradient(read_columns(values, labels), gradient, labels)
        assert found.loss.isnan().all() and found.scale.isnan().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_that_do_not_count_are_left_out(dtype: torch.dtype) -> None:
    """Ignored by the loss, or without a label at all; a sample may have none that counts."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(4, 60, 50, generator=generator) * 2).to(dtype)
    labels = torch.randint(0, 50, (4, 60), generator=generator)
    labels[0, 40:] = -1
    ignored = labels.clone()
    ignored[0, 40:], ignored[1, ::3], ignored[2] = -100, -100, -100

    values, gradient = differentiated(
        logits, lambda x: F.cross_entropy(x.float().flatten(0, 1), ignored.flatten())
    )
    found = loss_from_gradient(read_columns(values, labels), gradient, labels)
    assert found.counted.tolist() == [40, 40, 0, 60]
    each = F.cross_entropy(logits.float().transpose(1, 2), ignored, reduction="none")
    expected = each.sum(1) / found.counted
    tolerance = 1e-5 if dtype == torch.float32 else 3e-3
    torch.testing.assert_close(found.loss, expected, rtol=tolerance, atol=0, equal_nan=True)
    scale = torch.tensor([1 / 140, 1 / 140, torch.nan, 1 / 140])
    torch.testing.assert_close(found.scale, scale, rtol=tolerance, atol=0, equal_nan=True)


def test_another_loss_is_not_read_from_low_precision_either() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 500, 60, generator=generator).bfloat16()
    labels = torch.randint(0, 60, (3, 500), generator=generator)
    for smoothing in (0.1, 0.05):
        values, gradient = differentiated(
            logits,
            lambda x, s=smoothing: F.cross_entropy(
                x.float().flatten(0, 1), labels.flatten(), label_smoothing=s
            ),
        )
        found = loss_from_gradient(read_columns(values, labels), gradient, labels)
        assert found.loss.isnan().all(), smoothing


def test_a_term_of_the_normaliser_leaves_the_scale() -> None:
    """And the loss too low by log(1 + 2 z log Z), as the documentation says."""
    generator = torch.Generator().manual_seed(0)
    logits, z = torch.randn(2, 30, 50, generator=generator), 1e-3
    labels = torch.randint(0, 50, (2, 30), generator=generator)

    def loss(x: Tensor) -> Tensor:
        plain = F.cross_entropy(x.flatten(0, 1), labels.flatten())
        return plain + z * x.logsumexp(-1).square().mean()

    values, gradient = differentiated(logits, loss)
    found = loss_from_gradient(read_columns(values, labels), gradient, labels)
    torch.testing.assert_close(found.scale, torch.full((2,), 1 / 60), rtol=1e-5, atol=0)
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    each -= torch.log1p(2 * z * logits.logsumexp(-1))
    torch.testing.assert_close(found.loss, each.mean(1), rtol=1e-5, atol=1e-5)


def test_the_loss_of_masked_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mda_lightning.influence.logit_loss._CHUNK_NUMBERS", 7 * 50
    )  # several stretches
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 31, 50, generator=generator)
    labels = torch.randint(0, 50, (4, 30), generator=generator)
    labels[0, 25:] = -1
    found = direct_loss(logits, labels, torch.tensor([2, 0]))
    each = F.cross_entropy(
        logits[:, :30].transpose(1, 2), labels, reduction="none", ignore_index=-1
    )
    torch.testing.assert_close(found, torch.stack([each[2].mean(), each[0, :25].mean()]))


# -- what does not fit -----------------------------------------------------------------------------


def test_layers_without_a_gradient_give_nan(tokens: Tensor) -> None:
    """A frozen layer below all that trains gets none, and is not scored 0."""
    model = random_neox().train()
    expected = replay_scores(model, probe_gradients(model, INDUCTION, UNITS), [tokens]).values
    scorer = scorer_of(model)
    model.gpt_neox.embed_in.requires_grad_(False)
    model.gpt_neox.layers[0].requires_grad_(False)
    scorer.start(tokens)
    step_loss(model, tokens).backward()
    found = scorer.collect_all(float(tokens[:, 1:].numel()))
    assert found is not None and found.values[""][:, 0].isnan().all()
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.values[""][:, 1], expected[:, 1], rtol=0, atol=1e-5 * scale)


def test_other_samples_than_the_batch_has_are_an_error(tokens: Tensor) -> None:
    model = random_neox().train()
    scorer = scorer_of(model)
    scorer.start(tokens)
    step_loss(model, tokens[:3]).backward()
    with pytest.raises(ValueError, match="of 3 samples, its batch has 5"):
        scorer.collect_all(1.0)
    scorer.start(tokens)
    with pytest.raises(ValueError, match=r"[23] samples after [23] in the same step"):
        (step_loss(model, tokens[:3]) + step_loss(model, tokens[3:])).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_projection_is_the_sum_over_positions(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a loop over samples and positions in float64; low precision a few samples at once."""
    monkeypatch.setattr("mda_lightning.influence.projection._CAST_NUMBERS", 3 * 7 * 64)
    model, generator = random_neox(), torch.Generator().manual_seed(0)
    previous = mechanism("previous_token", token_ids=range(1, 40), length=(8, 12))
    probes = {
        "a": probe_gradients(model, INDUCTION, UNITS),
        "b": probe_gradients(model, previous, UNITS),
    }
    projection = Projection(model, probes)
    name = "gpt_neox.layers.1.attention.query_key_value"
    x = torch.randn(5, 7, 16, generator=generator).to(dtype)
    delta = torch.randn(5, 7, 48, generator=generator).to(dtype)
    out = torch.zeros(5, projection.width, dtype=torch.float64)
    projection.add(out, name, x, delta)
    found = projection.split(out)
    for mech, probe in probes.items():
        blocks = projection.targets[mech].blocks
        for k, block in enumerate(blocks):
            if block == "O":
                continue
            vector = probe[Head(1, 0), block].double()
            rows = slice(0, 16) if block == "QK" else slice(16, 24)
            expected = torch.zeros(5, dtype=torch.float64)
            for i in range(5):
                for t in range(7):
                    expected[i] -= delta[i, t, rows].double() @ vector @ x[i, t].double()
            torch.testing.assert_close(found[mech][:, 1, k], expected, rtol=1e-5, atol=1e-5)
    assert not projection.columns_of(["nowhere"])
