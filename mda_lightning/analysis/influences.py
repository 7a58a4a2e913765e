"""The scores of one seed's window, with the numbers the report states about them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mda_lightning.analysis.distributions import (
    Drive,
    TailFit,
    fit_tail,
    net_drive,
    normal_top_share,
    top_share,
)
from mda_lightning.store import ScoreTable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SeedInfluence:
    """Scores of every sample of one seed's window on one unit.

    Attributes:
        unit: the head scored for ("L1H2").
        sample_ids, scores, steps: aligned, ascending by id, finite scores only, [N]. A sample that
            was trained on more than once counts once, with its mean score and its first step.
        n_excluded: samples left out because their score was not finite.
        top: ids of the treated fraction, best first; ``bottom``: worst first, as many.
        share: of the positive influence held by ``top``.
        noise_share: the share that normal noise of the same mean and spread would show.
        tail: power-law fit of the positive tail, where there are enough samples.
    """

    seed: int
    unit: str
    sample_ids: Ints
    scores: Floats
    steps: Ints
    n_excluded: int
    top: Ints
    bottom: Ints
    share: float
    noise_share: float
    drive: Drive
    tail: TailFit | None
    estimator: str
    blocks: tuple[str, ...]
    provenance: Mapping[str, Any]

    def of(self, sample_id: int) -> tuple[float, int]:
        """(score, step) of one sample."""
        row = int(np.searchsorted(self.sample_ids, sample_id))
        return float(self.scores[row]), int(self.steps[row])


def seed_influence(path: str | Path, *, seed: int, unit: str, fraction: float) -> SeedInfluence:
    """Read a score table and summarise one unit's scores.

    Args:
        fraction: the treated fraction; the top set is the table's own ``top(unit, fraction=...)``,
            the one that plans are made from.

    Raises:
        ValueError: the table is unreadable or incomplete, lacks the unit, or has no finite score
            for it.
    """
    table = ScoreTable.open(path)
    if unit not in table.units:
        raise ValueError(f"the score table has no unit {unit}: it holds {', '.join(table.units)}")
    if not table.complete:
        raise ValueError(
            "the score table is not complete: its run still goes on or was interrupted"
        )
    sample_ids, values = table.mean_scores(unit)
    steps = table.frame(unit).groupby("sample_id")["step"].min().to_numpy(dtype=np.int64)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError(f"the score table has no finite score for unit {unit}")
    scores = values[finite]
    with warnings.catch_warnings():  # the table warns of left-out samples; here they are counted
        warnings.simplefilter("ignore", UserWarning)
        top = table.top(unit, fraction=fraction)
        bottom = table.bottom(unit, fraction=fraction)
    spread = float(scores.std())
    return SeedInfluence(
        seed=seed,
        unit=unit,
        sample_ids=sample_ids[finite],
        scores=scores,
        steps=steps[finite],
        n_excluded=int((~finite).sum()),
        top=top,
        bottom=bottom,
        share=top_share(scores, fraction),
        noise_share=normal_top_share(fraction, mean=float(scores.mean()), sd=spread)
        if spread > 0
        else float("nan"),
        drive=net_drive(scores),
        tail=fit_tail(scores),
        estimator=str(table.estimator),
        blocks=tuple(table.blocks),
        provenance=dict(table.provenance),
    )
