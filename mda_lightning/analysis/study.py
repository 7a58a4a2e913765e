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
import pandas as pd
from numpy.typing import NDArray

from mda_lightning.files import read_json

SCHEMA_VERSION = 1
BASELINE = "baseline"

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class StudyError(ValueError):
    """The folder cannot be read as a study; the message says what is wrong and what to do."""


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
class HeadCurves:
    """One metric of every head over one run.

    Attributes:
        units: head names ("L1H2"), ordered by layer then head, [U].
        steps: evaluation steps, ascending, [S].
        values: [S, U], NaN where a head was not evaluated.
        errors: standard errors over probe sequences, [S, U].
    """

    units: tuple[str, ...]
    steps: Ints
    values: Floats
    errors: Floats

    def of(self, unit: str) -> tuple[Ints, Floats]:
        """(steps, values) of one head.

        Raises:
            StudyError: the run did not evaluate that head.
        """
        if unit not in self.units:
            raise StudyError(
                f"head {unit} was not evaluated in this run: it has "
                f"{self.units[0]}..{self.units[-1]}"
            )
        column = self.values[:, self.units.index(unit)]
        known = np.isfinite(column)
        return self.steps[known], column[known]


@dataclass(frozen=True)
class Arm:
    """One training run from the branch point.

    Attributes:
        name: "baseline", "mask-top", ...
        curves: ``None`` when the run left no metrics.
        value: mean of the target head's metric over ``measured_at``; ``None`` when not reached.
    """

    name: str
    curves: HeadCurves | None
    value: float | None


@dataclass(frozen=True)
class SeedRun:
    """Everything one seed left behind."""

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

    @property
    def without_window(self) -> bool:
        """Whether the base run ended without a closed window, so that no arm could branch."""
        return self.status == "no_window" or self.window.start is None


@dataclass(frozen=True)
class Study:
    """A study folder.

    Attributes:
        notes: plain sentences about what is missing or unreadable, in seed order.
    """

    folder: Path
    title: str
    created: str
    metric: str
    chance: float | None
    treated_fraction: float
    seeds: tuple[SeedRun, ...]
    corpus: Path | None
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    window_rule: Any
    timings: Mapping[str, float]
    peak_memory_bytes: int | None
    notes: tuple[str, ...] = field(default=())

    @property
    def arm_names(self) -> tuple[str, ...]:
        """Arms of any seed: the baseline first, then in the order the study lists them."""
        names = dict.fromkeys(name for seed in self.seeds for name in seed.arms)
        return tuple(sorted(names, key=lambda name: name != BASELINE))


def control_of(arm: str, arms: tuple[str, ...]) -> str | None:
    """The matched random control of an arm: "mask-top" has "mask-random", where it was run."""
    operation, _, selection = arm.rpartition("-")
    control = f"{operation}-random"
    return control if operation and selection != "random" and control in arms else None


def read_head_curves(path: str | Path, metric: str) -> HeadCurves:
    """Read one metric of all heads from a ``unit_metrics.parquet``.

    Raises:
        StudyError: the file is damaged, lacks a column, or never logged the metric.
    """
    try:
        frame = pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise StudyError(f"{path} cannot be read as Parquet ({error})") from error
    absent = {"step", "layer", "head", "metric", "value"} - set(frame.columns)
    if absent:
        raise StudyError(f"{path} has no column {sorted(absent)[0]!r}: it is not a metrics table")
    chosen = frame[frame["metric"] == metric]
    if chosen.empty:
        logged = ", ".join(sorted(map(str, frame["metric"].unique()))) or "nothing"
        raise StudyError(f"{path} holds no metric {metric!r}: it logged {logged}")
    chosen = chosen.dropna(subset=["layer", "head"])
    if chosen.empty:
        raise StudyError(f"{path}: {metric!r} is a number of the whole model, not one a head")
    # Beside numbers of the whole model, which have no head, Parquet reads heads as floats.
    chosen = chosen.astype({"layer": int, "head": int})
    wide = chosen.pivot_table(
        index="step", columns=["layer", "head"], values="value", aggfunc="last", dropna=False
    ).sort_index(axis=1)
    errors = np.full(wide.shape, np.nan)
    if "se" in chosen.columns:
        errors = (
            chosen.pivot_table(
                index="step", columns=["layer", "head"], values="se", aggfunc="last", dropna=False
            )
            .reindex(index=wide.index, columns=wide.columns)
            .to_numpy(dtype=np.float64)
        )
    return HeadCurves(
        units=tuple(f"L{layer}H{head}" for layer, head in wide.columns),
        steps=wide.index.to_numpy(dtype=np.int64),
        values=wide.to_numpy(dtype=np.float64),
        errors=errors,
    )


def load_study(folder: str | Path) -> Study:
    """Read a study folder, whatever part of it exists.

    Raises:
        StudyError: there is no ``study.json``, or it is of another kind or schema version.
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
            "use the release that wrote it, or run the study again"
        )
    if raw.get("kind") != "counterfactual":
        raise StudyError(f"{path} is a {raw.get('kind')!r} study; this reads 'counterfactual' ones")
    notes: list[str] = []
    metric = str(raw.get("metric", "induction"))
    seeds = tuple(_seed(root, entry, metric, notes) for entry in raw.get("seeds") or [])
    corpus = root / raw["corpus"] if raw.get("corpus") else None
    chance = raw.get("chance")
    return Study(
        folder=root,
        title=str(raw.get("title") or root.name),
        created=str(raw.get("created") or ""),
        metric=metric,
        chance=None if chance is None else float(chance),
        treated_fraction=float(raw.get("treated_fraction") or 0.10),
        seeds=seeds,
        corpus=corpus,
        config=raw.get("config") or {},
        provenance=raw.get("provenance") or {},
        window_rule=raw.get("window_rule"),
        timings=raw.get("timings") or {},
        peak_memory_bytes=raw.get("peak_memory_bytes"),
        notes=tuple(notes),
    )


def _seed(root: Path, entry: Mapping[str, Any], metric: str, notes: list[str]) -> SeedRun:
    seed = int(entry.get("seed", 0))
    status = str(entry.get("status") or "unfinished")
    target = entry.get("target")
    measured = entry.get("measured_at")
    steps = tuple(
        int(s) for s in ([measured] if isinstance(measured, (int, float)) else measured or ())
    )
    arms = {}
    short: list[str] = []
    for name, where in (entry.get("arms") or {}).items():
        curves = _curves(root, where, metric, notes, f"seed {seed}: arm {name}")
        value = None
        if curves is not None and target is not None:
            value = _measured(curves, str(target), steps)
            if value is None:
                short.append(str(name))
        arms[str(name)] = Arm(str(name), curves, value)
    if short:
        notes.append(
            f"Seed {seed}: not measured where the arms are compared (stopped before it): "
            f"{', '.join(short)}."
        )
    scores = root / entry["scores"] if entry.get("scores") else None
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
    )


def _window(raw: Mapping[str, Any]) -> StudyWindow:
    known = {name: raw[name] for name in StudyWindow.__dataclass_fields__ if name in raw}
    return StudyWindow(**{**known, "censored": bool(known.get("censored"))})


def _curves(
    root: Path, where: str | None, metric: str, notes: list[str], what: str
) -> HeadCurves | None:
    sentence = what[:1].upper() + what[1:]
    path = root / where / "unit_metrics.parquet" if where else None
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
