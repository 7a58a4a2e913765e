"""The check of a ledger against its plan: over random plans it passes, and finds any one change."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stream_reference import whole
from test_schedule_operations import scheduled

from mda_lightning.corpora import TokenRows
from mda_lightning.files import read_json, write_json
from mda_lightning.interventions import Plan
from mda_lightning.recipes.plan_verify import verify_run
from mda_lightning.schedule import BaseOrder, Schedule
from mda_lightning.schedule.ledger import LEDGER_FOLDER, PLAN_FILE, STREAM_FILE, STREAM_FOLDER
from mda_lightning.schedule.ledger_parts import LedgerParts
from mda_lightning.schedule.ledger_rows import Share


def write(run: Path, schedule: Schedule, corpus: TokenRows | None = None, **more: Any) -> None:
    """What a run leaves besides the parts."""
    folder = run / STREAM_FOLDER
    schedule.plan.save(folder / PLAN_FILE)
    hashes = {"plan_hash": schedule.plan.content_hash, "order_hash": schedule.order.content_hash}
    about = {
        "kind": "stream",
        "schema_version": 1,
        "steps": [0, len(schedule)],
        "n_steps": len(schedule),
        "complete": True,
        "began_from": None,
        "order": schedule.order.describe(),
        "given_plan_hash": schedule.plan.content_hash,
        "corpus": str(run / "no corpus"),
        "corpus_hash": "0" * 64,
        "attempts": [{"start_step": 0, "weight_type": "float32", "read_from": {}}],
    }
    write_json(folder / STREAM_FILE, about | hashes | more)


def train(
    run: Path, schedule: Schedule, stream: Any, shares: list[Share], first: int, last: int
) -> None:
    """Append steps of ``stream``, all places of a run, by ranks of their own."""
    size = schedule.order.batch_size
    for share in shares:
        parts = LedgerParts(run / STREAM_FOLDER / LEDGER_FOLDER, schedule.order, share)
        parts.discard_from(first)
        per_step = size // share.world_size
        mine = share.positions(np.arange(first * per_step, last * per_step))
        base = schedule.base_positions(0, len(schedule))
        parts.add(first, base[mine], *(column[mine] for column in stream))
        parts.flush()


@st.composite
def shares_of(draw: st.DrawFn, batch_size: int) -> list[Share]:
    world_size = draw(st.sampled_from([n for n in range(1, batch_size + 1) if batch_size % n == 0]))
    rest = batch_size // world_size
    size = draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0]))
    return [Share(size, rank, world_size) for rank in range(world_size)]


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_run_of_any_plan_passes_and_any_change_is_found(data: st.DataObject) -> None:
    """Over plans, ranks, micro-batches and resume points."""
    schedule: Schedule = data.draw(scheduled())
    n_steps, size = len(schedule), schedule.order.batch_size
    stream = whole(schedule)
    resumed = data.draw(st.integers(0, n_steps - 1))
    reached = data.draw(st.integers(resumed, n_steps))
    first, then = (data.draw(shares_of(size)) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        write(run, schedule)
        train(run, schedule, stream, first, 0, reached)
        train(run, schedule, stream, then, resumed, n_steps)
        report = verify_run(run)
        assert report.ok, report.lines()
        (line,) = (line for line in report.verified if "places" in line)
        assert f": {n_steps * size:,} places, as the plan says" in line
        masked = int((stream.weights == 0).sum())
        assert (f" {masked:,} masked" in line) == (masked > 0)

        place = data.draw(st.integers(0, n_steps * size - 1))
        column = data.draw(st.sampled_from([0, 1, 2]))
        changed = [np.array(one) for one in stream]
        changed[column][place] += 1
        train(run, schedule, changed, then, 0, n_steps)
        (difference,) = verify_run(run).differences
        assert difference.startswith(f"step {place // size}, slot {place % size}: expected sample ")
        sample, weight = changed[0][place], changed[1][place]
        assert f"found sample {sample}, weight {weight:g}, " in difference


def run_of_two_ranks(run: Path, reached: int, **more: Any) -> Schedule:
    """Six steps by rank 0, ``reached`` by rank 1."""
    schedule = Schedule(BaseOrder(40, 4, 6), Plan.mask([3]))
    write(run, schedule, **more)
    for share, last in ((Share(2, 0, 2), 6), (Share(2, 1, 2), reached)):
        train(run, schedule, whole(schedule), [share], 0, last)
    return schedule


def test_places_of_one_rank_alone(tmp_path: Path) -> None:
    """In a run that was killed, ranks may have got differently far; in one that ended, not."""
    run_of_two_ranks(tmp_path, 4, complete=False)
    report = verify_run(tmp_path)
    assert report.ok
    assert "steps 4..5: only rank 0 wrote them before the run was interrupted" in report.notes
    assert any(line.startswith("steps 0..3: 16 places") for line in report.verified)

    run_of_two_ranks(tmp_path, 4)
    assert verify_run(tmp_path).differences == ["steps 4..5: not all of their places are there"]


def test_places_that_are_there_twice_or_before_the_beginning(tmp_path: Path) -> None:
    schedule = run_of_two_ranks(tmp_path, 6)
    assert verify_run(tmp_path).ok
    shares = [Share(2, 1, 2)]
    (tmp_path / "other").mkdir()
    train(tmp_path / "other", schedule, whole(schedule), shares, 0, 3)
    (part,) = (tmp_path / "other" / STREAM_FOLDER / LEDGER_FOLDER).iterdir()
    name = part.name.replace("-000000.", "-000009.")  # an earlier one would pass for merged
    part.rename(tmp_path / STREAM_FOLDER / LEDGER_FOLDER / name)
    assert "steps 0..2: several parts hold the same places" in verify_run(tmp_path).differences

    run_of_two_ranks(tmp_path / "late", 6, steps=[2, 6])
    (difference,) = verify_run(tmp_path / "late").differences
    assert difference == "steps 0..5: in the ledger, and the run began at step 2"


def test_steps_beyond_the_run_are_named(tmp_path: Path) -> None:
    run_of_two_ranks(tmp_path, 6)
    longer = Schedule(BaseOrder(40, 4, 9), Plan.mask([3]))
    shares = [Share(2, 0, 2), Share(2, 1, 2)]
    train(tmp_path, longer, whole(longer), shares, 6, 9)
    assert verify_run(tmp_path).differences == [
        "steps 6..8: in the ledger, and the plan's last step is 5"
    ]
    path = tmp_path / STREAM_FOLDER / STREAM_FILE
    told = read_json(path)
    write_json(path, told | {"complete": False})
    assert not verify_run(tmp_path).ok

    run_of_two_ranks(tmp_path / "short", 6, steps=[0, 4])
    assert verify_run(tmp_path / "short").differences == [
        "steps 4..5: in the ledger, and the run ended before step 4"
    ]
    # A killed run may have written more than it had told.
    run_of_two_ranks(tmp_path / "killed", 6, steps=[0, 4], complete=False)
    assert verify_run(tmp_path / "killed").ok


DAMAGE: dict[str, Any] = {
    "schema_version": [None, "1", -1, True],
    "steps": [None, [0], [0, "6"], [5, 2], {"0": 6}],
    "began_from": ["a checkpoint", {"step": 3}],
    "attempts": [
        None,
        {},
        [None],
        [{"start_step": 0}],
        [{"start_step": 0, "weight_type": "nonsense", "read_from": {}}],
        [{"start_step": 0, "weight_type": "load", "read_from": {}}],
        [{"start_step": 0, "weight_type": "float32", "read_from": None}],
        [{"start_step": None, "weight_type": "float32", "read_from": {}}],
    ],
    "order": [None, {}, {"n_rows": "40", "batch_size": 4, "n_steps": 6}, {"n_rows": 40, "x": 1}],
    "corpus": [None, 3],
    "corpus_hash": [None],
    "order_hash": [None],
    "plan_hash": [None, 1],
    "given_plan_hash": [None],
    "n_steps": [None, "6", 6.5],
    "complete": [None, 1],
    "announced": [None, [{}], ["plan"], [3]],
}


@pytest.mark.parametrize("key", DAMAGE)
def test_a_damaged_record_is_refused(tmp_path: Path, key: str) -> None:
    run_of_two_ranks(tmp_path, 6)
    path = tmp_path / STREAM_FOLDER / STREAM_FILE
    told = read_json(path)
    for value in DAMAGE[key]:
        write_json(path, told | {key: value})
        with pytest.raises(ValueError, match=rf"{STREAM_FILE}.*{key}.*edited or damaged"):
            verify_run(tmp_path)
    if key in told:
        del told[key]
        write_json(path, told)
        with pytest.raises(ValueError, match=f"{STREAM_FILE} lacks {key}; it was edited"):
            verify_run(tmp_path)
    path.write_text("[1, 2")
    with pytest.raises(ValueError, match="not valid JSON"):
        verify_run(tmp_path)


def test_another_order_is_named(tmp_path: Path) -> None:
    run_of_two_ranks(tmp_path, 6)
    path = tmp_path / STREAM_FOLDER / STREAM_FILE
    stored = read_json(path)
    stored["order"]["seed"] = 1
    write_json(path, stored)
    differences = verify_run(tmp_path).differences
    assert any("is of another base order" in one for one in differences)
    assert any(one.startswith("the base order is") for one in differences)


def test_progress_counts_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mda_lightning.schedule.ledger._PLACES_AT_ONCE", 8)
    run_of_two_ranks(tmp_path, 6)
    told: list[tuple[int, int]] = []
    verify_run(tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 6), (4, 6), (6, 6)]
