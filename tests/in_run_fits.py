"""Fits at learning rate 0, where in-run scores must be those of replay at the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from models import random_neox
from torch import Tensor
from training import MODEL_VOCABULARY, Rows, StrangersModule, fit

from mda_lightning.callbacks import InfluenceScoring
from mda_lightning.gradients import BlockVector
from mda_lightning.influence import replay_scores
from mda_lightning.influence.inverse_probes import CurvatureSettings, inverse_probes
from mda_lightning.mechanisms import Mechanism, mechanism
from mda_lightning.store import ScoreTable
from mda_lightning.units import Head

INDUCTION = mechanism(
    "induction", n_sequences=4, n_probe_sequences=6, probe_function="copy_logprob"
)
UNITS = ["L0H0", "L1H1"]
HEADS = [Head(0, 0), Head(1, 1)]


class StillModule(StrangersModule):
    """Learning rate 0; checkpointed or compiled as asked for."""

    def __init__(
        self,
        *,
        reduction: str = "mean",
        checkpoint: bool | None = None,
        backend: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.reduction = reduction
        model = self.net["lm"]
        if checkpoint is not None:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": checkpoint}
            )
        if backend is not None:
            model.compile(backend=backend)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        tokens = batch["tokens"]
        logits = self.net["lm"](input_ids=tokens[:, :-1], use_cache=False).logits.float()
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        if self.reduction == "sum":
            return each.sum()
        weight = batch.get("weight", torch.ones(len(tokens)))
        return (each.mean(1) * weight).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class MovingModule(StillModule):
    """The same, training."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Weighted(Rows):
    """Weights from the second batch of four on, some of them 0."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        return super().__getitem__(i) | {"weight": [0.0, 1.0, 0.5, 1.0][i % 4] if i > 3 else 1.0}


def ihvp_of(
    model: Any, heads: list[Head], batches: list[Tensor], one: Mechanism = INDUCTION
) -> BlockVector:
    """(H + λ)⁻¹∇f at a model's weights."""
    return inverse_probes(model, {"f": one}, heads, batches, CurvatureSettings()).ihvps["f"]


def expected_scores(
    tokens: Tensor,
    curvature: Tensor,
    one: Mechanism = INDUCTION,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """Replay's values [N, U, K] and losses [N]."""
    model = random_neox(seed=0, vocab_size=MODEL_VOCABULARY, dtype=dtype)
    ihvp = ihvp_of(model, HEADS, [curvature], one)
    scores = replay_scores(model, ihvp, [tokens])
    return scores.values.numpy(), scores.loss.numpy()


def scoring(mechanisms: Any = INDUCTION, **settings: Any) -> InfluenceScoring:
    defaults = {"active": "always", "units": UNITS, "n_curvature": 4, "refresh_every": 1000}
    return InfluenceScoring(mechanisms, **(defaults | settings))


def score(
    folder: Path, module: pl.LightningModule, callback: InfluenceScoring, **trainer: Any
) -> ScoreTable:
    """Fit, and open the table."""
    fit(module, [callback], folder, **trainer)
    return ScoreTable.open(folder / "mda" / "scores")


def values_of(table: ScoreTable) -> np.ndarray:
    """[N, U, K] in the order of the table."""
    frames = [table.frame(unit) for unit in table.units]
    return np.stack([f[list(table.blocks)].to_numpy() for f in frames], 1)


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """To ``tolerance`` of the largest."""
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
