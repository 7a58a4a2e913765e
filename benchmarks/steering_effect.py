"""``python -m benchmarks.steering_effect STUDY``: what steering does to a head that forms.

From the start of a quickstart study's critical window to its end, with the study's own data, model
and rate; each policy beside its random counterpart, and its plan run again without steering.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch

from mda_lightning.callbacks import InfluenceScoring, OnlineSteering
from mda_lightning.callbacks.steering import Amplify, DelayLevel, HoldCurve, Policy, Suppress
from mda_lightning.callbacks.steering.targets import Target
from mda_lightning.corpora import TokenRows
from mda_lightning.files import read_json
from mda_lightning.interventions import Plan
from mda_lightning.recipes.studies.building import build_data, build_module, build_monitor
from mda_lightning.recipes.studies.settings import StudySettings
from mda_lightning.units import parse_unit

_LAST = 5  # evaluations that μ is averaged over


@dataclass
class Branch:
    """Where the arms begin and end, and the head that is steered."""

    settings: StudySettings
    rows: TokenRows
    seed: int
    checkpoint: Path
    steps: tuple[int, int]
    unit: str

    @classmethod
    def of(cls, study: Path, seed: int) -> Branch:
        """Of a finished seed of a study folder."""
        stored = read_json(study / "study.json")
        base = study / f"seed-{seed}" / "base"
        window = read_json(base / "window.json")
        return cls(
            StudySettings.from_dict(stored["config"]),
            TokenRows.open(study / stored["corpus"]),
            seed,
            base / window["checkpoints"]["start"],
            (window["window"]["start"], window["window"]["end"]),
            window["target"],
        )


@dataclass
class Arm:
    """How an arm is steered, or the plan that it has from the start."""

    policies: list[Policy] = field(default_factory=list)
    target: Target | None = None
    plan: Plan | None = None


def run(branch: Branch, arm: Arm, folder: Path) -> tuple[float, dict[str, torch.Tensor], Plan]:
    """μ of the head over the last evaluations, the final weights, and the plan as it was run."""
    monitor = build_monitor(branch.settings, branch.rows, folder)
    callbacks: list[pl.Callback] = [monitor]
    if any(isinstance(policy, Amplify) for policy in arm.policies):
        callbacks.append(
            InfluenceScoring(
                branch.settings.mechanism, active="always", units=[branch.unit], refresh_every=50
            )
        )
    if arm.policies:
        callbacks.append(
            OnlineSteering(
                branch.settings.mechanism,
                policy=arm.policies,
                target=arm.target,
                units=[branch.unit],
                folder=str(folder),
            )
        )
    data = build_data(branch.settings, branch.rows, branch.seed, plan=arm.plan, folder=folder)
    module = build_module(branch.settings, branch.rows, branch.seed)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=branch.steps[1],
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data, ckpt_path=str(branch.checkpoint))
    unit = parse_unit(branch.unit)
    _, values = monitor.table.curves(branch.settings.mechanism)
    mu = float(np.mean([value[unit.layer, unit.head] for value in values[-_LAST:]]))
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    return mu, weights, data.schedule.plan


def main() -> int:
    """Run all arms, one after the other, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steering_effect")
    parser.add_argument("study", type=Path, help="a folder of `mda-lightning quickstart`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/steering"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    branch = Branch.of(options.study, options.seed)
    start, end = branch.steps
    order_ids = build_data(branch.settings, branch.rows, branch.seed).schedule.order.ids
    pool = np.unique(np.concatenate([order_ids(step) for step in range(start, end)]))
    often = {"recent_steps": 100, "every_n_steps": 50, "over_steps": 50}
    level = 0.2
    arms = {
        "base run": Arm(),
        "suppress the top eighth of each batch": Arm([Suppress(0.125, refresh_every=50)]),
        "a random eighth masked": Arm(plan=Plan.prune(0.125, (start, end))),
        "suppress the bottom eighth of each batch": Arm(
            [Suppress(0.125, which="bottom", refresh_every=50)]
        ),
        "amplify the top tenth of the last 100 steps": Arm([Amplify(0.1, **often)]),  # type: ignore[arg-type]
        f"delay {level} to step {end - 160}": Arm(
            [Suppress(0.25, refresh_every=50)], DelayLevel(level, end - 160)
        ),
        f"hold a line from 0.1 to {level}": Arm(
            [Suppress(0.25, refresh_every=50), Amplify(0.1, **often)],  # type: ignore[arg-type]
            HoldCurve([[start, 0.1], [end, level]]),
        ),
    }
    print(f"{branch.unit}, steps {start}..{end}\n| arm | μ at the end |\n|---|---|")
    found = {}
    for number, (name, arm) in enumerate(arms.items()):
        found[name] = run(branch, arm, options.output / f"arm-{number}")
        print(f"| {name} | {found[name][0]:.3f} |", flush=True)
    _, weights, plan = found["amplify the top tenth of the last 100 steps"]
    mu, again, _ = run(branch, Arm(plan=plan), options.output / "replay")
    same = all(torch.equal(again[name], value) for name, value in weights.items())
    print(f"| the amplified run's plan, without steering | {mu:.3f} |")
    print(f"|   its weights | {'the same bit for bit' if same else 'DIFFER'} |")
    for draw in range(2):
        control = plan.random_control(pool, seed=draw)
        mu, *_ = run(branch, Arm(plan=control), options.output / f"random-{draw}")
        print(f"| as many random insertions, draw {draw} | {mu:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
