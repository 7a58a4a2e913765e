"""What a policy is: at a step it decides on one operation on the stream to come, or on none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from mda_lightning.callbacks.scoring.when import Active, When
from mda_lightning.interventions import Insert, Mask
from mda_lightning.mechanisms import Mechanism
from mda_lightning.schedule import Schedule
from mda_lightning.units import Head
from mda_lightning.window import Phase

Which = Literal["top", "bottom"]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Decision:
    """An operation, and what it was decided by.

    Attributes:
        policy: its name among the policies of the run.
        operation: with ``online=True``.
        scores: float64 [n], of ``operation.sample_ids``.
        score_steps: int64 [n], step of the weights that a score was taken at; -1 unknown.
        ihvp_steps: int64 [n], step of the IHVP that it was taken with; -1 unknown.
    """

    policy: str
    operation: Mask | Insert
    scores: Floats
    score_steps: Ints
    ihvp_steps: Ints


@dataclass
class SteeredRun:
    """What policies see of a fit.

    Attributes:
        trainer: of the fit.
        model: the language model that trains.
        mechanism: whose f and μ the run is steered by.
        rows: of the data module; ``rows.get(ids)`` are token rows.
        corpus_hash: of the base corpus.
        end: steps of the run.
        schedule: as it is after what has been decided so far.
    """

    trainer: pl.Trainer
    model: PreTrainedModel
    mechanism: Mechanism
    rows: Any
    corpus_hash: str
    end: int
    schedule: Schedule


@dataclass
class Policy(ABC):
    """Decides, before a step's batch is fetched, what becomes of samples from that step on.

    Policies say nothing of each other; those before in the list are decided first.

    Attributes:
        name: in logs and in the audit table; "" takes the class's, numbered where there are two.
        active: when it acts: always; inside the window that CriticalWindow announces, from its
            first warning on; or in steps [first, last).
    """

    name: str = field(default="", kw_only=True)
    active: Active = field(default="always", kw_only=True)

    #: Whether it reads the scores of an InfluenceScoring in the same run.
    needs_in_run_scores: ClassVar[bool] = False
    #: What it means that it was on and decided nothing, for people.
    why_nothing: ClassVar[str] = "it decided on nothing"

    def __post_init__(self) -> None:
        self._when = When(self.active)

    @property
    @abstractmethod
    def direction(self) -> int:
        """1 where acting promotes the unit, -1 where it works against it."""

    @property
    def by_window(self) -> bool:
        return self._when.by_window

    def is_on(self, step: int, phase: Phase) -> bool:
        """Whether it may act at ``step``."""
        return self._when.is_on(step, phase)

    def steps(self, end: int) -> tuple[int, int]:
        """The first and last step at which it may act, in a run of ``end`` steps."""
        if isinstance(self._when.active, tuple):
            return self._when.active[0], min(self._when.active[1], end) - 1
        return 0, end - 1

    def begin(self, run: SteeredRun, units: Sequence[Head]) -> None:  # noqa: B027
        """Before the first step of a fit; ``units`` are empty where they are known only later.

        Raises:
            ValueError: what it cannot work with.
        """

    @abstractmethod
    def decide(
        self, run: SteeredRun, step: int, strength: float, units: Sequence[Head]
    ) -> Decision | None:
        """The operation from ``step`` on, or None.

        Called on all ranks alike, with a step that is the next to be trained.

        Args:
            strength: in (0, 1], by which the share is scaled.
            units: whose scores count, added up.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments, as JSON values."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know; tensors and primitives."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take up a saved state."""

    def forget(self) -> None:  # noqa: B027
        """Begin a new run."""


def check_share(share: float) -> None:
    """Refuse what is no share.

    Raises:
        ValueError: outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: a share of the samples, in (0, 1]")


def check_which(which: str) -> None:
    """Refuse another end of a ranking.

    Raises:
        ValueError: neither "top" nor "bottom".
    """
    if which not in ("top", "bottom"):
        raise ValueError(f"which={which!r}: 'top' (highest scores) or 'bottom'")


def check_counts(**counts: int | None) -> None:
    """Refuse numbers below 1.

    Raises:
        ValueError: which.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count}: at least 1")


def of_other_sign(name: str, which: Which, n: int, share: int) -> str:
    """A warning that a share has samples that are left out: see :func:`ranked`."""
    way = "promote the unit" if which == "top" else "work against the unit"
    return (
        f"{name}: {n} of the {share} samples of its share do not {way} by their scores and are "
        "left out; a smaller share has none of them"
    )


def ranked(ids: Ints, scores: Floats, which: Which) -> Ints:
    """Places [n] of the scores of that end, the first in rank first; ties go by sample id.

    The top of a ranking are samples that promote the unit, so scores above 0, however large a
    share of all is asked for; the bottom those below.
    """
    there = np.flatnonzero(np.isfinite(scores) & (scores > 0 if which == "top" else scores < 0))
    key = -scores[there] if which == "top" else scores[there]
    return there[np.lexsort((ids[there], key))]
