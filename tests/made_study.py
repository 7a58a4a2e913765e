"""A study folder made of arrays: the answer of every comparison is known by construction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mda_lightning.files import write_json

Track = tuple[Sequence[float], Sequence[float]]
"""(steps, values)."""


def write_run(
    folder: Path, heads: Mapping[str, Mapping[str, Track]], model: Mapping[str, Track]
) -> None:
    """``unit_metrics.parquet`` of tracks: by metric and head, and by number of the whole model."""
    rows: list[dict[str, Any]] = []
    for metric, units in heads.items():
        for unit, (steps, values) in units.items():
            layer, head = unit[1:].split("H")
            rows += [
                {"step": s, "layer": int(layer), "head": int(head), "metric": metric, "value": v}
                for s, v in zip(steps, values, strict=True)
            ]
    for metric, (steps, values) in model.items():
        rows += [
            {"step": s, "layer": None, "head": None, "metric": metric, "value": v}
            for s, v in zip(steps, values, strict=True)
        ]
    folder.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows, columns=["step", "layer", "head", "metric", "value"])
    frame.to_parquet(folder / "unit_metrics.parquet", index=False)


def write_made_study(
    folder: Path,
    arms: Mapping[str, Mapping[str, Any]],
    runs: Mapping[int, Mapping[str, Mapping[str, Any]]],
    *,
    metric: str = "induction",
    targets: Mapping[int, str] | None = None,
    window: tuple[int, int] = (100, 200),
    branch: int = 100,
    end: int = 220,
    measured_at: Sequence[int] = (190, 200),
    thresholds: Sequence[float] = (0.2, 0.3),
    no_window: Sequence[int] = (),
    treated: Mapping[str, int | None] | None = None,
) -> Path:
    """A study of schema 2.

    Args:
        arms: declared arms, without the baseline.
        runs: by seed and arm, ``{"heads": ..., "model": ...}`` as :func:`write_run` takes them; an
            arm that is absent has not finished. "baseline" is the base run.
        treated: how many samples the arms treat, in every seed; left out, the study does not say.
    """
    seeds: list[dict[str, Any]] = []
    for seed, made in runs.items():
        root = folder / f"seed-{seed}"
        for name, run in made.items():
            where = root / ("base" if name == "baseline" else f"arms/{name}")
            write_run(where, run["heads"], run.get("model", {}))
        lost = seed in no_window
        seeds.append(
            {
                "seed": seed,
                "status": "no_window" if lost else "complete",
                "message": "no head formed" if lost else "",
                "base": f"seed-{seed}/base",
                "target": None if lost else (targets or {}).get(seed, "L0H0"),
                "units": {} if lost else {"target": "L0H0", "second": "L0H1", "lowest": "L1H1"},
                "window": {}
                if lost
                else {"start": window[0], "end": window[1], "midpoint": sum(window) / 2},
                "measured_at": [] if lost else list(measured_at),
                "branch": None if lost else branch,
                "end": None if lost else end,
                "scores": None,
                "rankings": None,
                "subsets": None,
                **({} if treated is None else {"treated": dict(treated)}),
                "arms": {
                    name: f"seed-{seed}/base" if name == "baseline" else f"seed-{seed}/arms/{name}"
                    for name in made
                },
            }
        )
    baseline = {"do": "nothing", "control": None, "phrase": "leaving the data alone"}
    write_json(
        folder / "study.json",
        {
            "schema_version": 2,
            "kind": "counterfactual",
            "title": "Made study",
            "created": "2026-01-05T10:00:00+00:00",
            "settings_hash": "0" * 64,
            "config": {},
            "provenance": {"versions": {}},
            "corpus": None,
            "held_out": None,
            "metric": metric,
            "chance": 0.05,
            "treated_fraction": 0.1,
            "thresholds": list(thresholds),
            "timings": {},
            "peak_memory_bytes": None,
            "window_rule": None,
            "arms": {"baseline": baseline, **arms},
            "seeds": seeds,
        },
    )
    return folder
