"""What is measured of a model beside its mechanisms: companions that nothing is attributed to.

A mechanism has a μ, weights and a probe function; a measure is a number, or a number a head, that
is only watched: ablation contribution, in-context learning, held-out loss, copying, attention on
text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, runtime_checkable

from transformers import PreTrainedModel

from mda_lightning.companion_measures import (
    Ablation,
    Copying,
    HeldOutLoss,
    InContextLearning,
    PrefixMatching,
    PreviousTokenOnText,
)
from mda_lightning.mechanisms import MECHANISMS, Mechanism, mechanism
from mda_lightning.metrics import UnitScores


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
class Mu:
    """A mechanism's μ as a measure: watched at a rate of its own, and not attributed.

    Attributes:
        mechanism: whose μ.
        every_n_steps: optimizer steps between measurements; None leaves it to the monitor.
    """

    mechanism: Mechanism
    every_n_steps: int | None = None

    @property
    def name(self) -> str:
        return self.mechanism.name

    def settings(self) -> dict[str, Any]:
        return self.mechanism.settings()

    def with_token_ids(self, token_ids: list[int]) -> Self:
        return replace(self, mechanism=self.mechanism.with_token_ids(token_ids))

    def check(self, model: PreTrainedModel) -> None:
        self.mechanism.check(model)

    def measure(self, model: PreTrainedModel) -> dict[str, UnitScores]:
        return {self.name: self.mechanism.scores(model)}


MEASURES: dict[str, Callable[..., Measure]] = {
    Ablation.name: Ablation,
    InContextLearning.name: InContextLearning,
    HeldOutLoss.name: HeldOutLoss,
    Copying.name: Copying,
    PrefixMatching.name: PrefixMatching,
    PreviousTokenOnText.name: PreviousTokenOnText,
}


def measure(name: str, **settings: Any) -> Measure:
    """A measure by name, with its settings; a mechanism's name gives its μ (:class:`Mu`).

    Raises:
        ValueError: no measure has that name; the message lists those that exist.
    """
    if name in MECHANISMS:
        every_n_steps = settings.pop("every_n_steps", None)
        return Mu(mechanism(name, **settings), every_n_steps)
    if name not in MEASURES:
        names = ", ".join([*MEASURES, *MECHANISMS])
        raise ValueError(f"{name!r} is not a measure; there are: {names}")
    return MEASURES[name](**settings)
