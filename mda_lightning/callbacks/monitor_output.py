"""Where a monitor's numbers go beside the scalars: Parquet, pictures, W&B's table and images."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray

from mda_lightning.callbacks.allowance import Allowance
from mda_lightning.callbacks.loggers import LiveTable, log_image
from mda_lightning.callbacks.metric_table import COLUMNS, MetricTable, Row
from mda_lightning.files import atomic_path

TABLE_NAME = "unit_metrics.parquet"


def picture_name(metric: str) -> str:
    """A file name for any key: ``ablation/logit`` is drawn in ``ablation-logit.png``."""
    return re.sub(r"[^\w.@+-]+", "-", metric) + ".png"


class MonitorOutput:
    """Writes the table and the pictures, seldom enough to cost next to nothing.

    Drawing takes a tenth of a second a metric and more. So pictures (and W&B's rows, which go with
    them) wait for at least five minutes, and either waits for as long as keeps it under 0.3% of the
    wall time. At the end everything is written.
    """

    def __init__(self) -> None:
        self._table_time = Allowance()
        self._picture_time = Allowance(wait=300.0)
        self._live_table = LiveTable("unit_metrics", COLUMNS)
        self._sent: dict[str, int] = {}

    @property
    def seconds(self) -> float:
        """Spent since :meth:`begin`."""
        return self._table_time.seconds + self._picture_time.seconds

    def begin(self) -> None:
        """Count the time from now."""
        self._table_time.begin()
        self._picture_time.begin()

    def take_up(self, table: MetricTable) -> None:
        """What ``table`` holds has been sent by the run that filled it."""
        self._sent = {metric: table.count(metric) for metric in table.metrics}

    def write(
        self,
        trainer: pl.Trainer,
        table: MetricTable,
        folder: Path,
        *,
        step: int,
        provenance: Mapping[str, Any],
        chances: Mapping[str, float],
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
                self._live_table.send(trainer, lambda: self._new_rows(table), step=step)
                self.take_up(table)

    def _new_rows(self, table: MetricTable) -> list[Row]:
        return [row for m in table.metrics for row in table.rows(m, self._sent.get(m, 0))]

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
