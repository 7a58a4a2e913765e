"""A counterfactual study folder, read into values.

The folder is what ``quickstart`` and ``compare`` leave behind, finished or not: ``study.json``
names every seed's base run, score table and arms, and each of those may still be absent. Absence
is a value here (``None``) plus a sentence in :attr:`Study.notes`; only a folder that is no study
raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mda_lightning.analysis.run_curves import (
    HeadCurves,
    StudyError,
    read_head_curves,
)
from mda_lightning.files import read_json

__all__ = [
    "BASELINE",
    "Arm",
    "DeclaredArm",
    "HeadCurves",
    "SeedRun",
    "Study",
    "StudyError",
    "StudyWindow",
    "load_study",
    "read_head_curves",
]

SCHEMA_VERSION = 2
BASELINE = "baseline"
RANDOM = "random"
METRICS = "unit_metrics.parquet"


@dataclass(frozen=True)
class StudyWindow:
    """The critical window of a seed's target head, in optimizer steps; see ``window.json``."""

    start: int | None = None
    end: int | None = None
    midpoint: float | None = None
    refined_start: float | None = None
    refined_end: float | None = None
    end_reason: str | None = None
    censored: bool = False


@dataclass(frozen=True)
class DeclaredArm:
    """An arm as the study declares it.

    Attributes:
        name: "baseline", "mask-top", ...
        do: "nothing", "mask", "insert", "replace", "prune" or "steer".
        phrase: how a sentence calls it: "masking the top 10% by EK-FAC influence".
        control: the arm it is compared with, where one is declared.
        control_of: the arm whose matched random control this is.
        by: the ranking that chose its samples; ``None`` where nothing says.
        settings: everything the study says of it.
    """

    name: str
    do: str
    phrase: str
    control: str | None
    control_of: str | None
    by: str | None
    settings: Mapping[str, Any]

    @property
    def is_random(self) -> bool:
        """Whether chance chose its samples, so that it can serve as a control of some arm."""
        return self.control_of is not None or self.by == RANDOM

    @property
    def is_treated(self) -> bool:
        """Whether it is judged: neither the untouched run nor a random control."""
        return self.name != BASELINE and self.control_of is None


@dataclass(frozen=True)
class Arm:
    """One training run from the branch point.

    Attributes:
        name: "baseline", "mask-top", ...
        curves: the study's metric; ``None`` when the run left none.
        value: mean of the target head's metric over ``measured_at``; ``None`` when not reached.
        metrics: path of its ``unit_metrics.parquet``, where it could be read.
    """

    name: str
    curves: HeadCurves | None
    value: float | None
    metrics: Path | None = None


@dataclass(frozen=True)
class SeedRun:
    """Everything one seed left behind.

    Attributes:
        units: heads by their part: "target", "second", "lowest".
        branch: step at which the first arm leaves the base run.
        end: last step of the arms.
        rankings: folder of the rankings of the window's samples.
        subsets: file of what random subsets gave.
        treated: how many samples each arm treats, of those where that is known.
    """

    seed: int
    status: str
    message: str
    target: str | None
    window: StudyWindow
    base: HeadCurves | None
    scores: Path | None
    score_unit: str | None
    arms: dict[str, Arm]
    measured_at: tuple[int, ...]
    units: Mapping[str, str] = field(default_factory=dict)
    branch: int | None = None
    end: int | None = None
    rankings: Path | None = None
    subsets: Path | None = None
    treated: Mapping[str, int] = field(default_factory=dict)

    @property
    def without_window(self) -> bool:
        """Whether the base run ended without a closed window, so that no arm could branch."""
        return self.status == "no_window" or self.window.start is None


@dataclass(frozen=True)
class Study:
    """A study folder.

    Attributes:
        metric: the mechanism, which names μ: "induction" or "previous_token".
        declared: every arm of the study, the baseline first, then in the recipe's order.
        thresholds: values of μ whose crossing is compared.
        held_out: rows that were not trained on, where there are some.
        notes: plain sentences about what is missing or unreadable, in seed order.
    """

    folder: Path
    title: str
    created: str
    settings_hash: str
    metric: str
    chance: float | None
    treated_fraction: float
    declared: Mapping[str, DeclaredArm]
    thresholds: tuple[float, ...]
    seeds: tuple[SeedRun, ...]
    corpus: Path | None
    held_out: Path | None
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    window_rule: Any
    timings: Mapping[str, float]
    peak_memory_bytes: int | None
    notes: tuple[str, ...] = field(default=())

    @property
    def arm_names(self) -> tuple[str, ...]:
        """All declared arms, the baseline first."""
        return tuple(self.declared)

    def control_of(self, arm: str) -> str | None:
        """The arm that ``arm`` is declared to be compared with."""
        return self.declared[arm].control


def load_study(folder: str | Path) -> Study:
    """Read a study folder, whatever part of it exists.

    Raises:
        StudyError: there is no ``study.json``, it is of another kind or schema version, or an arm
            is declared against one that the study does not have.
    """
    root = Path(folder)
    path = root / "study.json"
    if not path.is_file():
        raise StudyError(
            f"{root} holds no study.json; give the folder that quickstart or compare wrote"
        )
    raw = read_json(path)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise StudyError(
            f"{path} has schema_version {version!r}; this version reads {SCHEMA_VERSION}: "
            "run the study again, or read it with the release that wrote it"
        )
    if raw.get("kind") != "counterfactual":
        raise StudyError(f"{path} is a {raw.get('kind')!r} study; this reads 'counterfactual' ones")
    notes: list[str] = []
    metric = str(raw.get("metric", "induction"))
    declared = _declared(path, raw.get("arms") or {}, (raw.get("config") or {}).get("arms") or {})
    seeds = tuple(
        _seed(root, entry, metric, tuple(declared), notes) for entry in raw.get("seeds") or []
    )
    chance = raw.get("chance")
    return Study(
        folder=root,
        title=str(raw.get("title") or root.name),
        created=str(raw.get("created") or ""),
        settings_hash=str(raw.get("settings_hash") or ""),
        metric=metric,
        chance=None if chance is None else float(chance),
        treated_fraction=float(raw.get("treated_fraction") or 0.10),
        declared=declared,
        thresholds=tuple(float(value) for value in raw.get("thresholds") or ()),
        seeds=seeds,
        corpus=_inside(root, raw.get("corpus")),
        held_out=_inside(root, raw.get("held_out")),
        config=raw.get("config") or {},
        provenance=raw.get("provenance") or {},
        window_rule=raw.get("window_rule"),
        timings=raw.get("timings") or {},
        peak_memory_bytes=raw.get("peak_memory_bytes"),
        notes=tuple(notes),
    )


def _declared(
    path: Path, raw: Mapping[str, Any], configured: Mapping[str, Any]
) -> dict[str, DeclaredArm]:
    """The arms, the untouched run first even where the file does not declare it."""
    every = {BASELINE: {"do": "nothing", "phrase": "leaving the data alone"}, **raw}
    arms = {}
    for name, entry in every.items():
        control = entry.get("control")
        if control is not None and (control not in every or control == name):
            raise StudyError(
                f"{path}: arm {name!r} is declared against {control!r}, which is no other arm of "
                f"the study; there are: {', '.join(every)}"
            )
        by = entry.get("by")
        arms[str(name)] = DeclaredArm(
            name=str(name),
            do=str(entry.get("do") or "nothing"),
            phrase=str(entry.get("phrase") or f"arm {name}"),
            control=None if control is None else str(control),
            control_of=entry.get("control_of"),
            by=None if by is None else str(by),
            settings={**configured.get(name, {}), **entry},
        )
    return arms


def _inside(root: Path, where: str | None) -> Path | None:
    return root / where if where else None


def _seed(
    root: Path,
    entry: Mapping[str, Any],
    metric: str,
    declared: tuple[str, ...],
    notes: list[str],
) -> SeedRun:
    seed = int(entry.get("seed", 0))
    status = str(entry.get("status") or "unfinished")
    target = entry.get("target")
    measured = entry.get("measured_at")
    steps = tuple(
        int(s) for s in ([measured] if isinstance(measured, (int, float)) else measured or ())
    )
    arms = {}
    short: list[str] = []
    finished = entry.get("arms") or {}
    for name in [arm for arm in declared if arm in finished]:
        where = finished[name]
        curves = _curves(root, where, metric, notes, f"seed {seed}: arm {name}")
        value = None
        if curves is not None and target is not None:
            value = _measured(curves, str(target), steps)
            if value is None:
                short.append(str(name))
        metrics = None if curves is None else root / where / METRICS
        arms[name] = Arm(name, curves, value, metrics)
    absent = [name for name in declared if name not in finished]
    if absent and status != "no_window" and finished:
        notes.append(f"Seed {seed}: not finished: {', '.join(absent)}.")
    elsewhere = [name for name in finished if name not in declared]
    if elsewhere:
        notes.append(f"Seed {seed}: not declared, so left out: {', '.join(elsewhere)}.")
    if short:
        notes.append(
            f"Seed {seed}: not measured where the arms are compared (stopped before it): "
            f"{', '.join(short)}."
        )
    scores = _inside(root, entry.get("scores"))
    if scores is not None and not scores.exists():
        notes.append(f"Seed {seed}: the score table is absent; scoring had not finished.")
        scores = None
    return SeedRun(
        seed=seed,
        status=status,
        message=str(entry.get("message") or ""),
        target=None if target is None else str(target),
        window=_window(entry.get("window") or {}),
        base=_curves(root, entry.get("base"), metric, notes, f"seed {seed}: the base run"),
        scores=scores,
        score_unit=entry.get("score_unit") or target,
        arms=arms,
        measured_at=steps,
        units={str(part): str(unit) for part, unit in (entry.get("units") or {}).items()},
        branch=_whole(entry.get("branch")),
        end=_whole(entry.get("end")),
        rankings=_inside(root, entry.get("rankings")),
        subsets=_inside(root, entry.get("subsets")),
        treated={
            str(arm): int(count)
            for arm, count in (entry.get("treated") or {}).items()
            if count is not None
        },
    )


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _window(raw: Mapping[str, Any]) -> StudyWindow:
    known = {name: raw[name] for name in StudyWindow.__dataclass_fields__ if name in raw}
    return StudyWindow(**{**known, "censored": bool(known.get("censored"))})


def _curves(
    root: Path, where: str | None, metric: str, notes: list[str], what: str
) -> HeadCurves | None:
    sentence = what[:1].upper() + what[1:]
    path = root / where / METRICS if where else None
    if path is None or not path.is_file():
        notes.append(f"{sentence} left no metrics (it had not finished, or was not started).")
        return None
    try:
        return read_head_curves(path, metric)
    except StudyError as error:
        notes.append(f"{sentence} could not be read: {_without(str(error), root)}.")
        return None


def _without(message: str, root: Path) -> str:
    """The message with paths relative to the study, so that a shared report names no machine."""
    return message.replace(f"{root}/", "")


def _measured(curves: HeadCurves, target: str, steps: tuple[int, ...]) -> float | None:
    """Mean over the steps asked for; with none asked for, the last evaluation."""
    at, values = curves.of(target)
    if at.size == 0:
        return None
    if not steps:
        return float(values[-1])
    found = np.isin(np.asarray(steps), at)
    return float(values[np.isin(at, steps)].mean()) if found.all() else None
