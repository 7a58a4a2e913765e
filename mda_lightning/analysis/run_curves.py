"""A run's ``unit_metrics.parquet``, read as one curve a head or one of the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mda_lightning.units import parse_unit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class StudyError(ValueError):
    """The folder cannot be read as a study; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class HeadCurves:
    """One metric of every head over one run.

    Attributes:
        units: head names ("L1H2"), ordered by layer then head, [U].
        steps: evaluation steps, ascending, [S].
        values: [S, U], NaN where a head was not evaluated.
        errors: standard errors over probe sequences, [S, U].
    """

    units: tuple[str, ...]
    steps: Ints
    values: Floats
    errors: Floats

    def of(self, unit: str) -> tuple[Ints, Floats]:
        """(steps, values) of one head.

        Raises:
            StudyError: the run did not evaluate that head.
        """
        if unit not in self.units:
            raise StudyError(
                f"head {unit} was not evaluated in this run: it has "
                f"{self.units[0]}..{self.units[-1]}"
            )
        column = self.values[:, self.units.index(unit)]
        known = np.isfinite(column)
        return self.steps[known], column[known]


def read_metrics(path: str | Path) -> pd.DataFrame:
    """A metrics table: columns step, layer, head, metric, value, and se where it was logged.

    Raises:
        StudyError: the file is damaged or lacks a column.
    """
    try:
        frame = pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise StudyError(f"{path} cannot be read as Parquet ({error})") from error
    absent = {"step", "layer", "head", "metric", "value"} - set(frame.columns)
    if absent:
        raise StudyError(f"{path} has no column {sorted(absent)[0]!r}: it is not a metrics table")
    return frame


def model_curve(frame: pd.DataFrame, name: str) -> tuple[Ints, Floats] | None:
    """(steps, values) of a number of the whole model; finite values only.

    Args:
        name: "icl/gain" also finds "icl/gain@127", of shorter positions.

    Returns:
        ``None`` when it was never logged.
    """
    names = [m for m in frame["metric"].unique() if m == name or str(m).startswith(f"{name}@")]
    return _curve(frame[frame["metric"].isin(names) & frame["head"].isna()])


def head_curve(frame: pd.DataFrame, metric: str, unit: str) -> tuple[Ints, Floats] | None:
    """(steps, values) of one metric of one head, finite values only; ``None`` without any."""
    head = parse_unit(unit)
    rows = frame[frame["metric"] == metric]
    return _curve(rows[(rows["layer"] == head.layer) & (rows["head"] == head.head)])


def _curve(rows: pd.DataFrame) -> tuple[Ints, Floats] | None:
    """The last value of every step, ascending."""
    values = rows["value"].to_numpy(dtype=np.float64)
    known = np.isfinite(values)
    if not known.any():
        return None
    last = dict(zip(rows["step"].to_numpy()[known].tolist(), values[known].tolist(), strict=True))
    steps = np.array(sorted(last), dtype=np.int64)
    return steps, np.array([last[step] for step in steps.tolist()], dtype=np.float64)


def read_head_curves(path: str | Path, metric: str) -> HeadCurves:
    """Read one metric of all heads from a ``unit_metrics.parquet``.

    Raises:
        StudyError: the file is damaged, lacks a column, or never logged the metric.
    """
    frame = read_metrics(path)
    chosen = frame[frame["metric"] == metric]
    if chosen.empty:
        logged = ", ".join(sorted(map(str, frame["metric"].unique()))) or "nothing"
        raise StudyError(f"{path} holds no metric {metric!r}: it logged {logged}")
    if chosen["head"].isna().all():
        raise StudyError(f"{path}: {metric!r} is a number of the whole model, not one a head")
    chosen = chosen.dropna(subset=["layer", "head"])
    # Beside numbers of the whole model, which have no head, Parquet reads heads as floats.
    chosen = chosen.astype({"layer": int, "head": int})
    wide = chosen.pivot_table(
        index="step", columns=["layer", "head"], values="value", aggfunc="last", dropna=False
    ).sort_index(axis=1)
    errors = np.full(wide.shape, np.nan)
    if "se" in chosen.columns:
        errors = (
            chosen.pivot_table(
                index="step", columns=["layer", "head"], values="se", aggfunc="last", dropna=False
            )
            .reindex(index=wide.index, columns=wide.columns)
            .to_numpy(dtype=np.float64)
        )
    return HeadCurves(
        units=tuple(f"L{layer}H{head}" for layer, head in wide.columns),
        steps=wide.index.to_numpy(dtype=np.int64),
        values=wide.to_numpy(dtype=np.float64),
        errors=errors,
    )
