"""Ablation logit contribution of every head (Eq. 39, App. H), in one pass.

One head at a time, Δ_h costs a forward with full logits per head. Here the clean stream is run once
and one branch per ablated head is carried from that head's layer on: below it nothing differs. Only
the position that predicts is unembedded, and in the last layer only its MLP is run. The result is
that of the loop up to rounding, for parallel and sequential residual blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mda_lightning.architectures import (
    ModelLayout,
    check_token_ids,
    describe,
    is_plain_linear,
    output_by_input,
    unembedding,
)
from mda_lightning.attention import attention_implementation
from mda_lightning.metrics.over_sequences import MeanOverSequences, UnitScores
from mda_lightning.modes import evaluating
from mda_lightning.probes import ProbeSet

Replacement = Literal["zero", "mean", "resample"]
REPLACEMENTS: tuple[Replacement, ...] = ("zero", "mean", "resample")

#: Numbers held at once in the branches, and in the logits (16 MiB each in float32).
_CHUNK_NUMBERS = 2**22


class AblationDrops(NamedTuple):
    """What is lost when a head is ablated, clean minus ablated, each float32 [N, L, heads].

    Attributes:
        logit: of the target's logit (Eq. 39). Raw logits have no gauge: adding a constant to every
            logit changes no prediction, and a head may do just that.
        centred: of the target's logit minus the mean logit over the vocabulary.
        logprob: of the target's log-probability, in nats.
    """

    logit: Tensor
    centred: Tensor
    logprob: Tensor


@dataclass(frozen=True)
class _Layer:
    """What the clean run leaves of one layer, for n sequences of T tokens.

    Attributes:
        stream: the layer's input [n, T, d_model]; after: its output.
        z: input of the attention's output projection [n, T, heads * head_dim].
        attended: the attention's output [n, T, d_model], its bias included.
        arguments: keyword arguments that the model gives its attention.
    """

    stream: Tensor
    after: Tensor
    z: Tensor
    attended: Tensor
    arguments: dict[str, Any]


@torch.no_grad()
def ablation_drops(
    model: PreTrainedModel,
    probes: ProbeSet,
    *,
    replacement: Replacement = "zero",
    seed: int = 0,
    chunk_numbers: int = _CHUNK_NUMBERS,
) -> AblationDrops:
    """Ablate every head in turn and read the target's logit at the query position.

    A head is ablated at the input of the attention's output projection, whose bias stays, at every
    position of the sequence. Runs the model in the mode it is in.

    Args:
        model: a causal language model of a family in
            :data:`mda_lightning.families.FAMILIES`.
        probes: sequences of one length with one entry each
            (:func:`mda_lightning.probes.ablation_sequences`).
        replacement: what takes the place of the head's output. "zero"; "mean", its mean over all
            positions of the probe set; "resample", its output at the same position of another
            sequence of the set.
        seed: of the partners that "resample" draws.
        chunk_numbers: memory in numbers for the branches; changes nothing but rounding.

    Raises:
        ValueError: an unknown replacement, a probe set of another form, or "resample" with one
            sequence.
    """
    _check(probes, replacement)
    check_token_ids(model, probes.tokens)
    layout = describe(model)
    n, length = probes.tokens.shape
    partners = _partners(n, seed) if replacement == "resample" else None
    size = max(1, chunk_numbers // (layout.n_layers * layout.n_heads * length * layout.d_model))
    found = torch.empty(3, n, layout.n_layers, layout.n_heads)
    with attention_implementation(model, "sdpa"):
        means = _mean_outputs(model, layout, probes.tokens, size) if replacement == "mean" else None
        for rows in torch.split(torch.arange(n), size):
            both = rows if partners is None else torch.cat([rows, partners[rows]])
            layers = _clean(model, layout, probes.tokens[both])
            instead = _instead(layers, len(rows), partners is not None, means)
            layers = [_first(layer, len(rows)) for layer in layers]
            query = probes.query[rows].to(model.device)
            ends = _branches(model, layout, layers, instead, query)
            target = probes.target[rows].to(model.device)
            values = _read(model, layout, ends, target, chunk_numbers)  # [3, 1 + L * heads, n]
            drops = (values[:, :1] - values[:, 1:]).mT.float()
            found[:, rows] = drops.reshape(3, len(rows), layout.n_layers, layout.n_heads)
    return AblationDrops(*found)


def _check(probes: ProbeSet, replacement: str) -> None:
    if replacement not in REPLACEMENTS:
        raise ValueError(
            f"replacement {replacement!r} is not one of {', '.join(map(repr, REPLACEMENTS))}"
        )
    n = probes.n_sequences
    if not torch.equal(probes.sequence, torch.arange(n)):
        raise ValueError(
            f"ablation reads one position of each sequence; the probe set has {n} sequences and "
            f"{len(probes.sequence)} entries. Build it with ablation_sequences()"
        )
    if replacement == "resample" and n < 2:
        raise ValueError("replacement 'resample' takes another sequence's output; give at least 2")


def _partners(n: int, seed: int) -> Tensor:
    """For each sequence another one: a random cyclic order, each followed by the next."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    partners = torch.empty(n, dtype=torch.int64)
    partners[order] = order.roll(-1)
    return partners


# -- the clean run ----------------------------------------------------------------------------


@contextmanager
def _recording(
    model: PreTrainedModel, layout: ModelLayout, found: dict[int, dict[str, Any]]
) -> Iterator[None]:
    """Hooks that keep what a :class:`_Layer` holds."""
    handles = []

    def keep_input(layer: int, key: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            found.setdefault(layer, {})[key] = stream
            if key == "arguments":
                found[layer][key] = {k: v for k, v in kwargs.items() if k != "hidden_states"}

        return hook

    def keep_output(layer: int, key: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            found[layer][key] = output[0] if isinstance(output, tuple) else output

        return hook

    try:
        for layer in range(layout.n_layers):
            whole = model.get_submodule(layout.layer_name(layer))
            attention = model.get_submodule(layout.attention_name(layer))
            output = model.get_submodule(layout.output_name(layer))
            for module, key in ((whole, "stream"), (attention, "arguments"), (output, "z")):
                hook = keep_input(layer, key)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            for module, key in ((whole, "after"), (attention, "attended")):
                handles.append(module.register_forward_hook(keep_output(layer, key)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _clean(model: PreTrainedModel, layout: ModelLayout, tokens: Tensor) -> list[_Layer]:
    found: dict[int, dict[str, Any]] = {}
    with _recording(model, layout, found):
        model.base_model(input_ids=tokens.to(model.device), use_cache=False)
    return [_Layer(**found[layer]) for layer in range(layout.n_layers)]


def _first(layer: _Layer, n: int) -> _Layer:
    """The first n sequences of a clean run. Nothing is padded: one row's mask serves all."""
    mask = layer.arguments.get("attention_mask")
    arguments = layer.arguments | {"attention_mask": None if mask is None else mask[:1]}
    return _Layer(layer.stream[:n], layer.after[:n], layer.z[:n], layer.attended[:n], arguments)


def _mean_outputs(
    model: PreTrainedModel, layout: ModelLayout, tokens: Tensor, size: int
) -> list[Tensor]:
    """Per layer, the mean of z over all positions of all sequences, [heads * head_dim]."""
    sums: list[Tensor | float] = [0.0] * layout.n_layers
    for part in torch.split(tokens, size):
        for i, layer in enumerate(_clean(model, layout, part)):
            sums[i] = sums[i] + layer.z.float().sum((0, 1))
    return [torch.as_tensor(total) / tokens.numel() for total in sums]


def _instead(
    layers: Sequence[_Layer], n: int, resampled: bool, means: Sequence[Tensor] | None
) -> list[Tensor | None]:
    """Per layer, what takes z's place; None is zero."""
    if resampled:
        return [layer.z[n:] for layer in layers]
    if means is not None:
        return [mean.to(layer.z) for mean, layer in zip(means, layers, strict=True)]
    return [None] * len(layers)


# -- the branches -----------------------------------------------------------------------------


def _branches(
    model: PreTrainedModel,
    layout: ModelLayout,
    layers: Sequence[_Layer],
    instead: Sequence[Tensor | None],
    query: Tensor,
) -> Tensor:
    """The last stream at the query, clean and then head by head: [1 + L * heads, n, d_model]."""
    carried: list[Tensor] = []  # of each layer below, [heads * n, T, d_model]
    for i, layer in enumerate(layers):
        at = query if i == len(layers) - 1 else None
        own = _Sublayers(model, layout, i)
        carried = [own.run(streams, layer.arguments, at) for streams in carried]
        replaced = instead[i]
        change = own.head_outputs(-layer.z if replaced is None else replaced - layer.z)
        carried.append(own.resume(layer, change, at))
    clean = _at(layers[-1].after, query)
    return torch.cat([clean, *carried]).view(-1, *clean.shape)


class _Sublayers:
    """Attention and MLP of one layer, put together as its family does.

    Streams are [branches * n, T, d_model]. With ``at`` [n], the position of each sequence that is
    wanted, the result is [branches * n, d_model] and the MLP runs on those alone.
    """

    def __init__(self, model: PreTrainedModel, layout: ModelLayout, layer: int) -> None:
        family = layout.family
        whole = model.get_submodule(layout.layer_name(layer))
        self._attention = whole.get_submodule(family.attention)
        self._mlp = whole.get_submodule(family.mlp)
        self._attention_norm = whole.get_submodule(family.attention_norm)
        self._mlp_norm = whole.get_submodule(family.mlp_norm)
        self._norms_before = family.norms == "before"
        self._parallel = layout.parallel
        self._output = model.get_submodule(layout.output_name(layer))
        self._heads = (layout.n_heads, layout.head_dim)

    def run(self, stream: Tensor, arguments: Mapping[str, Any], at: Tensor | None) -> Tensor:
        """The layer's output for a stream."""
        normed = self._attention_norm(stream) if self._norms_before else stream
        with _only_at(self._output, at):
            attended = self._attention(normed, **arguments)[0]
        return self._after_attention(_at(stream, at), attended)

    def head_outputs(self, z: Tensor) -> Tensor:
        """Each head's part of the output projection of z [n, T, heads * head_dim], without bias.

        Returns [heads, n, T, d_model].
        """
        each = z.view(*z.shape[:-1], *self._heads)
        if is_plain_linear(self._output):
            weight = output_by_input(self._output)
            return torch.einsum("nthd,ohd->hnto", each, weight.reshape(len(weight), *self._heads))
        # An adapter, say: what it makes of each head alone, less what it makes of nothing.
        nothing: Tensor = self._output(torch.zeros_like(z[:1, :1]))
        alone = torch.eye(self._heads[0], dtype=z.dtype, device=z.device)[:, None, None, :, None]
        whole: Tensor = torch.stack([self._output((each * one).flatten(-2)) for one in alone])
        return whole - nothing

    def resume(self, layer: _Layer, change: Tensor, at: Tensor | None) -> Tensor:
        """The layer's output where the attention's is changed by ``change`` [heads, n, T, d]."""
        heads = len(change)
        change = _at(change.flatten(0, 1), at).view(heads, *_at(layer.after, at).shape)
        if self._parallel and self._norms_before:
            # The MLP does not see the attention: nothing else of the layer differs.
            after = _at(layer.after, at) + change
        else:
            after = self._after_attention(_at(layer.stream, at), _at(layer.attended, at) + change)
        return after.flatten(0, 1)

    def _after_attention(self, stream: Tensor, attended: Tensor) -> Tensor:
        if not self._norms_before:
            attended = self._attention_norm(attended)
        between = stream + attended
        read = stream if self._parallel else between
        if self._norms_before:
            written: Tensor = self._mlp(self._mlp_norm(read))
        else:
            written = self._mlp_norm(self._mlp(read))
        return between + written


def _at(stream: Tensor, at: Tensor | None) -> Tensor:
    """``stream`` [branches * n, T, ...] at position ``at`` [n] of each sequence."""
    if at is None:
        return stream
    rows = torch.arange(len(stream), device=stream.device)
    return stream[rows, at.repeat(len(stream) // len(at))]


@contextmanager
def _only_at(output: nn.Module, at: Tensor | None) -> Iterator[None]:
    """Within the block the output projection computes the wanted positions alone."""
    if at is None:
        yield
        return
    handle = output.register_forward_pre_hook(lambda _, args: (_at(args[0], at),))
    try:
        yield
    finally:
        handle.remove()


def _read(
    model: PreTrainedModel, layout: ModelLayout, ends: Tensor, target: Tensor, numbers: int
) -> Tensor:
    """Logit, centred logit and log-probability of the target, [3, branches, n], float64."""
    final_norm = model.get_submodule(layout.family.final_norm)
    unembed = unembedding(model)
    flat, wanted = ends.flatten(0, 1), target.repeat(len(ends))
    size = max(1, numbers // layout.vocab_size)
    parts = []
    for rows, ids in zip(torch.split(flat, size), torch.split(wanted, size), strict=True):
        logits = unembed(final_norm(rows)).float().contiguous()
        own = logits.gather(1, ids[:, None])[:, 0].cpu().double()
        mean, top = logits.mean(1).cpu().double(), logits.amax(1, keepdim=True)
        # In float32 a log-probability near −10 is rounded at 1e-6; the sum of exponentials is not.
        total = logits.sub_(top).exp_().sum(1).cpu().double().log() + top[:, 0].cpu().double()
        parts.append(torch.stack([own, own - mean, own - total]))
    return torch.cat(parts, dim=1).view(3, len(ends), len(target))


# -- the metric -------------------------------------------------------------------------------


class AblationContribution(MeanOverSequences):
    """Ablation logit contribution of every head over a probe set (App. H).

    ``update(model)`` evaluates the probe set; ``compute()`` gives :class:`UnitScores` by key:
    ``"logit"`` (Eq. 39), ``"centred"`` and ``"logprob"`` (:class:`AblationDrops`), positive where
    the head helps. States are sums over sequences.

    Args:
        probes: sequences of one length with one entry each
            (:func:`mda_lightning.probes.ablation_sequences`).
        n_layers, n_heads: of the model to be measured.
        replacement, seed: see :func:`ablation_drops`.
    """

    higher_is_better = True

    def __init__(
        self,
        probes: ProbeSet,
        *,
        n_layers: int,
        n_heads: int,
        replacement: Replacement = "zero",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(3, n_layers, n_heads, **kwargs)
        _check(probes, replacement)
        self.probes, self.replacement, self.seed = probes, replacement, seed

    @torch.no_grad()
    def update(self, model: PreTrainedModel) -> None:
        """Add the probe set, evaluated on ``model``."""
        with evaluating(model):
            drops = ablation_drops(model, self.probes, replacement=self.replacement, seed=self.seed)
        self.add(torch.stack(drops, dim=1))

    def compute(self) -> dict[str, UnitScores]:
        """Mean over sequences and standard error, [L, heads] each, by key."""
        scores = self.scores()
        return {
            key: UnitScores(scores.mean[i], scores.se[i])
            for i, key in enumerate(AblationDrops._fields)
        }
