"""Subspace EK-FAC and influence scores against batch-1 autograd and brute force."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from models import random_neox

from mda_lightning.architectures import describe
from mda_lightning.curvature import CurvatureError, SubspaceEKFAC
from mda_lightning.gradients import probe_gradients, sequence_backward
from mda_lightning.influence import TrainingStepScorer, replay_scores, weights_hash
from mda_lightning.mechanisms import mechanism
from mda_lightning.sequence_loss import loss_at_hidden
from mda_lightning.units import Head

BLOCKS = ("QK", "V", "O")
UNITS = [Head(0, 1), Head(1, 0)]


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(1, 40, (9, 13), generator=torch.Generator().manual_seed(7))


def _block_slices(model, unit: Head, name: str):
    """Rows and columns written out from the layout [heads, 3, head_dim], apart from our code."""
    width = model.config.hidden_size // model.config.num_attention_heads
    attention = model.gpt_neox.layers[unit.layer].attention
    if name == "O":
        return attention.dense, slice(None), slice(unit.head * width, (unit.head + 1) * width)
    base = unit.head * 3 * width
    rows = (
        slice(base, base + 2 * width) if name == "QK" else slice(base + 2 * width, base + 3 * width)
    )
    return attention.query_key_value, rows, slice(None)


def _autograd(model, value: torch.Tensor, unit: Head, name: str) -> torch.Tensor:
    module, rows, columns = _block_slices(model, unit, name)
    return torch.autograd.grad(value, module.weight, retain_graph=True)[0][rows, columns]


def _summed_loss(model, row: torch.Tensor) -> torch.Tensor:
    logits = model(row[None, :-1]).logits[0]
    return F.cross_entropy(logits, row[1:], reduction="sum")


def _brute_force(model, tokens, unit: Head, name: str, damping: float = 0.1):
    """A, S, Λ from one sequence at a time with hooks and autograd, and the dense damped matrix."""
    module, rows, columns = _block_slices(model, unit, name)
    a_sum, s_sum, gradients, positions = 0.0, 0.0, [], 0
    for row in tokens:
        kept = {}

        def keep(_, args, output, kept=kept):
            kept["x"], kept["y"] = args[0], output

        handle = module.register_forward_hook(keep)
        loss = _summed_loss(model, row)
        handle.remove()
        delta = torch.autograd.grad(loss, kept["y"], retain_graph=True)[0][0].double()[:, rows]
        x = kept["x"][0].detach().double()[:, columns]
        a_sum, s_sum = a_sum + x.T @ x, s_sum + delta.T @ delta
        positions += len(x)
        gradients.append(_autograd(model, loss, unit, name).double())
    u_a = torch.linalg.eigh(a_sum / positions).eigenvectors
    u_s = torch.linalg.eigh(s_sum / positions).eigenvectors
    eigenvalues = torch.stack([(u_s.T @ g @ u_a) ** 2 for g in gradients]).mean(0)
    basis = torch.kron(u_s, u_a)
    dense = basis @ torch.diag(eigenvalues.flatten()) @ basis.T
    dense += damping * eigenvalues.mean() * torch.eye(len(dense), dtype=torch.float64)
    return dense, torch.stack(gradients)


@pytest.mark.parametrize("probe_function", ["copy_logprob", "attention"])
@pytest.mark.parametrize("parallel", [True, False])
def test_scores_equal_batch_1_autograd_and_a_dense_inverse(
    tokens, probe_function, parallel
) -> None:
    """Every score of every block, to 1e-5 of the largest, in a model where L0 feeds L1."""
    model = random_neox(parallel=parallel)
    mech = mechanism("induction", token_ids=range(1, 40), probe_function=probe_function)
    ekfac = SubspaceEKFAC.fit(
        model, UNITS, mech.block_names, [tokens[:4], tokens[4:]], fisher="empirical"
    )
    found = replay_scores(
        model, ekfac.solve(probe_gradients(model, mech, UNITS)), [tokens[:2], tokens[2:]]
    )
    value = mech.probe(model)
    for i, unit in enumerate(UNITS):
        own = value if value.dim() == 0 else value[unit.layer, unit.head]
        for k, name in enumerate(mech.block_names):
            dense, gradients = _brute_force(model, tokens, unit, name)
            probe = _autograd(model, own, unit, name).double()
            assert probe.abs().max() > 0
            ihvp = torch.linalg.solve(dense, probe.flatten()).view_as(probe)
            expected = -(gradients * ihvp).sum((1, 2))
            scale = expected.abs().max()
            torch.testing.assert_close(
                found.values[:, i, k].double() / scale, expected / scale, atol=1e-5, rtol=0
            )
    losses = torch.stack([_summed_loss(model, row) / (len(row) - 1) for row in tokens])
    torch.testing.assert_close(found.loss, losses.detach(), atol=1e-5, rtol=1e-5)


def test_trace_identity(tokens) -> None:
    """sum(Λ) is the mean squared norm of the per-sequence gradients, whatever the basis."""
    model = random_neox()
    ekfac = SubspaceEKFAC.fit(model, UNITS, BLOCKS, [tokens], fisher="empirical")
    for (unit, name), factors in ekfac.factors.items():
        gradients = [_autograd(model, _summed_loss(model, row), unit, name) for row in tokens]
        mean = torch.stack([g.double().square().sum() for g in gradients]).mean()
        assert float(factors.eigenvalues.sum()) == pytest.approx(float(mean), rel=1e-4)


def test_solve_undoes_apply_and_leaves_grad_alone(tokens) -> None:
    model = random_neox()
    ekfac = SubspaceEKFAC.fit(model, UNITS, BLOCKS, [tokens], seed=1)
    probe = probe_gradients(model, mechanism("induction", token_ids=range(1, 40)), UNITS)
    vectors = {key: value.double() for key, value in probe.items()}
    for key, back in ekfac.apply(ekfac.solve(vectors)).items():
        torch.testing.assert_close(back, vectors[key], atol=1e-9, rtol=1e-7)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_scores_do_not_depend_on_the_batching(tokens, fisher) -> None:
    model = random_neox()
    mech = mechanism("induction", token_ids=range(1, 40), probe_function="copy_logprob")
    probe = probe_gradients(model, mech, UNITS)

    def scores(cut: list[int]) -> torch.Tensor:
        batches = list(tokens.split(cut))
        ekfac = SubspaceEKFAC.fit(model, UNITS, BLOCKS, batches, fisher=fisher, seed=3)
        return replay_scores(model, ekfac.solve(probe), batches).values

    whole, ones = scores([9]), scores([1] * 9)
    assert whole.std() > 0
    torch.testing.assert_close(whole, ones, atol=1e-4 * float(whole.abs().max()), rtol=1e-4)


def test_a_small_step_on_a_sample_moves_f_by_its_score(tokens) -> None:
    """Identity curvature, SGD on the unit's own weights: Δf = ε·s + O(ε²). The sign matters."""
    unit, step = Head(1, 1), 1e-3
    for probe_function in ("attention", "copy_logprob"):
        model = random_neox(dtype=torch.float64)
        mech = mechanism("induction", token_ids=range(1, 40), probe_function=probe_function)
        score = replay_scores(model, probe_gradients(model, mech, [unit]), [tokens[:1]])
        before = mech.probe(model).detach()
        loss = _summed_loss(model, tokens[0])
        moves = {name: _autograd(model, loss, unit, name) for name in mech.block_names}
        norm = math.sqrt(sum(float(m.square().sum()) for m in moves.values()))
        with torch.no_grad():
            for name, move in moves.items():
                module, rows, columns = _block_slices(model, unit, name)
                module.weight[rows, columns] -= step / norm * move
        change = mech.probe(model).detach() - before
        change = change if change.dim() == 0 else change[unit.layer, unit.head]
        predicted = step / norm * float(score.values.sum())
        assert float(change) == pytest.approx(predicted, rel=0.05)
        assert abs(predicted) > 1e-8


def test_gradients_through_later_heads_are_kept(tokens) -> None:
    """L0's probe gradient runs through L1's attention and MLP; cutting them changes it."""
    model = random_neox()
    mech = mechanism("induction", token_ids=range(1, 40), probe_function="copy_logprob")
    found = probe_gradients(model, mech, [Head(0, 0)])[Head(0, 0), "V"]
    full = _autograd(model, mech.probe(model), Head(0, 0), "V")
    torch.testing.assert_close(found, full, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        model.gpt_neox.layers[1].attention.dense.weight.zero_()
    cut = _autograd(model, mech.probe(model), Head(0, 0), "V")
    assert (full - cut).abs().max() > 1e-3 * full.abs().max()


def test_training_step_scorer_equals_replay_at_the_same_weights(tokens) -> None:
    """From the step's own backward of a weighted mean loss, the scale undone."""
    model = random_neox()
    mech = mechanism("induction", token_ids=range(1, 40), probe_function="copy_logprob")
    ihvp = SubspaceEKFAC.fit(model, UNITS, BLOCKS, [tokens], seed=0).solve(
        probe_gradients(model, mech, UNITS)
    )
    expected = replay_scores(model, ihvp, [tokens]).values

    model.train()
    scorer = TrainingStepScorer(model, UNITS, BLOCKS)
    scorer.set_ihvp(ihvp)
    scorer.start()
    weight = torch.linspace(0.5, 2.0, len(tokens))
    logits = model(tokens[:, :-1]).logits
    each = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
    (weight * each).sum().div(len(tokens)).backward()
    length = tokens.shape[1] - 1
    found = scorer.collect(length * len(tokens) / weight)
    assert found is not None
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)
    assert scorer.collect(1.0) is None
    scorer.remove()
    assert not any(m._forward_hooks for m in model.modules())


def test_watched_training_has_the_same_gradients(tokens) -> None:
    def gradients(watched: bool) -> list[torch.Tensor]:
        model = random_neox().train()
        scorer = TrainingStepScorer(model, UNITS, BLOCKS)
        if watched:
            scorer.set_ihvp(
                probe_gradients(model, mechanism("induction", probe_function="copy_logprob"), UNITS)
            )
            scorer.start()
        model(tokens[:, :-1], labels=tokens[:, :-1]).loss.backward()
        return [p.grad for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def test_sampled_labels_follow_the_model(tokens) -> None:
    """Frequencies of labels drawn by inverse CDF against the softmax they are drawn from."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(4, 6, bias=False)
    hidden = torch.randn(1, 1, 4, generator=generator).expand(1, 20000, 4)
    uniform = torch.rand(1, 20000, generator=generator)
    found = loss_at_hidden(head, hidden, None, uniform=uniform)
    logprob = torch.log_softmax(head(hidden[0, 0]), -1).detach()
    nearest = (-found.loss[0][:, None] - logprob).abs().argmin(1)
    frequency = torch.bincount(nearest, minlength=6) / 20000
    torch.testing.assert_close(frequency, logprob.exp(), atol=0.012, rtol=0)


def test_truncated_backward_equals_full_autograd(tokens) -> None:
    model = random_neox()
    names = list(describe(model).block(Head(1, 0), "QK").modules)
    backward = sequence_backward(model, names, tokens)
    kept = {}
    handle = model.get_submodule(names[0]).register_forward_hook(
        lambda _, __, output: kept.update(y=output)
    )
    loss = sum(_summed_loss_batch(model, tokens))
    handle.remove()
    expected = torch.autograd.grad(loss, kept["y"])[0]
    torch.testing.assert_close(backward.deltas[names[0]], expected, atol=1e-6, rtol=1e-4)


def _summed_loss_batch(model, tokens):
    logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").sum(1)


def test_identity_curvature_is_the_plain_dot_product(tokens) -> None:
    """With identity curvature the score is the dot product of full-model autograd gradients."""
    model = random_neox()
    mech = mechanism("previous_token", token_ids=range(1, 40), length=(8, 12))
    probe = probe_gradients(model, mech, UNITS)
    found = replay_scores(model, probe, [tokens])
    for i, unit in enumerate(UNITS):
        f = _autograd(model, mech.probe(model)[unit.layer, unit.head], unit, "QK")
        dots = [-(f * _autograd(model, _summed_loss(model, r), unit, "QK")).sum() for r in tokens]
        expected = torch.stack(dots)
        torch.testing.assert_close(
            found.values[:, i, 0], expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4
        )


def test_weights_hash_sees_one_bit() -> None:
    model, same = random_neox(), random_neox()
    assert weights_hash(model) == weights_hash(same)
    with torch.no_grad():
        same.gpt_neox.layers[0].attention.dense.weight[0, 0] += 1e-6
    assert weights_hash(model) != weights_hash(same)


def test_bad_input_is_named(tokens) -> None:
    model = random_neox()
    with pytest.raises(
        ValueError, match=r"head 9 is out of range: layer 1 of this model has heads 0\.\.1"
    ):
        SubspaceEKFAC.fit(model, [Head(1, 9)], BLOCKS, [tokens])
    with pytest.raises(CurvatureError, match="no sequences"):
        SubspaceEKFAC.fit(model, UNITS, BLOCKS, [])
    with pytest.raises(CurvatureError, match="damping -1"):
        SubspaceEKFAC.fit(model, UNITS, BLOCKS, [tokens], damping=-1)
    ekfac = SubspaceEKFAC.fit(model, UNITS[:1], ("V",), [tokens])
    with pytest.raises(CurvatureError, match="no curvature for L1H0 V"):
        ekfac.solve({(Head(1, 0), "V"): torch.zeros(8, 16)})
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.weight[0] = float("nan")
    with pytest.raises(CurvatureError, match="not finite"):
        SubspaceEKFAC.fit(model, UNITS, BLOCKS, [tokens])
