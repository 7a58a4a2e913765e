"""``python -m benchmarks.publish_study STUDY``: a study's outcome as a page of docs/results.

Writes ``docs/results/NAME.md`` (settings, windows, the comparison, the linear datamodeling scores)
and, beside it, ``NAME.csv`` (the raw table) and the figures. What it means is written elsewhere.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from mda_lightning.analysis.comparison import write_comparison
from mda_lightning.analysis.study import Study, load_study
from mda_lightning.files import atomic_path, read_json

_RESULTS = Path(__file__).parents[1] / "docs" / "results"
_FIGURES = ("comparison", "coupling", "other-heads", "datamodeling", "selection-overlap")


def publish(folder: Path, *, command: str, results: Path = _RESULTS) -> Path:
    """Write the page of one study; returns its path."""
    study, name = load_study(folder), folder.name
    write_comparison(folder)
    text = (folder / "comparison.md").read_text("utf-8")
    title, _, body = text.partition("\n")
    # Relative links of the study's folder are none here.
    body = re.sub(r"!\[[^\]]*\]\([^)]*\)\n*", "", body)
    parts = [title, "", f"`{command}`", "", *_runs(study), ""]
    shown = [one for one in _FIGURES if (folder / "figures" / f"{one}.png").is_file()]
    if "comparison" in shown:
        parts += [f"![Arms against their controls]({name}-comparison.png)", ""]
    parts += [body.strip(), ""]
    parts += _datamodeling(folder)
    parts += [f"![{one.replace('-', ' ')}]({name}-{one}.png)\n" for one in shown[1:]]
    parts += [f"The raw table: [{name}.csv]({name}.csv).", ""]
    for one in shown:
        shutil.copyfile(folder / "figures" / f"{one}.png", results / f"{name}-{one}.png")
    shutil.copyfile(folder / "comparison.csv", results / f"{name}.csv")
    path = results / f"{name}.md"
    with atomic_path(path) as part:
        part.write_text("\n".join(parts), "utf-8")
    return path


def _runs(study: Study) -> list[str]:
    lines = ["| seed | head | window | untouched |", "|---|---|---|---|"]
    for seed in study.seeds:
        base = seed.arms.get("baseline")
        value = "" if base is None or base.value is None else f"{base.value:.3f}"
        window = f"{seed.window.start}-{seed.window.end}" if seed.window.start else "none"
        lines.append(f"| {seed.seed} | {seed.target} | {window} | {value} |")
    minutes = study.timings.get("total", 0) / 60
    runs = sum(value for name, value in study.timings.items() if name != "total") / 60
    versions = study.provenance.get("versions", {})
    made = ", ".join(f"{name} {value}" for name, value in versions.items())
    return [
        *lines,
        "",
        f"The last call took {minutes:.0f} minutes; all runs together, those that other studies "
        f"share included, {runs:.0f} process minutes. {made}.",
    ]


def _datamodeling(folder: Path) -> list[str]:
    path = folder / "analyses.json"
    if not path.is_file():
        return []
    found = read_json(path).get("datamodeling")
    if not found:
        return []
    lines = ["## Linear datamodeling score", ""]
    lines += [
        "| ranking | LDS | 95% interval over seeds | p | by seed |",
        "|---|---:|---:|---:|---|",
    ]
    for row in found["rankings"]:
        each = ", ".join(f"{one['value']:+.2f}" for one in row["per_seed"])
        chance = f"{row['p_value']:.3f}"
        lines.append(
            f"| {row['ranking']} | {row['mean']:+.3f} | {_interval(row)} | {chance} | {each} |"
        )
    return [*lines, "", *found["notes"], ""]


def _interval(row: dict[str, Any]) -> str:
    return "" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"


def main() -> int:
    """Publish the studies that are named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish_study")
    parser.add_argument("study", type=Path, nargs="+", help="folders of `mda-lightning compare`")
    options = parser.parse_args()
    for folder in options.study:
        print(publish(folder, command=f"mda-lightning compare {folder.name}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
