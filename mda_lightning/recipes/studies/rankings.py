"""The job that ranks a seed's samples in every way that its arms ask for."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mda_lightning.architectures import describe
from mda_lightning.callbacks.window_replay import WindowData, replay_window
from mda_lightning.corpora import TokenRows
from mda_lightning.corpora.repeats import repeated_ngrams
from mda_lightning.files import sha256_of, write_json
from mda_lightning.influence.inverse_probes import CurvatureSettings
from mda_lightning.recipes.studies.arm_settings import RankingSettings
from mda_lightning.recipes.studies.arms import steps_of
from mda_lightning.recipes.studies.building import (
    build_module,
    corpora_of,
    study_mechanism,
    study_order,
)
from mda_lightning.recipes.studies.jobs import stop_if_alone
from mda_lightning.recipes.studies.settings import StudySettings
from mda_lightning.schedule import Schedule
from mda_lightning.shuffling import key_of, keyed_order
from mda_lightning.store import ScoreTable
from mda_lightning.store.layout import TABLE_FILE
from mda_lightning.store.rankings import INDEX, write_rankings

_ROWS_AT_ONCE = 4096


def names_needed(settings: StudySettings) -> tuple[str, ...]:
    """The rankings that a study makes: those of its arms, its subsets, and its own."""
    names = dict.fromkeys(settings.rankings)
    for arm in settings.arms.values():
        if arm.control_of is None and arm.do in ("mask", "insert", "replace") and not arm.generator:
            names[arm.by] = None
    if settings.subsets.count:
        names |= dict.fromkeys(settings.subsets.rankings)
    if any(settings.ranking(name).method == "loss" for name in names):
        names.setdefault("influence", None)  # whose table holds the losses
    return tuple(names)


def resolved(settings: StudySettings, name: str) -> RankingSettings:
    """A ranking with the scoring's settings where it has none of its own."""
    own, scoring = settings.ranking(name), settings.scoring
    if own.method != "influence":
        return own
    return RankingSettings(
        "influence",
        own.curvature or scoring.curvature,
        own.probe_function or scoring.probe_function,
        own.n,
    )


def intervals_of(
    settings: StudySettings, window: tuple[int, int], middle: int
) -> list[tuple[int, int]]:
    """The window, and the other intervals that samples are chosen from, merged and ascending.

    Args:
        middle: the step from which subsets are trained on.
    """
    asked = [window]
    if settings.subsets.count:
        asked.append((middle, middle + settings.subsets.steps))
    for arm in settings.arms.values():
        if arm.control_of is None and arm.do in ("mask", "insert", "replace"):
            own, chosen = steps_of(arm.steps, window), steps_of(arm.from_steps, window)
            asked += {"mask": [own], "insert": [chosen], "replace": [own, chosen]}[arm.do]
    merged: list[tuple[int, int]] = []
    for start, end in sorted(asked):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def rank_samples(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Rank the samples of the window, and of other intervals that arms choose from.

    Influence is by replay, at the checkpoints that the scoring names, for all heads; the curvature
    is estimated on samples of the window. A ranking by the base run's own scores takes its table.

    Returns:
        The names of the rankings.
    """
    settings, seed = StudySettings.from_dict(spec["settings"]), int(spec["seed"])
    rows, _ = corpora_of(spec)
    report = spec["window"]
    window = (int(report["window"]["start"]), int(report["window"]["end"]))
    stream = Schedule(study_order(settings, rows, seed))
    intervals = intervals_of(
        settings, window, int(report["checkpoint_steps"].get("mid", window[0]))
    )
    parts = [WindowData.read(rows, stream, start=start, end=end) for start, end in intervals]
    data = WindowData(
        rows,
        np.concatenate([part.sample_id for part in parts]),
        np.concatenate([part.step for part in parts]),
    )
    inside = WindowData.read(rows, stream, start=window[0], end=window[1])
    wanted = {name: resolved(settings, name) for name in names_needed(settings)}
    tables: dict[str, Path] = {}
    made: dict[RankingSettings, Path] = {}
    if (own := spec.get("scores")) is not None:
        heads = len(describe(build_module(settings, rows, seed).model).heads)
        if intervals == [window] and len(ScoreTable.open(own).units) == heads:
            made[resolved(settings, "influence")] = Path(own)
        elif settings.scoring.estimator == "in_run":
            raise ValueError(
                f"arms choose samples of steps {intervals[0][0]} to {intervals[-1][1]}, and in-run "
                f"scores are of those of the window {window[0]} to {window[1]} alone; use "
                "scoring.estimator: replay"
            )
    kinds = list(dict.fromkeys(one for one in wanted.values() if one.method == "influence"))
    for number, kind in enumerate(kinds):
        if kind not in made:
            place = folder / f"{kind.curvature}-{kind.probe_function}"
            if (place / TABLE_FILE).is_file():  # of this job before it was interrupted
                made[kind] = place
                continue
            _score(kind, settings, spec, place, data, inside, number=(number, len(kinds)))
            made[kind] = place
    for name, kind in wanted.items():
        if kind.method == "influence":
            tables[name] = made[kind]
    columns = {
        name: _column(kind, name, seed, rows, data.sample_id, tables)
        for name, kind in wanted.items()
        if kind.method != "influence"
    }
    write_rankings(
        folder,
        tables=tables,
        sample_id=data.sample_id,
        step=data.step,
        columns=columns,
        provenance={
            "settings_hash": settings.content_hash,
            "seed": seed,
            "corpus_hash": rows.content_hash,
            "intervals": [list(one) for one in intervals],
            "window": list(window),
        },
    )
    return {"names": list(wanted)}


def _score(
    kind: RankingSettings,
    settings: StudySettings,
    spec: Mapping[str, Any],
    place: Path,
    data: WindowData,
    inside: WindowData,
    *,
    number: tuple[int, int],
) -> None:
    rows, _ = corpora_of(spec)
    module = build_module(settings, rows, int(spec["seed"]))
    if settings.training.accelerator != "cpu" and torch.cuda.is_available():
        module.to("cuda")
    assert kind.curvature is not None
    scoring, report = settings.scoring, spec["window"]
    checkpoints = {
        edge: (report["checkpoint_steps"][edge], Path(spec["base"]) / report["checkpoints"][edge])
        for edge in scoring.replay_at
    }
    mechanism = study_mechanism(settings, rows, probe_function=kind.probe_function)
    units = describe(module.model).heads
    work = place.with_name(f".{place.name}.scoring")

    def tell(phase: str, done: int, total: int) -> None:
        stop_if_alone()
        write_json(
            place.parent / "progress.json",
            {
                "phase": f"scoring by {kind.curvature} ({number[0] + 1} of {number[1]})",
                "done": done,
                "total": total,
                "remark": "",
            },
        )

    scored, provenance = replay_window(
        module.model,
        module,
        checkpoints,
        data,
        mechanism=mechanism,
        units=units,
        n_curvature=scoring.n_curvature,
        batch_size=None,
        settings=CurvatureSettings(
            kind=kind.curvature,
            fisher=scoring.fisher,
            damping=scoring.damping,
            seed=scoring.seed,
            tolerance=None,
        ),
        work=work,
        curvature_data=inside,
        progress=tell,
    )
    ScoreTable.write(
        place,
        sample_id=scored.sample_id,
        step=scored.step,
        units=[str(unit) for unit in units],
        blocks=mechanism.block_names,
        values=scored.values,
        loss=scored.loss,
        estimator="replay",
        ihvp_step=scored.ihvp_step,
        provenance={
            "mechanism": mechanism.name,
            "probe": mechanism.settings(),
            "settings": settings.base_dict()["scoring"],
            **provenance,
        },
    )
    shutil.rmtree(work, ignore_errors=True)


def _column(
    kind: RankingSettings,
    name: str,
    seed: int,
    rows: TokenRows,
    ids: NDArray[np.int64],
    tables: Mapping[str, Path],
) -> NDArray[np.float64]:
    """A ranking of the samples themselves: the highest value is treated first."""
    if kind.method == "loss":
        table = ScoreTable.open(tables["influence"])
        own = table.columns("sample_id", "loss")
        order = np.argsort(own["sample_id"], kind="stable")
        place = np.searchsorted(own["sample_id"][order], ids)
        return own["loss"][order][place].astype(np.float64)
    if kind.method == "random":
        unique, place = np.unique(ids, return_inverse=True)
        key = key_of(f"ranking {name}", seed)
        return keyed_order(key, len(unique)).astype(np.float64)[place]
    counts = [
        repeated_ngrams(rows.get(ids[first : first + _ROWS_AT_ONCE]), kind.n)
        for first in range(0, len(ids), _ROWS_AT_ONCE)
    ]
    return np.concatenate(counts).astype(np.float64)


def own_rankings(folder: Path, scores: Path, **provenance: Any) -> None:
    """Rankings that need no job: a base run's own scores."""
    if (folder / INDEX).is_file():
        return
    columns = ScoreTable.open(scores).columns("sample_id", "step")
    write_rankings(
        folder,
        tables={"influence": scores},
        sample_id=columns["sample_id"],
        step=columns["step"],
        columns={},
        provenance=provenance,
    )


def rankings_hash(settings: StudySettings) -> str:
    """Of all that decides the rankings beside the base run."""
    wanted = {name: resolved(settings, name) for name in names_needed(settings)}
    arms = sorted({(str(arm.from_steps), str(arm.steps)) for arm in settings.arms.values()})
    subsets = settings.subsets.steps if settings.subsets.count else 0
    return sha256_of(repr((wanted, arms, subsets)))
