"""The suite's sizes, and the weights a model starts from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from mda_lightning.pretraining import PYTHIA_SIZES, PythiaModule
from mda_lightning.pretraining.initialisation import build_model
from mda_lightning.pretraining.sizes import model_config

REFERENCE = Path(__file__).parents[1].parent / "shared" / "data" / "pythia_reference.json"
TINY = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1024,
}


def parameter_counts(name: str) -> tuple[int, int]:
    """All parameters, and those outside the two embedding tables."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(name))
    total = sum(p.numel() for p in model.parameters())
    config = model.config
    return total, total - 2 * config.vocab_size * config.hidden_size


@pytest.mark.parametrize(
    ("name", "total", "non_embedding"),
    [
        ("14m", 14_067_712, 1_189_888),
        ("70m", 70_426_624, 18_915_328),
        ("410m", 405_334_016, 302_311_424),
        ("12b", 11_846_072_320, 11_327_027_200),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, total: int, non_embedding: int) -> None:
    assert parameter_counts(name) == (total, non_embedding)


@pytest.mark.skipif(not REFERENCE.exists(), reason="the reference table is not beside the checkout")
def test_every_size_agrees_with_the_reference_table() -> None:
    reference = json.loads(REFERENCE.read_text())["models"]
    assert {name.lower() for name in reference} == set(PYTHIA_SIZES)
    for name, facts in reference.items():
        size = PYTHIA_SIZES[name.lower()]
        assert parameter_counts(name) == (facts["n_params_total"], facts["n_params_non_embedding"])
        assert size.n_layers == facts["num_layers"]
        assert size.n_heads == facts["num_attention_heads"]
        assert size.head_dim == facts["head_dim"]
        assert size.vocab_size == facts["padded_vocab_size"]
        assert size.learning_rate == facts["lr"]
        rope = model_config(name).rope_parameters
        assert size.head_dim * rope["partial_rotary_factor"] == facts["rotary_ndims"]
        expected = "small_wang" if facts["init_method"] == "small_init" else "scaled_normal"
        assert size.initialisation == expected


def test_activation_is_the_tanh_gelu() -> None:
    model = PythiaModule(TINY).model
    x = torch.linspace(-4, 4, 101)
    by_formula = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    activation = model.gpt_neox.layers[0].mlp.act
    torch.testing.assert_close(activation(x), by_formula, atol=1e-6, rtol=0)


def test_initial_weights_have_pythias_spread() -> None:
    """small_init sqrt(2/5d) and wang_init 2/(L sqrt d), not transformers' 0.02."""
    model = PythiaModule(TINY, init_seed=3).model
    small, wang = math.sqrt(2 / (5 * 256)), 2 / (2 * math.sqrt(256))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "layernorm" in name or "layer_norm" in name:
            assert (parameter == 1).all(), name
        else:
            outer = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
            expected = wang if outer else small
            standard_error = expected / math.sqrt(2 * parameter.numel())
            assert abs(parameter.std().item() - expected) < 5 * standard_error, name
            assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name


def test_weights_are_a_function_of_the_seed_and_global_rng_is_untouched() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = PythiaModule(TINY, init_seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    second, other = PythiaModule(TINY, init_seed=0), PythiaModule(TINY, init_seed=1)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
    assert not torch.equal(
        first.model.gpt_neox.embed_in.weight, other.model.gpt_neox.embed_in.weight
    )


def test_buffers_are_those_transformers_makes() -> None:
    """The rotary frequencies are not weights: skipping transformers' own filling must keep them."""
    ours = PythiaModule(TINY | {"rotary_pct": 0.5}).model
    theirs = AutoModelForCausalLM.from_config(GPTNeoXConfig(**TINY, rotary_pct=0.5))
    theirs_by_name = dict(theirs.named_buffers())
    assert theirs_by_name
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, theirs_by_name[name]), name
    head_dim = 64
    by_formula = 10_000.0 ** -(torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    torch.testing.assert_close(
        dict(ours.named_buffers())["gpt_neox.rotary_emb.inv_freq"], by_formula
    )


def test_tied_embeddings_stay_tied() -> None:
    model = PythiaModule(TINY | {"tie_word_embeddings": True}).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_another_architecture_keeps_its_own_initialisation() -> None:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    state = torch.get_rng_state()
    module = PythiaModule(config, init_seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    again = PythiaModule(module.hparams["size"], init_seed=4)
    assert type(again.model) is type(module.model)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert module(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 128)


def test_configuration_given_is_not_changed() -> None:
    config = GPTNeoXConfig(**TINY)
    before = config.to_dict()
    module = PythiaModule(config, vocab_size=64, seq_len=16)
    assert config.to_dict() == before
    assert module.model.config.vocab_size == 64
    assert module.model.config.max_position_embeddings == 16


def test_module_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = build_model(model_config("12b"), seed=0)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("15m", r"unknown Pythia size '15m'.*14m, 31m, 70m.*12b"),
        ({**TINY, "n_layer": 2}, r"no 'n_layer'.*num_hidden_layers"),
        ({"hidden_size": 64}, r"lacks num_hidden_layers, num_attention_heads, vocab_size"),
        ({**TINY, "num_attention_heads": 3}, r"256 is not a multiple.*3; try 255"),
    ],
)
def test_impossible_sizes_are_refused_by_name(size: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PythiaModule(size)  # type: ignore[arg-type]


def test_names_are_read_as_people_write_them() -> None:
    assert model_config("Pythia-70M").to_dict() == model_config("70m").to_dict()
