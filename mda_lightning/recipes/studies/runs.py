"""The two kinds of training run in a counterfactual study: the base run, and an arm of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from mda_lightning.callbacks import (
    CriticalWindow,
    InfluenceScoring,
    OnlineSteering,
    ScheduledCheckpoints,
    UnitMonitor,
)
from mda_lightning.callbacks.steering import Amplify, Policy, Suppress
from mda_lightning.corpora import TokenRows
from mda_lightning.files import read_json
from mda_lightning.interventions import Plan
from mda_lightning.recipes.studies.arms import RECENT
from mda_lightning.recipes.studies.building import (
    build_data,
    build_module,
    build_monitor,
    build_trainer,
    corpora_of,
    last_checkpoint,
    study_mechanism,
)
from mda_lightning.recipes.studies.settings import ArmSettings, StudySettings
from mda_lightning.units import Head


def run_base(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train until the critical window has closed, and score the samples that fell into it.

    With a fixed window: train to its end, keeping the checkpoints that arms and scores start from.

    Returns:
        ``window``: as :class:`CriticalWindow` writes it, with the checkpoint ``branch`` that the
        arms start from; ``units``: the heads that arms may name; ``stopped_at``.
    """
    settings, seed = StudySettings.from_dict(spec["settings"]), int(spec["seed"])
    rows, held_out = corpora_of(spec)
    fixed = settings.window.is_fixed
    monitored = build_monitor(
        settings,
        rows,
        folder,
        held_out=held_out,
        quiet_every_n_steps=None if fixed else settings.monitor.quiet_every_n_steps,
    )
    own = (
        _fixed_callbacks(settings, spec, folder)
        if fixed
        else _found_callbacks(settings, rows, folder)
    )
    trainer = build_trainer(
        settings, folder, spec, max_steps=base_end(settings), callbacks=[monitored, *own]
    )
    data = build_data(settings, rows, seed, folder=folder)
    module = build_module(settings, rows, seed)
    trainer.fit(module, datamodule=data, ckpt_path=last_checkpoint(folder))
    if trainer.interrupted:
        raise SystemExit("training was interrupted")
    report = _fixed_window(settings, spec, monitored, folder) if fixed else _found_window(folder)
    return {
        "window": report,
        "units": units_of(settings, monitored, report),
        "stopped_at": trainer.global_step,
    }


def run_arm(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train from the branch point to the window's end, under a plan or steered while it goes on.

    Returns:
        The last step.
    """
    settings, seed = StudySettings.from_dict(spec["settings"]), int(spec["seed"])
    rows, held_out = corpora_of(spec)
    plan = Plan.load(spec["plan"]) if spec.get("plan") else None
    data = build_data(settings, rows, seed, plan=plan, folder=folder, branch=True)
    callbacks: list[pl.Callback] = [build_monitor(settings, rows, folder, held_out=held_out)]
    if spec.get("steer"):
        callbacks += _steering(settings, rows, spec, folder)
    trainer = build_trainer(settings, folder, spec, max_steps=int(spec["end"]), callbacks=callbacks)
    resumed = last_checkpoint(folder)
    if resumed is None:
        check_branch(Path(spec["checkpoint"]))
    trainer.fit(
        build_module(settings, rows, seed), datamodule=data, ckpt_path=resumed or spec["checkpoint"]
    )
    if trainer.interrupted:
        raise SystemExit("training was interrupted")
    return {"stopped_at": trainer.global_step}


def check_branch(path: Path) -> None:
    """Refuse a checkpoint that no run can branch from exactly.

    Raises:
        ValueError: there is none, or it holds weights alone.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}, from which the arms branch; run it --fresh")
    held = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    states = held.get("optimizer_states") if isinstance(held, dict) else None
    is_first = bool(states) and held.get("global_step") == 0  # AdamW has no moments yet
    if not is_first and not any(state.get("state") for state in states or []):
        raise ValueError(
            f"{path} holds no optimizer state: an arm from it would start with AdamW's moments at "
            "0 and differ from the base run by that alone; branch from a checkpoint that was saved "
            "with it (ScheduledCheckpoints(weights_only=False))"
        )


def base_end(settings: StudySettings) -> int:
    """The step at which a base run ends at the latest."""
    end = settings.window.end
    if end is None:
        return settings.training.max_steps
    return min(end + settings.training.margin_steps, settings.training.max_steps)


def units_of(
    settings: StudySettings, monitored: UnitMonitor, report: Mapping[str, Any]
) -> dict[str, str]:
    """The heads that arms may name: the target, the second highest μ and the lowest.

    By the mean over the last evaluations up to the window's end.
    """
    if report["target"] is None:
        return {}
    steps, values = monitored.table.curves(settings.mechanism)
    until = steps <= int(report["window"]["end"])
    late = np.asarray(values[until][-settings.monitor.averaged_evaluations :], np.float64).mean(0)
    heads = [Head(int(layer), int(head)) for layer, head in np.ndindex(late.shape)]
    heads.sort(key=lambda head: -late[head.layer, head.head])
    others = [str(head) for head in heads if str(head) != report["target"]]
    return {"target": report["target"], "second": others[0], "lowest": others[-1]}


def _found_callbacks(settings: StudySettings, rows: TokenRows, folder: Path) -> list[pl.Callback]:
    scoring = settings.scoring
    return [
        CriticalWindow(
            settings.mechanism,
            folder=str(folder),
            stop_when_closed=True,
            margin_steps=settings.training.margin_steps,
        ),
        InfluenceScoring(
            study_mechanism(settings, rows),
            estimator=scoring.estimator,
            folder=str(folder),
            n_curvature=scoring.n_curvature,
            replay_at=scoring.replay_at,
            units="target" if (scoring.estimator, scoring.units) == ("replay", "target") else "all",
            curvature=scoring.curvature,
            fisher=scoring.fisher,
            damping=scoring.damping,
            seed=scoring.seed,
        ),
    ]


def _fixed_callbacks(
    settings: StudySettings, spec: Mapping[str, Any], folder: Path
) -> list[pl.Callback]:
    return [ScheduledCheckpoints(sorted(set(_edges(settings, spec).values())), folder=str(folder))]


def _edges(settings: StudySettings, spec: Mapping[str, Any]) -> dict[str, int]:
    start, end = settings.window.start, settings.window.end
    assert start is not None and end is not None
    return {"branch": int(spec["branch"]), "start": start, "mid": (start + end) // 2, "end": end}


def _fixed_window(
    settings: StudySettings, spec: Mapping[str, Any], monitored: UnitMonitor, folder: Path
) -> dict[str, Any]:
    """The report of a window that the recipe names, in the form of ``window.json``."""
    edges = _edges(settings, spec)
    target = settings.window.target
    if target is None:
        steps, values = monitored.table.curves(settings.mechanism)
        late = values[steps <= edges["end"]][-settings.monitor.averaged_evaluations :].mean(0)
        target = str(Head(*(int(i) for i in np.unravel_index(int(late.argmax()), late.shape))))
    return {
        "status": "closed",
        "message": f"the recipe's window: steps {edges['start']} to {edges['end']}",
        "target": target,
        "window": {
            "start": edges["start"],
            "end": edges["end"],
            "midpoint": edges["mid"],
            "end_reason": "recipe",
            "censored": False,
        },
        "checkpoints": {edge: f"checkpoints/step-{step}.ckpt" for edge, step in edges.items()},
        "checkpoint_steps": edges,
    }


def _found_window(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = read_json(folder / "window.json")
    for name in ("checkpoints", "checkpoint_steps"):
        if "start" in report[name]:
            report[name]["branch"] = report[name]["start"]
    return report


def _steering(
    settings: StudySettings, rows: TokenRows, spec: Mapping[str, Any], folder: Path
) -> list[pl.Callback]:
    how, unit = spec["steer"], spec["unit"]
    arm = ArmSettings(**how["arm"])
    active = (int(how["steps"][0]), int(how["steps"][1]))
    share, every = how["share"], arm.refresh_every
    own: list[pl.Callback] = []
    policy: Policy
    if arm.policy == "suppress":
        policy = Suppress(
            share,
            which=arm.which,
            weight=arm.weight,
            refresh_every=arm.refresh_every,
            active=active,
        )
    else:
        every = arm.refresh_every
        policy = Amplify(
            share, recent_steps=RECENT * every, every_n_steps=every, over_steps=every, active=active
        )
        own.append(
            InfluenceScoring(
                study_mechanism(settings, rows), active="always", units=[unit], refresh_every=every
            )
        )
    steering = OnlineSteering(
        study_mechanism(settings, rows), policy=[policy], units=[unit], folder=str(folder)
    )
    return [*own, steering]
