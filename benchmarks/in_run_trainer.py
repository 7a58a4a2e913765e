"""In-run scoring as a run has it: a Trainer's steps with and without the callback."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, StackDataset

from benchmarks.models import random_tokens
from mda_lightning.callbacks import InfluenceScoring
from mda_lightning.mechanisms import InductionHead
from mda_lightning.pretraining import PythiaModule

Rows = Iterator[tuple[str, tuple[float, float, float]]]

_BATCH, _LENGTH = 4, 512
#: The first two are not counted: curvature and probe gradient are taken between them.
_STEPS = 5


class _Clock(pl.Callback):
    """Seconds of processor time from each batch's end to the next one's: the whole of a step."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.process_time())

    @property
    def seconds(self) -> float:
        """Median of the counted steps."""
        counted = self.marks[1:]
        return statistics.median(later - earlier for earlier, later in itertools.pairwise(counted))


def in_run_trainer(rounds: int) -> Rows:
    """Pythia-14M's shape, 4 x 512: a step with ``InfluenceScoring`` against one without.

    QK, V and O with ``copy_logprob``, scores and losses into the store's shards, in the process's
    own time; refreshes are not counted.
    """
    torch.manual_seed(0)
    kinds = ("plain", "one head", "all heads")
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind in kinds:
            found = _fit(kind)
            if number:
                seconds[kind].append(found)
    for kind in kinds[1:]:
        pairs = zip(seconds[kind], seconds["plain"], strict=True)
        added = sorted(100 * (a / b - 1) for a, b in pairs)
        yield (
            f"Trainer, Pythia-14M, 4 x 512: scored, {kind}, added in %",
            (statistics.median(added), added[0], added[-1]),
        )


def _fit(kind: str) -> float:
    tokens = random_tokens(_BATCH * _STEPS, _LENGTH, 50_000)
    data: Any = StackDataset(tokens=tokens, sample_id=torch.arange(len(tokens)))
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callbacks: list[pl.Callback] = [clock]
        if kind != "plain":
            callbacks.append(
                InfluenceScoring(
                    InductionHead(probe_function="copy_logprob", token_ids=tuple(range(2, 50_000))),
                    active="always",
                    units="all" if kind == "all heads" else ["L3H3"],
                    refresh_every=10_000,
                    n_curvature=_BATCH,
                    curvature="identity",
                    folder=folder,
                )
            )
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=_STEPS,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        module = PythiaModule("pythia-14m", total_steps=_STEPS)
        trainer.fit(module, DataLoader(data, batch_size=_BATCH))
    return clock.seconds
