"""``window.json``: the critical window of one run, in a form that needs no code of ours to read.

=======================  =========================================================================
key                      meaning
=======================  =========================================================================
``status``               ``closed``; ``censored``: the run ended inside the window; ``lapsed``: a
                         head rose and fell back; ``none``: no head passed its threshold
``message``              the same in a sentence, with the values
``target``               the head, for example ``"L1H2"``, or null
``window``               start, end, midpoint, refined_start, refined_end, end_reason, censored,
                         start_censored: in optimizer steps; null without a window
``checkpoints``          start, mid, end: paths from the folder of this file; those that exist
``checkpoint_steps``     their steps; the start's is never after the window's start
``checkpoints_lost``     how many checkpoints could not be written
``highest``              the head and score that were highest over the run
``thresholds``           per head, the value above which its window opens
``windows``              every window of every head
=======================  =========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mda_lightning.units import Head
from mda_lightning.window.detector import WindowDetector
from mda_lightning.window.mechanism import Edge, MechanismWindow
from mda_lightning.window.rule import Window

Status = Literal["closed", "censored", "lapsed", "none"]
SCHEMA_VERSION = 1
WINDOW_NAME = "window.json"


def window_report(
    *,
    mechanism: str,
    follower: MechanismWindow,
    kept: Mapping[Edge, tuple[int, str]],
    n_lost: int,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The report as JSON values.

    Args:
        mechanism: its name.
        follower: holds every head's history.
        kept: promoted checkpoints: edge -> (step, path from the report's folder).
        n_lost: checkpoints that could not be written.
    """
    heads, detector, found = follower.heads, follower.detector, follower.window
    if follower.phase == "closed":
        status: Status = "closed"
    elif found is None:
        status = "none"
    else:
        status = "censored" if found[1].censored else "lapsed"
    highest = detector.highest
    best = int(np.nanargmax(highest)) if np.isfinite(highest).any() else None
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "critical_window",
        "mechanism": mechanism,
        "status": status,
        "message": _sentence(status, found, heads, detector, best),
        "target": None if found is None else str(found[0]),
        "window": None if found is None else _as_json(found[1]),
        "checkpoints": {edge: path for edge, (_, path) in sorted(kept.items())},
        "checkpoint_steps": {edge: step for edge, (step, _) in sorted(kept.items())},
        "checkpoints_lost": n_lost,
        "highest": None
        if best is None
        else {"unit": str(heads[best]), "score": round(float(highest[best]), 6)},
        "thresholds": {
            str(head): round(float(up), 6) for head, up in zip(heads, detector.up, strict=True)
        },
        "windows": [
            {"unit": str(heads[w.unit_index]), "state": w.state, **_as_json(w)}
            for w in detector.windows()
        ],
        "last_step": detector.last_step,
        "rule": detector.rule.settings(),
        "provenance": {"versions": dict(versions)},
    }


def _as_json(window: Window) -> dict[str, Any]:
    return {
        "start": window.start,
        "end": window.end,
        "midpoint": window.midpoint,
        "refined_start": window.refined_start,
        "refined_end": window.refined_end,
        "end_reason": window.end_reason,
        "censored": window.censored,
        "start_censored": window.start_censored,
    }


def _sentence(
    status: Status,
    found: tuple[Head, Window] | None,
    heads: Sequence[Head],
    detector: WindowDetector,
    best: int | None,
) -> str:
    if best is None:
        return "no finite score was measured"
    if found is None:
        return (
            f"no head opened a window by step {detector.last_step}: the highest score was "
            f"{detector.highest[best]:.3f} ({heads[best]}), and its window opens above "
            f"{detector.up[best]:.3f}"
        )
    head, window = found
    if status == "censored":
        return (
            f"the window of {head} opened at step {window.start} and was still open when the run "
            f"ended, at step {detector.last_step}; train longer to see its end"
        )
    if status == "lapsed":
        return f"{head} rose at step {window.start} and had fallen back by step {window.end}"
    return f"the window of {head} is steps {window.start} to {window.end} ({window.end_reason})"
