"""Where a monitor's numbers go beside the scalars: Parquet, pictures, W&B's table and images."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray

from mda_lightning.callbacks.allowance import Allowance
from mda_lightning.callbacks.loggers import LiveTable, log_image
from mda_lightning.callbacks.metric_keys import ScalarKeys
from mda_lightning.callbacks.metric_table import COLUMNS, MetricTable, Row
from mda_lightning.files import atomic_path

TABLE_NAME = "unit_metrics.parquet"
TABLE_KEY = "unit_metrics"
"""W&B's table."""
MOST_ROWS_AT_ONCE = 100_000
"""Rows of all heads that W&B is sent at once: about 4 s."""
MOST_ROWS = 1_000_000
"""Rows that W&B is sent in all before only the scalars' heads are: about 190 MB of memory."""


def picture_name(metric: str) -> str:
    """A file name for any key: ``ablation/logit`` is drawn in ``ablation-logit.png``."""
    return re.sub(r"[^\w.@+-]+", "-", metric) + ".png"


class MonitorOutput:
    """Writes the table and the pictures, seldom enough to cost next to nothing.

    Drawing takes a tenth of a second a metric and more, and so do a few thousand of W&B's rows. So
    pictures and rows wait for at least five minutes, and each of the three waits for as long as
    keeps it under 0.3% of the wall time. At the end everything is written.

    W&B keeps every row in memory, and takes 40 us for one. So its table holds all heads for
    :data:`MOST_ROWS_AT_ONCE` rows each time and :data:`MOST_ROWS` in all; of more, every second
    (third, ...) measurement has all heads, the others those that are scalars.
    """

    def __init__(self) -> None:
        self._table_time = Allowance()
        self._picture_time = Allowance(wait=300.0)
        self._row_time = Allowance(wait=300.0)
        self._live_table = LiveTable(TABLE_KEY, COLUMNS)
        self._sent: dict[str, int] = {}
        self._n_rows = 0

    @property
    def seconds(self) -> float:
        """Spent since :meth:`begin`."""
        return self._table_time.seconds + self._picture_time.seconds + self._row_time.seconds

    def begin(self, table_key: str = TABLE_KEY) -> None:
        """Count the time from now; W&B's table is to be ``table_key``."""
        for one in (self._table_time, self._picture_time, self._row_time):
            one.begin()
        if self._live_table.key != table_key:
            self._live_table = LiveTable(table_key, COLUMNS)

    def take_up(self, table: MetricTable) -> None:
        """What ``table`` holds has been sent by the run that filled it."""
        self._sent = {metric: table.count(metric) for metric in table.metrics}
        self._n_rows = sum(_size(table, metric) * n for metric, n in self._sent.items())

    def write(
        self,
        trainer: pl.Trainer,
        table: MetricTable,
        folder: Path,
        *,
        step: int,
        provenance: Mapping[str, Any],
        chances: Mapping[str, float],
        keys: ScalarKeys,
        final: bool,
    ) -> None:
        """Write what is due; with ``final`` everything."""
        if not table.metrics:
            return
        if final or self._table_time.is_due():
            with self._table_time.spending():
                table.write(folder / TABLE_NAME, provenance=provenance)
        if final or self._picture_time.is_due():
            with self._picture_time.spending():
                for metric in table.metrics:
                    self._draw(trainer, table, folder, metric, chances.get(metric), step=step)
        if final or self._row_time.is_due():
            with self._row_time.spending():
                self._live_table.send(trainer, lambda: self._new_rows(table, keys), step=step)

    def _new_rows(self, table: MetricTable, keys: ScalarKeys) -> list[Row]:
        sent = {metric: self._sent.get(metric, 0) for metric in table.metrics}
        n_due = sum(_size(table, m) * (table.count(m) - n) for m, n in sent.items())
        n_left = min(MOST_ROWS_AT_ONCE, MOST_ROWS - self._n_rows)
        stride = max(-(-n_due // n_left), 1) if n_left > 0 else None
        rows: list[Row] = []
        for metric, first in sent.items():
            heads = keys.chosen(metric) if stride != 1 and table.shape(metric) else []
            rows += table.rows(metric, first, stride=stride, heads=heads)
        self._sent = {metric: table.count(metric) for metric in table.metrics}
        self._n_rows += len(rows)
        return rows

    def _draw(
        self,
        trainer: pl.Trainer,
        table: MetricTable,
        folder: Path,
        metric: str,
        chance: float | None,
        *,
        step: int,
    ) -> None:
        png = draw(table, metric, chance)
        with atomic_path(folder / picture_name(metric)) as part:
            part.write_bytes(png)
        kind = "heads" if table.shape(metric) else "curve"
        log_image(trainer, f"{metric}/{kind}", lambda: _pixels(png), step=step)


def _size(table: MetricTable, metric: str) -> int:
    """Rows of one measurement."""
    return math.prod(table.shape(metric))


def draw(table: MetricTable, metric: str, chance: float | None) -> bytes:
    """The picture of one metric as PNG: heads over steps and layers by heads, or a curve."""
    # Here, since it takes a while to import and many runs never draw.
    from mda_lightning.analysis.figures import heads_heatmap, png_bytes, scalar_curve

    steps, values = table.curves(metric)
    shape = table.shape(metric)
    if not shape:
        return png_bytes(scalar_curve(steps, values, table.errors(metric), metric=metric))
    layers, heads = shape
    return png_bytes(
        heads_heatmap(
            steps,
            values.reshape(len(steps), -1),
            units=[f"L{layer}H{head}" for layer in range(layers) for head in range(heads)],
            metric=metric if chance is None else f"{metric} score",
            chance=chance,
            least_scale=0.0 if chance is None else 0.2,
            grid=(layers, heads),
        )
    )


def _pixels(png: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
