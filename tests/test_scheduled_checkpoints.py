"""ScheduledCheckpoints: what is saved when, resumed exactly, lost without harm, read afterwards."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy
from training import Rows, StrangersModule, assert_bit_identical, fit, training_state

from mda_lightning.callbacks import ScheduledCheckpoints
from mda_lightning.callbacks.attachment import UnsupportedTrainerError
from mda_lightning.callbacks.checkpoint_writing import check_checkpointing, write_checkpoint
from mda_lightning.checkpoint_steps import CheckpointSteps
from mda_lightning.cli import EXIT_ERROR, main
from mda_lightning.corpora import TokenRows
from mda_lightning.datamodules import TokenDataModule
from mda_lightning.influence import weights_hash
from mda_lightning.pretraining import PythiaModule

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
N_STEPS = 12


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rows(tmp_path: Path) -> TokenRows:
    tokens = np.random.default_rng(0).integers(2, 60, (200, 17))
    return TokenRows.write(tmp_path / "rows", tokens, provenance={})


def train(
    rows: TokenRows,
    folder: Path,
    *callbacks: pl.Callback,
    max_steps: int = N_STEPS,
    **settings: Any,
) -> pl.Trainer:
    """A run of PythiaModule in the order of a schedule."""
    pl.seed_everything(3, verbose=False)
    module = PythiaModule(
        SIZE, vocab_size=60, seq_len=16, total_steps=N_STEPS, warmup_steps=3, learning_rate=1e-2
    )
    return fit(
        module,
        list(callbacks),
        folder,
        data=TokenDataModule(rows, batch_size=4, n_steps=N_STEPS, seed=1),
        max_steps=max_steps,
        use_distributed_sampler=False,
        **settings,
    )


def saved_in(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "mda" / "checkpoints").iterdir())


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "mda" / "checkpoints" / "checkpoints.json").read_text())


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "mda" / "checkpoints" / f"step-{step}.ckpt"


class Weights(pl.Callback):
    """The weights after every optimizer step."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, torch.Tensor]] = {}

    def _take(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        state = module.state_dict().items()
        self.after.setdefault(trainer.global_step, {k: v.clone() for k, v in state})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._take(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        self._take(trainer, pl_module)


# -- what is saved, and when ----------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("weights_only", [False, True])
def test_every_due_step_is_saved_with_its_own_weights(
    tmp_path: Path, rows: TokenRows, accumulate: int, weights_only: bool
) -> None:
    seen = Weights()
    saving = ScheduledCheckpoints("0, log2..4, every 3 in 5..10", weights_only=weights_only)
    train(rows, tmp_path, seen, saving, accumulate_grad_batches=accumulate)
    due = [0, 1, 2, 4, 5, 8]
    assert sorted(saved_in(tmp_path)) == sorted(
        ["checkpoints.json", *(f"step-{step}.ckpt" for step in due)]
    )
    assert saving.checkpoints == {step: checkpoint(tmp_path, step) for step in due}
    for step in due:
        content = torch.load(checkpoint(tmp_path, step), weights_only=True)
        assert content["global_step"] == step
        assert_bit_identical(dict(content["state_dict"]), seen.after[step], str(step))
        assert ("optimizer_states" in content) != weights_only
        assert ("callbacks" in content) != weights_only
    index = index_of(tmp_path)
    assert (index["kind"], index["schema_version"]) == ("checkpoints", 1)
    assert (index["written"], index["lost"], index["passed"]) == (due, [], [])
    assert CheckpointSteps.parse(index["schedule"]) == saving.steps
    assert index["weights_only"] is weights_only
    assert set(index["provenance"]["versions"]) == {"mda_lightning", "torch", "lightning"}


def test_weights_alone_are_a_third(tmp_path: Path, rows: TokenRows) -> None:
    """AdamW keeps two numbers a weight; what else is in a file is the same few kilobytes."""

    def size(folder: Path, weights_only: bool) -> int:
        train(rows, folder, ScheduledCheckpoints("3", weights_only=weights_only), max_steps=3)
        return checkpoint(folder, 3).stat().st_size

    n_bytes = sum(p.numel() * 4 for p in PythiaModule(SIZE, vocab_size=60).parameters())
    full, small = size(tmp_path / "full", False), size(tmp_path / "small", True)
    assert full - small > 2 * n_bytes and small < 0.6 * full


def test_it_is_saved_where_asked(tmp_path: Path, rows: TokenRows) -> None:
    saving = ScheduledCheckpoints([1, "every 2 in 2..2"], folder=str(tmp_path / "run"))
    train(rows, tmp_path / "elsewhere", saving, max_steps=3)
    assert (tmp_path / "run" / "checkpoints" / "step-2.ckpt").exists()
    assert not (tmp_path / "elsewhere" / "mda" / "checkpoints").exists()


def test_the_last_step_is_saved_where_it_is_asked_for(tmp_path: Path, rows: TokenRows) -> None:
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 7

    for name, text, callbacks in [
        ("stopped", "2, last", [Stops()]),
        ("due as well", "2, 12, last", []),
        ("alone", "last", []),
        ("not asked", "2", []),
    ]:
        train(rows, tmp_path / name, *callbacks, ScheduledCheckpoints(text))
    found = {p.name: index_of(p)["written"] for p in tmp_path.iterdir() if (p / "mda").exists()}
    assert found == {"stopped": [2, 7], "due as well": [2, 12], "alone": [12], "not asked": [2]}


def test_where_the_step_jumps_the_next_one_is_saved(tmp_path: Path) -> None:
    """Two optimizers: ``global_step`` goes 2, 4, 6, ..."""

    class TwoOptimizers(StrangersModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            parameters = list(self.parameters())
            return [torch.optim.SGD(half, lr=0.01) for half in (parameters[:5], parameters[5:])]

    fit(TwoOptimizers(), [ScheduledCheckpoints("3, 6, every 5 in 7..")], tmp_path, max_steps=14)
    assert index_of(tmp_path)["written"] == [4, 6, 8, 12]
    for step in (4, 6, 8, 12):
        assert torch.load(checkpoint(tmp_path, step), weights_only=True)["global_step"] == step


def test_a_rehearsal_saves_nothing(tmp_path: Path) -> None:
    fit(StrangersModule(), [ScheduledCheckpoints("0, every 1, last")], tmp_path, fast_dev_run=3)
    assert not (tmp_path / "mda").exists()


@pytest.mark.parametrize(
    ("text", "warns"), [("every 13", True), ("12, 500", False), ("last", False)]
)
def test_a_schedule_that_lies_beyond_the_run_warns(
    tmp_path: Path, rows: TokenRows, text: str, warns: bool
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(rows, tmp_path, ScheduledCheckpoints(text))
    said = [str(one.message) for one in caught if "saves nothing" in str(one.message)]
    assert len(said) == warns
    if warns:
        assert "its first step is 13, and the Trainer stops at max_steps=12" in said[0]


# -- going on from them ---------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_resumes_exactly_from_every_one(
    tmp_path: Path, rows: TokenRows, accumulate: int
) -> None:
    """Weights, optimizer and learning rate: those of the run that never stopped.

    From step 0 too, from the last step of a shorter run, and from one that a resumed run saved
    where it began, in a folder of its own.
    """
    settings = {"accumulate_grad_batches": accumulate}
    whole = train(rows, tmp_path / "whole", ScheduledCheckpoints("0, 3, 4, 9"), **settings)
    shorter = ScheduledCheckpoints("last")
    train(rows, tmp_path / "shorter", shorter, max_steps=7, **settings)
    steps = {0: "whole", 3: "whole", 4: "whole", 9: "whole", 7: "shorter"}
    for step, name in steps.items():
        folder = tmp_path / f"from-{step}"
        saving = ScheduledCheckpoints("0, 3, 4, 7, 9")
        with pytest.warns(UserWarning, match="this one writes to"):
            again = train(
                rows, folder, saving, ckpt_path=checkpoint(tmp_path / name, step), **settings
            )
        assert again.global_step == N_STEPS
        assert_bit_identical(training_state(again), training_state(whole), str(step))
        schedulers = [
            [config.scheduler.state_dict()["last_epoch"] for config in run.lr_scheduler_configs]
            for run in (again, whole)
        ]
        assert schedulers[0] == schedulers[1]
        assert step in saving.checkpoints, "a folder of its own begins with where the run began"
        twice = train(rows, tmp_path / "twice", ckpt_path=checkpoint(folder, step), **settings)
        assert_bit_identical(training_state(twice), training_state(whole), f"{step} again")


@pytest.mark.parametrize("stop_at", [5, 6])
def test_stopped_and_resumed_the_folder_is_that_of_the_whole_run(
    tmp_path: Path, rows: TokenRows, stop_at: int
) -> None:
    """Nothing that was there is written again; what comes after is the same bit for bit."""
    text = "0, every 3, last"
    train(rows, tmp_path / "whole", ScheduledCheckpoints(text))
    cut = tmp_path / "cut"
    ending = ScheduledCheckpoints(CheckpointSteps.at(stop_at), folder=str(tmp_path / "end"))
    train(rows, cut, ScheduledCheckpoints("0, every 3"), ending, max_steps=stop_at)
    before = {p.name: p.stat().st_mtime_ns for p in (cut / "mda" / "checkpoints").glob("*.ckpt")}
    assert len(before) == 1 + stop_at // 3
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ScheduledCheckpoints|.*no past of this run")
        train(
            rows,
            cut,
            ScheduledCheckpoints(text),
            ckpt_path=tmp_path / "end" / "checkpoints" / f"step-{stop_at}.ckpt",
        )
    assert index_of(cut) == index_of(tmp_path / "whole")
    assert saved_in(cut) == saved_in(tmp_path / "whole")
    for name, written_at in before.items():
        assert (cut / "mda" / "checkpoints" / name).stat().st_mtime_ns == written_at, name
    for step in (0, 3, 6, 9, 12):
        one, other = (
            torch.load(checkpoint(folder, step), weights_only=True)
            for folder in (cut, tmp_path / "whole")
        )
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            assert_bit_identical(one[key], other[key], key)


def test_steps_that_have_passed_and_files_of_another_run_are_not_claimed(
    tmp_path: Path, rows: TokenRows
) -> None:
    """Added to a run at step 6, in a folder where another run has left files."""
    train(rows, tmp_path / "base", ScheduledCheckpoints("6"))
    run = tmp_path / "run"
    train(rows, run, ScheduledCheckpoints("4, 8, 11"))
    foreign = checkpoint(run, 4).read_bytes(), checkpoint(run, 8).read_bytes()
    start = torch.load(checkpoint(tmp_path / "base", 6), weights_only=True)
    start["callbacks"].clear()
    torch.save(start, tmp_path / "start.ckpt")
    saving = ScheduledCheckpoints("every 2")
    with pytest.warns(UserWarning, match=r"goes on from step 6: of step 4, 8, 11\. Those"):
        train(rows, run, saving, ckpt_path=tmp_path / "start.ckpt")
    index = index_of(run)
    assert (index["written"], index["passed"]) == ([6, 8, 10, 12], [2, 4])
    assert sorted(saving.checkpoints) == [6, 8, 10, 12]
    assert checkpoint(run, 4).read_bytes() == foreign[0]
    assert checkpoint(run, 8).read_bytes() != foreign[1], "step 8 is this run's own now"


def test_going_back_takes_back_what_comes_later(tmp_path: Path, rows: TokenRows) -> None:
    """From step 4 of a run of 12, to step 6: steps 8 and 12 on disk are not of this run."""
    train(rows, tmp_path, ScheduledCheckpoints("every 4"))
    with pytest.warns(UserWarning, match="of step 8, 12"):
        train(
            rows,
            tmp_path,
            ScheduledCheckpoints("every 4"),
            ckpt_path=checkpoint(tmp_path, 4),
            max_steps=6,
        )
    assert index_of(tmp_path)["written"] == [4]


def test_one_trainer_that_goes_back_forgets_what_came_later(
    tmp_path: Path, rows: TokenRows
) -> None:
    """To a checkpoint that knows nothing of the callback, so that its state is not replaced."""
    known = []

    class Looks(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            known.append((trainer.global_step, list(saving.checkpoints)))

    saving = ScheduledCheckpoints("every 4")
    trainer = train(rows, tmp_path, saving, Looks())
    content = torch.load(checkpoint(tmp_path, 4), weights_only=True)
    content["callbacks"].clear()
    torch.save(content, tmp_path / "start.ckpt")
    known.clear()
    with pytest.warns(UserWarning, match="of step 8, 12"):
        trainer.fit(
            trainer.lightning_module,
            datamodule=trainer.datamodule,
            ckpt_path=tmp_path / "start.ckpt",
        )
    assert known == [(step, [4] if step < 8 else [4, 8]) for step in range(4, 12)]


def test_weights_alone_are_no_checkpoint_to_go_on_from(tmp_path: Path, rows: TokenRows) -> None:
    train(rows, tmp_path, ScheduledCheckpoints("3", weights_only=True), max_steps=3)
    with pytest.raises(KeyError, match="only the model"):
        train(rows, tmp_path / "again", ckpt_path=checkpoint(tmp_path, 3))


# -- what cannot be written -----------------------------------------------------------------------


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond ``n_bytes``: as on a full disk, the write fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


class Full(pl.Callback):
    """The disk is full (on rank 0) for what another callback does after some steps.

    That one, called here, has then acted, and does not act again in its own turn.
    """

    def __init__(self, inner: ScheduledCheckpoints, steps: set[int], n_bytes: int = 4096) -> None:
        self.inner, self.steps, self.n_bytes = inner, steps, n_bytes

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        if trainer.global_step in self.steps and trainer.is_global_zero:
            with file_size_limit(self.n_bytes):
                self.inner.on_train_batch_end(trainer, *rest)


def files_under(*folders: Path) -> list[str]:
    return sorted(str(p) for folder in folders for p in folder.rglob("*") if p.is_file())


class StraightToFile(TorchCheckpointIO):
    """A plugin that lets torch write the file; its zip writer raises no OSError."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        torch.save(checkpoint, path)


@pytest.mark.parametrize("plugin", [None, StraightToFile], ids=["lightning", "torch"])
def test_a_full_disk_loses_checkpoints_and_nothing_else(
    tmp_path: Path, rows: TokenRows, monkeypatch: pytest.MonkeyPatch, plugin: Any
) -> None:
    """The system refuses the write (EFBIG) at steps 4 and 6, and not before and after."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    settings = {"plugins": [plugin()]} if plugin else {}
    without = train(rows, tmp_path / "without")
    saving = ScheduledCheckpoints("every 2")
    run = tmp_path / "run"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train(rows, run, Full(saving, {4, 6}), saving, **settings)
    said = [str(one.message) for one in caught if "could not be written" in str(one.message)]
    assert len(said) == 1 and "the checkpoint of step 4 could not be written" in said[0]
    reason = os.strerror(errno.EFBIG) if plugin is None else "inline_container.cc"
    assert reason in said[0]
    assert_bit_identical(training_state(trainer), training_state(without))
    assert saving.lost == [4, 6]
    # The index is small enough to be written all the same.
    index = index_of(run)
    assert (index["written"], index["lost"]) == ([2, 8, 10, 12], [4, 6])
    assert saved_in(run) == sorted(
        ["checkpoints.json", *(f"step-{step}.ckpt" for step in (2, 8, 10, 12))]
    )
    assert files_under(tmp_path / "temporary") == []
    state = torch.load(checkpoint(run, 8), weights_only=True)["callbacks"][saving.state_key]
    assert (state["written"], state["lost"]) == ([2, 8], [4, 6])
    again = train(rows, tmp_path / "again", ckpt_path=checkpoint(run, 8))
    assert_bit_identical(training_state(again), training_state(without))


def test_without_room_for_the_index_either_one_warning_is_enough(
    tmp_path: Path, rows: TokenRows
) -> None:
    saving = ScheduledCheckpoints("every 2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(rows, tmp_path, Full(saving, {4, 6}, n_bytes=16), saving)
    said = [str(one.message) for one in caught if "could not be written" in str(one.message)]
    assert len(said) == 1 and saving.lost == [4, 6]
    assert index_of(tmp_path)["lost"] == [4, 6], "written once there is room"


def test_what_stands_in_the_way_is_told(tmp_path: Path, rows: TokenRows) -> None:
    (tmp_path / "run").write_text("a file where the run's folder would be")
    saving = ScheduledCheckpoints("0, every 3", folder=str(tmp_path / "run"))
    with pytest.warns(UserWarning, match="step 0 could not be written"):
        trainer = train(rows, tmp_path, saving)
    assert trainer.global_step == N_STEPS and saving.lost == [0, 3, 6, 9, 12]
    # A folder where one checkpoint would be.
    checkpoint(tmp_path, 6).mkdir(parents=True)
    (checkpoint(tmp_path, 6) / "kept").write_text("")
    saving = ScheduledCheckpoints("every 3")
    with pytest.warns(UserWarning) as caught:
        train(rows, tmp_path, saving)
    assert any("step 6 could not be written" in str(one.message) for one in caught)
    assert saving.lost == [6] and (checkpoint(tmp_path, 6) / "kept").exists()
    assert not [path for path in files_under(tmp_path) if ".part" in path]


def test_a_folder_without_permission_is_told(tmp_path: Path, rows: TokenRows) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    saving = ScheduledCheckpoints("every 6", folder=str(tmp_path / "run"))
    with pytest.warns(UserWarning, match="step 6 could not be written.*Permission denied"):
        train(rows, tmp_path, saving)
    assert saving.lost == [6, 12]


def test_other_errors_are_no_lost_checkpoints(tmp_path: Path, rows: TokenRows) -> None:
    class Breaks(pl.Callback):
        def on_save_checkpoint(self, *_: Any) -> None:
            raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        train(rows, tmp_path, Breaks(), ScheduledCheckpoints("3"))
    assert saved_in(tmp_path) == ["checkpoints.json"]


class Rank:
    """One of two ranks, each in a thread: a Trainer and its strategy, as far as saving goes.

    Collective calls meet in pairs of one kind, as in a process group; where they would not, which
    hangs there, the test fails.
    """

    def __init__(self, rank: int, meeting: threading.Barrier, board: list[Any]) -> None:
        self.strategy, self.is_global_zero = self, rank == 0
        self._rank, self._meeting, self._board = rank, meeting, board
        self.gather: Callable[[int], None] = lambda rank: None

    def _meet(self, kind: str, value: Any = None) -> list[Any]:
        self._board[self._rank] = kind, value
        self._meeting.wait(timeout=20)
        (mine, _), (other, _) = found = list(self._board)
        assert mine == other, f"{mine} met {other}"
        self._meeting.wait(timeout=20)
        return [one for _, one in found]

    def barrier(self, name: str) -> None:
        self._meet("barrier")

    def broadcast(self, value: Any) -> Any:
        return self._meet("broadcast", value)[0]

    def reduce_boolean_decision(self, decision: bool) -> bool:
        return all(self._meet("reduce", decision))

    def save_checkpoint(self, path: Path, *, weights_only: bool) -> None:
        self.gather(self._rank)
        if self.is_global_zero:
            path.write_text("whole")
        self.barrier("Trainer.save_checkpoint")


def _fails_on(*ranks: int) -> Callable[[int], None]:
    def gather(rank: int) -> None:
        if rank in ranks:
            raise OSError(errno.ENOSPC, "No space left on device")

    return gather


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("fine", None),
        ("no folder", "File exists|Not a directory"),
        ("a folder in the way", "Is a directory|not empty"),
        ("rank 0 is full", "No space left"),
        ("rank 1 is full", "No space left|another rank"),
        ("both are full", "No space left"),
    ],
)
def test_two_ranks_agree_and_meet(tmp_path: Path, case: str, words: str | None) -> None:
    path = tmp_path / "run" / "step-1.ckpt"
    if case == "no folder":
        path.parent.write_text("")
    if case == "a folder in the way":
        (path / "kept").mkdir(parents=True)
    full = {"rank 0 is full": [0], "rank 1 is full": [1], "both are full": [0, 1]}.get(case, [])
    meeting, board, results = threading.Barrier(2), [None, None], {}

    def work(rank: int) -> None:
        trainer: Any = Rank(rank, meeting, board)
        trainer.gather = _fails_on(*full)
        results[rank] = [write_checkpoint(trainer, path) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.keys() == {0, 1}, "a rank failed, or they did not meet"
    for failure in [*results[0], *results[1]]:
        if words is None:
            assert failure is None
        else:
            assert isinstance(failure, OSError) and re.search(words, str(failure))
    assert path.is_file() == (words is None)
    assert not [name for name in files_under(tmp_path) if ".part" in name]


class TellsLost(pl.Callback):
    def __init__(self, saving: ScheduledCheckpoints, folder: Path) -> None:
        self.saving, self.folder = saving, folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        told = [self.saving.lost, list(self.saving.checkpoints), trainer.global_step]
        (self.folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(told))


@pytest.mark.slow
def test_two_processes_go_on_when_rank_0_is_full(tmp_path: Path) -> None:
    saving = ScheduledCheckpoints("0, every 2", folder=str(tmp_path / "run"))
    fit(
        StrangersModule(),
        [Full(saving, {4}), saving, TellsLost(saving, tmp_path)],
        tmp_path,
        data=Rows(64),
        max_steps=6,
        devices=2,
        strategy="ddp_spawn",
    )
    told = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1] == [[4], [0, 2, 6], 6]
    index = json.loads((tmp_path / "run" / "checkpoints" / "checkpoints.json").read_text())
    assert (index["written"], index["lost"]) == ([0, 2, 6], [4])


# -- with the rest --------------------------------------------------------------------------------


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no term of a schedule"):
        ScheduledCheckpoints("sometimes")
    with pytest.raises(TypeError, match="'every 10'"):
        ScheduledCheckpoints(10)
    two = [ScheduledCheckpoints("every 5"), ScheduledCheckpoints("3", weights_only=True)]
    with pytest.raises(ValueError, match=r"make one schedule of both, '3, every 5'"):
        fit(StrangersModule(), two, tmp_path)
    apart = [two[0], ScheduledCheckpoints("3", weights_only=True, folder=str(tmp_path / "w"))]
    fit(StrangersModule(), apart, tmp_path)
    assert (tmp_path / "w" / "checkpoints" / "step-3.ckpt").exists()
    assert index_of(tmp_path)["written"] == [5, 10]
    with pytest.raises(UnsupportedTrainerError, match="leave the plugin out"):
        fit(StrangersModule(), [ScheduledCheckpoints("3")], tmp_path, plugins=[AsyncCheckpointIO()])

    class Sharded:
        strategy = FSDPStrategy(accelerator=None)

    with pytest.raises(UnsupportedTrainerError, match="FSDPStrategy: rank 0 writes"):
        check_checkpointing(Sharded(), "ScheduledCheckpoints")


@pytest.mark.parametrize("weights_only", [False, True])
def test_the_monitor_reads_the_folder_as_it_is(
    tmp_path: Path, rows: TokenRows, weights_only: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each row's weights are those that the run had at that step."""

    class Hashes(pl.Callback):
        after: dict[int, str]

        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.after = {0: weights_hash(pl_module.model)}

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            self.after[trainer.global_step] = weights_hash(pl_module.model)

    hashes = Hashes()
    saving = ScheduledCheckpoints("0, log2..4, 10, last", weights_only=weights_only)
    train(rows, tmp_path, hashes, saving)
    folder, out = tmp_path / "mda" / "checkpoints", tmp_path / "monitor"
    options = ["--metrics", "induction", "--sequences", "4", "--output", str(out), "--strict"]
    assert main(["monitor", str(folder), *options]) == 0, capsys.readouterr().err
    table = pd.read_parquet(out / "metrics.parquet")
    found = dict(zip(table["step"], table["weights_sha256"], strict=True))
    assert found == {step: hashes.after[step] for step in (0, 1, 2, 4, 10, 12)}
    assert table["repeats"].isna().all() and np.isfinite(table["value"]).all()


def fit_config(rows: TokenRows, folder: Path, callback: dict[str, Any]) -> dict[str, Any]:
    return {
        "seed_everything": 0,
        "model": {"size": SIZE, "vocab_size": 60, "seq_len": 16, "total_steps": 8},
        "data": {"rows": str(rows.folder), "batch_size": 4, "n_steps": 8},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 8,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "use_distributed_sampler": False,
            "default_root_dir": str(folder),
            "callbacks": [
                {
                    "class_path": "mda_lightning.callbacks.ScheduledCheckpoints",
                    "init_args": callback,
                }
            ],
        },
    }


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("every 2 in 3..7", [3, 5, 7]),
        ([0, "log2..4", "last"], [0, 1, 2, 4, 8]),
        (["6"], [6]),
    ],
    ids=["text", "list", "number as text"],
)
def test_it_is_configured_in_a_file(
    tmp_path: Path,
    rows: TokenRows,
    monkeypatch: pytest.MonkeyPatch,
    steps: Any,
    expected: list[int],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = fit_config(rows, tmp_path / "run", {"steps": steps})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "run.yaml"]) == 0
    assert index_of(tmp_path / "run")["written"] == expected


def test_a_bad_configuration_is_named(
    tmp_path: Path,
    rows: TokenRows,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for steps, words in [("every 10 in 20..5", "every 10 in 5..20"), (1000, "every 1000")]:
        config = fit_config(rows, tmp_path / "run", {"steps": steps})
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        assert main(["fit", "--config", "run.yaml"]) == EXIT_ERROR
        assert words in capsys.readouterr().err
