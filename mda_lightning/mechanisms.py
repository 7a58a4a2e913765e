"""Mechanisms: the triple (μ, π, f) of a unit (SPEC §1, Table 3).

μ is the monitoring metric, π the blocks of weights that belong to the unit, f the probe function
whose gradient influence scores project on. f is always higher-is-better.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import (
    HEAD_BLOCKS,
    HEAD_BLOCKS_WITH_BIAS,
    BlockName,
    check_token_ids,
    describe,
    modules_of,
    real_token_ids,
    special_token_ids,
    unembedding,
)
from mda_lightning.attention import attention_at
from mda_lightning.metrics import AttentionScore, UnitScores
from mda_lightning.probes import (
    ProbeSet,
    random_sequences,
    repeated_sequences,
    single_target_sequences,
)
from mda_lightning.sequence_loss import loss_at_hidden
from mda_lightning.units import Head
from mda_lightning.vocabulary import describe_token_ids, token_id_tuple

ProbeFunction = Literal["attention", "log_attention", "copy_logprob"]


@runtime_checkable
class Mechanism(Protocol):
    """What the rest of the package asks of a mechanism."""

    name: ClassVar[str]

    @property
    def block_names(self) -> tuple[BlockName, ...]:
        """π: the blocks that f has a gradient in."""
        ...

    @property
    def chance(self) -> float:
        """μ of a head with uniform attention. Known once token ids are."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything that determines μ and f, as JSON values."""
        ...

    def with_token_ids(self, token_ids: list[int]) -> Mechanism:
        """The same mechanism, probed with these token ids."""
        ...

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError where the model cannot be measured so; called before training."""
        ...

    def scores(self, model: PreTrainedModel) -> UnitScores:
        """μ of every head, [L, heads]; no gradient, no random number, the model as before."""
        ...

    def probe(self, model: PreTrainedModel) -> Tensor:
        """f: a 0-dim tensor where one f serves all heads, else [L, heads]; differentiable."""
        ...


@dataclass(frozen=True)
class _HeadMechanism(ABC):
    """Settings shared by the mechanisms of attention heads.

    Attributes:
        n_sequences: sequences in μ's probe set.
        n_probe_sequences: sequences in f's probe set.
        seed, probe_seed: seeds of the two sets; they must differ, so that a sample is not scored by
            the sequences that later judge it.
        bos: a token put in front of every sequence, or None (default, SPEC §2).
        length: shortest and longest sequence; what it counts is said by the mechanism.
        bias: whether the biases of a head's query, key and value rows belong to π (SPEC §4: not by
            default).
        token_ids: ids to draw from; None takes those the model's tokenizer really uses, as far as
            the model's configuration tells.
    """

    name: ClassVar[str]
    n_sequences: int = 100
    n_probe_sequences: int = 100
    seed: int = 0
    probe_seed: int = 1
    bos: int | None = None
    token_ids: tuple[int, ...] | None = None
    length: tuple[int, int] = (8, 20)
    bias: bool = False
    _built: dict[Any, ProbeSet] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.token_ids is not None:
            object.__setattr__(self, "token_ids", token_id_tuple(self.token_ids))
        if self.seed == self.probe_seed:
            raise ValueError(
                f"seed and probe_seed are both {self.seed}: the metric and the probe function must "
                "use different random sequences; give two seeds"
            )

    def settings(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "_built"}
        return values | {"token_ids": describe_token_ids(self.token_ids)}

    def with_token_ids(self, token_ids: list[int]) -> Self:
        return replace(self, token_ids=tuple(token_ids))

    @abstractmethod
    def _probes(self, kind: str, ids: tuple[int, ...]) -> ProbeSet:
        """The probe set of μ (kind "mu") or of f ("f")."""

    @property
    @abstractmethod
    def block_names(self) -> tuple[BlockName, ...]:
        """π."""

    @property
    def chance(self) -> float:
        built = [probes for (kind, _), probes in self._built.items() if kind == "mu"]
        if built:
            return built[-1].chance
        if self.token_ids is not None:
            return self._draw_from("mu", self.token_ids).chance
        # Before there is a model: the lengths, and so the value, may still differ a little.
        return self._probes("mu", tuple(range(self.length[1]))).chance

    def check(self, model: PreTrainedModel) -> None:
        if self.bias:
            _check_biases(model, self.block_names)
        drawn = [self._draw(kind, model).tokens for kind in ("mu", "f")]
        for tokens in drawn:
            check_token_ids(model, tokens)
        longest = max(tokens.shape[1] for tokens in drawn)
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise ValueError(
                f"{self.name}: sequences of {longest} tokens are longer than the model's context "
                f"of {limit} (max_position_embeddings); give shorter ones, "
                f"mechanism({self.name!r}, length=(low, high)), now length={self.length}"
            )

    def scores(self, model: PreTrainedModel) -> UnitScores:
        return self._measure(self._draw("mu", model), model)

    def _draw(self, kind: str, model: PreTrainedModel) -> ProbeSet:
        if self.token_ids is not None:
            return self._draw_from(kind, self.token_ids)
        # What the ids follow from; no need to list them each time.
        key = (kind, (int(model.config.vocab_size), *sorted(special_token_ids(model))))
        if key not in self._built:
            self._built[key] = self._probes(kind, tuple(real_token_ids(model).tolist()))
        return self._built[key]

    def _draw_from(self, kind: str, ids: tuple[int, ...]) -> ProbeSet:
        if (kind, ids) not in self._built:
            self._built[kind, ids] = self._probes(kind, ids)
        return self._built[kind, ids]

    def _measure(self, probes: ProbeSet, model: PreTrainedModel) -> UnitScores:
        layout = describe(model)
        # Every rank measures the same sequences: added up, they would count twice.
        metric = AttentionScore(
            probes,
            n_layers=layout.n_layers,
            n_heads=layout.n_heads,
            sync_on_compute=False,
        )
        metric.update(model)
        return metric.compute()


def _check_biases(model: PreTrainedModel, blocks: Sequence[BlockName]) -> None:
    layout = describe(model)
    own = [name for name in blocks if name.endswith("+bias")]
    for module in modules_of(layout.blocks([Head(0, 0)], own)):
        if getattr(model.get_submodule(module), "bias", None) is None:
            raise ValueError(
                f"bias=True, but {module} of this {layout.model_type} has none; leave bias=False"
            )


def _attention_probe(model: PreTrainedModel, probes: ProbeSet, *, log: bool) -> Tensor:
    """Mean (log) attention over the entries, per head: [L, heads]."""
    pattern = attention_at(model, probes)
    # The smallest normal float32 keeps the gradient finite where attention underflows to 0.
    values = pattern.clamp_min(torch.finfo(torch.float32).tiny).log() if log else pattern
    return torch.einsum("e,elh->lh", probes.weight.to(values), values)


def _copy_logprob(model: PreTrainedModel, probes: ProbeSet) -> Tensor:
    """Mean log-probability of the copy target (Eq. 18): the logits at ``query`` predict it."""
    device = model.device
    out = model.base_model(input_ids=probes.tokens.to(device), use_cache=False, return_dict=True)
    at = out.last_hidden_state[probes.sequence.to(device), probes.query.to(device)]
    end = loss_at_hidden(unembedding(model), at[None], probes.target.to(device)[None])
    assert end.gradient is not None
    weight = probes.weight.to(at)
    value: Tensor = -(weight * end.loss[0].to(at)).sum()
    # The value as a function of ``at``, with the gradient that is known already.
    slope: Tensor = -(weight[:, None] * end.gradient[0] * at).sum()
    return value + slope - slope.detach()


@dataclass(frozen=True)
class InductionHead(_HeadMechanism):
    """Induction head: μ induction score; π QK, V, O; f ``attention`` or ``copy_logprob``.

    Attributes:
        probe_function: "attention" is the mean attention to the induction target, "log_attention"
            its mean logarithm (App. B); both have a gradient in QK only. "copy_logprob" is the mean
            log-probability of the right copy (Eq. 18), with a gradient in QK, V and O.
        length: base length L is uniform in this range, both ends included.
        repeats: copies of the base sequence (R).
        layout: "repeated" uses every determined position; "single_target" is Eq. 18's layout.
    """

    name: ClassVar[str] = "induction"
    probe_function: ProbeFunction = "attention"
    length: tuple[int, int] = (8, 20)
    repeats: int = 2
    layout: Literal["repeated", "single_target"] = "repeated"

    @property
    def block_names(self) -> tuple[BlockName, ...]:
        blocks = HEAD_BLOCKS_WITH_BIAS if self.bias else HEAD_BLOCKS
        return blocks if self.probe_function == "copy_logprob" else blocks[:1]

    def probe(self, model: PreTrainedModel) -> Tensor:
        probes = self._draw("f", model)
        if self.probe_function == "copy_logprob":
            return _copy_logprob(model, probes)
        return _attention_probe(model, probes, log=self.probe_function == "log_attention")

    def _probes(self, kind: str, ids: tuple[int, ...]) -> ProbeSet:
        if kind == "f" and self.layout == "single_target":
            return single_target_sequences(
                ids,
                seed=self.probe_seed,
                n_sequences=self.n_probe_sequences,
                length=(max(5, 2 * self.length[0]), 2 * self.length[1]),
                bos=self.bos,
            )
        return repeated_sequences(
            ids,
            seed=self.seed if kind == "mu" else self.probe_seed,
            n_sequences=self.n_sequences if kind == "mu" else self.n_probe_sequences,
            length=self.length,
            repeats=self.repeats,
            bos=self.bos,
        )


@dataclass(frozen=True)
class PreviousTokenHead(_HeadMechanism):
    """Previous-token head: μ and f mean attention to t−1 on random sequences; π QK (Eq. 15–17)."""

    name: ClassVar[str] = "previous_token"
    probe_function: Literal["attention", "log_attention"] = "attention"
    length: tuple[int, int] = (16, 40)

    @property
    def block_names(self) -> tuple[BlockName, ...]:
        return ("QK+bias",) if self.bias else ("QK",)

    def probe(self, model: PreTrainedModel) -> Tensor:
        probes = self._draw("f", model)
        return _attention_probe(model, probes, log=self.probe_function == "log_attention")

    def _probes(self, kind: str, ids: tuple[int, ...]) -> ProbeSet:
        return random_sequences(
            ids,
            seed=self.seed if kind == "mu" else self.probe_seed,
            n_sequences=self.n_sequences if kind == "mu" else self.n_probe_sequences,
            length=self.length,
            bos=self.bos,
        )


MECHANISMS: dict[str, Callable[..., Mechanism]] = {
    InductionHead.name: InductionHead,
    PreviousTokenHead.name: PreviousTokenHead,
}


def mechanism(name: str, **settings: Any) -> Mechanism:
    """A mechanism by name, with its settings.

    Raises:
        ValueError: no mechanism has that name; the message lists those that exist.
    """
    if name not in MECHANISMS:
        raise ValueError(f"{name!r} is not a mechanism; there are: {', '.join(MECHANISMS)}")
    return MECHANISMS[name](**settings)
