"""Ablation logit contribution against models whose weights or activations are changed by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from models import COPY_VOCABULARY, OTHER_FAMILIES, copying_neox, random_model, random_neox
from torch import nn

from mda_lightning.architectures import describe, output_by_input
from mda_lightning.measures import Measure, measure
from mda_lightning.mechanisms import mechanism
from mda_lightning.metrics import AblationContribution, ablation_drops
from mda_lightning.probes import ablation_sequences, repeated_sequences

FAMILIES = ("gpt_neox", *OTHER_FAMILIES)


def drops_of(model, ablated, probes) -> torch.Tensor:
    """(logit, centred, log-probability) lost, [3, N], from two models' full logits."""
    values = []
    for each in (model, ablated):
        with torch.no_grad():
            logits = each(input_ids=probes.tokens).logits[:, -1].double()
        own = logits.gather(1, probes.target[:, None])[:, 0]
        values.append(
            torch.stack(
                [
                    own,
                    own - logits.mean(1),
                    torch.log_softmax(logits, -1).gather(1, probes.target[:, None])[:, 0],
                ]
            )
        )
    return values[0] - values[1]


def without_head(model, layer: int, head: int):
    """A copy of the model whose output projection ignores one head; its bias stays."""
    changed = copy.deepcopy(model)
    layout = describe(changed)
    with torch.no_grad():
        linear = changed.get_submodule(layout.output_name(layer))
        width = layout.head_dim
        output_by_input(linear)[:, head * width : (head + 1) * width] = 0
    return changed


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_zeroing_the_weights_of_every_head_of_every_family(family: str) -> None:
    model = random_model(family, n_layers=3)
    probes = ablation_sequences(range(1, 40), seed=0, n_sequences=6, length=14)
    found = torch.stack(ablation_drops(model, probes)).double()
    for layer in range(3):
        for head in range(4):
            expected = drops_of(model, without_head(model, layer, head), probes)
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(found[:, :, layer, head], expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("parallel", [True, False])
def test_exact_in_float64_for_both_residual_forms(parallel: bool) -> None:
    model = random_neox(n_layers=3, parallel=parallel, dtype=torch.float64)
    probes = ablation_sequences(range(1, 40), seed=1, n_sequences=5, length=12)
    found = torch.stack(ablation_drops(model, probes)).double()
    for layer in range(3):
        for head in range(2):
            expected = drops_of(model, without_head(model, layer, head), probes)
            torch.testing.assert_close(found[:, :, layer, head], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("replacement", ["mean", "resample"])
def test_replacements_equal_a_loop_with_a_hook(replacement: str) -> None:
    """The head's output replaced in a pre-hook, one head at a time, with full logits."""
    model = random_neox(n_layers=2)
    layout = describe(model)
    probes = ablation_sequences(range(1, 40), seed=2, n_sequences=7, length=13)
    found = torch.stack(ablation_drops(model, probes, replacement=replacement, seed=5)).double()
    partners = None
    if replacement == "resample":
        order = torch.randperm(7, generator=torch.Generator().manual_seed(5))
        partners = torch.empty(7, dtype=torch.int64)
        for place, sequence in enumerate(order):
            partners[sequence] = order[(place + 1) % 7]
        assert not (partners == torch.arange(7)).any()
    for layer in range(2):
        module = model.get_submodule(layout.output_name(layer))
        kept = []
        handle = module.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        with torch.no_grad():
            model(input_ids=probes.tokens)
        handle.remove()
        z = kept[0]
        for head in range(2):
            columns = slice(head * layout.head_dim, (head + 1) * layout.head_dim)
            value = z[..., columns].mean((0, 1)) if partners is None else z[partners][..., columns]

            def replace(_, args, columns=columns, value=value):
                changed = args[0].clone()
                changed[..., columns] = value
                return (changed,)

            ablated = copy.deepcopy(model)
            ablated.get_submodule(layout.output_name(layer)).register_forward_pre_hook(replace)
            expected = drops_of(model, ablated, probes)
            torch.testing.assert_close(found[:, :, layer, head], expected, atol=2e-6, rtol=1e-6)


def test_the_cut_into_chunks_changes_nothing() -> None:
    model = random_neox(n_layers=2)
    probes = ablation_sequences(range(1, 40), seed=3, n_sequences=9, length=12)
    for replacement in ("zero", "mean", "resample"):
        whole = ablation_drops(model, probes, replacement=replacement)
        parts = ablation_drops(model, probes, replacement=replacement, chunk_numbers=2000)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_the_copying_head_carries_the_prediction() -> None:
    probes = ablation_sequences(range(COPY_VOCABULARY), seed=0, n_sequences=12, length=12)
    drops = ablation_drops(copying_neox(), probes)
    assert drops.logprob[:, 1, 0].min() > 1.0
    assert drops.logit[:, 1, 0].min() > 1.0
    for layer, head in ((0, 1), (1, 1)):  # heads of zero weights
        assert drops.logit[:, layer, head].abs().max() < 1e-5


def test_only_the_raw_logit_depends_on_the_gauge() -> None:
    """The same vector added to every row of the unembedding changes no prediction."""
    model = random_neox()
    probes = ablation_sequences(range(1, 40), seed=0, n_sequences=6, length=12)
    before = ablation_drops(model, probes)
    with torch.no_grad():
        model.get_output_embeddings().weight += torch.linspace(-1, 1, 16)
    after = ablation_drops(model, probes)
    assert (before.logit - after.logit).abs().max() > 0.1
    torch.testing.assert_close(before.centred, after.centred, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(before.logprob, after.logprob, atol=1e-5, rtol=1e-5)


def test_probe_sequences_have_the_form_of_the_paper() -> None:
    probes = ablation_sequences(range(5, 90), seed=0, n_sequences=50, length=20)
    for row, query, key, target in zip(
        probes.tokens.tolist(), probes.query, probes.key, probes.target, strict=True
    ):
        a, b = row[-2:]
        first = row.index(a)
        assert row[first : first + 3] == [a, b, int(target)]
        assert (int(query), int(key)) == (19, first + 2)
        assert first >= 1 and first + 3 < 18  # a prefix and a gap
        assert len(set(row)) == 18 and row.count(int(target)) == 1


def test_the_metric_is_the_mean_over_sequences_and_its_error() -> None:
    model = random_neox()
    probes = ablation_sequences(range(1, 40), seed=4, n_sequences=8, length=10)
    metric = AblationContribution(probes, n_layers=2, n_heads=2)
    metric.update(model)
    drops = ablation_drops(model, probes)
    for key, scores in metric.compute().items():
        values = getattr(drops, key).double()
        torch.testing.assert_close(scores.mean.double(), values.mean(0), atol=1e-6, rtol=1e-5)
        error = values.std(0) / 8**0.5
        torch.testing.assert_close(scores.se.double(), error, atol=1e-6, rtol=1e-4)


def test_the_model_is_as_before() -> None:
    model = random_neox()
    model.train()
    before = (
        model.config._attn_implementation,
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    metric = AblationContribution(
        ablation_sequences(range(1, 40), seed=4, n_sequences=3, length=10), n_layers=2, n_heads=2
    )
    metric.update(model)
    assert model.config._attn_implementation == before[0] and model.training
    assert all(torch.equal(v, before[1][k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bad_input_is_named() -> None:
    model = random_neox()
    probes = ablation_sequences(range(1, 40), seed=0, n_sequences=3, length=10)
    with pytest.raises(ValueError, match="'zreo' is not one of"):
        ablation_drops(model, probes, replacement="zreo")
    with pytest.raises(ValueError, match="ablation_sequences"):
        ablation_drops(model, repeated_sequences(range(1, 40), seed=0, n_sequences=3))
    one = ablation_sequences(range(1, 40), seed=0, n_sequences=1, length=10)
    with pytest.raises(ValueError, match="at least 2"):
        ablation_drops(model, one, replacement="resample")
    with pytest.raises(ValueError, match="at least 7"):
        ablation_sequences(range(1, 40), seed=0, length=6)


def test_as_a_measure_it_has_its_own_rate_sequences_and_keys() -> None:
    model = random_neox(n_heads=4)
    found = measure("ablation", n_sequences=6, length=10, every_n_steps=7)
    assert (found.name, found.every_n_steps) == ("ablation", 7)
    found.check(model)
    results = found.with_token_ids(list(range(1, 40))).measure(model)
    drops = ablation_drops(
        model, ablation_sequences(range(1, 40), seed=2, n_sequences=6, length=10)
    )
    assert set(results) == {"ablation/logit", "ablation/centred", "ablation/logprob"}
    for key, scores in results.items():
        expected = getattr(drops, key.split("/")[1]).mean(0)
        torch.testing.assert_close(scores.mean, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="70 tokens are longer than the model's context of 64"):
        measure("ablation", length=70).check(model)


def test_a_mechanisms_name_gives_its_score_as_a_measure() -> None:
    model = random_neox()
    found = measure("previous_token", n_sequences=5, every_n_steps=30, token_ids=range(40))
    expected = mechanism("previous_token", n_sequences=5, token_ids=range(40)).scores(model)
    assert found.every_n_steps == 30 and isinstance(found, Measure)
    assert torch.equal(found.measure(model)["previous_token"].mean, expected.mean)
    with pytest.raises(ValueError, match="'ablatoin' is not a measure; there are: ablation"):
        measure("ablatoin")


def test_an_adapter_on_the_output_projection_is_ablated_with_it() -> None:
    """A low-rank addition to the weight, against a hook that zeroes the head's input to both."""
    model = random_neox(n_layers=2)

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(3)
            self.base = base
            self.down = nn.Parameter(torch.randn(3, base.in_features, generator=generator))
            self.up = nn.Parameter(torch.randn(base.out_features, 3, generator=generator))

        @property
        def weight(self) -> torch.Tensor:
            return self.base.weight

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return self.base(z) + z @ self.down.T @ self.up.T

    for layer in model.gpt_neox.layers:
        layer.attention.dense = Adapted(layer.attention.dense)
    probes = ablation_sequences(range(1, 40), seed=0, n_sequences=4, length=12)
    found = torch.stack(ablation_drops(model, probes)).double()
    for layer in range(2):
        for head in range(2):

            def zero(_, args, head=head):
                z = args[0].clone()
                z[..., 8 * head : 8 * head + 8] = 0
                return (z,)

            ablated = copy.deepcopy(model)
            ablated.gpt_neox.layers[layer].attention.dense.register_forward_pre_hook(zero)
            expected = drops_of(model, ablated, probes)
            torch.testing.assert_close(found[:, :, layer, head], expected, atol=5e-6, rtol=1e-5)
