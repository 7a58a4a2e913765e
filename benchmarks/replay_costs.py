"""Replay scoring against training on the same samples: sequences a second."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.interleaved import interleaved, ratio
from benchmarks.models import quickstart_module
from benchmarks.training_step import TrainingSteps
from mda_lightning.gradients import BlockVector
from mda_lightning.influence import replay_scores
from mda_lightning.pretraining import PythiaModule
from mda_lightning.recipes.studies.quickstart import QUICKSTART

Rows = Iterator[tuple[str, tuple[float, float, float]]]


def replay(rounds: int) -> Rows:
    """QK, V and O, one head and all, at the quickstart's shape and at Pythia-14M's with 512.

    Training takes the quickstart's batch, or 4 of 512; scoring 4,096 or 2,048 tokens at once.
    Curvature and probe gradient, which are taken once, are not part of it.
    """
    torch.manual_seed(0)
    batch, length = QUICKSTART.training.batch_size, QUICKSTART.corpus.sequence_length
    shapes = {
        f"quickstart, {batch} x {length}": (
            TrainingSteps(quickstart_module(), 20, batch, length),
            32,
        ),
        "Pythia-14M, 4 x 512": (TrainingSteps(PythiaModule("pythia-14m"), 1, 4, 512), 4),
    }
    for shape, (steps, at_once) in shapes.items():
        tokens = torch.cat(list(steps.batches))

        def score(
            vectors: BlockVector,
            model: PreTrainedModel = steps.model,
            batches: Sequence[Tensor] = tokens.split(at_once),
        ) -> Tensor:
            return replay_scores(model, vectors, batches).values

        middle = steps.heads[len(steps.heads) // 2]
        timings = interleaved(
            {
                "training": steps.run,
                "one head": partial(score, steps.random_vectors([middle])),
                "all heads": partial(score, steps.random_vectors(steps.heads)),
            },
            rounds=rounds,
            clock=time.process_time,
        )
        for name in ("one head", "all heads"):
            yield (
                f"{shape}: replay throughput / training throughput, {name}",
                ratio(timings["training"], timings[name]),
            )
