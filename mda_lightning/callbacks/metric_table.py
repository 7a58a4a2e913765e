"""The long table of measurements: one row per (step, metric, layer, head)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
Row = tuple[int, int | None, int | None, str, float, float]


@dataclass(frozen=True)
class Measurement:
    """One metric after ``step`` updates; ``value`` and ``se`` are [L, H], or 0-dim for a number of
    the whole model."""

    step: int
    metric: str
    value: Grid
    se: Grid


class MetricTable:
    """Values and standard errors of several metrics over steps, of every head or of the model.

    Within a metric steps increase and shapes are the same; metrics may be measured at different
    steps.
    """

    def __init__(self) -> None:
        self._columns: dict[str, _Column] = {}

    @property
    def metrics(self) -> list[str]:
        return list(self._columns)

    @property
    def last_step(self) -> int:
        """Step of the last measurement of any metric; -1 before the first."""
        return max((int(c.steps[-1]) for c in self._columns.values()), default=-1)

    def append(self, step: int, metric: str, value: Grid, se: Grid) -> None:
        """Add one measurement: [L, H] each, or 0-dim."""
        if metric not in self._columns:
            self._columns[metric] = _Column(np.shape(value))
        self._columns[metric].append(step, value, se)

    def shape(self, metric: str) -> tuple[int, ...]:
        """``(L, H)``, or ``()`` for a number of the whole model."""
        return self._columns[metric].values.shape[1:]

    def count(self, metric: str) -> int:
        """How often the metric has been measured."""
        return len(self._columns[metric].steps) if metric in self._columns else 0

    def latest(self, metric: str) -> Measurement | None:
        """The last measurement of a metric, or None before the first."""
        if metric not in self._columns:
            return None
        one = self._columns[metric]
        return Measurement(
            int(one.steps[-1]), metric, np.asarray(one.values[-1]), np.asarray(one.errors[-1])
        )

    def curves(self, metric: str) -> tuple[NDArray[np.int64], Grid]:
        """Steps [n] and values [n, L, H], or [n], of one metric; not to be written to."""
        if metric not in self._columns:
            return np.zeros(0, np.int64), np.zeros((0, 0, 0), np.float32)
        return self._columns[metric].steps, self._columns[metric].values

    def errors(self, metric: str) -> Grid:
        """Standard errors, shaped as the values of :meth:`curves`."""
        return self._columns[metric].errors

    def since(self, metric: str, step: int) -> Grid:
        """The values measured at ``step`` or later, [n, L, H] or [n]."""
        steps, values = self.curves(metric)
        return values[int(np.searchsorted(steps, step)) :]

    def rows(
        self,
        metric: str,
        first: int = 0,
        *,
        stride: int | None = 1,
        heads: Sequence[tuple[int, int]] = (),
    ) -> list[Row]:
        """Rows in the order of :data:`COLUMNS`, from the ``first``-th measurement on.

        Layer and head are None where the metric is a number of the whole model.

        Args:
            stride: every ``stride``-th measurement has rows of all heads, None: none has.
            heads: (layer, head) of those that the other measurements have rows of.
        """
        steps, values = self.curves(metric)
        every = list(np.ndindex(values.shape[1:]))
        found: list[Row] = []
        for i in range(first, len(steps)):
            errors = self._columns[metric].errors[i]
            is_full = values.ndim == 1 or (stride is not None and i % stride == 0)
            for place in every if is_full else heads:
                layer, head = place or (None, None)
                found.append(
                    (
                        int(steps[i]),
                        layer,
                        head,
                        metric,
                        float(values[i][place]),
                        float(errors[place]),
                    )
                )
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
        one = self._columns[metric]
        n = len(one.steps)
        layer: Any = pa.nulls(n, pa.int16())
        head: Any = layer
        if one.values.ndim == 3:
            layers, heads = one.values.shape[1:]
            layer = np.tile(np.repeat(np.arange(layers, dtype=np.int16), heads), n)
            head = np.tile(np.arange(heads, dtype=np.int16), n * layers)
        columns = (
            np.repeat(one.steps.astype(np.int32), one.values[0].size),
            layer,
            head,
            pa.array([metric] * one.values.size),
            one.values.reshape(-1),
            one.errors.reshape(-1),
        )
        return pa.table(dict(zip(COLUMNS, columns, strict=True)), schema=_SCHEMA)

    def state_dict(self) -> dict[str, Any]:
        """Lists of steps and tensors [n, L, H] or [n]: safe under ``weights_only`` loading."""
        return {
            metric: {
                "steps": one.steps.tolist(),
                "value": torch.from_numpy(one.values.copy()),
                "se": torch.from_numpy(one.errors.copy()),
            }
            for metric, one in self._columns.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved table in place of what is held."""
        self._columns = {}
        for metric, part in state.items():
            values, errors = part["value"].cpu().numpy(), part["se"].cpu().numpy()
            for step, value, se in zip(part["steps"], values, errors, strict=True):
                self.append(int(step), metric, value, se)


class _Column:
    """Arrays of one metric that double when they are full: a measurement copies no former one."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._n = 0
        self._steps = np.zeros(16, np.int64)
        self._values = np.zeros((16, *shape), np.float32)
        self._errors = np.zeros((16, *shape), np.float32)

    @property
    def steps(self) -> NDArray[np.int64]:
        return self._steps[: self._n]

    @property
    def values(self) -> Grid:
        return self._values[: self._n]

    @property
    def errors(self) -> Grid:
        return self._errors[: self._n]

    def append(self, step: int, value: Grid, se: Grid) -> None:
        if self._n == len(self._steps):
            self._steps = np.concatenate([self._steps, np.zeros_like(self._steps)])
            self._values = np.concatenate([self._values, np.zeros_like(self._values)])
            self._errors = np.concatenate([self._errors, np.zeros_like(self._errors)])
        self._steps[self._n], self._values[self._n], self._errors[self._n] = step, value, se
        self._n += 1
