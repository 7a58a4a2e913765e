"""What ``mda-lightning monitor`` leaves in its folder: kept measurements, table, figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mda_lightning.analysis.figures.checkpoints import AT_STEP, checkpoint_curve, checkpoint_heatmap
from mda_lightning.analysis.figures.style import png_bytes
from mda_lightning.callbacks.metric_table import COLUMNS
from mda_lightning.files import atomic_path, read_json, write_json

TABLE, CSV, KEPT = "metrics.parquet", "metrics.csv", "measured"
SCHEMA_VERSION = 1
BY_PLACE = "place in the list"
"""Where a row's step is from if some checkpoint tells none."""

Grid = NDArray[np.float32]
Scores = dict[str, tuple[Grid, Grid]]
"""Value and standard error by metric, each [L, heads], or 0-dim for the whole model."""

_SCHEMA = pa.schema(
    [
        *zip(
            COLUMNS,
            (pa.int32(), pa.int16(), pa.int16(), pa.string(), pa.float32(), pa.float32()),
            strict=True,
        ),
        ("checkpoint", pa.string()),
        ("weights_sha256", pa.string()),
        ("repeats", pa.string()),
    ]
)


@dataclass(frozen=True)
class MeasuredCheckpoint:
    """One checkpoint's numbers.

    Attributes:
        step: the row's step; step_from: what said so.
        own_step: of its training; None where nothing tells, and ``step`` is a place in the list.
        provenance: where the checkpoint came from.
    """

    label: str
    step: int
    step_from: str
    own_step: int | None
    weights_sha256: str
    scores: Scores
    provenance: Mapping[str, Any]


class KeptMeasurements:
    """Scores on disk, each under a key that covers everything that determines them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, metric: str, key: str) -> Scores | None:
        """The scores kept under ``key``, or None."""
        path = self._path(metric, key)
        if not path.is_file():
            return None
        content = read_json(path)
        if content.get("key") != key or content.get("schema_version") != SCHEMA_VERSION:
            return None
        return {
            name: (_array(one["value"]), _array(one["se"]))
            for name, one in content["scores"].items()
        }

    def put(self, metric: str, key: str, scores: Scores, **about: Any) -> None:
        """Keep scores; ``about`` is for people."""
        values = {
            name: {"value": _plain(value), "se": _plain(se)} for name, (value, se) in scores.items()
        }
        content = {"schema_version": SCHEMA_VERSION, "key": key, **about, "scores": values}
        write_json(self._path(metric, key), content)

    def _path(self, metric: str, key: str) -> Path:
        return self._folder / f"{metric}-{key[:32]}.json"


def _plain(values: Grid) -> Any:
    """Nested lists, None where not finite: JSON has no NaN. float32 survives it exactly."""
    if values.ndim == 0:
        number = float(values)
        return number if math.isfinite(number) else None
    return [_plain(part) for part in values]


def _array(values: Any) -> Grid:
    return np.array(values, dtype=np.float32)


def repeats(measured: Sequence[MeasuredCheckpoint]) -> list[str | None]:
    """For each checkpoint the labels of the others with the same weights, or None."""
    found: list[str | None] = []
    for one in measured:
        same = [
            other.label
            for other in measured
            if other is not one and other.weights_sha256 == one.weights_sha256
        ]
        found.append(", ".join(same) or None)
    return found


def write_table(
    folder: Path, measured: Sequence[MeasuredCheckpoint], *, provenance: Mapping[str, Any]
) -> pd.DataFrame:
    """Write the long table as Parquet and CSV; returns it."""
    parts = [_SCHEMA.empty_table()]
    for one, same in zip(measured, repeats(measured), strict=True):
        for metric, (value, se) in one.scores.items():
            places = [place or (None, None) for place in np.ndindex(value.shape)]
            n = value.size
            columns: list[Any] = [
                [one.step] * n,
                [layer for layer, _ in places],
                [head for _, head in places],
                [metric] * n,
                value.reshape(-1),
                se.reshape(-1),
                [one.label] * n,
                [one.weights_sha256] * n,
                [same] * n,
            ]
            parts.append(pa.table(dict(zip(_SCHEMA.names, columns, strict=True)), schema=_SCHEMA))
    table = pa.concat_tables(parts)
    with atomic_path(folder / CSV) as part:
        pyarrow.csv.write_csv(table, part)
    note = {
        "kind": "checkpoint_metrics",
        "schema_version": SCHEMA_VERSION,
        "provenance": dict(provenance),
    }
    table = table.replace_schema_metadata({b"mda_lightning": json.dumps(note).encode()})
    with atomic_path(folder / TABLE) as part:
        pq.write_table(table, part, compression="zstd")
    nullable = {pa.int16(): pd.Int16Dtype()}
    frame: pd.DataFrame = table.to_pandas(types_mapper=nullable.get)
    return frame


def write_figures(
    folder: Path, measured: Sequence[MeasuredCheckpoint], *, chance: Mapping[str, float]
) -> list[Path]:
    """One PNG a metric, over the checkpoints that have it; those of other metrics are removed.

    A key that names positions, such as ``icl/gain@63``, is of models with that context only.
    """
    by_place = any(one.step_from == BY_PLACE for one in measured)
    axis = f"checkpoint, by its {BY_PLACE}" if by_place else AT_STEP
    repeated = list(zip(measured, repeats(measured), strict=True))
    written = []
    for metric in dict.fromkeys(metric for one in measured for metric in one.scores):
        having = [(one, same is not None) for one, same in repeated if metric in one.scores]
        steps = [str(one.step) for one, _ in having]
        marked = [mark for _, mark in having]
        grids = [one.scores[metric] for one, _ in having]
        values, errors = (np.stack(part) for part in zip(*grids, strict=True))
        if values.ndim == 3:
            n, layers, heads = values.shape
            figure = checkpoint_heatmap(
                steps,
                values.reshape(n, layers * heads),
                units=[f"L{layer}H{head}" for layer, head in np.ndindex(layers, heads)],
                metric=metric,
                chance=chance.get(metric),
                repeated=marked,
                axis=axis,
            )
        else:
            figure = checkpoint_curve(
                steps, values, errors, metric=metric, repeated=marked, axis=axis
            )
        path = folder / f"heatmap-{metric.replace('/', '-')}.png"
        with atomic_path(path) as part:
            part.write_bytes(png_bytes(figure))
        written.append(path)
    for stale in set(folder.glob("heatmap-*.png")) - set(written):
        stale.unlink()
    return written
