"""Everything that determines a counterfactual study, as values that can be written down."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from mda_lightning.files import sha256_of
from mda_lightning.recipes.studies.arm_settings import (
    RANKINGS,
    STANDARD_ARMS,
    ArmSettings,
    CurvatureKind,
    InterventionSettings,
    Position,
    ProbeFunction,
    RankingSettings,
)

__all__ = [
    "RANKINGS",
    "STANDARD_ARMS",
    "ArmSettings",
    "CorpusSettings",
    "CurvatureKind",
    "InterventionSettings",
    "ModelSettings",
    "MonitorSettings",
    "Position",
    "ProbeFunction",
    "RankingSettings",
    "ScoringSettings",
    "StudySettings",
    "SubsetSettings",
    "TrainingSettings",
    "WindowSettings",
]

Estimator = Literal["replay", "in_run"]


@dataclass(frozen=True)
class CorpusSettings:
    """What is trained on.

    ``embedded`` is standard-library text and generated records, see
    :func:`~mda_lightning.corpora.embedded_corpus` and
    :class:`~mda_lightning.corpora.records.RecordStyle` for ``seed`` to ``lines_per_record``.

    Attributes:
        kind: ``embedded``; ``jsonl`` or ``text``, tokenised here; ``rows``, a corpus folder; or
            ``megatron``, rows tokenised by others, such as the preshuffled Pile.
        path: where it lies, for all but ``embedded``; ``~`` and ``$NAME`` are filled in.
        tokenizer: a ``tokenizer.json`` for text; None trains a BPE of ``vocab_size``. For
            ``megatron`` the one that made it.
        n_rows: rows at most; of the others than ``embedded`` None takes all.
        held_out_rows: rows kept back from training, on which held-out loss and in-context learning
            are measured; 0 measures the latter on training rows and no held-out loss.
        held_out: text to hold out instead, such as a validation file.
        icl_text: text for in-context learning, such as WikiText-2; None takes the held-out rows.
        shuffle: False trains on the rows in their order, as a preshuffled corpus wants it.
    """

    kind: Literal["embedded", "jsonl", "text", "rows", "megatron"] = "embedded"
    path: str | None = None
    tokenizer: str | None = None
    seed: int = 0
    records_share: float = 0.15
    vocab_size: int = 512
    sequence_length: int = 128
    n_rows: int | None = 45_000
    pieces_per_name: tuple[int, int] = (4, 8)
    lines_per_record: tuple[int, int] = (5, 8)
    held_out_rows: int = 0
    held_out: str | None = None
    icl_text: str | None = None
    shuffle: bool = True


@dataclass(frozen=True)
class ModelSettings:
    """A GPT-NeoX with Pythia's initialisation.

    Attributes:
        size: a Pythia size such as ``"14m"``, instead of the five numbers.
        weights: a checkpoint that training begins from instead of the initialisation, as
            ``mda-lightning monitor`` takes it (``EleutherAI/pythia-14m@step0``, or a folder).
        fresh_optimizer: allow weights of a later step than 0: they come without optimizer state, so
            that AdamW's moments begin at 0.
    """

    n_layers: int = 3
    n_heads: int = 4
    d_model: int = 64
    d_mlp: int = 64
    rotary_fraction: float = 0.5
    size: str | None = None
    weights: str | None = None
    fresh_optimizer: bool = False

    @property
    def dimensions(self) -> str | dict[str, Any]:
        """As :class:`~mda_lightning.pretraining.PythiaModule` takes them."""
        if self.size is not None:
            return self.size
        return {
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "intermediate_size": self.d_mlp,
            "rotary_pct": self.rotary_fraction,
        }


@dataclass(frozen=True)
class TrainingSettings:
    """The base run: it stops ``margin_steps`` after the window closes, or at ``max_steps``.

    Attributes:
        batch_size: samples of an optimizer step.
        micro_batch: samples of a forward pass; None is the whole batch.
        learning_rate: None is the size's own.
        warmup_steps: None is 1% of the schedule.
        schedule_steps: length of the learning-rate schedule; None is ``max_steps``.
        margin_steps: arms, too, go on for so long after the window's end; they are compared at its
            end all the same.
        checkpoint_every_n_steps: a killed run goes on from the last multiple; 0 keeps none, and it
            begins anew.
        accelerator, precision: as Lightning's Trainer takes them; one device a run.
    """

    batch_size: int = 8
    micro_batch: int | None = None
    learning_rate: float | None = 1e-2
    schedule: Literal["constant", "wsd", "pythia"] = "constant"
    warmup_steps: int | None = 50
    schedule_steps: int | None = None
    max_steps: int = 12_000
    margin_steps: int = 0
    checkpoint_every_n_steps: int = 0
    accelerator: str = "cpu"
    precision: str = "32-true"


@dataclass(frozen=True)
class WindowSettings:
    """The steps in which the head forms; left out, the base run finds head and window.

    Attributes:
        start, end: the window [start, end), for all seeds.
        target: the head, such as ``"L3H3"``; None takes the one with the highest μ at the end.
    """

    start: int | None = None
    end: int | None = None
    target: str | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether the recipe says where the window is."""
        return self.start is not None


@dataclass(frozen=True)
class ScoringSettings:
    """Influence scores of the window's samples on the head that formed.

    Attributes:
        replay_at: checkpoints of the window whose scores are averaged (replay only).
        n_curvature: sequences that the curvature is estimated on.
        units: score for the target alone, or for all heads.
    """

    estimator: Estimator = "replay"
    probe_function: ProbeFunction = "attention"
    curvature: CurvatureKind = "ekfac"
    fisher: Literal["sampled", "empirical"] = "sampled"
    damping: float = 0.1
    n_curvature: int = 256
    replay_at: tuple[Literal["start", "mid", "end"], ...] = ("mid",)
    units: Literal["target", "all"] = "target"
    seed: int = 0


@dataclass(frozen=True)
class SubsetSettings:
    """Random subsets for the linear datamodeling score (LDS); none unless ``count`` is given.

    From the window's midpoint, training goes on for ``steps`` steps on a random subset of their
    samples, the others masked, and μ is measured; the LDS of a ranking is the rank correlation of
    μ with the sum of its scores over the subset.

    Attributes:
        count: subsets a seed.
        keep: share of the samples kept in each.
        rankings: those whose LDS is asked for.
    """

    count: int = 0
    keep: float = 0.5
    steps: int = 100
    rankings: tuple[str, ...] = ("ekfac", "kfac", "dot", "random")


@dataclass(frozen=True)
class MonitorSettings:
    """μ: how often, on how many sequences, and over how many last evaluations an arm is judged.

    Attributes:
        every_n_steps: optimizer steps between measurements, in the base run while something
            happens and in every arm.
        quiet_every_n_steps: the same in the base run while nothing happens.
        companions_every_n_steps: steps between measurements of the previous-token score, the
            ablation contribution, in-context learning and the held-out loss.
        text_rows: rows of text that in-context learning and held-out loss are measured on.
        thresholds: values of μ whose crossing is compared.
    """

    every_n_steps: int = 10
    quiet_every_n_steps: int = 50
    companions_every_n_steps: int = 1000
    n_sequences: int = 100
    text_rows: int = 32
    averaged_evaluations: int = 5
    thresholds: tuple[float, ...] = (0.2, 0.3, 0.4)


@dataclass(frozen=True)
class StudySettings:
    """A study: one base run per seed, and its arms branched from it."""

    mechanism: str = "induction"
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    window: WindowSettings = field(default_factory=WindowSettings)
    scoring: ScoringSettings = field(default_factory=ScoringSettings)
    intervention: InterventionSettings = field(default_factory=InterventionSettings)
    monitor: MonitorSettings = field(default_factory=MonitorSettings)
    rankings: dict[str, RankingSettings] = field(default_factory=dict)
    arms: dict[str, ArmSettings] = field(default_factory=lambda: dict(STANDARD_ARMS))
    subsets: SubsetSettings = field(default_factory=SubsetSettings)

    def ranking(self, name: str) -> RankingSettings:
        """A ranking by name: the study's own, or one of :data:`RANKINGS`."""
        return self.rankings[name] if name in self.rankings else RANKINGS[name]

    def control_of(self, arm: str) -> str | None:
        """The arm that ``arm`` is compared with, where there is one."""
        if (named := self.arms[arm].control) is not None:
            return named
        return next((name for name, one in self.arms.items() if one.control_of == arm), None)

    def to_dict(self) -> dict[str, Any]:
        """Nested JSON values; :meth:`from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`, of values that it wrote.

        A recipe that a person wrote is read, and checked, by
        :func:`~mda_lightning.recipes.studies.recipe_file.read_recipe`.

        Raises:
            ValueError: a key that no setting has; the message names it and those that exist.
        """
        given = {key: _part(key, part) for key, part in value.items()}
        _refuse_unknown(cls, given, "")
        return cls(**given)

    @property
    def content_hash(self) -> str:
        """SHA-256 over every setting."""
        return sha256_of(json.dumps(self.to_dict(), sort_keys=True))

    def base_dict(self) -> dict[str, Any]:
        """The settings that decide the base run: two studies that agree in them can share it."""
        values = self.to_dict()
        for name in ("arms", "intervention", "rankings", "subsets"):
            del values[name]
        del values["monitor"]["thresholds"]
        return values


_PARTS: dict[str, Any] = {
    "corpus": CorpusSettings,
    "model": ModelSettings,
    "training": TrainingSettings,
    "window": WindowSettings,
    "scoring": ScoringSettings,
    "intervention": InterventionSettings,
    "monitor": MonitorSettings,
    "subsets": SubsetSettings,
}
_COLLECTIONS: dict[str, Any] = {"rankings": RankingSettings, "arms": ArmSettings}


def _part(key: str, value: Any) -> Any:
    if key in _COLLECTIONS:
        return {
            name: _built(_COLLECTIONS[key], one, f"{key}.{name}.") for name, one in value.items()
        }
    return _built(_PARTS[key], value, f"{key}.") if key in _PARTS else value


def _built(kind: Any, value: Mapping[str, Any], prefix: str) -> Any:
    _refuse_unknown(kind, value, prefix)
    # JSON has no tuples.
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})


def _refuse_unknown(kind: Any, value: Mapping[str, Any], prefix: str) -> None:
    known = [f.name for f in dataclasses.fields(kind)]
    if unknown := sorted(set(value) - set(known)):
        raise ValueError(f"no setting {prefix}{unknown[0]}; there are: {', '.join(known)}")
