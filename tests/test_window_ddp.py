"""Two processes decide alike: the same window, checkpoints, announcements and end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from test_scheduled_checkpoints import file_size_limit
from training import Clock, CurveMechanism
from window_runs import CURVE, N_STEPS, TinyModule, outcome, report_of, run, watching

from mda_lightning.callbacks import CriticalWindow, UnitMonitor
from mda_lightning.corpora import TokenRows
from mda_lightning.window import WindowRule

SMALL = {"ring": 4, "ring_every": 2, "stop_when_closed": True, "margin_steps": 3}
GIVEN: dict[str, Any] = {"chance": 0.05, "rule": WindowRule(minimum_up=0.2, level=0.5)}


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def apart(step: int) -> np.ndarray:
    """On rank 1 another head rises, ten steps earlier: alone it would decide otherwise."""
    if rank() == 0:
        return np.asarray(CURVE(step))
    return np.ascontiguousarray(CURVE(step + 10)[::-1, ::-1])


class ApartModule(TinyModule):
    """Logs a number that differs between ranks, or that one of them does not know."""

    def __init__(self) -> None:
        super().__init__()
        model: Any = self.net["lm"]
        model.requires_grad_(False)
        for trained in (model.gpt_neox.embed_in, model.lm_head):
            trained.requires_grad_(True)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        step = self.global_step + 1
        self.log("apart", float(apart(step).max()))
        if rank() == 1:
            self.log("only on rank 1", 1.0)
        return super().training_step(batch, batch_idx)


class Full(pl.Callback):
    """Rank 0's disk is full while the window's callback acts, in some steps."""

    def __init__(self, window: pl.Callback, steps: range) -> None:
        self.window, self.steps = window, steps

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        if trainer.global_step in self.steps and trainer.is_global_zero:
            with file_size_limit(64):
                self.window.on_train_batch_end(trainer, *rest)


class Tells(pl.Callback):
    """What a rank has heard and holds, in a file of its own; and a checkpoint of the Trainer."""

    def __init__(self, window: CriticalWindow, folder: Path, save_at: int = -1) -> None:
        self.window, self.folder, self.save_at = window, folder, save_at
        self.heard: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def hear(one: Any) -> None:
            self.heard.append([trainer.global_step, one.kind, str(one.unit), one.start])

        self.window.subscribe(hear)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.folder / "at.ckpt")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = self.window.window
        told = {
            "heard": self.heard,
            "stopped_at": trainer.global_step,
            "window": None if found is None else [str(found[0]), found[1].start, found[1].end],
            "kept": {edge: step for edge, (step, _) in self.window.checkpoints.items()},
            "lost": self.window.report()["checkpoints_lost"],
            "state": json.loads(json.dumps(self.window.state_dict())),
        }
        (self.folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(told))


def two(
    rows: TokenRows,
    folder: Path,
    *,
    metric: str | None = None,
    full: range | None = None,
    save_at: int = -1,
    ckpt_path: Path | None = None,
) -> list[dict[str, Any]]:
    """What each of two processes tells of a run."""
    clock = Clock()
    if metric is None:
        callbacks = watching(folder / "run", clock=clock, curve=apart, **SMALL)
    else:
        window = CriticalWindow(
            metric, folder=str(folder / "run"), every_n_steps=2, **GIVEN, **SMALL
        )
        monitor = UnitMonitor(
            [CurveMechanism(clock, apart)], measures=(), folder=str(folder / "other"), live=False
        )
        callbacks = [clock, monitor, window]
    window = callbacks[2]
    if full is not None:
        callbacks.insert(2, Full(window, full))
    run(
        rows,
        folder,
        [*callbacks, Tells(window, folder, save_at)],
        module=ApartModule(),
        devices=2,
        strategy="ddp_spawn",
        ckpt_path=ckpt_path,
    )
    return [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(2)]


def assert_alike(told: list[dict[str, Any]]) -> dict[str, Any]:
    first, second = told
    assert first == second
    return first


@pytest.mark.slow
def test_ranks_that_measure_differently_decide_alike_and_resume(
    rows: TokenRows, tmp_path: Path
) -> None:
    """As one process does that measures what rank 0 does; and again, from inside the window."""
    alone = watching(tmp_path / "alone", **SMALL)
    run(rows, tmp_path / "alone", alone)
    one = report_of(tmp_path / "alone")
    told = assert_alike(two(rows, tmp_path / "two", save_at=37))
    found = outcome(tmp_path / "two" / "run")
    assert found["report"] == one
    window = one["window"]
    assert told["stopped_at"] == window["end"] + 3 < N_STEPS
    assert told["window"] == ["L1H1", window["start"], window["end"]]
    assert [kind for _, kind, _, _ in told["heard"]] == ["opened", "closed"]
    assert told["kept"] == one["checkpoint_steps"] and told["lost"] == 0
    again = assert_alike(two(rows, tmp_path / "two", ckpt_path=tmp_path / "two" / "at.ckpt"))
    assert again["kept"] == told["kept"] and again["stopped_at"] == told["stopped_at"]
    assert [kind for at, kind, _, _ in again["heard"]] == [
        kind for at, kind, _, _ in told["heard"] if at > 37
    ]
    resumed = outcome(tmp_path / "two" / "run")
    assert resumed["report"] == found["report"] and resumed["ring"] == []
    for name, checkpoint in found["promoted"].items():
        for key in ("state_dict", "optimizer_states", "global_step"):
            from training import assert_bit_identical

            assert_bit_identical(resumed["promoted"][name][key], checkpoint[key], f"{name} {key}")


@pytest.mark.slow
@pytest.mark.parametrize("full", [range(99), range(44, 99)], ids=["always", "at the end"])
def test_rank_0_without_room_does_not_hang(rows: TokenRows, tmp_path: Path, full: range) -> None:
    told = assert_alike(two(rows, tmp_path, full=full))
    assert told["lost"] > 0 and told["window"][0] == "L1H1"
    assert told["stopped_at"] == told["window"][2] + 3
    found = report_of(tmp_path / "run")
    assert found["checkpoint_steps"] == told["kept"]
    assert found["checkpoints_lost"] == told["lost"]


@pytest.mark.slow
def test_a_logged_number_is_rank_0s(rows: TokenRows, tmp_path: Path) -> None:
    told = assert_alike(two(rows, tmp_path, metric="apart"))
    values = told["state"]["source"]["values"]
    steps = told["state"]["source"]["steps"]
    np.testing.assert_allclose(values, [CURVE(step).max() for step in steps], rtol=1e-6)
    assert [kind for _, kind, _, _ in told["heard"]] == ["opened", "closed"]


@pytest.mark.slow
def test_a_number_that_rank_0_does_not_log_is_told_by_all(rows: TokenRows, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="nothing was logged under that name"):
        two(rows, tmp_path, metric="only on rank 1")
