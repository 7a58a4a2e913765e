"""``window.json``: the critical window of one run, in a form that needs no code of ours to read.

=======================  =========================================================================
key                      meaning
=======================  =========================================================================
``status``               ``closed``; ``censored``: the run ended inside the window; ``lapsed``: a
                         unit rose and fell back; ``none``: no unit passed its threshold
``message``              the same in a sentence, with the values
``target``               the leading unit, for example ``"L1H2"``, or null
``targets``              all of them, the leading one first, each with its own window
``window``               start, end, midpoint, refined_start, refined_midpoint, refined_end,
                         midpoint_interval, end_reason, censored, start_censored, floor, threshold:
                         in optimizer steps and units of the metric; null without a window
``checkpoints``          start, mid, end: paths from the folder of this file; those that exist
``checkpoint_steps``     their steps; the start's is never after the window's start
``checkpoints_lost``     how many checkpoints could not be written
``highest``              the unit and score that were highest over the run
``thresholds``           per unit, the value above which its next window opens
``windows``              every window of every unit
``handed_over``          from, to, step: one unit lapsed while the other rose
=======================  =========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from mda_lightning.window.mechanism import Edge, MechanismWindow
from mda_lightning.window.rule import Window

Status = Literal["closed", "censored", "lapsed", "none"]
SCHEMA_VERSION = 2
WINDOW_NAME = "window.json"


def window_report(
    *,
    mechanism: str,
    follower: MechanismWindow[Any],
    kept: Mapping[Edge, tuple[int, str]],
    n_lost: int,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The report as JSON values.

    Args:
        mechanism: its name.
        follower: holds every unit's history.
        kept: promoted checkpoints: edge -> (step, path from the report's folder).
        n_lost: checkpoints that could not be written.
        versions: of the packages, for the provenance.
    """
    units, detector, found = follower.units, follower.detector, follower.window
    highest = detector.highest
    best = int(np.nanargmax(highest)) if np.isfinite(highest).any() else None
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "critical_window",
        "mechanism": mechanism,
        "status": status_of(follower),
        "message": message_of(follower),
        "target": None if found is None else str(found[0]),
        "targets": [{"unit": str(unit), **_as_json(w)} for unit, w in follower.targets],
        "window": None if found is None else _as_json(found[1]),
        "checkpoints": {edge: path for edge, (_, path) in sorted(kept.items())},
        "checkpoint_steps": {edge: step for edge, (step, _) in sorted(kept.items())},
        "checkpoints_lost": n_lost,
        "highest": None
        if best is None
        else {"unit": str(units[best]), "score": round(float(highest[best]), 6)},
        "thresholds": {
            str(unit): round(float(up), 6) for unit, up in zip(units, detector.up, strict=True)
        },
        "windows": [
            {"unit": str(units[w.unit_index]), "state": w.state, **_as_json(w)}
            for w in detector.windows()
        ],
        "handed_over": [
            {"from": str(units[e.unit_index]), "to": str(units[e.to_index]), "step": e.step}
            for e in follower.handovers
            if e.to_index is not None
        ],
        "last_step": detector.last_step,
        "rule": detector.rule.settings(),
        "provenance": {"versions": dict(versions)},
    }


def status_of(follower: MechanismWindow[Any]) -> Status:
    """How far the mechanism's window has come."""
    found = follower.window
    if follower.phase == "closed":
        return "closed"
    if found is None:
        return "none"
    return "lapsed" if found[1].end_reason == "lapsed" else "censored"


def message_of(follower: MechanismWindow[Any]) -> str:
    """The status in a sentence, with the values."""
    units, detector, found = follower.units, follower.detector, follower.window
    highest = detector.highest
    if not np.isfinite(highest).any():
        return "no finite score was measured"
    if found is None:
        watched = follower.watched
        there = [str(units[w.unit_index]) for w in detector.windows() if w.start_censored]
        if there:
            return (
                f"{', '.join(there)}: above the threshold at the first evaluation already, so when "
                "it formed was not seen; no other window had opened by step "
                f"{detector.last_step}"
            )
        best = watched[int(np.nanargmax(highest[watched]))]
        return (
            f"no window had opened by step {detector.last_step}: the highest score was "
            f"{highest[best]:.3f} ({units[best]}), and its window opens above "
            f"{detector.up[best]:.3f}"
        )
    unit, window = found
    status = status_of(follower)
    if status == "lapsed":
        return f"{unit} rose at step {window.start} and had fallen back by step {window.end}"
    if status == "censored":
        return (
            f"the window of {unit} opened at step {window.start} and was still open when the run "
            f"ended, at step {detector.last_step}; train longer to see its end"
        )
    targets = ", ".join(str(one) for one, _ in follower.targets)
    return f"the window of {targets} is steps {window.start} to {window.end} ({window.end_reason})"


def _as_json(window: Window) -> dict[str, Any]:
    interval = window.midpoint_interval
    return {
        "start": window.start,
        "end": window.end,
        "midpoint": window.midpoint,
        "refined_start": window.refined_start,
        "refined_midpoint": window.refined_midpoint,
        "refined_end": window.refined_end,
        "midpoint_interval": None if interval is None else list(interval),
        "end_reason": window.end_reason,
        "censored": window.censored,
        "start_censored": window.start_censored,
        "floor": round(window.floor, 6),
        "threshold": round(window.threshold, 6),
    }
