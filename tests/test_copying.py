"""Copying: the activation evaluator against a plain loop, eigenvalues against the dense matrix."""

from __future__ import annotations

import pytest
import torch
from models import COPY_VOCABULARY, OTHER_FAMILIES, copying_neox, random_model, random_neox

from mda_lightning.architectures import describe
from mda_lightning.measures import measure
from mda_lightning.metrics import CopyingScore, copying_per_sequence, ov_eigenvalue_scores
from mda_lightning.metrics.copying import _values_and_attention, copying_sequences
from mda_lightning.units import Head

IDS = list(range(1, COPY_VOCABULARY))


def scores_of(model, **settings):
    metric = CopyingScore(model, **settings)
    metric.update(model)
    return metric.compute()


def test_a_hand_built_head_that_copies_scores_one_and_negated_minus_one() -> None:
    model = copying_neox()
    scores = scores_of(model, token_ids=IDS, length=20)
    assert scores["copying"].mean[1, 0] > 0.99
    assert scores["copying/eigenvalues"].mean[1, 0] == pytest.approx(1.0)
    # The other heads write nothing that is read, and are put at chance.
    chance = 2 / 20 - 1
    others = scores["copying"].mean.flatten()[[0, 1, 3]]
    assert others.tolist() == pytest.approx([chance] * 3, abs=2e-3)
    assert scores["copying/eigenvalues"].mean.flatten()[[0, 1, 3]].tolist() == [0, 0, 0]
    with torch.no_grad():
        model.gpt_neox.layers[1].attention.dense.weight.neg_()
    scores = scores_of(model, token_ids=IDS, length=20)
    assert scores["copying"].mean[1, 0] < -0.99
    assert scores["copying/eigenvalues"].mean[1, 0] == pytest.approx(-1.0)


@torch.no_grad()
def plain_copying(model, row: torch.Tensor, layer: int, head: int) -> float:
    """The definition, term by term, for a GPT-NeoX: one query and one key at a time."""
    model.set_attn_implementation("eager")
    run = model(row[None], output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    pattern = run.attentions[layer][0, head]
    block = model.gpt_neox.layers[layer]
    size = model.config.hidden_size // model.config.num_attention_heads
    start = head * 3 * size + 2 * size
    fused = block.attention.query_key_value
    normed = block.input_layernorm(run.hidden_states[layer][0])
    norm, unembed = model.gpt_neox.final_layer_norm, model.get_output_embeddings().weight
    own = total = 0.0
    for q in range(len(row)):
        for k in range(q + 1):
            v = fused.weight[start : start + size] @ normed[k] + fused.bias[start : start + size]
            written = block.attention.dense.weight[:, head * size : (head + 1) * size] @ v
            logits = unembed @ ((written - written.mean()) * norm.weight)
            raised = (logits - logits.mean()).clamp(min=0)
            own += float(pattern[q, k] * raised[row[k]])
            total += float(pattern[q, k] * sum(raised[j] for j in row))
    return 2 * own / total - 1


def test_activation_score_is_the_definition_term_by_term() -> None:
    model = random_neox()
    tokens = copying_sequences(range(1, 40), seed=1, n_sequences=2, length=12)
    found = copying_per_sequence(model, tokens)
    expected = [
        [[plain_copying(model, row, layer, head) for head in range(2)] for layer in range(2)]
        for row in tokens
    ]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-4)
    assert found.std() > 0.01


@pytest.mark.parametrize("family", ["gpt_neox", *OTHER_FAMILIES])
def test_terms_add_up_to_what_the_head_gives_its_output_projection(family: str) -> None:
    """Σ_k A[q, k] v_k at the last query is the head's slice of the output projection's input."""
    model = random_model(family)
    layout = describe(model)
    tokens = copying_sequences(range(1, 40), seed=1, n_sequences=3, length=12)
    seen = {}
    handles = [
        model.get_submodule(layout.output_name(layer)).register_forward_pre_hook(
            lambda module, args, layer=layer: seen.__setitem__(layer, args[0].detach())
        )
        for layer in range(layout.n_layers)
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        values, received = _values_and_attention(model, layout, tokens)
    for layer in range(layout.n_layers):
        z = seen[layer].unflatten(-1, (layout.n_heads, layout.head_dim))
        found = torch.einsum("nhk,nkhe->nhe", received[layer], values[layer])
        torch.testing.assert_close(found, z.sum(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt_neox", *OTHER_FAMILIES])
@torch.no_grad()
def test_eigenvalues_are_those_of_the_dense_circuit(family: str) -> None:
    """Σ Re λ / Σ |λ| of W_U W_O W_V W_Eᵀ, [V, V], with all of its V eigenvalues."""
    model = random_model(family)
    layout = describe(model)
    found = ov_eigenvalue_scores(model)
    embedding = model.get_input_embeddings().weight.double()
    unembed = model.get_output_embeddings().weight.double()
    for unit in [Head(0, 0), Head(1, 3)]:
        v, o = (layout.weight(model, layout.block(unit, name)).double() for name in ("V", "O"))
        values = torch.linalg.eigvals(unembed @ o @ v @ embedding.T)
        expected = values.real.sum() / values.abs().sum()
        assert float(found[unit.layer, unit.head]) == pytest.approx(float(expected), abs=1e-4)
    assert found.abs().max() <= 1


def test_scores_do_not_depend_on_the_scale_of_the_output() -> None:
    model = random_neox()
    tokens = copying_sequences(range(1, 40), seed=1, n_sequences=2, length=12)
    before = copying_per_sequence(model, tokens)[:, -1]
    with torch.no_grad():
        model.gpt_neox.layers[-1].attention.dense.weight *= 3
        model.gpt_neox.final_layer_norm.weight *= 5
    torch.testing.assert_close(copying_per_sequence(model, tokens)[:, -1], before)


def test_metric_states_add_up_over_ranks() -> None:
    model = random_neox()
    tokens = copying_sequences(range(1, 40), seed=1, n_sequences=7, length=12)
    parts = [CopyingScore(model, tokens=t) for t in (tokens[:3], tokens[3:])]
    whole, merged = (CopyingScore(model, tokens=tokens) for _ in range(2))
    for metric in (*parts, whole):
        metric.update(model)
    for name in merged._defaults:
        assert merged._reductions[name].__name__ == "dim_zero_sum"
        setattr(merged, name, getattr(parts[0], name) + getattr(parts[1], name))
    merged._update_count = 1
    for key, scores in merged.compute().items():
        torch.testing.assert_close(scores.mean, whole.compute()[key].mean)
        torch.testing.assert_close(scores.se, whole.compute()[key].se)
    each = copying_per_sequence(model, tokens)
    torch.testing.assert_close(whole.compute()["copying"].se, each.std(0) / 7**0.5)


def test_broken_weights_are_nan_in_their_own_places() -> None:
    model = random_neox()
    with torch.no_grad():
        model.gpt_neox.layers[1].attention.dense.weight[:, :8] = torch.nan
    scores = scores_of(model, token_ids=range(1, 40))
    for found in scores.values():
        assert found.mean.isnan().tolist() == [[False, False], [True, False]]


def test_measure_is_the_metric_and_leaves_the_model_alone() -> None:
    model = random_neox().train()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    copying = measure("copying").with_token_ids(list(range(1, 40)))
    copying.check(model)
    found = copying.measure(model)
    expected = scores_of(model, token_ids=range(1, 40))
    assert list(found) == ["copying", "copying/eigenvalues"]
    for key in found:
        assert torch.equal(found[key].mean, expected[key].mean)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and model.config._attn_implementation == "sdpa"
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert copying.settings() != measure("copying").settings()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_ids": tuple(range(10))}, "10 distinct token ids are too few"),
        ({"token_ids": tuple(range(100, 140))}, "not in the model's vocabulary 0..39"),
        ({"length": 65}, "65 tokens is longer than the model's 64"),
    ],
)
def test_bad_settings_are_refused_before_training(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure("copying", **settings).check(random_neox())
