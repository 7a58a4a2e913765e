"""What changed in every head between two runs: the paper's figures 3e and 9, appendix K.

Two runs are compared at steps that both measured. A circuit that grows or shrinks moves its heads
the same way; one that *hands off* has heads that fall while others rise as much.

>>> deltas = head_deltas_of(("L0H0", "L0H1"), [0.4, 0.1], [0.2, 0.25], threshold=0.05)
>>> deltas.fell, deltas.rose
(('L0H0',), ('L0H1',))
>>> round(deltas.compensation, 2)
0.75
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from mda_lightning.analysis.run_curves import HeadCurves, read_head_curves

Floats = NDArray[np.float64]

THRESHOLD = 0.05
"""Change of an attention score that counts; the paper's 14M heads move by up to about 0.1."""


@dataclass(frozen=True, eq=False)
class HeadDeltas:
    """Changes of one metric in U heads, second run minus first.

    Attributes:
        units: names, [U].
        first, second: the metric, means over ``steps``, [U]; NaN where a run lacks the head.
        errors: standard error of the change from those over probe sequences, [U]. The runs share
            their probe sequences, which makes it too large rather than too small; NaN where a run
            logged none.
        steps: at which both were measured.
        threshold: absolute change from which a head counts as fallen or risen.
    """

    units: tuple[str, ...]
    first: Floats
    second: Floats
    errors: Floats
    steps: tuple[int, ...]
    threshold: float

    @property
    def changes(self) -> Floats:
        """``second - first``, [U]."""
        return self.second - self.first

    @property
    def fell(self) -> tuple[str, ...]:
        """Heads that lost at least the threshold, the largest loss first."""
        return self._beyond(self.changes)

    @property
    def rose(self) -> tuple[str, ...]:
        """Heads that gained at least the threshold, the largest gain first."""
        return self._beyond(-self.changes)

    @property
    def compensation(self) -> float:
        """Smaller over larger of all gains and all losses, in [0, 1].

        0 when every head moves the same way, 1 when gains make up for losses; NaN when no head
        reaches the threshold, so that noise is not taken for an exchange.
        """
        changes = self.changes[np.isfinite(self.changes)]
        if not (np.abs(changes) >= self.threshold).any():
            return math.nan
        gains, losses = changes[changes > 0].sum(), -changes[changes < 0].sum()
        return float(min(gains, losses) / max(gains, losses))

    @property
    def handed_off(self) -> bool:
        """Whether heads fell and others rose, each by the threshold at least."""
        return bool(self.fell and self.rose)

    def table(self) -> pd.DataFrame:
        """Columns ``unit``, ``first``, ``second``, ``change``, ``se``; the largest change first."""
        frame = pd.DataFrame(
            {
                "unit": self.units,
                "first": self.first,
                "second": self.second,
                "change": self.changes,
                "se": self.errors,
            }
        )
        order = np.argsort(-np.abs(np.nan_to_num(self.changes, nan=-0.0)), kind="stable")
        return frame.iloc[order].reset_index(drop=True)

    def _beyond(self, losses: Floats) -> tuple[str, ...]:
        order = np.argsort(losses, kind="stable")
        return tuple(self.units[i] for i in order if losses[i] <= -self.threshold)


def head_deltas(
    first: HeadCurves,
    second: HeadCurves,
    *,
    steps: Sequence[int] | None = None,
    threshold: float = THRESHOLD,
) -> HeadDeltas:
    """Per-head change between two runs.

    Args:
        first, second: one metric of all heads, see
            :func:`~mda_lightning.analysis.run_curves.read_head_curves`.
        steps: evaluations to average over; None is the last one that both runs have.
        threshold: see :class:`HeadDeltas`.

    Raises:
        ValueError: no common step or head, or a step that a run did not measure.
    """
    shared = np.intersect1d(first.steps, second.steps)
    units = tuple(unit for unit in first.units if unit in second.units)
    if shared.size == 0 or not units:
        raise ValueError(
            f"the runs have {shared.size} evaluation steps and {len(units)} heads in common: "
            f"one was measured at {_range(first)}, the other at {_range(second)}"
        )
    at = shared[-1:] if steps is None else np.asarray(sorted(set(steps)), dtype=np.int64)
    if (missing := np.setdiff1d(at, shared)).size or at.size == 0:
        raise ValueError(
            f"step {missing[0] if missing.size else 'none'} is not an evaluation of both runs; "
            f"the nearest common ones are {_nearest(shared, missing)}"
        )
    means, squares = [], []
    for run in (first, second):
        rows = np.flatnonzero(np.isin(run.steps, at))
        columns = np.array([run.units.index(unit) for unit in units])
        means.append(run.values[np.ix_(rows, columns)].mean(axis=0))
        # The same probe sequences at every step: errors of steps do not average out.
        squares.append((run.errors[np.ix_(rows, columns)] ** 2).mean(axis=0))
    return HeadDeltas(
        units=units,
        first=means[0],
        second=means[1],
        errors=np.sqrt(squares[0] + squares[1]),
        steps=tuple(at.tolist()),
        threshold=threshold,
    )


def head_deltas_of(
    units: Sequence[str], first: ArrayLike, second: ArrayLike, *, threshold: float = THRESHOLD
) -> HeadDeltas:
    """As :func:`head_deltas`, of arrays [U]."""
    one, other = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if one.shape != (len(units),) or other.shape != one.shape:
        raise ValueError(f"{len(units)} heads, {one.size} and {other.size} values: one of each")
    return HeadDeltas(tuple(units), one, other, np.full(len(units), np.nan), (), threshold)


def run_deltas(
    first: str | Path,
    second: str | Path,
    *,
    metric: str = "induction",
    steps: Sequence[int] | None = None,
    threshold: float = THRESHOLD,
) -> HeadDeltas:
    """As :func:`head_deltas`, of two run folders that hold ``unit_metrics.parquet``.

    Raises:
        FileNotFoundError: a folder without that file.
        ValueError: as there, or a file that cannot be read or never logged the metric.
    """
    curves = []
    for folder in (first, second):
        path = Path(folder) / "unit_metrics.parquet"
        if not path.is_file():
            raise FileNotFoundError(
                f"no unit_metrics.parquet in {folder}: the UnitMonitor callback writes one"
            )
        curves.append(read_head_curves(path, metric))
    return head_deltas(curves[0], curves[1], steps=steps, threshold=threshold)


def _range(curves: HeadCurves) -> str:
    if curves.steps.size == 0:
        return "no step"
    return f"{curves.steps.size} steps from {curves.steps[0]} to {curves.steps[-1]}"


def _nearest(shared: NDArray[np.int64], missing: NDArray[np.int64]) -> str:
    around = shared if missing.size == 0 else shared[np.argsort(np.abs(shared - missing[0]))]
    return ", ".join(map(str, sorted(around[:3].tolist())))
