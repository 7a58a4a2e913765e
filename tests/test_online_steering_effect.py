"""The whole loop at work: a head that would form early is held on the curve of a slower run."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from models import random_neox
from torch import Tensor
from training import fit

from mda_lightning.callbacks import OnlineSteering, UnitMonitor
from mda_lightning.callbacks.steering import Decisions, HoldCurve, Suppress
from mda_lightning.corpora import TokenRows
from mda_lightning.datamodules import TokenDataModule
from mda_lightning.mechanisms import mechanism

VOCABULARY, LENGTH, BATCH, STEPS = 32, 33, 32, 300


def repeating(folder: Path, share: float) -> tuple[TokenRows, np.ndarray]:
    """``share`` of the rows repeat a block of distinct tokens; the others are random."""
    rng = np.random.default_rng(0)
    rows = rng.integers(1, VOCABULARY, (12_000, LENGTH))
    repeats = rng.random(len(rows)) < share
    for i in np.flatnonzero(repeats):
        block = rng.permutation(np.arange(1, VOCABULARY))[: rng.integers(6, 12)]
        rows[i] = np.tile(block, LENGTH // len(block) + 1)[:LENGTH]
    return TokenRows.write(folder / str(share), rows, provenance={}), repeats


class Small(pl.LightningModule):
    """A model in which an induction head forms within 200 steps on such rows."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = random_neox(seed=2, vocab_size=VOCABULARY, hidden_size=64, n_heads=4, std=0.1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        tokens = batch["tokens"]
        logits = self.lm(input_ids=tokens[:, :-1]).logits
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        return (each.mean(1) * batch["weight"]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.0)


@pytest.mark.slow
def test_a_head_is_held_on_the_curve_of_a_slower_run(tmp_path: Path) -> None:
    """Nine rows in ten repeat instead of seven: suppression takes out what is too much."""
    torch.set_num_threads(1)
    induction = mechanism(
        "induction", n_sequences=16, n_probe_sequences=8, probe_function="attention"
    )

    def curve(rows: TokenRows, folder: Path, *held: OnlineSteering) -> np.ndarray:
        monitor = UnitMonitor(
            [induction], measures=[], every_n_steps=10, folder=str(folder), live=False
        )
        data = TokenDataModule(rows, batch_size=BATCH, n_steps=STEPS, seed=1, folder=str(folder))
        fit(Small(), [monitor, *held], folder, data=data, max_steps=STEPS)
        return monitor.table.curves("induction")[1].max((1, 2))

    slow, _ = repeating(tmp_path, 0.7)
    fast, repeats = repeating(tmp_path, 0.9)
    reference = curve(slow, tmp_path / "reference")
    steering = OnlineSteering(
        induction,
        policy=Suppress(share=0.6, refresh_every=40, n_curvature=32, score_batch_size=32),
        target=HoldCurve(
            str(tmp_path / "reference" / "unit_metrics.parquet"),
            tolerance=0.005,
            full_at=0.05,
            integral=2.0,
        ),
        over="max",
        folder=str(tmp_path / "held"),
    )
    free, held = curve(fast, tmp_path / "free"), curve(fast, tmp_path / "held", steering)
    assert reference[-1] > 0.8 and free[-1] > 0.8

    def off(found: np.ndarray) -> float:
        return float(np.sqrt(np.mean((found - reference) ** 2)))

    assert off(free) > 0.1 and off(held) < 0.7 * off(free)
    masked = Decisions.open(tmp_path / "held").frame
    assert repeats[masked["sample_id"]].mean() > 0.93  # nine in ten, were they random
    assert masked["push"].between(-1, 0).all()
