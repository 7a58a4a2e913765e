"""What scoring a step's own samples adds to the step: time, and memory at the peak."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks.interleaved import interleaved
from benchmarks.models import quickstart_module
from benchmarks.training_step import TrainingSteps
from mda_lightning.architectures import HEAD_BLOCKS, BlockName
from mda_lightning.pretraining import PythiaModule
from mda_lightning.recipes.studies.quickstart import QUICKSTART
from mda_lightning.units import Head

Rows = Iterator[tuple[str, tuple[float, float, float]]]

#: Length of a sequence, and how many a step has: some seconds a step.
_PYTHIA_STEPS = {512: 4, 2048: 1}


def _pythia(length: int, n_steps: int = 1) -> TrainingSteps:
    torch.manual_seed(0)
    return TrainingSteps(PythiaModule("pythia-14m"), n_steps, _PYTHIA_STEPS[length], length)


def pythia(rounds: int) -> Rows:
    """Pythia-14M's shape, QK, V and O of one head and of all 24.

    The IHVP is random: what is in it costs a step nothing, and its making is not part of a step.
    """
    for length, batch in _PYTHIA_STEPS.items():
        yield from _added(_pythia(length), f"Pythia-14M, {batch} x {length}", HEAD_BLOCKS, rounds)


def quickstart(rounds: int) -> Rows:
    """The same at the quickstart's shape, ten steps at a time, in QK, which its f has."""
    steps = TrainingSteps(
        quickstart_module(),
        n_steps=10,
        batch=QUICKSTART.training.batch_size,
        length=QUICKSTART.corpus.sequence_length,
    )
    shape = f"quickstart, {QUICKSTART.training.batch_size} x {QUICKSTART.corpus.sequence_length}"
    yield from _added(steps, shape, ("QK",), rounds)


def _added(steps: TrainingSteps, shape: str, blocks: Sequence[BlockName], rounds: int) -> Rows:
    """Two rows for one head and two for all: of the step's whole time, and in the scorer's code.

    The first is what is asked; where other processes run, it is a difference of two large numbers
    that vary by more. The second leaves out what scoring may do to caches.
    """
    one = steps.random_vectors([_middle(steps)], blocks)
    every = steps.random_vectors(steps.heads, blocks)
    steps.scoring_seconds.clear()
    timings = interleaved(
        {
            "plain": steps.run,
            "one head": partial(steps.run_scored, one),
            "plain again": steps.run,
            "all heads": partial(steps.run_scored, every),
        },
        rounds=rounds,
        clock=time.process_time,
    )
    # Between two plain steps, so that a drift of the machine does not count for or against.
    pairs = zip(timings["plain"].seconds, timings["plain again"].seconds, strict=True)
    plain = [(a + b) / 2 for a, b in pairs]
    own = {
        "one head": steps.scoring_seconds[2::2],
        "all heads": steps.scoring_seconds[3::2],
    }
    for name in ("one head", "all heads"):
        added = [100 * (a / b - 1) for a, b in zip(timings[name].seconds, plain, strict=True)]
        yield f"{shape}: scored, {name}, added in %", _spread(added)
        within = [100 * a / b for a, b in zip(own[name], plain, strict=True)]
        yield f"{shape}: the scorer's own code, {name}, in % of a step", _spread(within)
    pairs = zip(timings["plain again"].seconds, timings["plain"].seconds, strict=True)
    noise = [100 * (a / b - 1) for a, b in pairs]
    yield f"{shape}: a plain step against another (noise), in %", _spread(noise)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def _middle(steps: TrainingSteps) -> Head:
    return steps.heads[len(steps.heads) // 2]


def memory(rounds: int) -> Rows:
    """Peak resident memory of two steps, each kind in a process of its own, in turn."""
    for length, batch in _PYTHIA_STEPS.items():
        peaks: dict[str, list[float]] = {"plain": [], "one": [], "all": []}
        for _ in range(rounds):
            for name, found in peaks.items():
                command = [sys.executable, "-m", "benchmarks.in_run_costs", name, str(length)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found.append(float(done.stdout.splitlines()[-1]))
        for name in ("one", "all"):
            ratios = sorted(a / b for a, b in zip(peaks[name], peaks["plain"], strict=True))
            heads = "one head" if name == "one" else "all heads"
            yield (
                f"Pythia-14M, {batch} x {length}: peak memory scored / plain, {heads}",
                (statistics.median(ratios), ratios[0], ratios[-1]),
            )
        plain = sorted(peaks["plain"])
        yield (
            f"Pythia-14M, {batch} x {length}: peak memory plain, in GiB",
            (statistics.median(plain), plain[0], plain[-1]),
        )


def _peak(kind: str, length: int) -> float:
    """GiB at the peak of two steps."""
    torch.set_num_threads(1)
    steps = _pythia(length, n_steps=2)
    if kind == "plain":
        steps.run()
    else:
        units = steps.heads if kind == "all" else [_middle(steps)]
        steps.run_scored(steps.random_vectors(units))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    print(_peak(sys.argv[1], int(sys.argv[2])))
