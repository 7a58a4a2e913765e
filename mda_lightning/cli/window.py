"""``mda-lightning window``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mda_lightning.cli.options import EXIT_OK, positive

_DESCRIPTION = """\
Find the critical windows in a recorded table of metrics: when each unit began to rise, when it was
formed, whether it fell back or handed over. The detector is that of the CriticalWindow callback.

a TABLE is
  unit_metrics.parquet of UnitMonitor, metrics.parquet or metrics.csv of mda-lightning monitor
  a CSV or Parquet file with a column of steps and one column a metric: Lightning's CSVLogger,
  an export from W&B (of one run: "run - metric" is read as the metric)
  a folder that holds exactly one such table
"""

_EPILOG = """\
examples:
  mda-lightning window runs/mine/unit_metrics.parquet
  mda-lightning window runs/mine/unit_metrics.parquet --metric induction --unit L1H2,L2H0
  mda-lightning window runs/monitor --top-k 3 --rule level=none
  mda-lightning window logs/version_0/metrics.csv --metric induction --floor 0.053
  mda-lightning window export.csv --metric val/loss --falls --floor 6.24 --rule minimum_up=0.5

A step that occurs in several rows counts as its last row says. A floor below 0 and a metric that
falls are followed by their distance from the floor; thresholds are of that distance then.
"""


def add_window(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "window",
        help="find critical windows in a recorded table of metrics",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", type=Path, metavar="TABLE", help="see above")
    parser.add_argument(
        "--metric", metavar="NAME", help="default: all whose chance value the table tells"
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--unit",
        type=_names,
        default=[],
        metavar="L1H2,...",
        help="targets by name (default: the highest when the window has closed)",
    )
    target.add_argument(
        "--top-k",
        type=positive,
        default=1,
        metavar="K",
        help="how many of the highest then are targets (default: %(default)s)",
    )
    parser.add_argument(
        "--floor",
        type=float,
        metavar="X",
        help="the metric's chance value, where the table does not tell it, or another",
    )
    parser.add_argument(
        "--rule",
        type=_setting,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a threshold of the detector, repeatable; level=none closes on a plateau only",
    )
    parser.add_argument(
        "--falls", action="store_true", help="the metric forms by falling, as a loss does"
    )
    parser.add_argument(
        "--step-column",
        metavar="NAME",
        help="default: trainer/global_step, global_step, step or _step, the first there is",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder to write (default: windows, beside the table)",
    )
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    parser.set_defaults(run=_window)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("name at least one unit, such as L1H2")
    return names


def _setting(text: str) -> tuple[str, Any]:
    from mda_lightning.recipes.window_rule import read_setting

    try:
        return read_setting(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _window(options: argparse.Namespace) -> int:
    from rich.console import Console

    from mda_lightning.recipes.window import WINDOWS_NAME, find_windows
    from mda_lightning.recipes.window_display import WindowDisplay, summary

    console = Console()
    with WindowDisplay(console, quiet=options.quiet) as display:
        found = find_windows(
            options.table,
            metric=options.metric,
            units=options.unit,
            top_k=options.top_k,
            floor=options.floor,
            rule=dict(options.rule),
            step_column=options.step_column,
            falls=options.falls,
            output=options.output,
            warn=lambda message: print(f"mda-lightning: {message}", file=sys.stderr),
            watch=display.watch,
        )
    if not options.quiet:
        metrics = found["metrics"]
        if any(report["targets"] for report in metrics.values()):
            console.print(summary(metrics))
        for metric, report in metrics.items():
            console.print(f"{metric}: {report['message']}", highlight=False, soft_wrap=True)
        written = ", ".join([WINDOWS_NAME, *(report["figure"] for report in metrics.values())])
        folder = options.output or Path(found["provenance"]["table"]).parent / "windows"
        console.print(f"{folder}: {written}", highlight=False, soft_wrap=True)
    return EXIT_OK
