"""A stranger's training script in small, and a mechanism whose scores follow a given curve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from models import random_neox
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mda_lightning.metrics import UnitScores

ROW = 17
VOCABULARY = 40
MODEL_VOCABULARY = 48


class Rows(Dataset):
    """Random token rows with sample ids; the ids are not the row numbers."""

    def __init__(self, n: int, *, seed: int = 0, with_ids: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(1, VOCABULARY, (n, ROW), generator=generator)
        self.with_ids = with_ids

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row: dict[str, Any] = {"tokens": self.tokens[i]}
        return row | ({"sample_id": 1000 + i} if self.with_ids else {})


class StrangersModule(pl.LightningModule):
    """A LightningModule that knows nothing of this package, around a Hugging Face model."""

    def __init__(self, *, freeze: bool = False, dropout: bool = False, compile: bool = False):
        super().__init__()
        self.net = torch.nn.ModuleDict({"lm": random_neox(seed=0, vocab_size=MODEL_VOCABULARY)})
        self.net["lm"].train()
        self.noise = torch.nn.Dropout(0.1 if dropout else 0.0)
        if freeze:
            layer = self.net["lm"].gpt_neox.layers[0]
            layer.requires_grad_(False)
            layer.eval()
        if compile:
            self.net["lm"].compile(backend="eager")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        tokens = batch["tokens"]
        logits = self.noise(self.net["lm"](input_ids=tokens[:, :-1]).logits)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=1e-2)


class Clock(pl.Callback):
    """Tells a :class:`CurveMechanism` what step it is."""

    def __init__(self) -> None:
        self.step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.step = trainer.global_step


class CurveMechanism:
    """Scores [L, H] as a function of the step, whatever the model."""

    name: ClassVar[str] = "curve"
    block_names = ("QK",)
    chance = 0.05

    def __init__(self, clock: Clock, curve: Callable[[int], np.ndarray]) -> None:
        self._clock, self._curve = clock, curve

    def settings(self) -> dict[str, Any]:
        return {"token_ids": None}

    def with_token_ids(self, token_ids: list[int]) -> CurveMechanism:
        return self

    def check(self, model: Any) -> None:
        pass

    def scores(self, model: Any) -> UnitScores:
        mean = torch.as_tensor(self._curve(self._clock.step), dtype=torch.float32)
        return UnitScores(mean, torch.full_like(mean, 0.01))


class FakeMeasure:
    """A number a head and a number of the whole model, as functions of the step."""

    def __init__(
        self,
        clock: Clock,
        *,
        every_n_steps: int | None = None,
        heads: Callable[[int], Any] = lambda step: np.array([[0.0, 1.0], [2.0, -3.0]]) + step,
        whole: Callable[[int], float] = lambda step: 10.0 + step,
    ) -> None:
        self.name = "fake"
        self.every_n_steps = every_n_steps
        self.checked: list[Any] = []
        self._clock, self._heads, self._whole = clock, heads, whole

    def settings(self) -> dict[str, Any]:
        return {"token_ids": None}

    def with_token_ids(self, token_ids: list[int]) -> FakeMeasure:
        return self

    def check(self, model: Any) -> None:
        self.checked.append(type(model).__name__)

    def measure(self, model: Any) -> dict[str, UnitScores]:
        heads = torch.as_tensor(self._heads(self._clock.step), dtype=torch.float32)
        whole = torch.tensor(self._whole(self._clock.step), dtype=torch.float32)
        return {
            "fake/heads": UnitScores(heads, torch.full_like(heads, 0.5)),
            "fake/whole@7": UnitScores(whole, torch.tensor(0.25)),
        }


def jump(
    at: int, *, to: float = 0.6, ramp: int = 40, layers: int = 2, heads: int = 2
) -> Callable[[int], Any]:
    """All heads at chance until L1H1 rises to ``to`` from step ``at`` on, over ``ramp`` steps."""

    def curve(step: int) -> np.ndarray:
        values = np.full((layers, heads), 0.05)
        values[1, 1] += (to - 0.05) * min(max((step - at + 1) / ramp, 0.0), 1.0)
        return values

    return curve


def fit(
    module: pl.LightningModule,
    callbacks: list[pl.Callback],
    folder: Path,
    *,
    data: Any = None,
    ckpt_path: Any = None,
    batch_size: int = 4,
    **trainer_arguments: Any,
) -> pl.Trainer:
    """One quiet single-process fit on the CPU."""
    settings: dict[str, Any] = {
        "max_steps": 12,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }
    trainer = pl.Trainer(callbacks=callbacks, **(settings | trainer_arguments))
    if isinstance(data, pl.LightningDataModule):
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    else:
        loader = DataLoader(Rows(256) if data is None else data, batch_size=batch_size)
        trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def training_state(trainer: pl.Trainer) -> dict[str, Any]:
    """Weights and optimizer state, as they would be saved."""
    return {
        "weights": trainer.lightning_module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
    }


def assert_bit_identical(a: Any, b: Any, where: str = "state") -> None:
    """Every tensor equal under ``torch.equal``, every other value equal."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_bit_identical(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_bit_identical(x, y, f"{where}[{i}]")
    else:
        assert a == b, where
