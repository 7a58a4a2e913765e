"""The job that trains on random subsets, for the linear datamodeling score of the rankings."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mda_lightning.files import atomic_path, read_json, write_json
from mda_lightning.interventions import Plan
from mda_lightning.interventions.selection import samples_of
from mda_lightning.recipes.studies.building import (
    build_data,
    build_module,
    build_trainer,
    corpora_of,
    study_mechanism,
    study_order,
)
from mda_lightning.recipes.studies.jobs import stop_if_alone
from mda_lightning.recipes.studies.runs import check_branch
from mda_lightning.recipes.studies.settings import StudySettings
from mda_lightning.units import parse_unit

SCHEMA_VERSION = 1
FILE = "subsets.npz"
_SO_FAR = "so-far.json"


def kept_of(number: int, n_samples: int, *, keep: float, seed: int) -> NDArray[np.bool_]:
    """Which samples subset ``number`` keeps, bool [N]: always ``round(keep * N)`` of them."""
    kept = np.zeros(n_samples, bool)
    rng = np.random.default_rng([seed, number])
    kept[rng.choice(n_samples, size=round(keep * n_samples), replace=False)] = True
    return kept


def train_on_subsets(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """From the window's midpoint, train on each random subset and measure the target's μ.

    Interrupted, it goes on with the subset that comes next.

    Returns:
        How many subsets, and the target's μ before.
    """
    settings, seed = StudySettings.from_dict(spec["settings"]), int(spec["seed"])
    rows, _ = corpora_of(spec)
    report, what = spec["window"], settings.subsets
    first = int(report["checkpoint_steps"]["mid"])
    steps = (first, first + what.steps)
    ids = samples_of(study_order(settings, rows, seed), steps)
    checkpoint = Path(spec["base"]) / report["checkpoints"]["mid"]
    check_branch(checkpoint)
    key = spec["key"]
    found = read_json(folder / _SO_FAR) if (folder / _SO_FAR).is_file() else {}
    mu: list[float] = found["mu"] if found.get("key") == key else []
    everything = np.ones(len(ids), bool)
    before = found.get("before") if mu else None
    if before is None:
        before = _trained(settings, spec, checkpoint, ids, everything, (first, first))
    while len(mu) < what.count:
        stop_if_alone()
        kept = kept_of(len(mu), len(ids), keep=what.keep, seed=seed)
        mu.append(_trained(settings, spec, checkpoint, ids, kept, steps))
        write_json(folder / _SO_FAR, {"key": key, "mu": mu, "before": before})
        write_json(
            folder / "progress.json",
            {"phase": "subsets", "done": len(mu), "total": what.count, "remark": ""},
        )
    about = {
        "schema_version": SCHEMA_VERSION,
        "kind": "subsets",
        "seed": seed,
        "keep": what.keep,
        "steps": what.steps,
        "at_step": first,
        "unit": report["target"],
        "corpus_hash": rows.content_hash,
    }
    kept_all = [kept_of(i, len(ids), keep=what.keep, seed=seed) for i in range(what.count)]
    with atomic_path(folder / FILE) as part, part.open("wb") as out:
        np.savez_compressed(
            out,
            sample_ids=ids,
            kept=np.stack(kept_all),
            mu=np.asarray(mu),
            mu_before=before,
            about=json.dumps(about),
        )
    return {"subsets": len(mu), "mu_before": before}


def _trained(
    settings: StudySettings,
    spec: dict[str, Any],
    checkpoint: Path,
    ids: NDArray[np.int64],
    kept: NDArray[np.bool_],
    steps: tuple[int, int],
) -> float:
    """μ of the target after ``steps`` without the samples that are not kept."""
    rows, _ = corpora_of(spec)
    seed = int(spec["seed"])
    order = study_order(settings, rows, seed)
    plan = None
    if not kept.all():
        plan = Plan.mask(ids[~kept], steps=steps).bound(
            corpus_hash=rows.content_hash, order=order, seed=seed
        )
    module = build_module(settings, rows, seed)
    if steps[0] == steps[1]:
        held = torch.load(checkpoint, map_location="cpu", weights_only=True)
        module.load_state_dict(held["state_dict"])
    else:
        with tempfile.TemporaryDirectory() as scratch:
            trainer = build_trainer(
                settings, Path(scratch), spec, max_steps=steps[1], callbacks=[], logged=False
            )
            data = build_data(settings, rows, seed, plan=plan, branch=True)
            trainer.fit(module, datamodule=data, ckpt_path=str(checkpoint))
        if trainer.interrupted:
            raise SystemExit("training was interrupted")
    unit = parse_unit(spec["window"]["target"])
    scores = study_mechanism(settings, rows).scores(module.model)
    return float(scores.mean[unit.layer, unit.head])
