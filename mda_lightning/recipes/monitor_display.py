"""The top heads of what ``mda-lightning monitor`` measured."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from rich.table import Table

from mda_lightning.recipes.monitor_files import TABLE

_TOP = 3


def summary(folder: Path) -> Table:
    """The top heads of each metric in a folder's table: highest value, last value, chance."""
    path = folder / TABLE
    note = json.loads(pq.read_schema(path).metadata[b"mda_lightning"])
    chance: dict[str, float] = note["provenance"]["chance"]
    frame: pd.DataFrame = pq.read_table(path).to_pandas()
    last = frame["checkpoint"].iloc[-1]
    step = frame["step"].iloc[-1]
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("metric")
    table.add_column("head")
    for heading in ("highest", "at step", f"at step {step}, last", "chance"):
        table.add_column(heading, justify="right")
    for metric, own in frame.groupby("metric", sort=False):
        peaks = own.dropna(subset="value").groupby(["layer", "head"], dropna=False)["value"]
        top = own.loc[peaks.idxmax()].sort_values("value", ascending=False).head(_TOP)
        for place, row in enumerate(top.to_dict("records")):
            same = (own["checkpoint"] == last) & _is(own, "layer", row) & _is(own, "head", row)
            now = own[same].to_dict("records")  # none where the last one lacks the metric
            table.add_row(
                str(metric) if place == 0 else "",
                "model" if pd.isna(row["layer"]) else f"L{row['layer']:.0f}H{row['head']:.0f}",
                f"{row['value']:.3f}",
                str(row["step"]),
                f"{now[0]['value']:.3f} ± {now[0]['se']:.3f}" if now else "–",
                f"{chance[metric]:.3f}" if metric in chance and place == 0 else "",
            )
    return table


def _is(frame: pd.DataFrame, column: str, row: dict[Hashable, Any]) -> Any:
    wanted = row[column]
    return frame[column].isna() if pd.isna(wanted) else frame[column] == wanted
