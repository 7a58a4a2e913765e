"""What is measured of a model beside its mechanisms: companions that nothing is attributed to.

A mechanism has a μ, weights and a probe function; a measure is a number, or a number a head, that
is only watched: ablation contribution, in-context learning, copying, attention on text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, Self, runtime_checkable

from transformers import PreTrainedModel

from mda_lightning.architectures import ModelLayout, describe, real_token_ids
from mda_lightning.companion_measures import (
    Copying,
    InContextLearning,
    PrefixMatching,
    PreviousTokenOnText,
)
from mda_lightning.metrics import AblationContribution, UnitScores
from mda_lightning.metrics.ablation import Replacement
from mda_lightning.probes import ablation_sequences


@runtime_checkable
class Measure(Protocol):
    """What a monitor asks of a measure."""

    @property
    def name(self) -> str:
        """As in :data:`MEASURES`, and the first part of its keys."""
        ...

    @property
    def every_n_steps(self) -> int | None:
        """Optimizer steps between measurements; None leaves it to the monitor."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything that determines the numbers, as JSON values."""
        ...

    def with_token_ids(self, token_ids: list[int]) -> Self:
        """The same measure, probed with these token ids; itself where it draws none."""
        ...

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError where the model cannot be measured so; called before training."""
        ...

    def measure(self, model: PreTrainedModel) -> dict[str, UnitScores]:
        """Numbers by key, such as ``"icl/gain"``: [L, heads], or 0-dim for the whole model.

        No gradient, no random number of a global generator, the model as before.
        """
        ...


@dataclass(frozen=True)
class Ablation:
    """Ablation logit contribution of every head (Eq. 39): ``ablation/logit``, ``/centred``,
    ``/logprob``, each positive where the head helps to predict the copy.

    Attributes:
        every_n_steps: optimizer steps between measurements; None leaves it to the monitor.
        replacement: what takes the place of a head's output: "zero", "mean" or "resample".
        n_sequences, length: of the probe set, ``[prefix] A B C [gap] A B``.
        seed: of the probe set; another one than those of μ and f, which it is to confirm.
        token_ids: ids to draw from; None takes those the model's tokenizer really uses, as far as
            the model's configuration tells.
    """

    every_n_steps: int | None = None
    replacement: Replacement = "zero"
    n_sequences: int = 100
    length: int = 32
    seed: int = 2
    token_ids: tuple[int, ...] | None = None
    name: str = field(default="ablation", init=False)

    def settings(self) -> dict[str, Any]:
        values = asdict(self)
        del values["every_n_steps"], values["name"]
        return values

    def with_token_ids(self, token_ids: list[int]) -> Self:
        return replace(self, token_ids=tuple(int(i) for i in token_ids))

    def check(self, model: PreTrainedModel) -> None:
        layout = describe(model)
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and self.length > longest:
            raise ValueError(
                f"ablation sequences of {self.length} tokens are longer than the model's context "
                f"of {longest}; give Ablation(length={longest}) or less"
            )
        self._metric(model, layout)

    def measure(self, model: PreTrainedModel) -> dict[str, UnitScores]:
        metric = self._metric(model, describe(model))
        metric.update(model)
        return {f"{self.name}/{key}": scores for key, scores in metric.compute().items()}

    def _metric(self, model: PreTrainedModel, layout: ModelLayout) -> AblationContribution:
        ids = self.token_ids or tuple(real_token_ids(model).tolist())
        probes = ablation_sequences(
            ids, seed=self.seed, n_sequences=self.n_sequences, length=self.length
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


MEASURES: dict[str, Callable[..., Measure]] = {
    "ablation": Ablation,
    InContextLearning.name: InContextLearning,
    Copying.name: Copying,
    PrefixMatching.name: PrefixMatching,
    PreviousTokenOnText.name: PreviousTokenOnText,
}


def measure(name: str, **settings: Any) -> Measure:
    """A measure by name, with its settings.

    Raises:
        ValueError: no measure has that name; the message lists those that exist.
    """
    if name not in MEASURES:
        raise ValueError(f"{name!r} is not a measure; there are: {', '.join(MEASURES)}")
    return MEASURES[name](**settings)
