"""What is measured of a model beside its mechanisms: companions that nothing is attributed to.

A mechanism has a μ, weights and a probe function; a measure is a number, or a number a head, that
is only watched: ablation contribution, in-context learning, copying, attention on text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, Self, runtime_checkable

from transformers import PreTrainedModel

from mda_lightning.metrics import UnitScores


@runtime_checkable
class Measure(Protocol):
    """What a monitor asks of a measure.

    Attributes:
        name: as in :data:`MEASURES`, and the first part of its keys.
        every_n_steps: optimizer steps between measurements; None leaves it to the monitor.
    """

    name: str
    every_n_steps: int | None

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


MEASURES: dict[str, Callable[..., Measure]] = {}


def measure(name: str, **settings: Any) -> Measure:
    """A measure by name, with its settings.

    Raises:
        ValueError: no measure has that name; the message lists those that exist.
    """
    if name not in MEASURES:
        raise ValueError(f"{name!r} is not a measure; there are: {', '.join(MEASURES)}")
    return MEASURES[name](**settings)
