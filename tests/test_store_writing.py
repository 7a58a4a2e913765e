"""Ranks append, a resume forgets, and what an interruption leaves can be read and carried on."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mda_lightning.store import ScoreRows, ScoreTable, ScoreWriter

UNITS, BLOCKS = ("L0H0", "L1H2"), ("QK", "V")


def writer(folder: Path, **more: object) -> ScoreWriter:
    given_: dict[str, object] = {"units": UNITS, "blocks": BLOCKS, "estimator": "in_run"}
    return ScoreWriter(folder, **(given_ | more))  # type: ignore[arg-type]


def rows_of(steps: range, *, rank: int = 0, batch: int = 3) -> ScoreRows:
    """Some samples a step, in no order; a sample's scores follow from its id and its step."""
    step = np.repeat(np.array(steps, np.int64), batch)
    ids = 100 * step + 10 * rank + np.tile(np.arange(batch)[::-1], len(steps))
    values = (ids[:, None, None] + np.array([[0.0, 0.25], [0.5, 0.75]])).astype(np.float32)
    return ScoreRows(ids, step, values, (ids / 7).astype(np.float32), step // 5 * 5)


def steps_in(folder: Path, **more: object) -> list[int]:
    """Steps of the rows by plain pandas, each sample checked to be there once and as written."""
    frame = pd.read_parquet(folder, **more)  # type: ignore[call-overload]
    assert not frame.duplicated(["sample_id", "step"]).any()
    assert (frame["L1H2.V"] == frame["sample_id"] + np.float32(0.75)).all()
    return sorted(frame["step"].unique().tolist())


def test_ranks_append_without_touching_each_others_parts(tmp_path: Path) -> None:
    writers = [writer(tmp_path / "s", rank=rank) for rank in range(3)]
    for steps in (range(4), range(4, 9)):
        for rank, one in enumerate(writers):
            one.add(rows_of(steps, rank=rank))
            one.flush()
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").glob("part-r000[02]*")}
    assert len(before) == 4
    writers[1].discard_from(6)
    writers[1].add(rows_of(range(6, 7), rank=1))
    writers[1].flush()
    assert {p.name: p.read_bytes() for p in (tmp_path / "s").glob("part-r000[02]*")} == before
    assert [one.n_held for one in writers] == [27, 21, 27]
    table = ScoreTable.open(tmp_path / "s")
    assert (table.complete, len(table), table.provenance) == (False, 75, {})
    table = writers[0].finish({"damping": 0.1})
    assert (table.complete, len(table), table.provenance) == (True, 75, {"damping": 0.1})
    with pytest.raises(ValueError, match="rank 1 cannot finish"):
        writers[1].finish({})
    frame = table.frame("L0H0")
    for _, part in frame.groupby((frame["step"].diff() < 0).cumsum()):
        assert part[["step", "sample_id"]].apply(tuple, axis=1).is_monotonic_increasing


PROCESS = """
import sys, numpy as np
from mda_lightning.store import ScoreRows, ScoreWriter

folder, rank = sys.argv[1], int(sys.argv[2])
one = ScoreWriter(folder, units=["L0H0"], blocks=["QK"], estimator="in_run", rank=rank)
sys.stdin.readline()  # all begin at once
for step in range(40):
    ids, values = np.array([3 * step + rank]), np.full((1, 1, 1), step)
    one.add(ScoreRows(ids, np.array([step]), values, np.ones(1), np.array([0])))
    one.flush()
    if step % 10 == 9:
        one.discard_from(step - 1)  # the last two, as a run that goes on at an earlier step
"""


def test_processes_write_to_one_folder_at_a_time(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "s")]
    processes = [
        subprocess.Popen([*command, str(rank)], stdin=subprocess.PIPE) for rank in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    frame = ScoreTable.open(tmp_path / "s").frame("L0H0").sort_values("sample_id")
    steps = [step for step in range(40) if step % 10 < 8]
    assert frame["sample_id"].tolist() == [3 * step + rank for step in steps for rank in range(3)]
    assert frame["score"].tolist() == [step for step in steps for _ in range(3)]


def test_memory_is_bounded_and_flushed_by_itself(tmp_path: Path) -> None:
    one = writer(tmp_path / "s", most_held=7)
    sizes = []
    for step in range(10):
        one.add(rows_of(range(step, step + 1)))
        sizes.append(sum(len(pd.read_parquet(p)) for p in (tmp_path / "s").glob("part-*")))
    assert sizes == [0, 0, 9, 9, 9, 18, 18, 18, 27, 27] and one.n_held == 30
    names = sorted(path.name for path in (tmp_path / "s").glob("part-*"))
    assert names[1] == "part-r0000-00000003-00000005-000001.parquet"


def test_what_is_added_may_change_afterwards(tmp_path: Path) -> None:
    """Rows often are views of a tensor that the next step writes into."""
    one, rows = writer(tmp_path / "s"), rows_of(range(1))
    one.add(rows)
    for column in rows[:5]:
        column[...] = 99  # type: ignore[index]
    assert steps_in(one.finish({}).folder) == [0]


def test_scores_that_are_not_finite_are_nan_and_counted(tmp_path: Path) -> None:
    one = writer(tmp_path / "s")
    values = np.ones((5, 2, 2), np.float64)
    values[0, 0, 0], values[1, 1, 1], values[2, 0, 1], values[2, 1, 0] = (
        np.inf,
        -np.inf,
        np.nan,
        1e99,
    )
    rows = rows_of(range(5), batch=1)._replace(values=values)
    one.add(rows)
    assert one.n_not_finite == 3
    one.flush()
    assert one.n_not_finite == 3 and writer(tmp_path / "s").n_not_finite == 3
    frame = pd.read_parquet(tmp_path / "s")
    scores = frame[[f"{unit}.{block}" for unit in UNITS for block in BLOCKS]].to_numpy()
    assert not np.isinf(scores).any()
    assert (
        np.isnan(scores).tolist() == (~np.isfinite(values.reshape(5, 4)) | (scores != 1)).tolist()
    )
    assert np.isnan(scores).sum() == 4
    one.discard_from(2)
    assert (one.n_held, one.n_not_finite) == (2, 2)
    table = one.finish({}, steps=(1, None))
    assert (len(table), table.n_not_finite) == (1, 1)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 20), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_resume_forgets_its_step_and_later(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], at: int, reopened: bool
) -> None:
    """In memory, in whole parts and in one that straddles; parts are named for what they hold."""
    folder = tmp_path_factory.mktemp("t") / "s"
    one, first = writer(folder), 0
    for number, length in enumerate(lengths):
        one.add(rows_of(range(first, first + length)))
        first += length
        if number % 3 < 2:
            one.flush()
    if reopened:
        one.flush()
        one = writer(folder)
    one.discard_from(at)
    assert one.n_held == 3 * min(at, first)
    one.add(rows_of(range(at, at + 2)))
    one.flush()
    assert steps_in(folder) == sorted({*range(min(at, first)), at, at + 1})
    for path in folder.glob("part-*"):
        held = pd.read_parquet(path)["step"]
        assert path.name.split("-")[2:4] == [f"{held.min():08d}", f"{held.max():08d}"]


def test_a_run_on_fewer_processes_forgets_the_others_rows(tmp_path: Path) -> None:
    for rank in range(4):
        one = writer(tmp_path / "s", rank=rank, world_size=4)
        one.add(rows_of(range(6), rank=rank))
        one.flush()
    fewer = [writer(tmp_path / "s", rank=rank, world_size=2) for rank in range(2)]
    for one in fewer:
        one.discard_from(4)
    assert steps_in(tmp_path / "s") == [0, 1, 2, 3]
    assert len(ScoreTable.open(tmp_path / "s")) == 4 * 4 * 3


def test_a_finished_table_that_is_carried_on_is_incomplete_again(tmp_path: Path) -> None:
    one = writer(tmp_path / "s")
    one.add(rows_of(range(5)))
    one.finish({"first": True})
    again = writer(tmp_path / "s")
    again.discard_from(5)
    assert ScoreTable.open(tmp_path / "s").complete  # nothing has changed
    again.add(rows_of(range(5, 8)))
    again.flush()
    table = ScoreTable.open(tmp_path / "s")
    assert (table.complete, table.provenance, len(table)) == (False, {"first": True}, 24)
    assert len(again.finish({"first": False})) == 24


def test_an_empty_table_can_be_finished(tmp_path: Path) -> None:
    one = writer(tmp_path / "s")
    one.add(rows_of(range(5)))
    one.flush()
    table = one.finish({}, steps=(9, 12))
    assert table.complete and len(table) == 0 and not len(table.frame())
    assert not len(table.scores("L0H0")[0]) and not len(table.by_domain("L0H0", {}))
    with pytest.raises(ValueError, match="has 0 with a finite score"):
        table.top("L0H0", fraction=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"units": ("L0H0", "L1H3")}, r"units \['L0H0', 'L1H3'\] instead of \['L0H0', 'L1H2'\]"),
        ({"blocks": ("QK", "O")}, "blocks"),
        ({"estimator": "replay"}, "estimator replay instead of in_run"),
        ({"domains": True}, "domains True instead of False"),
    ],
)
def test_scores_of_another_kind_do_not_join(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    one = writer(tmp_path / "s")
    one.add(rows_of(range(2)))
    one.flush()
    with pytest.raises(ValueError, match=message + ".*give another folder, or remove this one"):
        writer(tmp_path / "s", **change)
    assert steps_in(tmp_path / "s") == [0, 1]


def test_folders_and_rows_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and no score table"):
        writer(tmp_path / "notes")
    one, rows = writer(tmp_path / "s"), rows_of(range(2))
    for change, message in (
        ({"values": rows.values[:, :1]}, r"values \(6, 1, 2\)"),
        ({"step": rows.step[:3]}, r"step \(3,\)"),
        ({"step": rows.step - 2}, "step is -2 to -1"),
        ({"domain": np.array(["a"] * 6)}, "has no domains"),
    ):
        with pytest.raises(ValueError, match=message):
            one.add(rows._replace(**change))
    assert one.n_held == 0
    one.add(rows)
    with pytest.raises(ValueError, match="JSON"):
        one.finish({"loss": float("inf")}, steps=(0, 1))
    assert steps_in(one.finish({}).folder) == [0, 1]


class Killed(BaseException):
    """As if the process ended here."""


def dies_at(monkeypatch: pytest.MonkeyPatch, k: int) -> Callable[[], bool]:
    """From the k-th rename or removal on, none takes place; tells whether it came to that."""
    done, dead = 0, False

    def counted(operation: Callable[..., None]) -> Callable[..., None]:
        def replacement(*args: object, **more: object) -> None:
            nonlocal done, dead
            if done >= k:
                dead = True
                raise Killed
            done += 1
            operation(*args, **more)

        return replacement

    for name in ("replace", "unlink", "remove", "rename", "rmdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return lambda: dead


def prepared(folder: Path, *, complete: bool) -> None:
    """Two ranks, two parts each, of steps 0 to 9."""
    writers = [writer(folder, rank=rank) for rank in range(2)]
    for steps in (range(6), range(6, 10)):
        for rank, one in enumerate(writers):
            one.add(rows_of(steps, rank=rank))
            one.flush()
    if complete:
        writers[0].finish({"finished": "before"})


def carry_on(folder: Path) -> None:
    """What a run resumed at step 4 does on rank 0."""
    one = writer(folder)
    one.discard_from(4)
    one.add(rows_of(range(4, 8)))
    one.flush()


def finish(folder: Path) -> None:
    writer(folder).finish({"finished": "now"}, steps=(2, 7))


@pytest.mark.parametrize("complete", [False, True], ids=["incomplete", "complete"])
@pytest.mark.parametrize("work", [carry_on, finish])
def test_killed_between_any_two_file_operations(
    tmp_path: Path, work: Callable[[Path], None], complete: bool
) -> None:
    """What is left reads as a table without a row twice, keeps what is to stay, and goes on."""
    whole = tmp_path / "whole"
    prepared(whole, complete=complete)
    work(whole)
    expected = ScoreTable.open(whole)
    kept = range(4) if work is carry_on else range(2, 7)
    for k in range(100):
        folder = tmp_path / str(k)
        prepared(folder, complete=complete)
        with pytest.MonkeyPatch.context() as patch:
            was_killed = dies_at(patch, k)
            with contextlib.suppress(Killed):
                work(folder)
            if not was_killed():
                break
        left = ScoreTable.open(folder)
        assert set(kept) <= set(steps_in(folder)) <= set(range(10))
        if left.complete:  # not begun, or done but for a last removal
            whole_before = (list(range(10)), {"finished": "before"})
            done = (list(range(2, 7)), {"finished": "now"})
            assert (steps_in(folder), left.provenance) in (whole_before, done)
        work(folder)
        again = ScoreTable.open(folder)
        order = ["unit", "step", "sample_id"]
        pd.testing.assert_frame_equal(
            again.frame().sort_values(order, ignore_index=True),
            expected.frame().sort_values(order, ignore_index=True),
        )
        about = ("complete", "provenance", "n_rows")
        assert [getattr(again, a) for a in about] == [getattr(expected, a) for a in about]
        assert not list(folder.glob(".*" if work is finish else ".part-r0000*"))
    assert 5 <= k < 99


def test_a_killed_start_leaves_a_folder_to_start_in(tmp_path: Path) -> None:
    writer(tmp_path / "s").discard_from(0)
    assert not (tmp_path / "s").exists()  # a run that scores nothing leaves nothing
    with pytest.MonkeyPatch.context() as patch:
        dies_at(patch, 0)
        with pytest.raises(Killed):
            carry_on(tmp_path / "s")
    with pytest.raises(FileNotFoundError, match="no score table"):
        ScoreTable.open(tmp_path / "s")
    carry_on(tmp_path / "s")
    assert json.loads((tmp_path / "s" / "_table.json").read_text())["complete"] is False
    assert steps_in(tmp_path / "s") == [4, 5, 6, 7]
