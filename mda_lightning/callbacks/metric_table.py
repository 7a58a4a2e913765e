"""The long table of measurements: one row per (step, metric, layer, head)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from mda_lightning.files import atomic_path

COLUMNS = ("step", "layer", "head", "metric", "value", "se")
_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("layer", pa.int16()),
        ("head", pa.int16()),
        ("metric", pa.string()),
        ("value", pa.float32()),
        ("se", pa.float32()),
    ]
)
SCHEMA_VERSION = 1

Grid = NDArray[np.float32]


class MetricTable:
    """Every head's value and standard error of several metrics, over steps.

    Within a metric steps increase; metrics may be measured at different steps.
    """

    def __init__(self) -> None:
        self._steps: dict[str, list[int]] = {}
        self._values: dict[str, list[Grid]] = {}
        self._errors: dict[str, list[Grid]] = {}

    @property
    def metrics(self) -> list[str]:
        return list(self._steps)

    def append(self, step: int, metric: str, value: Grid, se: Grid) -> None:
        """Add one measurement, [L, H] each."""
        self._steps.setdefault(metric, []).append(step)
        self._values.setdefault(metric, []).append(np.asarray(value, np.float32))
        self._errors.setdefault(metric, []).append(np.asarray(se, np.float32))

    def last_step(self, metric: str) -> int | None:
        steps = self._steps.get(metric)
        return steps[-1] if steps else None

    def latest(self, metric: str) -> tuple[int, Grid, Grid] | None:
        """``(step, value [L, H], se [L, H])`` of the last measurement, or None before the first."""
        if not self._steps.get(metric):
            return None
        return self._steps[metric][-1], self._values[metric][-1], self._errors[metric][-1]

    def curves(self, metric: str) -> tuple[NDArray[np.int64], Grid]:
        """Steps [n] and values [n, L, H] of one metric."""
        steps = np.asarray(self._steps.get(metric, []), np.int64)
        if len(steps) == 0:
            return steps, np.zeros((0, 0, 0), np.float32)
        return steps, np.stack(self._values[metric])

    def rows(self, metric: str, first: int = 0) -> list[tuple[int, int, int, str, float, float]]:
        """Rows in the order of :data:`COLUMNS`, from the ``first``-th measurement on."""
        found = []
        for step, value, se in zip(
            self._steps.get(metric, [])[first:],
            self._values.get(metric, [])[first:],
            self._errors.get(metric, [])[first:],
            strict=True,
        ):
            for (layer, head), number in np.ndenumerate(value):
                found.append((step, layer, head, metric, float(number), float(se[layer, head])))
        return found

    def write(self, path: str | os.PathLike[str], *, provenance: Mapping[str, Any]) -> Path:
        """Write the whole table as Parquet, aside and then renamed."""
        parts = [self._part(metric) for metric in self.metrics]
        table = pa.concat_tables([_SCHEMA.empty_table(), *parts])
        note = {"schema_version": SCHEMA_VERSION, "provenance": dict(provenance)}
        table = table.replace_schema_metadata({b"mda_lightning": json.dumps(note).encode()})
        with atomic_path(path) as part:
            pq.write_table(table, part, compression="zstd")
        return Path(path)

    def _part(self, metric: str) -> pa.Table:
        values, errors = np.stack(self._values[metric]), np.stack(self._errors[metric])
        n, layers, heads = values.shape
        columns: Sequence[Any] = (
            np.repeat(np.asarray(self._steps[metric], np.int32), layers * heads),
            np.tile(np.repeat(np.arange(layers, dtype=np.int16), heads), n),
            np.tile(np.arange(heads, dtype=np.int16), n * layers),
            pa.array([metric] * values.size),
            values.reshape(-1),
            errors.reshape(-1),
        )
        return pa.table(dict(zip(COLUMNS, columns, strict=True)), schema=_SCHEMA)

    def state_dict(self) -> dict[str, Any]:
        """Lists of steps and tensors [n, L, H]: safe under ``weights_only`` loading."""
        return {
            metric: {
                "steps": list(self._steps[metric]),
                "value": torch.from_numpy(np.stack(self._values[metric])),
                "se": torch.from_numpy(np.stack(self._errors[metric])),
            }
            for metric in self.metrics
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved table in place of what is held."""
        self._steps = {m: [int(s) for s in part["steps"]] for m, part in state.items()}
        self._values = {m: list(part["value"].cpu().numpy()) for m, part in state.items()}
        self._errors = {m: list(part["se"].cpu().numpy()) for m, part in state.items()}
