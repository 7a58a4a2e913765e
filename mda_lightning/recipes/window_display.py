"""What a person sees of ``mda-lightning window``: a bar where it takes long, then the windows."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_REASONS = {"level": "level held", "plateau": "plateau", "lapsed": "lapsed", None: "still open"}
_EVERY = 64
"""Evaluations between two looks at the bar: drawing is dearer than following."""


class WindowDisplay:
    """Progress over evaluations, on a terminal; use as a context manager."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task("reading", total=None)

    def __enter__(self) -> WindowDisplay:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def watch(self, metric: str, done: int, total: int) -> None:
        """Show how many evaluations of a metric have been followed."""
        if done % _EVERY == 0 or done == total:
            self._bar.update(self._task, description=metric, completed=done, total=total)


def summary(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """The targets of each metric in the content of ``windows.json``."""
    table = Table(box=None, pad_edge=False, header_style="")
    for heading in ("metric", "unit"):
        table.add_column(heading)
    for heading in ("start", "midpoint (nominal 95%)", "end"):
        table.add_column(heading, justify="right")
    for heading in ("why it ended", "state now"):
        table.add_column(heading)
    for metric, report in found.items():
        states = {(w["unit"], w["start"]): w["state"] for w in report["windows"]}
        for place, window in enumerate(report["targets"]):
            table.add_row(
                metric if place == 0 else "",
                window["unit"],
                f"{window['start']}{' or before' if window['start_censored'] else ''}",
                _midpoint(window),
                "–" if window["end"] is None else str(window["end"]),
                _REASONS[window["end_reason"]],
                states[window["unit"], window["start"]],
            )
    return table


def _midpoint(window: Mapping[str, Any]) -> str:
    """Of the fit, with its interval; else where the curve was halfway up."""
    if window["refined_midpoint"] is None:
        return "–" if window["midpoint"] is None else str(window["midpoint"])
    low, high = window["midpoint_interval"]
    return f"{window['refined_midpoint']} ({low} to {high})"
