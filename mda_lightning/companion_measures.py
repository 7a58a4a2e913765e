"""Companions to the mechanisms' scores: ablation, copying, and what is measured on text.

Each satisfies :class:`mda_lightning.measures.Measure`. The text is read once, at ``check``, or at
the first measurement.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import ModelLayout, check_token_ids, describe, real_token_ids
from mda_lightning.evaluation_text import TextSource, describe_text, own_row_length, text_rows
from mda_lightning.files import sha256_of
from mda_lightning.metrics import AblationContribution, AttentionScore, TextLoss, UnitScores
from mda_lightning.metrics.ablation import Replacement
from mda_lightning.metrics.copying import CopyingScore, copying_sequences
from mda_lightning.metrics.icl import (
    ICLScore,
    check_context,
    check_tokens,
    context_limit,
    icl_positions,
)
from mda_lightning.probes import (
    ProbeSet,
    ablation_sequences,
    prefix_matching_sequences,
    previous_token_sequences,
)
from mda_lightning.vocabulary import TokenizerLike, describe_token_ids, token_id_tuple

DEFAULT_CONTEXT = 512
DEFAULT_ABLATION_LENGTH = 64


def _make_ids_a_tuple(one: Ablation | Copying) -> None:
    if one.token_ids is not None:
        object.__setattr__(one, "token_ids", token_id_tuple(one.token_ids))


@dataclass(frozen=True)
class Ablation:
    """Ablation logit contribution of every head (Eq. 39): ``ablation/logit``, ``/centred``,
    ``/logprob``, each positive where the head helps to predict the copy.

    Attributes:
        every_n_steps: optimizer steps between measurements; None leaves it to the monitor.
        replacement: what takes the place of a head's output: "zero", "mean" or "resample".
        n_sequences: of the probe set, ``[prefix] A B C [gap] A B``.
        length: tokens in each; None takes 64, or as many as the context and the ids allow.
        seed: of the probe set; another one than those of μ and f, which it is to confirm.
        token_ids: ids to draw from, given as any sequence, array or tensor of whole numbers; None
            takes those the model's tokenizer really uses, as far as the model's configuration
            tells.
    """

    name: ClassVar[str] = "ablation"
    every_n_steps: int | None = None
    replacement: Replacement = "zero"
    n_sequences: int = 100
    length: int | None = None
    seed: int = 2
    token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _make_ids_a_tuple(self)

    def settings(self) -> dict[str, Any]:
        values = asdict(self) | {"token_ids": describe_token_ids(self.token_ids)}
        del values["every_n_steps"]
        return values

    def with_token_ids(self, token_ids: list[int]) -> Self:
        return replace(self, token_ids=tuple(token_ids))

    def check(self, model: PreTrainedModel) -> None:
        layout = describe(model)
        longest = context_limit(model)
        if longest is not None and self._length(model) > longest:
            raise ValueError(
                f"ablation sequences of {self.length} tokens are longer than the model's context "
                f"of {longest}; give Ablation(length={longest}) or less"
            )
        check_token_ids(model, self._metric(model, layout).probes.tokens)

    def measure(self, model: PreTrainedModel) -> dict[str, UnitScores]:
        metric = self._metric(model, describe(model))
        metric.update(model)
        return {f"{self.name}/{key}": scores for key, scores in metric.compute().items()}

    def _length(self, model: PreTrainedModel) -> int:
        if self.length is not None:
            return self.length
        wanted = min(DEFAULT_ABLATION_LENGTH, len(self._ids(model)))
        return min(wanted, context_limit(model) or wanted)

    def _ids(self, model: PreTrainedModel) -> tuple[int, ...]:
        if self.token_ids is not None:
            return self.token_ids
        return tuple(real_token_ids(model).tolist())

    def _metric(self, model: PreTrainedModel, layout: ModelLayout) -> AblationContribution:
        probes = ablation_sequences(
            self._ids(model),
            seed=self.seed,
            n_sequences=self.n_sequences,
            length=self._length(model),
        )
        # Every rank measures the same sequences: added up, they would count twice.
        return AblationContribution(
            probes,
            n_layers=layout.n_layers,
            n_heads=layout.n_heads,
            replacement=self.replacement,
            seed=self.seed,
            sync_on_compute=False,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class _OnText(ABC):
    """What measures on text have in common.

    Attributes:
        text: see :data:`mda_lightning.evaluation_text.TextSource`.
        tokenizer: path, name or object; None takes the one that the model's ``name_or_path``
            leads to. Not needed for texts that are tokens already.
        text_key: the text's column or key in ``.jsonl``, ``.parquet`` and ``.arrow``.
        n_rows: rows at most.
        every_n_steps: optimizer steps between measurements; None leaves it to the monitor.
    """

    name: ClassVar[str]
    _plain: ClassVar[tuple[str, ...]]
    text: TextSource = "wikitext-2"
    tokenizer: TokenizerLike | None = None
    text_key: str = "text"
    n_rows: int = 128
    every_n_steps: int | None = None
    # Of this object's text and tokenizer: ``replace`` starts anew.
    _read: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)

    def settings(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name in self._plain}
        rows = next(reversed(self._read.values()), None)
        return values | {
            "text": describe_text(self.text),
            # Of the rows last used, which a model's context may have cut; None until then.
            "rows_sha256": None if rows is None else sha256_of(rows.numpy()),
        }

    def with_token_ids(self, token_ids: list[int]) -> Self:
        return self

    def rows(self, model: PreTrainedModel) -> Tensor:
        """The rows that ``model`` is measured on, int64 [N, tokens].

        Raises:
            ValueError: too little text, a tokenizer or ids that the model lacks, or none.
        """
        length = self._row_length(model)
        name = str(getattr(model.config, "_name_or_path", None) or "") or None
        size = int(model.config.vocab_size)
        key = (length, size, name if self.tokenizer is None else None)
        if key not in self._read:
            self._read[key] = text_rows(
                self.text,
                row_length=length,
                n_rows=self.n_rows,
                tokenizer=name if self.tokenizer is None else self.tokenizer,
                vocab_size=size,
                text_key=self.text_key,
            )
        self._read[key] = self._read.pop(key)  # the one last used stands last
        return self._read[key]

    @abstractmethod
    def _row_length(self, model: PreTrainedModel) -> int: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class InContextLearning(_OnText):
    """``icl/gain`` and ``icl/olsson`` on text (:class:`mda_lightning.metrics.ICLScore`).

    Attributes:
        context: predicted tokens in a row; None is 512, or as many as the model and the text's own
            rows allow.
    """

    name: ClassVar[str] = "icl"
    _plain: ClassVar[tuple[str, ...]] = ("n_rows", "context")
    context: int | None = None

    def check(self, model: PreTrainedModel) -> None:
        check_tokens(model, self.rows(model))

    def measure(self, model: PreTrainedModel) -> dict[str, UnitScores]:
        # Every rank measures the same rows: added up, they would count twice.
        metric = ICLScore(self.rows(model), sync_on_compute=False)
        metric.update(model)
        return metric.compute()

    def _row_length(self, model: PreTrainedModel) -> int:
        context = self.context
        if context is None:
            own = own_row_length(self.text)
            context = min(DEFAULT_CONTEXT, context_limit(model) or DEFAULT_CONTEXT)
            context = context if own is None else min(context, own - 1)
        icl_positions(context)
        check_context(model, context)
        return context + 1


@dataclass(frozen=True, eq=False, kw_only=True)
class HeldOutLoss(_OnText):
    """``held_out_loss``: mean next-token cross-entropy in nats, of rows that nothing is trained on.

    The text is the caller's: a validation file, or rows kept back from training.

    Attributes:
        context: predicted tokens in a row; None takes the text's own rows, or 512, or as many as
            the model can read.
    """

    name: ClassVar[str] = "held_out_loss"
    _plain: ClassVar[tuple[str, ...]] = ("n_rows", "context")
    context: int | None = None

    def check(self, model: PreTrainedModel) -> None:
        check_tokens(model, self.rows(model))

    def measure(self, model: PreTrainedModel) -> dict[str, UnitScores]:
        # Every rank measures the same rows: added up, they would count twice.
        metric = TextLoss(self.rows(model), sync_on_compute=False)
        metric.update(model)
        return {self.name: metric.compute()}

    def _row_length(self, model: PreTrainedModel) -> int:
        context = self.context
        if context is None:
            own = own_row_length(self.text)
            context = DEFAULT_CONTEXT if own is None else own - 1
            context = min(context, context_limit(model) or context)
        check_context(model, context)
        return context + 1


@dataclass(frozen=True, eq=False, kw_only=True)
class _AttentionOnText(_OnText):
    """Mean attention over entries that a text's rows determine.

    Attributes:
        length: tokens in a row.
    """

    _plain: ClassVar[tuple[str, ...]] = ("n_rows", "length")
    length: int = 128
    _built: dict[int, ProbeSet] = field(default_factory=dict, init=False, repr=False)

    def check(self, model: PreTrainedModel) -> None:
        describe(model)
        self.probes(model)

    def probes(self, model: PreTrainedModel) -> ProbeSet:
        """The entries whose attention is read; ``.chance`` is the value of uniform attention."""
        rows = self.rows(model)
        if id(rows) not in self._built:
            self._built[id(rows)] = self._entries(rows)
        return self._built[id(rows)]

    def measure(self, model: PreTrainedModel) -> dict[str, UnitScores]:
        layout = describe(model)
        metric = AttentionScore(
            self.probes(model),
            n_layers=layout.n_layers,
            n_heads=layout.n_heads,
            sync_on_compute=False,
        )
        metric.update(model)
        return {self.name: metric.compute()}

    def _row_length(self, model: PreTrainedModel) -> int:
        check_context(model, self.length)
        return self.length

    @abstractmethod
    def _entries(self, rows: Tensor) -> ProbeSet: ...


class PrefixMatching(_AttentionOnText):
    """Attention to what followed the present token before, on text, of every head.

    See :func:`mda_lightning.probes.prefix_matching_sequences`.
    """

    name: ClassVar[str] = "prefix_matching"

    def _entries(self, rows: Tensor) -> ProbeSet:
        return prefix_matching_sequences(rows)


class PreviousTokenOnText(_AttentionOnText):
    """Attention to the token before, on text, of every head.

    See :func:`mda_lightning.probes.previous_token_sequences`.
    """

    name: ClassVar[str] = "previous_token_text"

    def _entries(self, rows: Tensor) -> ProbeSet:
        return previous_token_sequences(rows)


@dataclass(frozen=True, kw_only=True)
class Copying:
    """``copying`` and ``copying/eigenvalues`` of every head (:class:`CopyingScore`).

    Attributes:
        seed, n_sequences, length: of the random sequences.
        token_ids: ids to draw from, given as any sequence, array or tensor of whole numbers; None
            takes those the model's tokenizer really uses, as far as the model's configuration
            tells.
        every_n_steps: optimizer steps between measurements; None leaves it to the monitor.
    """

    name: ClassVar[str] = "copying"
    seed: int = 0
    n_sequences: int = 50
    length: int = 25
    token_ids: tuple[int, ...] | None = None
    every_n_steps: int | None = None

    def __post_init__(self) -> None:
        _make_ids_a_tuple(self)

    def settings(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "n_sequences": self.n_sequences,
            "length": self.length,
            "token_ids": describe_token_ids(self.token_ids),
        }

    def with_token_ids(self, token_ids: list[int]) -> Self:
        return replace(self, token_ids=tuple(token_ids))

    def check(self, model: PreTrainedModel) -> None:
        describe(model)
        check_context(model, self.length)
        self._sequences(model)

    def measure(self, model: PreTrainedModel) -> dict[str, UnitScores]:
        metric = CopyingScore(model, tokens=self._sequences(model), sync_on_compute=False)
        metric.update(model)
        return metric.compute()

    def _sequences(self, model: PreTrainedModel) -> Tensor:
        tokens = copying_sequences(
            real_token_ids(model) if self.token_ids is None else self.token_ids,
            seed=self.seed,
            n_sequences=self.n_sequences,
            length=self.length,
        )
        check_token_ids(model, tokens)
        return tokens
