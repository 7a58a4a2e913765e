"""A run that is killed or interrupted in its window, and one that runs out of room."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import random
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from window_runs import assert_same_outcome, outcome, run, watching

from mda_lightning.callbacks import checkpoint_ring, checkpoint_writing
from mda_lightning.callbacks.checkpoint_ring import CheckpointRing
from mda_lightning.callbacks.monitor_output import MonitorOutput
from mda_lightning.corpora import TokenRows

SMALL = {"ring": 4, "ring_every": 2}
SAVED_EVERY = 7

# Processes that can be killed are forked from one that has imported everything and run nothing.
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["lightning.pytorch", "transformers", "mda_lightning.callbacks"])


pytestmark = pytest.mark.usefixtures("one_thread")


def train(rows: TokenRows, folder: Path, *more: Any, **settings: Any) -> pl.Trainer:
    """A run that saves the Trainer now and then; it goes on from the newest of those, if any."""
    saver = ModelCheckpoint(
        folder / "saved", "{step}", every_n_train_steps=SAVED_EVERY, save_top_k=-1
    )
    newest = max((folder / "saved").glob("*.ckpt"), key=lambda p: p.stat().st_mtime, default=None)
    return run(
        rows,
        folder,
        [*more, *watching(folder / "run", **SMALL), saver],
        enable_checkpointing=True,
        ckpt_path=newest,
        **settings,
    )


@pytest.fixture(scope="module")
def expected(rows: TokenRows, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the run leaves that nobody stopped; in the end it lies where the others lay."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    train(rows, folder)
    found = outcome(folder / "run")
    folder.rename(folder.with_name("whole"))
    return folder, found


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(pl.Callback):
    """After a step, before the others have acted on it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            die()


def nth_call(owner: Any, name: str, n: int, *, done: bool) -> None:
    """Die in the n-th call of a function, before or after it has done its work."""
    inner, count = getattr(owner, name), 0

    def dying(*args: Any, **settings: Any) -> Any:
        nonlocal count
        count += 1
        if count == n and not done:
            die()
        result = inner(*args, **settings)
        if count == n:
            die()
        return result

    setattr(owner, name, dying)


# What a killed process does; each is one place where it may be hit.
PLACES: dict[str, Callable[[int], list[Any]]] = {
    "at a step": lambda n: [DieAt(n)],
    "writing a checkpoint": lambda n: nth_call(checkpoint_writing, "_rename", n, done=False) or [],
    "a checkpoint written": lambda n: nth_call(checkpoint_writing, "_rename", n, done=True) or [],
    "promoting": lambda n: nth_call(CheckpointRing, "_link", n, done=False) or [],
    "in the middle of a copy": lambda n: copying(n) or [],
    "promoted": lambda n: nth_call(CheckpointRing, "_link", n, done=True) or [],
    "clearing": lambda n: nth_call(CheckpointRing, "clear", n, done=False) or [],
    "cleared": lambda n: nth_call(CheckpointRing, "clear", n, done=True) or [],
}


def copying(n: int) -> None:
    """No links on this disk; the process dies when a copy is half there."""
    checkpoint_ring.os.link = no_link  # type: ignore[attr-defined]

    def half(source: Path, destination: Path) -> None:
        Path(destination).write_bytes(Path(source).read_bytes()[:1000])
        die()

    checkpoint_ring.shutil.copyfile = half  # type: ignore[attr-defined]


def no_link(*_: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def be_killed(rows: Path, folder: Path, place: str, n: int) -> None:
    """The process: a run that is hit."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    MonitorOutput.write = lambda *_, **__: None  # type: ignore[method-assign]
    train(TokenRows.open(rows), folder, *PLACES[place](n))


def in_a_process(rows: TokenRows, folder: Path, place: str, n: int) -> int | None:
    process = CLEAN.Process(target=be_killed, args=(rows.folder, folder, place, n))
    process.start()
    process.join(120)
    return process.exitcode


def hits() -> list[tuple[str, int]]:
    """Two random steps of the window, three of the writings in it, and every place of its end."""
    rng = random.Random(0)
    steps = rng.sample(range(27, 50), 2)
    writings = rng.sample(range(3, 11), 3)
    return [
        *(("at a step", step) for step in steps),
        *(("writing a checkpoint", n) for n in writings),
        ("a checkpoint written", rng.randrange(3, 11)),
        ("promoting", 1),
        ("promoting", 3),
        ("in the middle of a copy", 1),
        ("promoted", 2),
        ("clearing", 2),
        ("cleared", 2),
    ]


@pytest.mark.parametrize(("place", "n"), hits())
def test_killed_and_carried_on(
    rows: TokenRows, expected: Any, monkeypatch: pytest.MonkeyPatch, place: str, n: int
) -> None:
    """SIGKILL; then the newest of the Trainer's own checkpoints: nothing is lost or left over."""
    folder, whole = expected
    monkeypatch.setattr(MonitorOutput, "write", lambda *_, **__: None)
    try:
        assert in_a_process(rows, folder, place, n) == -signal.SIGKILL
        assert (folder / "saved").exists()
        if place == "writing a checkpoint":
            assert list((folder / "run" / "ring").glob(".step-*.part"))
        if place == "in the middle of a copy":
            assert list((folder / "run" / "window").glob(".start-*"))
        train(rows, folder)
        assert_same_outcome(folder / "run", whole, f"{place}, {n}")
        left = sorted(p.name for p in (folder / "run").iterdir() if p.name != "live.html")
        assert left == ["window", "window.json"]
        assert len(list((folder / "run" / "window").iterdir())) == 3
    finally:
        clean(folder)


def clean(folder: Path) -> None:
    for n in range(100):
        if folder.exists() and not folder.with_name(f"gone-{n}").exists():
            folder.rename(folder.with_name(f"gone-{n}"))


def test_the_end_that_was_saved_but_not_promoted(
    rows: TokenRows, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed then, and carried on from the ring's own last checkpoint, it is promoted now."""
    folder, whole = expected
    monkeypatch.setattr(MonitorOutput, "write", lambda *_, **__: None)
    try:
        assert in_a_process(rows, folder, "promoting", 1) == -signal.SIGKILL
        ring = folder / "run" / "ring"
        last = max(ring.glob("step-*.ckpt"), key=lambda p: int(p.stem.removeprefix("step-")))
        assert not (folder / "run" / "window").exists()
        copy = folder / "last.ckpt"
        copy.write_bytes(last.read_bytes())
        run(rows, folder, watching(folder / "run", **SMALL), ckpt_path=copy)
        assert_same_outcome(folder / "run", whole, "from the end")
    finally:
        clean(folder)


# -- interrupted ----------------------------------------------------------------------------------


class Interrupt(pl.Callback):
    """Ctrl-C in a hook of one step."""

    def __init__(self, hook: str, step: int) -> None:
        self.step, self.interrupted = step, False
        setattr(self, hook, self._act)

    def _act(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("hook", "place"),
    [("on_before_optimizer_step", 0), ("on_train_batch_end", 0), ("on_train_batch_end", 9)],
    ids=["before the step", "after the step", "after everything"],
)
def test_interrupted_the_ring_stays_and_the_run_can_go_on(
    rows: TokenRows, expected: Any, monkeypatch: pytest.MonkeyPatch, hook: str, place: int
) -> None:
    """From the checkpoint of the exception, and from the newest other."""
    folder, whole = expected
    monkeypatch.setattr(MonitorOutput, "write", lambda *_, **__: None)
    for i, step in enumerate((30, 41)):
        try:
            callbacks = [
                *watching(folder / "run", **SMALL),
                OnExceptionCheckpoint(folder, "ctrl-c"),
            ]
            callbacks.insert(place, Interrupt(hook, step))
            before = signal.getsignal(signal.SIGINT)
            with pytest.raises(SystemExit):
                train_interrupted(rows, folder, callbacks)
            signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
            assert list((folder / "run" / "ring").glob("step-*.ckpt"))
            if i == 0:
                at = folder / "ctrl-c.ckpt"
                run(rows, folder, watching(folder / "run", **SMALL), ckpt_path=at)
            else:
                train(rows, folder)
            # Lightning counts a batch that was made ready and interrupted; so do its checkpoints.
            where = f"{hook} of {step}"
            assert_same_outcome(folder / "run", whole, where, with_loops=i > 0)
        finally:
            clean(folder)


def train_interrupted(rows: TokenRows, folder: Path, callbacks: list[Any]) -> None:
    saver = ModelCheckpoint(
        folder / "saved", "{step}", every_n_train_steps=SAVED_EVERY, save_top_k=-1
    )
    run(rows, folder, [*callbacks, saver], enable_checkpointing=True)
