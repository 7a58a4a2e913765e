"""Short runs with a window in them, and what they leave: for tests that stop and resume them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from models import random_neox
from torch import Tensor
from training import MODEL_VOCABULARY, Clock, CurveMechanism, StrangersModule, fit, jump
from training import assert_bit_identical as assert_same

from mda_lightning.callbacks import CriticalWindow, UnitMonitor
from mda_lightning.corpora import TokenRows
from mda_lightning.datamodules import TokenDataModule

N_STEPS = 64
CURVE = jump(25, ramp=20)


class TinyModule(StrangersModule):
    """Trains the two embeddings of a language model and logs its loss: 64 steps take 0.2 s."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        model = random_neox(seed=0, vocab_size=MODEL_VOCABULARY, hidden_size=8)
        self.net = torch.nn.ModuleDict({"lm": model})

    def _loss(self, tokens: Tensor) -> Tensor:
        model: Any = self.net["lm"]
        logits = model.lm_head(model.gpt_neox.embed_in(tokens[:, :-1]))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch["tokens"])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self._loss(batch["tokens"]))

    def configure_optimizers(self) -> Any:
        model: Any = self.net["lm"]
        weights = [model.gpt_neox.embed_in.weight, model.lm_head.weight]
        optimizer = torch.optim.AdamW(weights, lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, N_STEPS)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def write_rows(folder: Path, n: int = 300) -> TokenRows:
    tokens = np.random.default_rng(0).integers(1, 40, (n, 17))
    return TokenRows.write(folder, tokens, provenance={})


def watching(
    folder: Path,
    *,
    curve: Callable[[int], Any] = CURVE,
    every: int = 2,
    quiet: int | None = None,
    measures: Sequence[Any] = (),
    clock: Clock | None = None,
    **settings: Any,
) -> list[Any]:
    """A clock, a monitor of a curve, and the window that follows it. No page: it is not tested."""
    clock = clock or Clock()
    monitor = UnitMonitor(
        [CurveMechanism(clock, curve)],
        measures=measures,
        every_n_steps=every,
        quiet_every_n_steps=quiet,
        folder=str(folder),
        live=False,
    )
    window = CriticalWindow(settings.pop("metric", "curve"), folder=str(folder), **settings)
    return [clock, monitor, window]


def run(
    rows: TokenRows,
    folder: Path,
    callbacks: list[pl.Callback],
    *,
    module: pl.LightningModule | None = None,
    max_steps: int = N_STEPS,
    val_rows: TokenRows | None = None,
    **settings: Any,
) -> pl.Trainer:
    """A run in the order of a schedule of 64 steps."""
    return fit(
        module or TinyModule(),
        callbacks,
        folder,
        data=TokenDataModule(rows, batch_size=4, n_steps=N_STEPS, seed=1, val_rows=val_rows),
        max_steps=max_steps,
        use_distributed_sampler=False,
        **settings,
    )


class KeepEverything(pl.Callback):
    """A checkpoint of the Trainer, and a copy of the run's folder, after every step."""

    def __init__(self, folder: Path, to: Path) -> None:
        self.folder, self.to = folder, to
        self._seen = -1

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step == self._seen or step == 0:
            return  # a micro-batch of an accumulated step
        self._seen = step
        trainer.save_checkpoint(self.checkpoint(step))
        if self.folder.exists():
            shutil.copytree(self.folder, self.to / f"folder-{step}")

    def checkpoint(self, step: int) -> Path:
        return self.to / f"step-{step}.ckpt"

    def put_back(self, step: int | None) -> None:
        """Make the run's folder what it was after a step, or at the end."""
        if step is None and not (self.to / "end").exists():
            shutil.copytree(self.folder, self.to / "end")
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.to / ("end" if step is None else f"folder-{step}"), self.folder)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "window.json").read_text())


def outcome(folder: Path) -> dict[str, Any]:
    """What a run leaves of its window: the report, every promoted checkpoint, the ring's files."""
    promoted = sorted((folder / "window").iterdir()) if (folder / "window").exists() else []
    return {
        "report": report_of(folder),
        "promoted": {path.name: torch.load(path, weights_only=True) for path in promoted},
        "ring": sorted(path.name for path in folder.glob("ring/*")),
    }


def assert_same_outcome(
    folder: Path, expected: dict[str, Any], where: str, *, with_loops: bool = True
) -> None:
    """Bit for bit: weights, optimizer, counters, the metric table and the callbacks' own states.

    All of a checkpoint, but for the states of callbacks that the two runs do not share.
    """
    found, expected = outcome(folder), copy.deepcopy(expected)
    assert found["report"] == expected["report"], where
    assert found["promoted"].keys() == expected["promoted"].keys(), where
    assert found["ring"] == expected["ring"], where
    for name, one in found["promoted"].items():
        other = expected["promoted"][name]
        for checkpoint in (one, other):
            # Lightning's count for its own loggers: one off where a run went on from step 0.
            checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"].pop("_batches_that_stepped")
            if not with_loops:
                checkpoint.pop("loops")
        mine, theirs = one.pop("callbacks"), other.pop("callbacks")
        assert_same(one, other, f"{where}: {name}")
        ours = [key for key in theirs if key.startswith(("UnitMonitor", "CriticalWindow"))]
        assert len(ours) >= 2
        for key in ours:
            assert_same(mine[key], theirs[key], f"{where}: {name}: {key}")
