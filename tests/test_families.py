"""Every model family: patterns, blocks and scores against eager attention and plain autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models import OTHER_FAMILIES, random_model, random_neox
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, GraniteConfig, GraniteForCausalLM

from mda_lightning.architectures import (
    UnsupportedModelError,
    describe,
    find_language_model,
    real_token_ids,
)
from mda_lightning.curvature import SubspaceEKFAC
from mda_lightning.families import FAMILIES
from mda_lightning.family_check import check_family
from mda_lightning.gradients import probe_gradients
from mda_lightning.influence import TrainingStepScorer, replay_scores
from mda_lightning.mechanisms import mechanism
from mda_lightning.metrics import attention_per_sequence
from mda_lightning.probes import repeated_sequences
from mda_lightning.units import Head

ALL = ("gpt_neox", *OTHER_FAMILIES)
GROUPED = ("llama", "qwen2", "qwen3", "olmo2")
LAYERS = {
    "gpt_neox": lambda m: m.gpt_neox.layers,
    "gpt2": lambda m: m.transformer.h,
    "llama": lambda m: m.model.layers,
    "qwen2": lambda m: m.model.layers,
    "qwen3": lambda m: m.model.layers,
    "olmo2": lambda m: m.model.layers,
}


def block_by_hand(family: str, model, unit: Head, name: str):
    """[(weight, transposed, rows, columns)] of a block, written out family by family."""
    layer = LAYERS[family](model)[unit.layer]
    h, everything = unit.head, slice(None)
    if family == "gpt_neox":
        w, qkv, out = 4, layer.attention.query_key_value.weight, layer.attention.dense.weight
        rows = {"QK": slice(12 * h, 12 * h + 8), "V": slice(12 * h + 8, 12 * h + 12)}
        if name == "O":
            return [(out, False, everything, slice(w * h, w * h + w))]
        return [(qkv, False, rows[name], everything)]
    if family == "gpt2":
        qkv, out = layer.attn.c_attn.weight, layer.attn.c_proj.weight
        if name == "O":
            return [(out, True, everything, slice(4 * h, 4 * h + 4))]
        starts = {"QK": (0, 16), "V": (32,)}[name]
        return [(qkv, True, slice(s + 4 * h, s + 4 * h + 4), everything) for s in starts]
    w = 8 if family == "qwen3" else 4
    attention, g = layer.self_attn, h // 2
    own, group = slice(w * h, w * h + w), slice(w * g, w * g + w)
    if name == "O":
        return [(attention.o_proj.weight, False, everything, own)]
    if name == "V":
        return [(attention.v_proj.weight, False, group, everything)]
    return [
        (attention.q_proj.weight, False, own, everything),
        (attention.k_proj.weight, False, group, everything),
    ]


def autograd_block(family: str, model, value: torch.Tensor, unit: Head, name: str) -> torch.Tensor:
    found = []
    for weight, transposed, rows, columns in block_by_hand(family, model, unit, name):
        gradient = torch.autograd.grad(value, weight, retain_graph=True)[0]
        found.append((gradient.T if transposed else gradient)[rows, columns])
    return torch.cat(found)


@pytest.mark.parametrize("family", ALL)
def test_patterns_equal_eager_attention(family: str) -> None:
    model = random_model(family)
    probes = repeated_sequences(range(1, 40), seed=0, n_sequences=5, length=(4, 7))
    model.set_attn_implementation("eager")
    patterns = torch.stack(model(input_ids=probes.tokens, output_attentions=True).attentions, 1)
    each = patterns[probes.sequence, :, :, probes.query, probes.key]
    model.set_attn_implementation("sdpa")
    found = attention_per_sequence(model, probes)
    torch.testing.assert_close(found, probes.per_sequence(each), atol=1e-6, rtol=1e-5)
    assert found.shape == (5, 2, 4)


def test_a_sliding_window_is_kept() -> None:
    model = random_model("qwen2")
    model.config.sliding_window = 3
    model.config.layer_types = ["sliding_attention"] * 2
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 3
    model.model.has_sliding_layers = True
    probes = repeated_sequences(range(1, 40), seed=0, n_sequences=4, length=(4, 6))
    model.set_attn_implementation("eager")
    patterns = torch.stack(model(input_ids=probes.tokens, output_attentions=True).attentions, 1)
    assert patterns[0, 0, 0, 7, 4] == 0 < patterns[0, 0, 0, 7, 5]
    each = patterns[probes.sequence, :, :, probes.query, probes.key]
    model.set_attn_implementation("sdpa")
    found = attention_per_sequence(model, probes)
    torch.testing.assert_close(found, probes.per_sequence(each), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("probe_function", ["attention", "copy_logprob"])
def test_scores_equal_plain_gradients_of_each_sample(family: str, probe_function: str) -> None:
    """Dot products of batch-1 autograd gradients, in blocks cut out by hand."""
    model = random_model(family)
    units = [Head(0, 1), Head(1, 2), Head(1, 3)]  # the last two share keys and values if any do
    settings = {"token_ids": range(1, 40), "length": (4, 7), "n_probe_sequences": 6}
    mech = mechanism("induction", probe_function=probe_function, **settings)
    tokens = torch.randint(1, 40, (4, 10), generator=torch.Generator().manual_seed(1))
    probe = probe_gradients(model, mech, units)
    found = replay_scores(model, probe, [tokens]).values
    value = mech.probe(model)
    for i, unit in enumerate(units):
        own = value if value.dim() == 0 else value[unit.layer, unit.head]
        for k, name in enumerate(mech.block_names):
            of_f = autograd_block(family, model, own, unit, name)
            assert of_f.abs().max() > 0
            torch.testing.assert_close(probe[unit, name], of_f, atol=1e-6, rtol=1e-4)
            for n, row in enumerate(tokens):
                logits = model(input_ids=row[None, :-1]).logits[0]
                loss = F.cross_entropy(logits, row[1:], reduction="sum")
                expected = -(autograd_block(family, model, loss, unit, name) * of_f).sum()
                scale = float(found[:, i, k].abs().max())
                assert float(found[n, i, k]) == pytest.approx(float(expected), abs=1e-4 * scale)


@pytest.mark.parametrize("family", ALL)
def test_in_run_scores_equal_replay_at_the_same_weights(family: str) -> None:
    model, units = random_model(family), [Head(0, 0), Head(1, 3)]
    mech = mechanism("induction", probe_function="copy_logprob", token_ids=range(1, 40))
    tokens = torch.randint(1, 40, (5, 9), generator=torch.Generator().manual_seed(2))
    ekfac = SubspaceEKFAC.fit(model, units, mech.block_names, [tokens], seed=0)
    ihvp = ekfac.solve(probe_gradients(model, mech, units))
    expected = replay_scores(model, ihvp, [tokens]).values
    scorer = TrainingStepScorer(model, units, mech.block_names)
    scorer.set_ihvp(ihvp)
    scorer.start()
    logits = model(input_ids=tokens[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    found = scorer.collect(tokens[:, 1:].numel())
    scorer.remove()
    assert found is not None
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("family", ALL)
def test_weights_of_a_block_are_its_own(family: str) -> None:
    model = random_model(family)
    layout = describe(model)
    for name in ("QK", "V", "O"):
        block = layout.block(Head(1, 2), name)
        parts = block_by_hand(family, model, Head(1, 2), name)
        by_hand = torch.cat([(w.T if t else w)[rows, columns] for w, t, rows, columns in parts])
        assert torch.equal(layout.weight(model, block), by_hand)
        assert block.shape == tuple(by_hand.shape)


@pytest.mark.parametrize("family", ALL)
def test_what_a_group_shares_is_said(family: str) -> None:
    layout = describe(random_model(family))
    shared = layout.block(Head(0, 2), "QK").shared_with
    if family in GROUPED:
        assert (
            shared == (Head(0, 3),) and layout.sharing is not None and "2 heads" in layout.sharing
        )
        assert layout.block(Head(0, 2), "V").shared_with == shared
    else:
        assert shared == () and layout.sharing is None
    assert layout.block(Head(0, 2), "O").shared_with == ()


def test_every_family_is_tested_and_others_are_refused() -> None:
    assert set(ALL) == set(FAMILIES)

    class Config:
        model_type = "mamba"

    other = nn.Linear(2, 2)
    other.config = Config()
    with pytest.raises(
        UnsupportedModelError, match="'mamba' has no layout here; supported: gpt_ne"
    ):
        describe(other)
    with pytest.raises(UnsupportedModelError, match="expected one Hugging Face language model"):
        find_language_model(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UnsupportedModelError, match=r"no part 'gpt_neox\.layers\.0"):
        describe(random_neox().base_model)


@pytest.mark.parametrize(
    ("unit", "message"),
    [(Head(2, 0), r"layers 0\.\.1"), (Head(0, 4), r"heads 0\.\.3")],
)
def test_a_head_out_of_range_is_named(unit: Head, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe(random_model("gpt2")).block(unit, "QK")


@pytest.mark.parametrize("family", ALL)
def test_the_check_of_a_row_passes_for_every_family(family: str) -> None:
    model = random_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_family(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "wrong", "message"),
    [
        ("gpt_neox", {"fused": "by_kind"}, "changing the QK block of L0H"),
        ("gpt2", {"fused": "by_head"}, "changing the QK block of L0H"),
        ("llama", {"q": "v_proj", "v": "q_proj"}, "changing the V block of L0H"),
        ("llama", {"parallel": True}, "the ablation of L0H0 differs"),
        ("llama", {"mlp_norm": "input_layernorm"}, "the ablation of L0H0 differs"),
        ("olmo2", {"norms": "before"}, "the ablation of L0H0 differs"),
        ("olmo2", {"norms_across_heads": False}, "changing the QK block of L0H"),
        ("llama", {"mlp_norm": "norm2"}, "no part 'model.layers.0.norm2'"),
    ],
)
def test_the_check_finds_a_wrong_row(
    monkeypatch: pytest.MonkeyPatch, family: str, wrong: dict, message: str
) -> None:
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], **wrong))
    with pytest.raises(UnsupportedModelError, match=message):
        check_family(random_model(family))


def test_the_check_finds_logits_that_are_changed_after_the_unembedding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FAMILIES, "granite", FAMILIES["llama"])
    config = GraniteConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        logits_scaling=8.0,
    )
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match="changes its logits after the unembedding"):
        check_family(GraniteForCausalLM(config))


def test_weights_of_an_adapted_layer_are_not_taken_for_what_it_computes() -> None:
    model = random_neox()

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base

        @property
        def weight(self) -> torch.Tensor:
            return self.base.weight

    attention = model.gpt_neox.layers[1].attention
    attention.dense = Adapted(attention.dense)
    layout = describe(model)
    with pytest.raises(UnsupportedModelError, match="Adapted is not a plain linear layer"):
        layout.weight(model, layout.block(Head(1, 0), "O"))


def test_special_ids_may_be_lists() -> None:
    model = random_neox()
    model.config.eos_token_id = [0, 3, 5]
    assert real_token_ids(model).tolist() == [i for i in range(40) if i not in (0, 3, 5)]


def test_the_check_finds_a_norm_whose_weight_is_not_its_gain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FAMILIES, "gemma", FAMILIES["llama"])
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "head_dim": 4}
    config = GemmaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match="the final norm's weight is not its gain"):
        check_family(GemmaForCausalLM(config))
