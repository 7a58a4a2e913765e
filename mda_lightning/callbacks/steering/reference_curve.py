"""A curve of a metric over steps, from an earlier run's table or as numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mda_lightning.units import Head, parse_unit

Over = Literal["mean", "max"]
"""How the values of several units become one number."""


@dataclass(frozen=True)
class ReferenceCurve:
    """Values between steps, linearly interpolated.

    Attributes:
        steps: ascending int64 [n], n >= 1.
        values: float64 [n], finite.
        name: for error messages.
        spacing: steps that the last value stands for: a run ends between two evaluations.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    name: str
    spacing: int = 1

    @classmethod
    def of_points(cls, points: Sequence[Sequence[float]]) -> ReferenceCurve:
        """From ``[[step, value], ...]``.

        Raises:
            ValueError: not pairs, steps that do not ascend, or values that are not finite.
        """
        array = np.asarray(points, np.float64)
        if array.ndim != 2 or array.shape[1] != 2 or not len(array):
            raise ValueError(
                f"curve of shape {array.shape}: give one or more points [step, value], or the "
                "unit_metrics.parquet of an earlier run"
            )
        return cls._checked(array[:, 0], array[:, 1], "the curve that was given")

    @classmethod
    def of_table(
        cls, path: str | os.PathLike[str], metric: str, units: Sequence[Head], over: Over
    ) -> ReferenceCurve:
        """From the ``unit_metrics.parquet`` of a :class:`~mda_lightning.callbacks.UnitMonitor`.

        Args:
            path: the file, or its folder.
            metric: a mechanism's name.
            units: whose mean or highest value is taken at every step.
            over: see there.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it has no value of the metric and a unit.
        """
        file = Path(path)
        file = file / "unit_metrics.parquet" if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(
                f"no reference curve at {path}: give the unit_metrics.parquet (or its folder) that "
                "UnitMonitor writes"
            )
        table = pq.read_table(file, columns=["step", "layer", "head", "metric", "value"])
        table = table.filter(pc.equal(table["metric"], metric))
        step, layer, head = (table[c].to_numpy() for c in ("step", "layer", "head"))
        value = table["value"].to_numpy().astype(np.float64)
        curves = []
        for unit in units:
            mine = (layer == unit.layer) & (head == unit.head)
            if not mine.any():
                raise ValueError(
                    f"{file} has no {metric!r} of {unit}; the reference run must have measured it"
                )
            curves.append((step[mine], value[mine]))
        common = curves[0][0]
        for steps, _ in curves[1:]:
            common = np.intersect1d(common, steps)
        together = np.stack([v[np.isin(s, common)] for s, v in curves])
        joined = together.mean(0) if over == "mean" else together.max(0)
        there = np.isfinite(joined)
        curve = cls._checked(common[there], joined[there], str(file))
        spacing = int(np.diff(curve.steps)[-1]) if len(curve.steps) > 1 else 1
        return replace(curve, spacing=spacing)

    @classmethod
    def _checked(cls, steps: NDArray, values: NDArray, name: str) -> ReferenceCurve:  # type: ignore[type-arg]
        whole = np.asarray(steps).astype(np.int64)
        if not len(whole) or (np.diff(whole) <= 0).any():
            raise ValueError(f"{name}: steps must ascend, and there must be one")
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: values must be finite")
        return cls(whole, np.asarray(values, np.float64), name)

    def check_covers(self, first: int, last: int) -> None:
        """Refuse steps that the curve says nothing of.

        Raises:
            ValueError: a step of ``[first, last]`` lies before its first or after its last one.
        """
        begin, end = int(self.steps[0]), int(self.steps[-1]) + self.spacing - 1
        if first < begin or last > end:
            missing = f"{first}..{begin - 1}" * (first < begin)
            missing += " and " * (first < begin and last > end) + f"{end + 1}..{last}" * (
                last > end
            )
            raise ValueError(
                f"{self.name} covers steps {begin}..{end}, steering asks for {first}..{last}: "
                f"steps {missing} have no reference. Give a curve of a run as long as this one, or "
                f"the policies active=({begin}, {end})"
            )

    def covers(self, step: int) -> bool:
        """Whether it says anything of a step."""
        return bool(self.steps[0] <= step < self.steps[-1] + self.spacing)

    def at(self, step: int) -> float:
        """The value at a step that is covered."""
        return float(np.interp(step, self.steps, self.values))


def heads_of(unit: str | Sequence[str] | None) -> list[Head] | None:
    """Heads by name; None stays None."""
    if unit is None:
        return None
    return [parse_unit(one) for one in ([unit] if isinstance(unit, str) else unit)]
