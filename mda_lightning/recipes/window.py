"""``mda-lightning window``: the critical windows of a recorded metric table."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mda_lightning import __version__
from mda_lightning.analysis.figures.style import png_bytes
from mda_lightning.analysis.figures.windows import windows_figure
from mda_lightning.files import atomic_path, write_json
from mda_lightning.recipes.window_rule import Setting, rule_for
from mda_lightning.recipes.window_table import Curves, RecordedTable, chance_values, read_table
from mda_lightning.window import (
    Followed,
    MechanismWindow,
    WindowDetector,
    WindowEvent,
    WindowRule,
    window_report,
)

WINDOWS_NAME = "windows.json"
SCHEMA_VERSION = 1
KIND = "critical_windows"

Floats = NDArray[np.float64]

_NOT_IN_NAMES = re.compile(r"[^\w.@+-]+")
_FIGURE = re.compile(r"windows-[\w.@+-]+\.png")
_TOLD = ("opened", "closed", "lapsed", "handed_over")


@dataclass(frozen=True)
class Replayed:
    """One metric's table, followed to its end."""

    follower: MechanismWindow[str]
    events: list[WindowEvent]
    smooth: Floats
    """[n, units] the EMA after each evaluation."""


def find_windows(
    path: str | Path,
    *,
    metric: str | None = None,
    units: Sequence[str] = (),
    top_k: int = 1,
    floor: float | None = None,
    rule: Mapping[str, Setting] | None = None,
    step_column: str | None = None,
    falls: bool = False,
    output: str | Path | None = None,
    warn: Callable[[str], None] | None = None,
    watch: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Follow a recorded table as :class:`~mda_lightning.callbacks.CriticalWindow` follows a run.

    Writes ``windows.json`` and one ``windows-<metric>.png`` a metric. A folder holds the metrics of
    the last call: figures that the ``windows.json`` of an earlier one names are removed.

    Args:
        path: a table, or a folder that holds exactly one; see
            :func:`mda_lightning.recipes.window_table.read_table`.
        metric: its name; None takes all whose chance value the table tells.
        units: targets by name; none takes the ``top_k`` that are highest in retrospect.
        floor: the metric's chance value, in its own units; None takes the table's.
        rule: fields of :class:`~mda_lightning.window.WindowRule` that are not the default.
        falls: whether forming is a fall, as of a loss.
        output: folder to write; None is ``windows`` beside the table.
        warn: told what the user should know; None is :func:`warnings.warn`.
        watch: told metric, evaluations followed and evaluations in all.

    Returns:
        The content of ``windows.json``.

    Raises:
        ValueError, OSError: a table, metric, unit, floor or threshold that cannot be.
    """
    say = warn or (lambda message: warnings.warn(message, stacklevel=3))
    table = read_table(path, step_column=step_column)
    folder = table.path.parent / "windows" if output is None else Path(output)
    found: dict[str, Any] = {}
    pictures: dict[str, bytes] = {}
    for name, chance in _chosen(table, metric, floor).items():
        curves = table.curves(name)
        followed = Followed.of(chance, falls=falls)
        thresholds, notes = rule_for(name, followed.seen(curves.values), followed, rule or {})
        named = _targets(curves, units, table)
        targets = named if named else min(top_k, len(curves.units))
        replayed = _replay(curves, followed, targets, thresholds, watch or _unwatched)
        notes = [*curves.notes, *notes, *_why_none(curves, replayed)]
        for note in notes:
            say(f"{name}: {note}")
        picture = f"windows-{_NOT_IN_NAMES.sub('-', name)}.png"
        pictures[picture] = png_bytes(_figure(curves, replayed, followed))
        report = window_report(
            mechanism=name, follower=replayed.follower, kept={}, n_lost=0, versions={}
        )
        found[name] = {
            **report,
            "floor": chance,
            "follows": followed.follows,
            "n_evaluations": len(curves.steps),
            "events": _events(curves, replayed),
            "notes": notes,
            "figure": picture,
        }
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "provenance": {
            "table": str(table.path),
            "sha256": table.sha256,
            "step_column": table.step_column,
            "versions": {"mda_lightning": __version__},
        },
        "metrics": found,
    }
    former = _former_figures(folder)
    for picture, data in pictures.items():
        with atomic_path(folder / picture) as part:
            part.write_bytes(data)
    write_json(folder / WINDOWS_NAME, content)
    for stale in former - set(pictures):
        (folder / stale).unlink(missing_ok=True)
    return content


def _former_figures(folder: Path) -> set[str]:
    """Names of the figures that an earlier call wrote, as its ``windows.json`` has them."""
    try:
        former = json.loads((folder / WINDOWS_NAME).read_text("utf-8"))
        if former["kind"] != KIND:
            return set()
        names = {report["figure"] for report in former["metrics"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()  # none, or no file of ours
    return {name for name in names if isinstance(name, str) and _FIGURE.fullmatch(name)}


def _chosen(table: RecordedTable, metric: str | None, floor: float | None) -> dict[str, float]:
    """Metric -> floor."""
    if floor is not None and not np.isfinite(floor):
        raise ValueError(f"floor={floor} is not finite: it is the metric's chance value")
    if metric is not None and floor is not None:
        return {metric: floor}
    known = chance_values(table)
    if metric is not None:
        table.check_has(metric)
        if metric not in known:
            raise ValueError(
                f"{table.path} does not tell the chance value of {metric!r}: give it with --floor, "
                f"in the metric's own units{_beside(table)}"
            )
        return {metric: known[metric]}
    if floor is not None:
        if len(table.metrics) > 1:
            raise ValueError(
                f"--floor {floor:g} is of one metric: name it with --metric, among: {table.listed}"
            )
        return {table.metrics[0]: floor}
    if not known:
        raise ValueError(
            f"{table.path} tells no metric's chance value: name a metric with --metric and give "
            f"its --floor{_beside(table)}; there are: {table.listed}"
        )
    return known


def _beside(table: RecordedTable) -> str:
    other = table.path.with_suffix(".parquet")
    if other != table.path and other.is_file():
        return f" (or follow {other}, which may tell it)"
    return ""


def _targets(curves: Curves, units: Sequence[str], table: RecordedTable) -> list[str]:
    unknown = [unit for unit in units if unit not in curves.units]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is no unit of {curves.metric} in {table.path}; there are: "
            f"{', '.join(curves.units[:24])}{' ...' if len(curves.units) > 24 else ''}"
        )
    return list(dict.fromkeys(units))


def _unwatched(metric: str, done: int, total: int) -> None:
    pass


def _replay(
    curves: Curves,
    followed: Followed,
    targets: int | list[str],
    rule: WindowRule,
    watch: Callable[[str, int, int], None],
) -> Replayed:
    values, chance = followed.seen(curves.values), followed.chance
    follower = MechanismWindow(curves.units, chance=chance, targets=targets, rule=rule)
    # The follower tells of its targets only; the figure shows the others as well.
    all_units = WindowDetector(len(curves.units), floor=chance, rule=rule)
    smooth = np.empty_like(values)
    events: list[WindowEvent] = []
    for i, step in enumerate(curves.steps.tolist()):
        events += [e for e in all_units.update(step, values[i]) if e.kind in _TOLD]
        follower.update(step, values[i])
        smooth[i] = all_units.ema
        watch(curves.metric, i + 1, len(curves.steps))
    return Replayed(follower, events, smooth)


def _why_none(curves: Curves, replayed: Replayed) -> list[str]:
    """Why no window opened, where the number of evaluations is why."""
    n, patience = len(curves.steps), replayed.follower.detector.rule.patience
    if n < patience:
        return [
            f"too few evaluations, {n}: a window opens after {patience} in a row (patience), so "
            "none can be found"
        ]
    follower = replayed.follower
    detector, watched = follower.detector, follower.watched
    highest = np.where(np.isfinite(detector.highest), detector.highest, -np.inf)[watched]
    best = watched[int(np.argmax(highest))]
    if follower.targets or not detector.highest[best] > detector.up[best]:
        return []
    return [
        f"{curves.units[best]} was above its threshold, but not for {patience} "
        "evaluations in a row (patience), as a window needs: a passing rise, or one that was "
        "measured too seldom"
    ]


def _events(curves: Curves, replayed: Replayed) -> list[dict[str, Any]]:
    return [
        {
            "kind": event.kind,
            "unit": curves.units[event.unit_index],
            "step": event.step,
            "start": event.start,
            "to": None if event.to_index is None else curves.units[event.to_index],
        }
        for event in replayed.events
    ]


def _figure(curves: Curves, replayed: Replayed, followed: Followed) -> Figure:
    follower = replayed.follower
    detector, targets = follower.detector, [window for _, window in follower.targets]
    highest = np.where(np.isfinite(detector.highest), detector.highest, -np.inf)
    up = targets[0].threshold if targets else float(detector.up[int(np.argmax(highest))])
    return windows_figure(
        curves.steps,
        curves.values,
        followed.own(replayed.smooth),
        units=curves.units,
        windows=detector.windows(),
        targets=targets,
        events=replayed.events,
        metric=curves.metric,
        floor=followed.floor,
        opens_at=float(followed.own(np.asarray(up))),
        falls=followed.falls,
    )
