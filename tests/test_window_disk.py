"""A window is found, and training goes on, where its checkpoints cannot be written."""

from __future__ import annotations

import errno
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from test_scheduled_checkpoints import Rank, file_size_limit
from training import assert_bit_identical, training_state
from window_runs import N_STEPS, report_of, run, watching

from mda_lightning.callbacks import checkpoint_ring
from mda_lightning.callbacks.checkpoint_ring import CheckpointRing
from mda_lightning.corpora import TokenRows
from mda_lightning.files import write_json

SMALL = {"ring": 4, "ring_every": 2}


pytestmark = pytest.mark.usefixtures("one_thread")


def no_link(*_: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


class NoRoom(pl.Callback):
    """No file grows beyond some bytes while the window's callback acts, in some steps."""

    def __init__(self, window: pl.Callback, steps: Any, n_bytes: int = 4096) -> None:
        self.window, self.steps, self.n_bytes = window, steps, n_bytes

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        if trainer.global_step in self.steps:
            with file_size_limit(self.n_bytes):
                self.window.on_train_batch_end(trainer, *rest)


@contextmanager
def warned_once(words: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(one.message) for one in caught if words in str(one.message)]
    assert len(said) == 1, said
    assert os.strerror(errno.EFBIG) in said[0] or "not permitted" in said[0], said[0]


def without_room(
    rows: TokenRows, folder: Path, steps: Any, *, n_bytes: int = 4096
) -> tuple[pl.Trainer, Any]:
    clock, monitor, window = watching(folder / "run", **SMALL)
    trainer = run(rows, folder, [clock, monitor, NoRoom(window, steps, n_bytes=n_bytes), window])
    return trainer, window


def test_without_room_for_the_ring_the_window_is_found(rows: TokenRows, tmp_path: Path) -> None:
    """The system refuses every write of a checkpoint (EFBIG): a warning, a count, and a window."""
    plain = run(rows, tmp_path / "plain", watching(tmp_path / "plain" / "run", **SMALL))
    with warned_once("could not be written"):
        trainer, _ = without_room(rows, tmp_path, range(1, 100), n_bytes=8192)
    assert_bit_identical(training_state(trainer), training_state(plain))
    found, whole = report_of(tmp_path / "run"), report_of(tmp_path / "plain" / "run")
    assert found["window"] == whole["window"] and found["status"] == "closed"
    # That of step 0 was written before the disk was full.
    assert found["checkpoint_steps"].get("start") == 0
    assert found["checkpoints_lost"] > 4 and whole["checkpoints_lost"] == 0
    assert not list((tmp_path / "run").rglob("*.part*"))


def test_losses_are_counted_over_a_resume(rows: TokenRows, tmp_path: Path) -> None:
    clock, monitor, window = watching(tmp_path / "run", **SMALL)
    saver = ModelCheckpoint(tmp_path / "saved", "at", every_n_train_steps=40)
    full = NoRoom(window, range(26, 36), n_bytes=8192)
    with warned_once("could not be written"):
        run(
            rows,
            tmp_path,
            [clock, monitor, full, window, saver],
            max_steps=40,
            enable_checkpointing=True,
        )
    lost = report_of(tmp_path / "run")["checkpoints_lost"]
    assert lost >= 2
    at = tmp_path / "saved" / "at.ckpt"
    run(rows, tmp_path, watching(tmp_path / "run", **SMALL), ckpt_path=at)
    found = report_of(tmp_path / "run")
    assert found["checkpoints_lost"] == lost and found["status"] == "closed"
    assert found["checkpoint_steps"]["end"] == found["window"]["end"]


def test_without_room_for_the_report_training_goes_on(rows: TokenRows, tmp_path: Path) -> None:
    """Nor for ``window.json``: told once; it is there at the end, when there is room again."""
    reports = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            reports.append((tmp_path / "run" / "window.json").exists())

    clock, monitor, window = watching(tmp_path / "run", **SMALL)
    full = NoRoom(window, range(1, 100), n_bytes=64)
    with warned_once("window.json could not be written"):
        trainer = run(rows, tmp_path, [clock, monitor, full, window, Looks()])
    assert trainer.global_step == N_STEPS and not any(reports)
    assert report_of(tmp_path / "run")["status"] == "closed"


@pytest.mark.parametrize("what", ["no folder", "no link and no room"])
def test_what_cannot_be_promoted_is_lost_and_nothing_else(
    rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder = tmp_path / "run"
    if what == "no folder":
        write_json(folder / "window", {})  # a file is where the folder would be
        with pytest.warns(UserWarning, match=r"could not be kept as .*start-step26"):
            trainer = run(rows, tmp_path, watching(folder, **SMALL))
    else:
        monkeypatch.setattr(checkpoint_ring.os, "link", no_link)
        small = os.path.getsize

        def copy(source: Path, destination: Path) -> None:
            assert small(source) > 8192
            with file_size_limit(8192):
                Path(destination).write_bytes(Path(source).read_bytes())

        monkeypatch.setattr(checkpoint_ring.shutil, "copyfile", copy)
        with warned_once("could not be kept as"):
            trainer = run(rows, tmp_path, watching(folder, **SMALL))
    assert trainer.global_step == N_STEPS
    found = report_of(folder)
    assert found["status"] == "closed" and found["checkpoints"] == {}
    assert found["checkpoints_lost"] == 3
    kept = sorted(int(p.stem.removeprefix("step-")) for p in (folder / "ring").glob("*.ckpt"))
    assert found["window"]["start"] in kept and found["window"]["end"] in kept, "they still exist"
    assert not [p for p in folder.rglob("*") if ".part" in p.name]


def test_one_that_cannot_be_promoted_leaves_the_others(
    rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def one_fails(source: Path, destination: Path) -> None:
        if ".mid-" in str(destination):
            no_link()
        link(source, destination)

    monkeypatch.setattr(checkpoint_ring.os, "link", one_fails)
    monkeypatch.setattr(checkpoint_ring.shutil, "copyfile", no_link)
    with pytest.warns(UserWarning, match="mid-step"):
        run(rows, tmp_path, watching(tmp_path / "run", **SMALL))
    found = report_of(tmp_path / "run")
    assert found["checkpoints"].keys() == {"start", "end"} and found["checkpoints_lost"] == 1


def test_a_ring_that_cannot_be_cleared_does_not_stop_training(
    rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def stuck(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name == "ring" and path.exists():
            raise PermissionError(errno.EACCES, "Permission denied")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", stuck)
    trainer = run(rows, tmp_path, watching(tmp_path / "run", **SMALL))
    assert trainer.global_step == N_STEPS
    assert report_of(tmp_path / "run")["checkpoints"].keys() == {"start", "mid", "end"}


@pytest.mark.parametrize("is_there", [True, False])
def test_two_ranks_agree_on_what_was_promoted(tmp_path: Path, is_there: bool) -> None:
    """Only rank 0 looks at the disk and writes; both list the same, and meet in the same calls."""
    ring_folder = tmp_path / "ring"
    ring_folder.mkdir()
    if is_there:
        (ring_folder / "step-8.ckpt").write_text("whole")
    meeting, board, results = threading.Barrier(2), [None, None], {}

    def work(rank: int) -> None:
        trainer: Any = Rank(rank, meeting, board)
        ring = CheckpointRing(3)
        # Rank 1 sees another disk.
        ring.attach(ring_folder if rank == 0 else tmp_path / "none", promoted=tmp_path / "window")
        ring.steps = [8]
        available = ring.available(trainer)
        destination = tmp_path / "window" / "mid-step8.ckpt"
        results[rank] = available, ring.promote(trainer, 8, destination), ring.n_lost

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results[0] == results[1] == (([8], True, 0) if is_there else ([], False, 1))
    assert (tmp_path / "window" / "mid-step8.ckpt").exists() == is_there
