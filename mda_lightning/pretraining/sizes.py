"""The Pythia suite as data, and the model configuration of each size.

Numbers: ``models/*/pythia-*.yml`` of EleutherAI/pythia at a19eecb8. Where the suite's own files
disagree (learning rate of 1B: 2.5e-4 in the file, 3.0e-4 in the README) the file is followed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from transformers import AutoConfig, GPTNeoXConfig, PreTrainedConfig

Initialisation: TypeAlias = Literal["small_wang", "scaled_normal"]
ModelSpec: TypeAlias = "str | Mapping[str, Any] | PreTrainedConfig"

SEQUENCE_LENGTH = 2048
"""Tokens the model reads per sequence; a stored row holds one more, for the last label."""
SEQUENCES_PER_STEP = 1024
TOTAL_STEPS = 143_000
WARMUP_FRACTION = 0.01
MIN_LEARNING_RATE_RATIO = 0.1
BETAS = (0.9, 0.95)
EPSILON = 1e-8
WEIGHT_DECAY = 0.1
GRADIENT_CLIP = 1.0
ROTARY_FRACTION = 0.25
TOKENIZER_IDS = 50_277
"""Ids the tokenizer really uses; the rows up to ``vocab_size`` are padding and never a target."""


@dataclass(frozen=True)
class PythiaSize:
    """One member of the suite.

    ``initialisation`` is ``"scaled_normal"`` for the two sizes whose files name no initialiser and
    which were therefore trained from NeoX's defaults.
    """

    n_layers: int
    d_model: int
    n_heads: int
    learning_rate: float
    vocab_size: int = 50_304
    initialisation: Initialisation = "small_wang"

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


PYTHIA_SIZES: Mapping[str, PythiaSize] = {
    "14m": PythiaSize(6, 128, 4, learning_rate=1e-3),
    "31m": PythiaSize(6, 256, 8, learning_rate=1e-3),
    "70m": PythiaSize(6, 512, 8, learning_rate=1e-3),
    "160m": PythiaSize(12, 768, 12, learning_rate=6e-4),
    "410m": PythiaSize(24, 1024, 16, learning_rate=3e-4),
    "1b": PythiaSize(16, 2048, 8, learning_rate=2.5e-4),
    "1.4b": PythiaSize(24, 2048, 16, learning_rate=2e-4),
    "2.8b": PythiaSize(32, 2560, 32, learning_rate=1.6e-4),
    "6.9b": PythiaSize(
        32, 4096, 32, learning_rate=1.2e-4, vocab_size=50_432, initialisation="scaled_normal"
    ),
    "12b": PythiaSize(
        36, 5120, 40, learning_rate=1.2e-4, vocab_size=50_688, initialisation="scaled_normal"
    ),
}

_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def pythia_size(name: str) -> PythiaSize:
    """The size called ``name``, in any case and with or without ``pythia-`` before it.

    Raises:
        ValueError: there is no such size; the message lists those there are.
    """
    size = PYTHIA_SIZES.get(name.lower().removeprefix("pythia-"))
    if size is None:
        raise ValueError(
            f"unknown Pythia size {name!r}: the suite has {', '.join(PYTHIA_SIZES)}; for another "
            "architecture give a dict or a transformers configuration instead of a name"
        )
    return size


def model_config(
    spec: ModelSpec, *, vocab_size: int | None = None, seq_len: int | None = None
) -> PreTrainedConfig:
    """The configuration that ``spec`` stands for; an object given is copied, never changed.

    Args:
        spec: a size's name; a dict of transformers' own names (of a GPT-NeoX with Pythia's
            defaults, unless ``model_type`` says otherwise); or a transformers configuration.
        vocab_size: replaces the vocabulary of ``spec``.
        seq_len: replaces its longest context, in tokens.

    Raises:
        ValueError: unknown size; a dict that lacks a dimension or holds a name no GPT-NeoX has.
        TypeError: ``spec`` is something else.
    """
    changes: dict[str, Any] = {}
    if vocab_size is not None:
        changes["vocab_size"] = vocab_size
    if seq_len is not None:
        changes["max_position_embeddings"] = seq_len
    if isinstance(spec, str):
        size = pythia_size(spec)
        dimensions = {
            "hidden_size": size.d_model,
            "num_hidden_layers": size.n_layers,
            "num_attention_heads": size.n_heads,
            "vocab_size": size.vocab_size,
        }
        return _neox_config(dimensions | changes)
    if isinstance(spec, PreTrainedConfig):
        config = copy.deepcopy(spec)
        for name, value in changes.items():
            setattr(config, name, value)
        return config
    if isinstance(spec, Mapping):
        settings = {**spec, **changes}
        model_type = settings.pop("model_type", "gpt_neox")
        if model_type != "gpt_neox":
            return AutoConfig.for_model(model_type, **settings)
        return _neox_config(settings)
    raise TypeError(
        f"size is a {type(spec).__name__}; give a name ({', '.join(PYTHIA_SIZES)}), a dict of "
        "dimensions or a transformers configuration"
    )


def _neox_config(settings: Mapping[str, Any]) -> GPTNeoXConfig:
    """A GPT-NeoX as Pythia trained it: parallel residual, untied, rotary 25%, tanh GELU, eps 1e-5.

    transformers takes any keyword and fills in the dimensions of NeoX-20B, so a misspelt name
    would ask for 44 layers of 6144 without a word: names are checked here.
    """
    known = {*GPTNeoXConfig().to_dict(), "rotary_pct", "rotary_emb_base"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(
            f"a GPT-NeoX configuration has no {unknown[0]!r}; its dimensions are called "
            f"{', '.join(_REQUIRED)}, intermediate_size, rotary_pct"
        )
    missing = [name for name in _REQUIRED if name not in settings]
    if missing:
        raise ValueError(
            f"the model's dict lacks {', '.join(missing)}; it needs {', '.join(_REQUIRED)}, or "
            "give the name of a Pythia size"
        )
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    if hidden % heads:
        raise ValueError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}; "
            f"try {hidden - hidden % heads or heads}"
        )
    defaults: dict[str, Any] = {
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": SEQUENCE_LENGTH,
        "hidden_act": "gelu_pytorch_tanh",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if "rope_parameters" not in settings:
        defaults["rotary_pct"] = ROTARY_FRACTION
    return GPTNeoXConfig(**(defaults | dict(settings)))
