"""Peak memory of fitting and scoring Pythia-160M's shape with sequences of 2,048."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator

import torch

from benchmarks.models import pythia_160m, random_tokens
from mda_lightning.architectures import describe
from mda_lightning.influence import fit_and_score
from mda_lightning.mechanisms import InductionHead

Rows = Iterator[tuple[str, tuple[float, float, float]]]

_SEQUENCES = 2
#: Bytes for gradients that are kept for a second look.
_MEMORY = 2**30


def memory_160m(rounds: int) -> Rows:
    """All 144 heads, ``copy_logprob``, sampled Fisher, two sequences, in a process of its own.

    Once, whatever the number of rounds: it takes minutes, and no clock is in it.
    """
    del rounds
    command = [sys.executable, "-m", "benchmarks.scoring_memory"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    before, peak = (float(value) for value in done.stdout.splitlines()[-1].split())
    yield "Pythia-160M, 2 x 2,048, all heads: with the model loaded, in GiB", (before,) * 3
    yield "Pythia-160M, 2 x 2,048, all heads: peak of fit and score, in GiB", (peak,) * 3


def _resident() -> float:
    """GiB at the process's peak so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _run() -> tuple[float, float]:
    torch.set_num_threads(1)
    model = pythia_160m()
    before = _resident()
    mechanism = InductionHead(probe_function="copy_logprob", token_ids=tuple(range(2, 50_000)))
    tokens = random_tokens(_SEQUENCES, 2048, 50_000)
    _, found = fit_and_score(
        model, {"": mechanism}, describe(model).heads, tokens.split(1), memory=_MEMORY
    )
    assert torch.isfinite(found[""].values).all()
    return before, _resident()


if __name__ == "__main__":
    print(*_run())
