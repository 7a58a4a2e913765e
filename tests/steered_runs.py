"""Small fits that are steered, and what they train on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from in_run_fits import INDUCTION, UNITS, MovingModule, scoring
from lightning.pytorch.callbacks import ModelCheckpoint
from training import fit

from mda_lightning.callbacks import OnlineSteering, UnitMonitor
from mda_lightning.callbacks.steering import Amplify, FromScores, Policy, Suppress
from mda_lightning.corpora import TokenRows
from mda_lightning.datamodules import TokenDataModule
from mda_lightning.interventions import Plan
from mda_lightning.store import ScoreTable

N_ROWS, BATCH, STEPS = 300, 8, 14


def corpus(folder: Path) -> TokenRows:
    tokens = np.random.default_rng(0).integers(1, 40, (N_ROWS, 17))
    return TokenRows.write(folder / "rows", tokens, provenance={})


def suppress(**settings: Any) -> Suppress:
    defaults = {"share": 0.3, "refresh_every": 4, "n_curvature": 8, "score_batch_size": 4}
    return Suppress(**(defaults | settings))


def amplify(**settings: Any) -> Amplify:
    defaults = {"share": 0.25, "recent_steps": 3, "over_steps": 5, "every_n_steps": 4}
    return Amplify(**(defaults | settings))


def earlier_scores(folder: Path, *, least: float | None = None) -> Path:
    """A table of made-up scores of all samples of the corpus, for both units."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=(N_ROWS, len(UNITS), 3)).astype(np.float32)
    if least is not None:
        values = np.abs(values) + least
    ids = np.arange(N_ROWS)
    ScoreTable.write(
        folder / "earlier",
        sample_id=ids,
        step=0,
        values=values,
        loss=np.ones(N_ROWS),
        units=UNITS,
        blocks=["QK", "V", "O"],
        estimator="replay",
        provenance={},
    )
    return folder / "earlier"


def policies(kind: str, folder: Path) -> list[Policy]:
    """The policies of a case, made anew."""
    if kind == "suppress":
        return [suppress()]
    if kind == "amplify":
        return [amplify()]
    if kind == "both":
        return [amplify(active=(0, 8)), suppress(which="bottom")]
    table = str(folder / "earlier")
    if kind == "mask from scores":
        return [FromScores(table, "mask", every_n_steps=4)]
    return [FromScores(table, "insert", every_n_steps=4, per_step=1.4)]


def steered(
    folder: Path,
    rows: TokenRows,
    policy: Any,
    *extra: pl.Callback,
    target: Any = None,
    units: Any = UNITS,
    accumulate: int = 1,
    num_workers: int = 0,
    plan: Plan | None = None,
    max_steps: int = STEPS,
    ckpt_path: Any = None,
    module: pl.LightningModule | None = None,
    in_run: bool = True,
    first: Sequence[pl.Callback] = (),
    **trainer: Any,
) -> tuple[pl.Trainer, OnlineSteering, TokenDataModule]:
    """A fit whose loss weighs its samples, with in-run scoring and steering."""
    one = OnlineSteering(INDUCTION, policy=policy, target=target, units=units, folder=str(folder))
    before: list[pl.Callback] = []
    if target is not None:
        before.append(
            UnitMonitor([INDUCTION], measures=[], every_n_steps=2, folder=str(folder), live=False)
        )
    if in_run:
        before.append(scoring(folder=str(folder), refresh_every=5))
    data = TokenDataModule(
        rows,
        batch_size=BATCH,
        n_steps=STEPS,
        seed=2,
        plan=plan,
        num_workers=num_workers,
        folder=str(folder),
    )
    found = fit(
        MovingModule() if module is None else module,
        [*first, *before, one, *extra],
        folder,
        data=data,
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        ckpt_path=ckpt_path,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in extra),
        **trainer,
    )
    return found, one, data


def replayed(
    folder: Path,
    rows: TokenRows,
    plan: Plan | str | None,
    *,
    extra: Sequence[pl.Callback] = (),
    **settings: Any,
) -> tuple[pl.Trainer, TokenDataModule]:
    """An ordinary fit under a plan, without steering."""
    data = TokenDataModule(
        rows, batch_size=BATCH, n_steps=STEPS, seed=2, plan=plan, folder=str(folder)
    )
    module = MovingModule()
    return fit(module, list(extra), folder, data=data, max_steps=STEPS, **settings), data


def weights(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    return dict(trainer.lightning_module.state_dict())
