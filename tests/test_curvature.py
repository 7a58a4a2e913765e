"""Curvature beside EK-FAC's own formula: K-FAC, passes, subsets, files, and what is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import random_neox
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, LlamaConfig

from mda_lightning.architectures import describe
from mda_lightning.curvature import (
    CurvatureError,
    FactorKey,
    SubspaceEKFAC,
    fit_converged,
    load_factors,
    sampled_uniform,
    save_factors,
    score_correlation,
    tokens_hash,
)
from mda_lightning.gradients import probe_gradients, sequence_backward
from mda_lightning.influence import (
    config_hash,
    fit_and_score,
    replay_scores,
    token_scores,
    weights_hash,
    zero_probes,
)
from mda_lightning.mechanisms import mechanism
from mda_lightning.units import Head

BLOCKS = ("QK", "V", "O")
UNITS = [Head(0, 1), Head(1, 0)]


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(1, 40, (12, 13), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def copying():
    return mechanism("induction", token_ids=range(1, 40), probe_function="copy_logprob")


def _same_factors(a: SubspaceEKFAC, b: SubspaceEKFAC, *, rtol: float = 1e-4) -> None:
    """Equal as operators: bases are free to differ in sign and order."""
    generator = torch.Generator().manual_seed(1)
    for key, own in a.factors.items():
        v = torch.randn(own.eigenvalues.shape, generator=generator, dtype=torch.float64)
        first, second = a.apply({key: v})[key], b.apply({key: v})[key]
        torch.testing.assert_close(first, second, rtol=rtol, atol=rtol * float(first.abs().max()))


def test_kfac_is_the_kronecker_product_of_second_moments(tokens) -> None:
    """T · S ⊗ A built densely from batch-1 autograd, V of one head; damped by 0.1 of its mean."""
    model = random_neox()
    unit, head_dim = Head(1, 0), 8
    module = model.gpt_neox.layers[1].attention.query_key_value
    rows = slice(2 * head_dim, 3 * head_dim)
    a, s = 0.0, 0.0
    for row in tokens:
        kept = {}

        def keep(_, args, output, kept=kept):
            kept["x"], kept["y"] = args[0], output

        handle = module.register_forward_hook(keep)
        loss = F.cross_entropy(model(row[None, :-1]).logits[0], row[1:], reduction="sum")
        handle.remove()
        delta = torch.autograd.grad(loss, kept["y"])[0][0].double()[:, rows]
        x = kept["x"][0].detach().double()
        a, s = a + x.T @ x, s + delta.T @ delta
    length = tokens.shape[1] - 1
    n = len(tokens) * length
    dense = length * torch.kron(s / n, a / n)
    dense += 0.1 * dense.diagonal().mean() * torch.eye(len(dense), dtype=torch.float64)
    kfac = SubspaceEKFAC.fit(
        model, [unit], ("V",), tokens.split(5), kind="kfac", fisher="empirical"
    )
    assert head_dim == describe(model).head_dim
    v = torch.randn(kfac.factors[unit, "V"].eigenvalues.shape, dtype=torch.float64)
    expected = torch.linalg.solve(dense, v.flatten()).view_as(v)
    found = kfac.solve({(unit, "V"): v})[unit, "V"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_one_pass_equals_two_and_a_fit_followed_by_replay(tokens, copying, fisher) -> None:
    """Gradients kept from one forward against a second pass, and against separate calls."""
    model = random_neox()
    batches = tokens.split(5)
    previous = mechanism("previous_token", token_ids=range(1, 40), length=(8, 12))
    both = {"induction": copying, "previous_token": previous}
    once, kept = fit_and_score(model, both, UNITS, batches, fisher=fisher, seed=3)
    again, streamed = fit_and_score(model, both, UNITS, batches, fisher=fisher, seed=3, memory=0)
    assert once is not None and again is not None
    _same_factors(once, again)
    apart = SubspaceEKFAC.fit(model, UNITS, BLOCKS, batches, fisher=fisher, seed=3)
    _same_factors(once, apart)
    for name, own in both.items():
        separate = replay_scores(model, apart.solve(probe_gradients(model, own, UNITS)), batches)
        assert separate.values.std() > 0
        for found in (kept[name], streamed[name]):
            assert found.blocks == own.block_names
            scale = float(separate.values.abs().max())
            torch.testing.assert_close(found.values, separate.values, rtol=0, atol=1e-4 * scale)
            torch.testing.assert_close(found.loss, separate.loss, rtol=1e-5, atol=1e-6)


def test_curvature_of_the_first_sequences_scores_all(tokens, copying) -> None:
    """As a fit on those batches followed by a replay of everything."""
    model = random_neox()
    batches = tokens.split(3)
    curvature, found = fit_and_score(model, {"f": copying}, UNITS, batches, n_curvature=5)
    assert curvature is not None and curvature.n_sequences == 6
    apart = SubspaceEKFAC.fit(model, UNITS, BLOCKS, batches[:2])
    expected = replay_scores(model, apart.solve(probe_gradients(model, copying, UNITS)), [tokens])
    scale = float(expected.values.abs().max())
    torch.testing.assert_close(found["f"].values, expected.values, rtol=0, atol=1e-4 * scale)
    torch.testing.assert_close(found["f"].loss, expected.loss, rtol=1e-5, atol=1e-6)


def test_scores_do_not_depend_on_order_batches_or_shares(tokens, copying) -> None:
    """Sampled labels belong to a sequence, not to its place in the stream."""
    model = random_neox()
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    _, whole = fit_and_score(model, {"f": copying}, UNITS, [tokens], seed=5)
    _, shuffled = fit_and_score(model, {"f": copying}, UNITS, tokens[order].split(1), seed=5)
    values = whole["f"].values
    scale = float(values.abs().max())
    torch.testing.assert_close(shuffled["f"].values, values[order], rtol=0, atol=1e-4 * scale)
    ekfac = SubspaceEKFAC.fit(model, UNITS, BLOCKS, [tokens], seed=5)
    ihvp = ekfac.solve(probe_gradients(model, copying, UNITS))
    shares = [replay_scores(model, ihvp, [part]).values for part in tokens.split(3)]
    torch.testing.assert_close(torch.cat(shares), values, rtol=0, atol=1e-4 * scale)
    _, other = fit_and_score(model, {"f": copying}, UNITS, [tokens], seed=6)
    assert not torch.allclose(other["f"].values, values, rtol=1e-3)


def test_sampled_draws_belong_to_the_sequence(tokens) -> None:
    draws = sampled_uniform(0, tokens)
    assert torch.equal(sampled_uniform(0, tokens.flip(0)), draws.flip(0))
    assert not torch.equal(sampled_uniform(1, tokens), draws)
    assert float(draws.min()) >= 0 and float(draws.max()) < 1


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_shorter_samples_count_only_their_own_positions(tokens, copying, fisher) -> None:
    """Filled up with -1 in a batch they score as they do alone, and so does the curvature."""
    model = random_neox()
    lengths = [13, 4, 9, 2, 13, 6]
    alone = [tokens[i, :n][None] for i, n in enumerate(lengths)]
    padded = torch.full((len(lengths), 13), -1)
    for row, own in zip(padded, alone, strict=True):
        row[: own.shape[1]] = own[0]
    one, single = fit_and_score(model, {"f": copying}, UNITS, alone, fisher=fisher)
    other, together = fit_and_score(model, {"f": copying}, UNITS, [padded], fisher=fisher)
    assert one is not None and other is not None
    assert one.n_positions == other.n_positions == sum(n - 1 for n in lengths)
    _same_factors(one, other)
    scale = float(single["f"].values.abs().max())
    torch.testing.assert_close(together["f"].values, single["f"].values, rtol=0, atol=1e-4 * scale)
    torch.testing.assert_close(together["f"].loss, single["f"].loss, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="fill up on the right only"):
        sequence_backward(model, [], torch.tensor([[-1, 3, 4]]))
    with pytest.raises(ValueError, match="sequence 1 of the batch has fewer than 2 tokens"):
        sequence_backward(model, [], torch.tensor([[3, 4, 5], [3, -1, -1]]))


@pytest.mark.parametrize("probe_function", ["copy_logprob", "attention"])
def test_biases_are_one_more_input_column(tokens, probe_function) -> None:
    """Scores with biases against batch-1 autograd and a dense inverse of the widened block."""
    model = random_neox()
    settings = {"token_ids": range(1, 40), "probe_function": probe_function, "bias": True}
    own = mechanism("induction", **settings)
    assert own.block_names == ("QK+bias", "V+bias", "O")[: 3 if "copy" in probe_function else 1]
    padded = tokens.clone()
    padded[4, 7:] = -1
    curvature, scores = fit_and_score(model, {"f": own}, UNITS, padded.split(5), fisher="empirical")
    assert curvature is not None
    value = own.probe(model)
    ihvp = curvature.solve(probe_gradients(model, own, UNITS))
    again = replay_scores(model, ihvp, [padded]).values  # formed layer by layer
    torch.testing.assert_close(
        again, scores["f"].values, rtol=0, atol=1e-4 * float(again.abs().max())
    )
    for i, unit in enumerate(UNITS):
        module = model.gpt_neox.layers[unit.layer].attention.query_key_value
        f = value if value.dim() == 0 else value[unit.layer, unit.head]

        def gradient(of, rows, module=module):
            weight, bias = torch.autograd.grad(of, [module.weight, module.bias], retain_graph=True)
            return torch.cat([weight[rows], bias[rows, None]], dim=1).detach().double()

        for k, of_kind in enumerate(((0, 16), (16, 24))):
            if k == len(own.block_names):
                break
            rows = slice(*(24 * unit.head + edge for edge in of_kind))
            a, s, n, gradients = 0.0, 0.0, 0, []
            for row in padded:
                row = row[row >= 0]
                kept = {}

                def keep(_, args, output, kept=kept):
                    kept.update(x=args[0], y=output)

                handle = module.register_forward_hook(keep)
                loss = F.cross_entropy(model(row[None, :-1]).logits[0], row[1:], reduction="sum")
                handle.remove()
                delta = torch.autograd.grad(loss, kept["y"], retain_graph=True)[0][0][:, rows]
                x = kept["x"][0].detach().double()
                x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
                a, s, n = a + x.T @ x, s + delta.double().T @ delta.double(), n + len(x)
                gradients.append(gradient(loss, rows))
            u_a, u_s = torch.linalg.eigh(a / n).eigenvectors, torch.linalg.eigh(s / n).eigenvectors
            stacked = torch.stack(gradients)
            spectrum = (u_s.T @ stacked @ u_a).square().mean(0)
            probe = u_s.T @ gradient(f, rows) @ u_a
            ihvp = u_s @ (probe / (spectrum + 0.1 * spectrum.mean())) @ u_a.T
            expected = -(stacked * ihvp).sum((1, 2))
            scale = float(expected.abs().max())
            found = scores["f"].values[:, i, k].double()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale)
    with pytest.raises(ValueError, match=r"self_attn.q_proj of this llama has none"):
        mechanism("induction", **settings).check(
            AutoModelForCausalLM.from_config(
                LlamaConfig(
                    vocab_size=48,
                    hidden_size=16,
                    intermediate_size=32,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    bos_token_id=0,
                    eos_token_id=0,
                )
            )
        )


def test_token_scores_sum_to_the_sample_and_belong_to_their_position(tokens, copying) -> None:
    model = random_neox()
    ekfac = SubspaceEKFAC.fit(model, UNITS, BLOCKS, [tokens], fisher="empirical")
    ihvp = ekfac.solve(probe_gradients(model, copying, UNITS))
    parts = token_scores(model, ihvp, tokens)
    whole = replay_scores(model, ihvp, [tokens])
    assert parts.values.shape == (12, 12, 2, 3)
    scale = float(whole.values.abs().max())
    torch.testing.assert_close(parts.values.sum(1), whole.values, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(parts.loss.mean(1), whole.loss, rtol=1e-5, atol=1e-5)
    # Position t of O by autograd: zero δ elsewhere, so the weight's gradient is that position's.
    unit, t = Head(1, 0), 4
    dense = model.gpt_neox.layers[1].attention.dense
    kept = {}

    def keep(_, args, output):
        kept.update(x=args[0], y=output)

    handle = dense.register_forward_hook(keep)
    logits = model(tokens[:1, :-1]).logits[0]
    handle.remove()
    loss = F.cross_entropy(logits, tokens[0, 1:], reduction="sum")
    delta = torch.autograd.grad(loss, kept["y"])[0][0, t]
    gradient = torch.outer(delta, kept["x"][0, t, :8])
    expected = -float((gradient.detach() * ihvp[unit, "O"]).sum())
    assert float(parts.values[0, t, 1, 2]) == pytest.approx(expected, rel=1e-4)


def test_predicted_correlation_is_that_of_real_scores(copying) -> None:
    """score_correlation against scores of gradients drawn with the curvature as covariance."""
    model = random_neox()
    tokens = torch.randint(1, 40, (24, 13), generator=torch.Generator().manual_seed(3))
    probe = probe_gradients(model, copying, UNITS)
    few = SubspaceEKFAC.fit(model, UNITS, BLOCKS, [tokens[:6]], seed=0)
    many = SubspaceEKFAC.fit(model, UNITS, BLOCKS, [tokens], seed=0)
    a, b = few.solve(probe), many.solve(probe)
    predicted = score_correlation(many, a, b)
    generator = torch.Generator().manual_seed(0)
    for unit in UNITS:
        scores = [0.0, 0.0]
        for name in BLOCKS:
            own = many.factors[unit, name]
            noise = torch.randn(20000, *own.eigenvalues.shape, generator=generator).double()
            gradients = own.basis_s @ (noise * own.eigenvalues.sqrt()) @ own.basis_a.T
            for i, v in enumerate((a, b)):
                scores[i] = scores[i] + (gradients * v[unit, name]).sum((1, 2))
        real = float(np.corrcoef(scores[0].numpy(), scores[1].numpy())[0, 1])
        assert predicted[unit] == pytest.approx(real, abs=0.02)
        assert predicted[unit] < 0.999


def test_the_subset_grows_until_scores_stay(copying) -> None:
    """It stops by itself, reads no more than it needs, and scores as all of the data would."""
    model = random_neox()
    tokens = torch.randint(1, 40, (512, 13), generator=torch.Generator().manual_seed(3))
    probe = probe_gradients(model, copying, UNITS)
    read = []

    def batches():
        for part in tokens.split(10):
            read.append(len(part))
            yield part

    found = fit_converged(
        model, UNITS, BLOCKS, batches(), [probe], tolerance=0.9, first=8, fisher="empirical"
    )
    sizes = [n for n, _ in found.convergence]
    assert sizes == [16 * 2**i for i in range(len(sizes))]
    assert found.n_sequences == sizes[-1] < 512 and sum(read) < sizes[-1] + 10
    values = [value for _, value in found.convergence]
    assert values[-1] >= 0.9 and all(value < 0.9 for value in values[:-1])
    plain = SubspaceEKFAC.fit(model, UNITS, BLOCKS, [tokens[: sizes[-1]]], fisher="empirical")
    _same_factors(found, plain)
    everything = SubspaceEKFAC.fit(model, UNITS, BLOCKS, [tokens], fisher="empirical")
    scores = [
        replay_scores(model, own.solve(probe), [tokens]).values.sum(2)
        for own in (found, everything)
    ]
    for i in range(len(UNITS)):
        assert spearmanr(scores[0][:, i], scores[1][:, i])[0] > 0.9
    with pytest.warns(UserWarning, match="all 20 sequences given and has not converged"):
        fit_converged(model, UNITS, BLOCKS, [tokens[:20]], [probe], tolerance=0.9999, first=8)
    with pytest.raises(ValueError, match="tolerance is 1"):
        fit_converged(model, UNITS, BLOCKS, [tokens], [probe], tolerance=1)


def test_what_is_left_over_is_not_half_as_many(copying) -> None:
    """33 sequences against 32 say nothing of 64."""
    model = random_neox()
    tokens = torch.randint(1, 40, (33, 13), generator=torch.Generator().manual_seed(3))
    probe = probe_gradients(model, copying, UNITS)
    with pytest.warns(UserWarning, match="cannot be told"):
        found = fit_converged(model, UNITS, BLOCKS, [tokens], [probe], tolerance=0.5)
    assert found.n_sequences == 33 and found.convergence == ()
    with pytest.warns(UserWarning, match="has not converged: the least correlation"):
        found = fit_converged(model, UNITS, BLOCKS, [tokens], [probe], tolerance=0.999, first=16)
    assert [n for n, _ in found.convergence] == [32] and found.n_sequences == 33


def test_the_configuration_is_part_of_what_determines_scores() -> None:
    model, other = random_neox(), random_neox(parallel=False)
    assert weights_hash(model) == weights_hash(other)
    assert config_hash(model) == config_hash(random_neox()) != config_hash(other)
    model.config._name_or_path = "elsewhere"
    assert config_hash(model) == config_hash(random_neox())


def test_damping_is_added_afterwards(tokens) -> None:
    model = random_neox()
    made = SubspaceEKFAC.fit(model, UNITS, BLOCKS, [tokens], damping=0.5)
    changed = SubspaceEKFAC.fit(model, UNITS, BLOCKS, [tokens]).damped(0.5)
    key = (UNITS[0], "V")
    v = torch.randn(made.factors[key].eigenvalues.shape, dtype=torch.float64)
    torch.testing.assert_close(made.solve({key: v})[key], changed.solve({key: v})[key])
    absolute = made.damped(1e9, "absolute").solve({key: v})[key]
    torch.testing.assert_close(absolute * 1e9, v, rtol=1e-3, atol=1e-6)
    with pytest.raises(CurvatureError, match="damping nan"):
        made.damped(float("nan"))


def _key(model, tokens) -> FactorKey:
    return FactorKey(
        weights=weights_hash(model),
        config=config_hash(model),
        data=tokens_hash([tokens]),
        layout=FactorKey.layout_of(model, UNITS, BLOCKS),
        kind="ekfac",
        fisher="sampled",
        seed=0,
    )


def test_factors_come_back_from_their_file(tokens, tmp_path) -> None:
    model = random_neox()
    key = _key(model, tokens)
    assert load_factors(tmp_path, key, damping=0.1) is None
    made = SubspaceEKFAC.fit(model, UNITS, BLOCKS, [tokens])
    path = save_factors(tmp_path, key, made)
    back = load_factors(tmp_path, key, damping=0.1)
    assert back is not None and back.to_provenance() == made.to_provenance()
    for block, own in made.factors.items():
        for part in ("basis_a", "basis_s", "eigenvalues"):
            assert torch.equal(getattr(back.factors[block], part), getattr(own, part))
    # Bases that blocks share are one: two of A for the layers' inputs, and so on.
    assert len({id(own.basis_a) for own in back.factors.values()}) == 4
    path.write_bytes(path.read_bytes()[:-100])
    assert load_factors(tmp_path, key, damping=0.1) is None


@pytest.mark.parametrize(
    "change", ["weights", "config", "data", "layout", "kind", "fisher", "seed", "size", "loss"]
)
def test_a_key_covers_what_determines_the_factors(tokens, change) -> None:
    key = _key(random_neox(), tokens)
    other = 1 if change == "seed" else "other"
    assert replace(key, **{change: other}).name != key.name


def test_the_key_sees_dtype_units_and_tokens(tokens) -> None:
    model = random_neox()
    key = _key(model, tokens)
    half = random_neox(dtype=torch.bfloat16)
    assert FactorKey.layout_of(half, UNITS, BLOCKS) != key.layout
    assert FactorKey.layout_of(model, UNITS[:1], BLOCKS) != key.layout
    assert tokens_hash(tokens.split(2)) == key.data
    assert tokens_hash([tokens.flip(0)]) != key.data


def test_sequences_with_broken_gradients_are_left_out_and_counted(tokens, copying) -> None:
    """A token whose embedding is infinite spoils its own sequences and no other."""
    model, fine = random_neox(), random_neox()
    tokens = tokens.clone()
    tokens[tokens == 5] = 6
    tokens[3, 2] = tokens[8, 7] = 5
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[5] = torch.inf
        fine.gpt_neox.embed_in.weight[5] = 0.0
    good = [i for i in range(12) if i not in (3, 8)]
    copying = mechanism("induction", token_ids=range(6, 40), probe_function="copy_logprob")
    with pytest.warns(UserWarning) as caught:
        broken, scores = fit_and_score(
            model, {"f": copying}, UNITS, tokens.split(5), fisher="empirical"
        )
    said = " | ".join(str(one.message) for one in caught)
    assert "curvature sequences 3" in said and "sequences 8" in said
    assert "2 of 12 samples have a gradient that is not finite" in said
    assert broken is not None and broken.n_not_finite == 2 and broken.n_sequences == 10
    expected, clean = fit_and_score(fine, {"f": copying}, UNITS, [tokens[good]], fisher="empirical")
    assert expected is not None
    _same_factors(broken, expected)
    assert torch.isnan(scores["f"].values[[3, 8]]).all()
    scale = float(clean["f"].values.abs().max())
    torch.testing.assert_close(
        scores["f"].values[good], clean["f"].values, rtol=0, atol=1e-4 * scale
    )


def test_a_head_without_gradient_has_no_score_and_is_named(tokens, copying) -> None:
    """V's gradient vanishes where O is zero, and the other way round: the head is dead."""
    model = random_neox()
    with torch.no_grad():
        model.gpt_neox.layers[1].attention.dense.weight[:, :8] = 0
        model.gpt_neox.layers[1].attention.query_key_value.weight[16:24] = 0
        model.gpt_neox.layers[1].attention.query_key_value.bias[16:24] = 0
    ekfac = SubspaceEKFAC.fit(model, UNITS, BLOCKS, [tokens])
    probe = probe_gradients(model, copying, UNITS)
    assert zero_probes(probe) == [Head(1, 0)]
    with pytest.warns(UserWarning, match="no sequence has a gradient in L1H0 QK, L1H0 V, L1H0 O"):
        solved = ekfac.solve(probe)
    assert torch.isnan(solved[Head(1, 0), "V"]).all()
    assert torch.isfinite(solved[Head(0, 1), "V"]).all()


def test_a_probe_that_reaches_no_weight_is_refused(tokens) -> None:
    class Detached(type(mechanism("induction"))):
        def probe(self, model):
            return super().probe(model).detach()

    with pytest.raises(ValueError, match="'induction' does not depend on the model's weights"):
        probe_gradients(random_neox(), Detached(token_ids=range(1, 40)), UNITS)


def test_fewer_positions_than_directions_are_said(tokens) -> None:
    model = random_neox()
    with pytest.warns(UserWarning, match="on 12 positions, fewer than the 16 directions"):
        SubspaceEKFAC.fit(model, UNITS, BLOCKS, [tokens[:1]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SubspaceEKFAC.fit(model, UNITS, BLOCKS, [tokens])
