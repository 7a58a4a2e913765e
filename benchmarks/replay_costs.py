"""Replay scoring against training on the same samples: sequences a second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.interleaved import interleaved, ratio
from benchmarks.models import quickstart_module
from benchmarks.training_step import TrainingSteps
from mda_lightning.gradients import BlockVector
from mda_lightning.influence import replay_scores
from mda_lightning.pretraining import PythiaModule
from mda_lightning.recipes.quickstart import QUICKSTART

Rows = Iterator[tuple[str, tuple[float, float, float]]]


def replay(rounds: int) -> Rows:
    """QK, V and O, one head and all, at the quickstart's shape and at Pythia-14M's with 512.

    Both take the sequences in the same batches. Curvature and probe gradient, which are taken once,
    are not part of it.
    """
    torch.manual_seed(0)
    shapes = {
        "quickstart, 10 x 32 x 128": TrainingSteps(
            quickstart_module(),
            10,
            QUICKSTART.training.batch_size,
            QUICKSTART.corpus.sequence_length,
        ),
        "Pythia-14M, 4 x 512": TrainingSteps(PythiaModule("pythia-14m"), 1, 4, 512),
    }
    for shape, steps in shapes.items():

        def score(vectors: BlockVector, steps: TrainingSteps = steps) -> Tensor:
            return replay_scores(steps.model, vectors, steps.batches).values

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
