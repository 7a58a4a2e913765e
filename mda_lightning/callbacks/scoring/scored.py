"""A mechanism that is scored in a run, and what a subscriber hears of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from mda_lightning.callbacks.critical_window import CriticalWindow
from mda_lightning.callbacks.scoring.not_finite import NotFinite
from mda_lightning.mechanisms import Mechanism
from mda_lightning.store import ScoreWriter
from mda_lightning.window import Phase


@dataclass
class Scored:
    """A mechanism that is scored, the window that it follows, and its rows of this rank."""

    mechanism: Mechanism
    window: CriticalWindow | None = None
    writer: ScoreWriter | None = None
    not_finite: NotFinite = field(default_factory=NotFinite)

    @property
    def name(self) -> str:
        return self.mechanism.name

    @property
    def phase(self) -> Phase:
        return "before" if self.window is None else self.window.phase


class ScoredSamples(NamedTuple):
    """A micro-batch of this rank that has been scored for a mechanism.

    Attributes:
        mechanism: its name.
        step: of the samples' update.
        ihvp_step: of the refresh that they were scored by.
        sample_ids: int64 [b].
        values: float32 [b, U, K], NaN where there is no score.
    """

    mechanism: str
    step: int
    ihvp_step: int
    sample_ids: Tensor
    values: Tensor
