"""What scoring a step's own samples adds to the step: time, and memory at the peak."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.interleaved import Timing, interleaved
from benchmarks.models import quickstart_module
from benchmarks.training_step import TrainingSteps
from mda_lightning.pretraining import PythiaModule
from mda_lightning.recipes.quickstart import QUICKSTART
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
        yield from _added(_pythia(length), f"Pythia-14M, {batch} x {length}", rounds)


def quickstart(rounds: int) -> Rows:
    """The same at the quickstart's own shape, ten steps at a time."""
    steps = TrainingSteps(
        quickstart_module(),
        n_steps=10,
        batch=QUICKSTART.training.batch_size,
        length=QUICKSTART.corpus.sequence_length,
    )
    yield from _added(steps, f"quickstart, {steps.batches[0].shape[0]} x 128", rounds)


def _added(steps: TrainingSteps, shape: str, rounds: int) -> Rows:
    one, every = steps.random_vectors([_middle(steps)]), steps.random_vectors(steps.heads)
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
    plain = Timing(
        tuple(
            (a + b) / 2
            for a, b in zip(timings["plain"].seconds, timings["plain again"].seconds, strict=True)
        )
    )
    for name in ("one head", "all heads", "plain again"):
        base = timings["plain"] if name == "plain again" else plain
        added = sorted(
            100 * (a / b - 1) for a, b in zip(timings[name].seconds, base.seconds, strict=True)
        )
        what = "the same step again (noise)" if name == "plain again" else f"scored, {name}"
        yield f"{shape}: {what}, added in %", (statistics.median(added), added[0], added[-1])


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
