"""Where a unit's weights live in a model, read from its family's row.

Families are data (:mod:`mda_lightning.families`). Everything else in the package asks a
:class:`ModelLayout` and never looks at a model's attributes by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mda_lightning.families import FAMILIES, Family
from mda_lightning.units import Head

BlockName = Literal["QK", "V", "O", "QK+bias", "V+bias"]
HEAD_BLOCKS: tuple[BlockName, ...] = ("QK", "V", "O")
#: The same with the biases of the head's own rows; the output projection's is of no head alone.
HEAD_BLOCKS_WITH_BIAS: tuple[BlockName, ...] = ("QK+bias", "V+bias", "O")


class UnsupportedModelError(ValueError):
    """The model's family has no layout here, or no language model was found."""


class Part(NamedTuple):
    """Rows of one linear layer's weight ``[out, in]``."""

    module: str
    rows: slice


@dataclass(frozen=True)
class Block:
    """Weights ``[rows, columns]`` of a unit: rows of linear layers with the same input, stacked.

    Attributes:
        name: "QK" (joint, Eq. 16), "V" or "O"; with "+bias" the bias is one more input column.
        parts: the rows, module by module; the dotted names are from the language model down.
        columns: the input columns, the same in every part.
        shared_with: heads whose queries read the same key and value rows (grouped queries); these
            rows are then not this head's alone.
    """

    unit: Head
    name: BlockName
    parts: tuple[Part, ...]
    columns: slice
    shared_with: tuple[Head, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """The linear layers that hold the parts, each once."""
        return tuple(dict.fromkeys(part.module for part in self.parts))

    @property
    def output_key(self) -> str:
        """Names the rows: equal for blocks of the same rows."""
        return " ".join(f"{p.module}[{p.rows.start}:{p.rows.stop}]" for p in self.parts)

    @property
    def input_key(self) -> str:
        """Names the input columns: equal for blocks of a layer that read the same ones."""
        source = "output" if self.name == "O" else "attention"
        return f"{self.unit.layer} {source}[{self.columns.start}:{self.columns.stop}]"

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)`` of the block."""
        rows = sum(part.rows.stop - part.rows.start for part in self.parts)
        return rows, self.columns.stop - self.columns.start

    def of_output(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """The block's rows of its layers' outputs (or their gradients), [..., rows]."""
        found = [outputs[part.module][..., part.rows] for part in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def of_input(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The block's columns of its layers' common input, [..., columns]."""
        return input_columns(inputs[self.parts[0].module], self.columns)


def input_columns(x: Tensor, columns: slice) -> Tensor:
    """Columns of a linear layer's input x [..., in]; the one after the last is 1, for its bias."""
    if columns.stop > x.shape[-1]:
        x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
    return x[..., columns]


def modules_of(blocks: Sequence[Block]) -> list[str]:
    """Dotted names of the linear layers that hold some blocks, each once."""
    return list(dict.fromkeys(name for block in blocks for name in block.modules))


@dataclass(frozen=True)
class ModelLayout:
    """The shape of a causal language model and the places of its heads' weights.

    Attributes:
        n_heads: query heads a layer; these are the units.
        n_kv_heads: key and value heads a layer; fewer than ``n_heads`` with grouped queries.
        parallel: whether attention and MLP read the same stream.
    """

    family: Family
    model_type: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_model: int
    vocab_size: int
    parallel: bool

    @property
    def heads(self) -> list[Head]:
        """All heads, layer by layer."""
        return [Head(layer, h) for layer in range(self.n_layers) for h in range(self.n_heads)]

    @property
    def group_size(self) -> int:
        """Query heads that share one key and value head; 1 without grouped queries."""
        return self.n_heads // self.n_kv_heads

    @property
    def entangled(self) -> int:
        """How many neighbouring heads of a layer have patterns that depend on common weights."""
        return self.n_heads if self.family.norms_across_heads else self.group_size

    def group(self, unit: Head) -> tuple[Head, ...]:
        """The heads that read the same keys and values as ``unit``, itself included."""
        first = unit.head // self.group_size * self.group_size
        return tuple(Head(unit.layer, first + i) for i in range(self.group_size))

    @property
    def sharing(self) -> str | None:
        """A sentence on shared keys and values, or None where every head has its own."""
        if self.group_size == 1:
            return None
        return (
            f"grouped queries: {self.group_size} heads share each key and value head, so the key "
            "and value weights of a head are its group's"
        )

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

    def layer_name(self, layer: int) -> str:
        """Dotted name of a layer."""
        return f"{self.family.layers}.{layer}"

    def attention_name(self, layer: int) -> str:
        """Dotted name of a layer's attention."""
        return f"{self.layer_name(layer)}.{self.family.attention}"

    def output_name(self, layer: int) -> str:
        """Dotted name of a layer's attention output projection."""
        return f"{self.attention_name(layer)}.{self.family.output}"

    def head_columns(self, head: int) -> slice:
        """A head's columns of the output projection's input."""
        return slice(head * self.head_dim, (head + 1) * self.head_dim)

    def block(self, unit: Head, name: BlockName) -> Block:
        """The place of one block of one head (Table 3)."""
        self.check(unit)
        if name == "O":
            part = Part(self.output_name(unit.layer), slice(0, self.d_model))
            return Block(unit, name, (part,), self.head_columns(unit.head))
        if name not in (*HEAD_BLOCKS, *HEAD_BLOCKS_WITH_BIAS):
            raise ValueError(
                f"{name!r} is not a block of a head; a head has {', '.join(HEAD_BLOCKS)}"
            )
        weights, _, bias = name.partition("+")
        parts = tuple(self._part(unit, kind) for kind in ("qk" if weights == "QK" else "v"))
        if len(parts) == 2 and parts[0].module == parts[1].module:
            first, second = parts[0].rows, parts[1].rows
            if first.stop == second.start:
                parts = (Part(parts[0].module, slice(first.start, second.stop)),)
        others = tuple(head for head in self.group(unit) if head != unit)
        width = self.d_model + (1 if bias else 0)
        return Block(unit, name, parts, slice(0, width), others)

    def _part(self, unit: Head, kind: str) -> Part:
        place = {"q": self.family.q, "k": self.family.k, "v": self.family.v}[kind]
        module = f"{self.attention_name(unit.layer)}.{place}"
        of_kind = "qkv".index(kind)
        if self.family.fused == "by_head":
            index = 3 * unit.head + of_kind
        elif self.family.fused == "by_kind":
            index = of_kind * self.n_heads + unit.head
        else:
            index = unit.head if kind == "q" else unit.head // self.group_size
        return Part(module, slice(index * self.head_dim, (index + 1) * self.head_dim))

    def blocks(self, units: Sequence[Head], names: Sequence[BlockName]) -> list[Block]:
        """The blocks of several heads, unit by unit."""
        return [self.block(unit, name) for unit in units for name in names]

    def weight(self, model: nn.Module, block: Block) -> Tensor:
        """The block's weights, [rows, columns]; a view of the model's own where it has one part."""
        found = [
            output_by_input(model.get_submodule(part.module))[part.rows, block.columns]
            for part in block.parts
        ]
        return found[0] if len(found) == 1 else torch.cat(found)


def output_by_input(linear: nn.Module) -> Tensor:
    """A linear layer's weight as [out, in]; GPT-2's ``Conv1D`` stores it the other way round.

    Raises:
        UnsupportedModelError: a layer that does more than multiply by its weight, as an adapter.
    """
    if not is_plain_linear(linear):
        raise UnsupportedModelError(
            f"{type(linear).__name__} is not a plain linear layer, so its weight does not say what "
            "it computes; merge adapters into the model first"
        )
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(linear, Conv1D) else weight


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer's output is its weight times its input, plus its bias."""
    return type(layer).forward in (nn.Linear.forward, Conv1D.forward)


def describe(model: nn.Module) -> ModelLayout:
    """Read the layout of a Hugging Face causal language model.

    Raises:
        UnsupportedModelError: the family is not in :data:`FAMILIES` (the message lists those), or
            the model lacks a part that its family should have.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    family = FAMILIES.get(model_type)
    if family is None or config is None:
        raise UnsupportedModelError(
            f"model family {model_type!r} has no layout here; supported: {', '.join(FAMILIES)}. "
            "A family is one row of mda_lightning.families.FAMILIES; the docs show how to add one"
        )
    n_heads = int(config.num_attention_heads)
    parallel = family.parallel
    layout = ModelLayout(
        family=family,
        model_type=model_type,
        n_layers=int(config.num_hidden_layers),
        n_heads=n_heads,
        n_kv_heads=int(getattr(config, "num_key_value_heads", None) or n_heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // n_heads),
        d_model=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        parallel=getattr(config, parallel) if isinstance(parallel, str) else parallel,
    )
    _check_parts(model, layout)
    return layout


def _check_parts(model: nn.Module, layout: ModelLayout) -> None:
    family, first = layout.family, layout.layer_name(0)
    inside = (family.attention, family.mlp, family.attention_norm, family.mlp_norm)
    for name in (first, family.final_norm, *(f"{first}.{part}" for part in inside)):
        try:
            model.get_submodule(name)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no part {name!r}, where the layout of family "
                f"{layout.model_type!r} expects one; give the causal language model itself, "
                "unwrapped, or correct the family's row"
            ) from error
    for name in (*layout.block(Head(0, 0), "QK").modules, layout.output_name(0)):
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(getattr(linear, "weight", None), Tensor):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no linear layer {name!r}, where the layout of family "
                f"{layout.model_type!r} expects one; give the causal language model itself, "
                "unwrapped, or correct the family's row"
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


def special_token_ids(model: PreTrainedModel) -> set[int]:
    """Ids that a model's configuration names as special; some name several for the end of text."""
    special: set[int | None] = set()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = getattr(model.config, key, None)
        special |= set(given) if isinstance(given, (list, tuple)) else {given}
    return {i for i in special if i is not None}


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
    special = special_token_ids(model)
    return torch.tensor([i for i in range(size) if i not in special], dtype=torch.int64)


def check_token_ids(model: PreTrainedModel, tokens: Tensor) -> None:
    """Check that ``model`` has all ids of ``tokens``.

    Raises:
        ValueError: it has not.
    """
    smallest, largest = int(tokens.min()), int(tokens.max())
    size = int(model.config.vocab_size)
    if smallest < 0 or largest >= size:
        raise ValueError(
            f"token id {smallest if smallest < 0 else largest} is not in the model's vocabulary "
            f"0..{size - 1}; give token ids of the model's own tokenizer"
        )
