"""What watching costs: time beside training, and memory at the peak."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPTNeoXForCausalLM

from benchmarks.interleaved import Timing, interleaved, ratio
from benchmarks.models import pythia_14m
from mda_lightning.callbacks import CriticalWindow, UnitMonitor
from mda_lightning.callbacks.probe_scope import probe_scope
from mda_lightning.corpora import TokenRows
from mda_lightning.measures import measure
from mda_lightning.pretraining import PythiaModule
from mda_lightning.pretraining.loss import sequence_losses, weighted_loss
from mda_lightning.recipes.studies.building import build_data, build_module, build_monitor
from mda_lightning.recipes.studies.quickstart import QUICKSTART, quickstart_corpus

Rows = Iterator[tuple[str, tuple[float, float, float]]]

#: Pythia's batch: 1,024 sequences of 2,048 tokens.
_TOKENS_A_STEP = 1024 * 2048
_CONTEXT = 2048
#: Steps of the quickstart's base run with seed 0, to its window's end.
_BASE_STEPS = 4360


def _random_rows(n: int, length: int, vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, vocabulary, (n, length), generator=generator)


def pythia_step(model: GPTNeoXForCausalLM | None = None) -> tuple[Callable[[], None], float]:
    """Forward and backward of one sequence of 2,048 tokens, and which part of a step that is."""
    model = model or pythia_14m()
    tokens = _random_rows(1, _CONTEXT + 1, 50_000)

    def train() -> None:
        model.train()
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        weighted_loss(sequence_losses(logits, tokens[:, 1:]), None, normalize="batch").backward()
        model.zero_grad(set_to_none=True)

    return train, _CONTEXT / _TOKENS_A_STEP


def pythia(rounds: int) -> Rows:
    """Pythia-14M's shape: measurements against a step of 2.1M tokens.

    The step is too long to run: its time is that of forward and backward of one sequence of 2,048
    tokens, times 1,024. The optimizer's update is left out, which makes the share greater.
    """
    model = pythia_14m()
    train, a_step = pythia_step(model)

    measures = {
        "induction": measure("induction"),
        "previous_token": measure("previous_token"),
        "ablation": measure("ablation"),
        "icl": measure("icl", text=_random_rows(128, 513, 50_000)),
    }

    def take(name: str) -> None:
        with probe_scope(model):
            measures[name].measure(model)

    timings = interleaved(
        {"train": train, **{name: partial(take, name) for name in measures}}, rounds=rounds
    )
    step = _scaled(timings["train"], 1 / a_step)
    for name in measures:
        median, low, high = ratio(timings[name], step)
        yield f"{name}, one measurement / one step, in %", (100 * median, 100 * low, 100 * high)
    own = ("induction", "previous_token", "ablation")
    share = Timing(
        tuple(
            (sum(timings[name].seconds[i] for name in own) / 10 + timings["icl"].seconds[i] / 100)
            for i in range(rounds)
        )
    )
    median, low, high = ratio(share, step)
    yield (
        "all heads every 10 steps, ICL every 100 / training, in %",
        (100 * median, 100 * low, 100 * high),
    )


def _scaled(timing: Timing, factor: float) -> Timing:
    return Timing(tuple(seconds * factor for seconds in timing.seconds))


def quickstart(rounds: int) -> Rows:
    """The quickstart's base run of seed 0 to its window's end, watched as it is and not watched.

    Each is some minutes of one thread; the process's own time is counted. The number of samples
    and the order are those of the quickstart, the corpus too.
    """
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        rows = quickstart_corpus(Path(place))

        def watched() -> None:
            began = time.perf_counter()
            monitor = _fit(rows, Path(place, "watched"), watched=True)
            assert monitor is not None
            shares.append(100 * monitor.measuring_seconds / (time.perf_counter() - began))

        timings = interleaved(
            {"plain": partial(_fit, rows, Path(place, "plain"), watched=False), "watched": watched},
            rounds=rounds,
            clock=time.process_time,
        )
    added = sorted(
        100 * (a / b - 1)
        for a, b in zip(timings["watched"].seconds, timings["plain"].seconds, strict=True)
    )
    yield (
        f"quickstart, {_BASE_STEPS} steps: added by monitor, window, files and page, in %",
        (added[len(added) // 2], added[0], added[-1]),
    )
    measuring = sorted(shares[1:])
    yield (
        "quickstart: share of the watched run spent on measuring, in %",
        (measuring[len(measuring) // 2], measuring[0], measuring[-1]),
    )


def _fit(rows: TokenRows, folder: Path, *, watched: bool) -> UnitMonitor | None:
    monitor = None
    callbacks: list[pl.Callback] = []
    if watched:
        shutil.rmtree(folder, ignore_errors=True)
        quiet = QUICKSTART.monitor.quiet_every_n_steps
        monitor = build_monitor(QUICKSTART, rows, folder, quiet_every_n_steps=quiet)
        callbacks = [monitor, CriticalWindow("induction", folder=str(folder))]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=_BASE_STEPS,
        logger=pl.loggers.CSVLogger(str(folder), name="", version="csv"),
        callbacks=callbacks,
        log_every_n_steps=50,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(build_module(QUICKSTART, rows, 0), datamodule=build_data(QUICKSTART, rows, 0))
    return monitor


def memory(rounds: int) -> Rows:
    """Peak resident memory of a fit at sequence 2,048, each in a process of its own."""
    peaks: dict[str, list[float]] = {"plain": [], "watched": []}
    for _ in range(rounds):
        for name, found in peaks.items():
            command = [sys.executable, "-m", "benchmarks.monitoring_costs", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(float(done.stdout.splitlines()[-1]))
    ratios = sorted(a / b for a, b in zip(peaks["watched"], peaks["plain"], strict=True))
    yield (
        "Pythia-14M, 2 x 2,048 tokens: peak memory watched / not watched",
        (ratios[len(ratios) // 2], ratios[0], ratios[-1]),
    )
    plain = sorted(peaks["plain"])
    yield (
        "Pythia-14M, 2 x 2,048 tokens: peak not watched, in GiB",
        (plain[len(plain) // 2], plain[0], plain[-1]),
    )


def _peak(watched: bool) -> float:
    """GiB at the peak of four steps, each measured in full where it is watched."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[pl.Callback] = []
        if watched:
            text = _random_rows(16, 513, 50_000)
            measures = ["ablation", "copying", measure("icl", text=text, every_n_steps=1)]
            callbacks = [UnitMonitor(measures=measures, every_n_steps=1, folder=folder)]
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=4,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        data = DataLoader(_random_rows(8, _CONTEXT + 1, 50_000), batch_size=2)  # type: ignore[arg-type]
        trainer.fit(PythiaModule("pythia-14m", total_steps=4), data)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    print(_peak(sys.argv[1] == "watched"))
