"""Where a unit's weights live in each model family: layouts as data, not as branches.

A family is one :class:`Family` row in :data:`FAMILIES`. Everything else in the package asks a
:class:`ModelLayout` and never looks at a model's attributes by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mda_lightning.units import Head

BlockName = Literal["QK", "V", "O"]
HEAD_BLOCKS: tuple[BlockName, ...] = ("QK", "V", "O")


class UnsupportedModelError(ValueError):
    """The model's family has no layout here, or no language model was found."""


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        layers: dotted name of the list of layers, from the language model down.
        qkv: dotted name of the fused query-key-value projection, from a layer down. Its output
            rows are ``[heads, 3, head_dim]``, the three being Q, K and V.
        output: dotted name of the attention's output projection, from a layer down. Its input
            columns are ``[heads, head_dim]``.
    """

    layers: str
    qkv: str
    output: str


FAMILIES: dict[str, Family] = {
    "gpt_neox": Family(
        layers="gpt_neox.layers", qkv="attention.query_key_value", output="attention.dense"
    ),
}


@dataclass(frozen=True)
class Block:
    """A rectangle of one Linear layer's weight ``[out, in]`` that belongs to a unit.

    Attributes:
        name: "QK" (joint, Eq. 16), "V" or "O".
        module: dotted name of the Linear, from the language model down.
        rows: the output rows, as a slice.
        columns: the input columns, as a slice.
    """

    unit: Head
    name: BlockName
    module: str
    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)`` of the block."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


@dataclass(frozen=True)
class ModelLayout:
    """The shape of a causal language model and the places of its heads' weights."""

    family: Family
    model_type: str
    n_layers: int
    n_heads: int
    head_dim: int
    d_model: int
    vocab_size: int

    @property
    def heads(self) -> list[Head]:
        """All heads, layer by layer."""
        return [Head(layer, h) for layer in range(self.n_layers) for h in range(self.n_heads)]

    def check(self, unit: Head) -> Head:
        """Return ``unit`` if this model has it.

        Raises:
            ValueError: the layer or the head is out of range; the message gives the range.
        """
        if unit.layer >= self.n_layers:
            raise ValueError(
                f"layer {unit.layer} is out of range: this model has layers 0..{self.n_layers - 1}"
            )
        if unit.head >= self.n_heads:
            raise ValueError(
                f"head {unit.head} is out of range: layer {unit.layer} of this model has heads "
                f"0..{self.n_heads - 1}"
            )
        return unit

    def qkv_name(self, layer: int) -> str:
        """Dotted name of a layer's query-key-value projection."""
        return f"{self.family.layers}.{layer}.{self.family.qkv}"

    def output_name(self, layer: int) -> str:
        """Dotted name of a layer's attention output projection."""
        return f"{self.family.layers}.{layer}.{self.family.output}"

    def block(self, unit: Head, name: BlockName) -> Block:
        """The place of one block of one head (Table 3; biases are not part of it)."""
        self.check(unit)
        first = unit.head * 3 * self.head_dim
        width = self.head_dim
        everything = slice(0, self.d_model)
        if name == "QK":
            return Block(
                unit, name, self.qkv_name(unit.layer), slice(first, first + 2 * width), everything
            )
        if name == "V":
            rows = slice(first + 2 * width, first + 3 * width)
            return Block(unit, name, self.qkv_name(unit.layer), rows, everything)
        if name == "O":
            columns = slice(unit.head * width, (unit.head + 1) * width)
            return Block(unit, name, self.output_name(unit.layer), everything, columns)
        raise ValueError(f"{name!r} is not a block of a head; a head has {', '.join(HEAD_BLOCKS)}")

    def blocks(self, units: Sequence[Head], names: Sequence[BlockName]) -> list[Block]:
        """The blocks of several heads, unit by unit."""
        return [self.block(unit, name) for unit in units for name in names]


def describe(model: nn.Module) -> ModelLayout:
    """Read the layout of a Hugging Face causal language model.

    Raises:
        UnsupportedModelError: the family is not in :data:`FAMILIES`; the message lists those.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    family = FAMILIES.get(model_type)
    if family is None or config is None:
        raise UnsupportedModelError(
            f"model family {model_type!r} has no layout here; supported: {', '.join(FAMILIES)}. "
            "A family is one row of mda_lightning.architectures.FAMILIES"
        )
    return ModelLayout(
        family=family,
        model_type=model_type,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        d_model=config.hidden_size,
        vocab_size=config.vocab_size,
    )


def find_language_model(module: nn.Module, name: str | None = None) -> PreTrainedModel:
    """The one Hugging Face language model inside ``module``, or the one called ``name``.

    Raises:
        UnsupportedModelError: there is none, or several and no name; the message lists them.
    """
    if name is not None:
        try:
            found = module.get_submodule(name)
        except AttributeError as error:
            names = [n for n, m in module.named_modules() if isinstance(m, PreTrainedModel)]
            raise UnsupportedModelError(
                f"{type(module).__name__} has no submodule {name!r}; "
                f"Hugging Face models in it: {', '.join(map(repr, names)) or 'none'}"
            ) from error
        if not isinstance(found, PreTrainedModel):
            raise UnsupportedModelError(
                f"{name!r} is a {type(found).__name__}, not a Hugging Face PreTrainedModel"
            )
        return found
    candidates = [
        (n, m)
        for n, m in module.named_modules()
        if isinstance(m, PreTrainedModel) and unembedding(m) is not None
    ]
    outermost = [
        (n, m)
        for n, m in candidates
        if not any(
            n != other and n.startswith(f"{other}." if other else "") for other, _ in candidates
        )
    ]
    if len(outermost) != 1:
        names_text = ", ".join(repr(n) for n, _ in outermost) or "none"
        raise UnsupportedModelError(
            f"expected one Hugging Face language model inside {type(module).__name__}, found "
            f"{names_text}; name it, for example model='net.lm'"
        )
    return outermost[0][1]


def unembedding(model: PreTrainedModel) -> nn.Module:
    """The layer that maps final hidden states [.., d_model] to logits [.., V]."""
    found: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return found


def real_token_ids(model: PreTrainedModel) -> Tensor:
    """Token ids that a model's tokenizer really uses, without special or padding ids, int64 [V'].

    Known for the Pythia suite: vocabulary 50304, 50432 or 50688 around a tokenizer of 50277 ids,
    of which 0 (end of document) and 1 (padding) are special. For another vocabulary size every id
    but the configuration's special ones counts; give the ids where that is not so.
    """
    config = model.config
    size = int(config.vocab_size)
    if size in (50304, 50432, 50688):
        return torch.arange(2, 50277)
    special = {
        getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return torch.tensor([i for i in range(size) if i not in special], dtype=torch.int64)
