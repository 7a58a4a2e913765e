"""Everything that determines a counterfactual study, as values that can be written down."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from mda_lightning.files import sha256_of

Estimator = Literal["replay", "in_run"]
ARMS = ("baseline", "mask-top", "mask-random", "insert-top", "insert-random")


@dataclass(frozen=True)
class CorpusSettings:
    """The embedded corpus: standard-library text and generated records.

    See :func:`~mda_lightning.corpora.embedded_corpus` and
    :class:`~mda_lightning.corpora.records.RecordStyle` for what each means.
    """

    seed: int = 0
    records_share: float = 0.15
    vocab_size: int = 512
    sequence_length: int = 128
    n_rows: int = 45_000
    pieces_per_name: tuple[int, int] = (4, 8)
    lines_per_record: tuple[int, int] = (5, 8)


@dataclass(frozen=True)
class ModelSettings:
    """A small GPT-NeoX with Pythia's initialisation."""

    n_layers: int = 3
    n_heads: int = 4
    d_model: int = 64
    d_mlp: int = 64
    rotary_fraction: float = 0.5

    @property
    def dimensions(self) -> dict[str, Any]:
        """By transformers' names, as :class:`~mda_lightning.pretraining.PythiaModule` takes."""
        return {
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "intermediate_size": self.d_mlp,
            "rotary_pct": self.rotary_fraction,
        }


@dataclass(frozen=True)
class TrainingSettings:
    """The base run: it stops ``margin_steps`` after the window closes, or at ``max_steps``."""

    batch_size: int = 8
    learning_rate: float = 1e-2
    schedule: Literal["constant", "wsd"] = "constant"
    warmup_steps: int = 50
    max_steps: int = 12_000
    margin_steps: int = 0


@dataclass(frozen=True)
class ScoringSettings:
    """Influence scores of the window's samples on the head that formed.

    Attributes:
        replay_at: checkpoints of the window whose scores are averaged (replay only).
        n_curvature: sequences that the curvature is estimated on.
    """

    estimator: Estimator = "replay"
    probe_function: Literal["attention", "log_attention", "copy_logprob"] = "attention"
    curvature: Literal["ekfac", "identity"] = "ekfac"
    fisher: Literal["sampled", "empirical"] = "sampled"
    damping: float = 0.1
    n_curvature: int = 256
    replay_at: tuple[Literal["start", "mid", "end"], ...] = ("mid",)
    seed: int = 0


@dataclass(frozen=True)
class InterventionSettings:
    """What the arms do to the treated share of the window's samples."""

    fraction: float = 0.10
    placement: Literal["shift", "replace"] = "replace"
    mode: Literal["dispersed", "concentrated"] = "dispersed"
    copies: int = 1


@dataclass(frozen=True)
class MonitorSettings:
    """μ: how often, on how many sequences, and over how many last evaluations an arm is judged.

    Attributes:
        every_n_steps: optimizer steps between measurements, in the base run while something
            happens and in every arm.
        quiet_every_n_steps: the same in the base run while nothing happens.
        companions_every_n_steps: steps between measurements of the previous-token score, the
            ablation contribution and in-context learning, which no arm is judged by.
    """

    every_n_steps: int = 10
    quiet_every_n_steps: int = 50
    companions_every_n_steps: int = 1000
    n_sequences: int = 100
    averaged_evaluations: int = 5


@dataclass(frozen=True)
class StudySettings:
    """A study: one base run per seed, and its arms branched from the window's start."""

    mechanism: str = "induction"
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    scoring: ScoringSettings = field(default_factory=ScoringSettings)
    intervention: InterventionSettings = field(default_factory=InterventionSettings)
    monitor: MonitorSettings = field(default_factory=MonitorSettings)

    def to_dict(self) -> dict[str, Any]:
        """Nested JSON values; :meth:`from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a key that no setting has; the message names it and those that exist.
        """
        parts: dict[str, Any] = {}
        kinds = {f.name: f.default_factory for f in dataclasses.fields(cls)}
        for name, given in value.items():
            kind = kinds.get(name)
            if name not in kinds:
                raise ValueError(f"no setting {name!r}; there are: {', '.join(kinds)}")
            if kind is dataclasses.MISSING or not callable(kind):
                parts[name] = given
                continue
            known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
            if unknown := set(given) - known:
                raise ValueError(
                    f"no setting {name}.{sorted(unknown)[0]!r}; there are: "
                    f"{', '.join(sorted(known))}"
                )
            # JSON has no tuples.
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
            parts[name] = kind(**values)
        return cls(**parts)

    @property
    def content_hash(self) -> str:
        """SHA-256 over every setting."""
        return sha256_of(json.dumps(self.to_dict(), sort_keys=True))
