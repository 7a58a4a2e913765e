"""What a person sees of ``mda-lightning monitor``: a bar while it runs, then the top heads."""

from __future__ import annotations

import json
import time
from collections.abc import Hashable
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mda_lightning.recipes.monitor import MonitorProgress
from mda_lightning.recipes.monitor_files import TABLE

_LINE_SECONDS = 15.0
_TOP = 3


class MonitorDisplay:
    """Progress over checkpoints; use as a context manager.

    On a terminal a bar, taken away while the hub's library shows its own; elsewhere a line now and
    then.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._silent = quiet
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task("checkpoints", total=None, left="")
        self._printed = time.monotonic()

    def __enter__(self) -> MonitorDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.live.stop()

    def watch(self, now: MonitorProgress) -> None:
        """Show where the call is."""
        if self._silent:
            return
        left = "" if now.seconds_left is None else f"about {_duration(now.seconds_left)} left"
        if self._console.is_terminal:
            if now.remote and now.doing == "loading":
                self._bar.live.stop()
            else:
                self._bar.start()
            self._bar.update(
                self._task,
                description=f"{now.doing} {now.label}".strip(),
                completed=now.done,
                total=now.total,
                left=left,
            )
        elif time.monotonic() - self._printed >= _LINE_SECONDS:
            self._printed = time.monotonic()
            said = f"{now.doing} {now.label}: {now.done} of {now.total} done"
            self._console.print(f"{said}, {left}" if left else said, highlight=False)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


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
