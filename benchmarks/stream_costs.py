"""What the training stream costs: reading it, writing its ledger, plans over many scores."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.interleaved import Timing, interleaved, ratio
from benchmarks.models import pythia_14m, quickstart_model, random_tokens
from mda_lightning.base_order import BaseOrder
from mda_lightning.corpora import TokenRows
from mda_lightning.datamodules import TokenDataModule
from mda_lightning.interventions import Plan
from mda_lightning.interventions.from_scores import plan_from_scores
from mda_lightning.pretraining.loss import sequence_losses
from mda_lightning.schedule.ledger_parts import LedgerParts
from mda_lightning.schedule.ledger_rows import Share
from mda_lightning.store import ScoreTable

Rows = Iterator[tuple[str, tuple[float, float, float]]]


def stream(rounds: int) -> Rows:
    """The stream's own time against forward and backward of the samples that it gives; CPU time.

    Loading in the training process, a tenth of the samples masked and as many inserted. The step is
    not run whole: its forward and backward are those of a few sequences, times as many as it has.
    """
    for name, model, batch, length, n_run in (
        ("Pythia-14M, 1024 x 2048", pythia_14m(), 1024, 2048, 1),
        ("quickstart, 8 x 128", quickstart_model(), 8, 128, 8),
    ):
        n_steps = 4 if batch > 100 else 400
        model.train()
        with tempfile.TemporaryDirectory() as folder:
            data = _data(Path(folder), batch, length, n_steps, model.config.vocab_size)
            tokens = random_tokens(n_run, length, min(500, model.config.vocab_size))
            timed = interleaved(
                {
                    "step": lambda model=model, tokens=tokens: _forward_backward(model, tokens),
                    "stream": lambda data=data: [None for _ in data.train_dataloader()],
                    "ledger": lambda data=data, at=folder: _ledger(data, Path(at) / "ledger"),
                },
                rounds=rounds,
                clock=time.process_time,
            )
        whole = Timing(tuple(s * batch / n_run * n_steps for s in timed["step"].seconds))
        pairs = zip(timed["stream"].seconds, timed["ledger"].seconds, strict=True)
        both = Timing(tuple(map(sum, pairs)))
        for what, one in (("stream", timed["stream"]), ("ledger", timed["ledger"]), ("both", both)):
            median, low, high = ratio(one, whole)
            yield f"{name}: {what} / training step, in ppm", (1e6 * median, 1e6 * low, 1e6 * high)
        seconds = sorted(1e6 * s / (batch * n_steps) for s in both.seconds)
        yield f"{name}: both, in us a sample", (seconds[len(seconds) // 2], seconds[0], seconds[-1])


def plans(rounds: int) -> Rows:
    """Opening a table of a million samples, building a plan and its control, saving it; seconds."""
    rng, n = np.random.default_rng(0), 1_000_000
    units = [f"L{layer}H{head}" for layer in range(6) for head in range(4)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ScoreTable.write(
            folder / "scores",
            sample_id=rng.permutation(n),
            step=900 + np.arange(n) // 1024,
            units=units,
            blocks=("QK", "V", "O"),
            values=1e-3 * rng.standard_t(3, (n, len(units), 3)).astype(np.float32),
            loss=rng.normal(3, 0.5, n).astype(np.float32),
            estimator="in_run",
            provenance={},
        )
        made: dict[str, Callable[[], object]] = {
            "mask the top 10% of one head": lambda: _plan(folder, ["L3H3"], "mask"),
            "insert the top 1% of each of 24 heads": lambda: _plan(folder, units, "insert"),
        }
        for what, timing in interleaved(made, rounds=rounds).items():
            seconds = sorted(timing.seconds)
            yield f"1M samples, {what}, in s", (timing.median, seconds[0], seconds[-1])


def pile(rounds: int) -> Rows:
    """A schedule over 146 million samples, in a process that imports nothing else."""
    command = [sys.executable, "-m", "benchmarks.stream_pile"]
    found = []
    for _ in range(rounds):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    for what in found[0]:
        values = sorted(one[what] for one in found)
        yield f"146M samples: {what}", (values[len(values) // 2], values[0], values[-1])


def _data(folder: Path, batch: int, length: int, n_steps: int, vocabulary: int) -> TokenDataModule:
    n = batch * n_steps
    tokens = np.random.default_rng(0).integers(0, min(500, vocabulary), (n, length + 1))
    rows = TokenRows.write(folder / "rows", tokens, vocab_size=vocabulary, provenance={})
    some = np.arange(0, n, 10)
    plan = Plan.mask(some) | Plan.insert(some + 1, steps=(0, n_steps), placement="replace")
    return TokenDataModule(rows, batch_size=batch, n_steps=n_steps, plan=plan)


def _forward_backward(model: torch.nn.Module, tokens: Tensor) -> None:
    for part in tokens.split(8):
        logits = model(input_ids=part[:, :-1], use_cache=False).logits
        sequence_losses(logits, part[:, 1:]).mean().backward()
    model.zero_grad()


def _ledger(data: TokenDataModule, folder: Path) -> None:
    schedule = data.schedule
    size = schedule.order.batch_size
    parts = LedgerParts(folder, schedule.order, Share(size))
    parts.discard_from(0)
    every = 100
    for first in range(0, len(schedule), every):
        last = min(first + every, len(schedule))
        batches = [schedule.batch(step) for step in range(first, last)]
        columns = [np.concatenate(column) for column in zip(*batches, strict=True)]
        parts.add(first, schedule.base_positions(first, last), *columns)
        parts.flush()


def _plan(folder: Path, units: list[str], action: str) -> None:
    plan, control = plan_from_scores(
        folder / "scores",
        units,
        action="mask" if action == "mask" else "insert",
        fraction=0.1 if action == "mask" else 0.01,
        window=(900, 1876),
        order=BaseOrder(1_000_000, 1024, 2000),
        control_seed=0,
    )
    plan.save(folder / "plan.json")
    control.save(folder / "control.json")
