"""The ledger holds what was trained on, whatever that was, in few rows, and survives its writer."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mda_lightning.files import write_json
from mda_lightning.interventions import Plan
from mda_lightning.schedule import BaseOrder, Schedule
from mda_lightning.schedule.ledger import LEDGER_FOLDER, STREAM_FILE, Ledger
from mda_lightning.schedule.ledger_file import PartReader, parts_of
from mda_lightning.schedule.ledger_parts import LedgerParts
from mda_lightning.schedule.ledger_rows import Share, decode, encode

WEIGHTS = st.sampled_from([1.0, 1.0, 1.0, 0.0, 0.25, float("nan")])


@st.composite
def consumed(draw: st.DrawFn) -> tuple[BaseOrder, Share, int, list[tuple[int, int, float, int]]]:
    """Some steps of one rank, of which any place may hold any id, weight and provenance."""
    size, world_size = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    share = Share(size, draw(st.integers(0, world_size - 1)), world_size)
    batch_size = size * world_size * draw(st.integers(1, 2))
    order = BaseOrder(batch_size + draw(st.integers(0, 30)), batch_size, 5, draw(st.integers(0, 3)))
    per_step = batch_size // world_size
    first, n_steps = draw(st.integers(0, 4)), draw(st.integers(1, 4))
    places = []
    shift = 0
    for number in range(first * per_step, (first + n_steps) * per_step):
        micro_batch, within = divmod(number, size)
        position = (micro_batch * world_size + share.rank) * size + within
        base = position - shift
        kind = draw(st.sampled_from(["base", "base", "base", "shift", "other", "wrong hint"]))
        if kind == "shift":
            shift += 1
            base = -1
        sample = int(order.at(np.array([max(base, 0)]))[0])
        if kind in ("shift", "other"):
            sample = draw(st.integers(-1, 3)) + (draw(st.integers(0, 1)) << 40)
        if kind == "wrong hint":
            base = draw(st.integers(-1, 40))
        places.append((base, sample, draw(WEIGHTS), draw(st.integers(0, 1))))
    return order, share, first, places


@given(consumed())
@settings(max_examples=200, deadline=None)
def test_rows_give_back_every_place(
    case: tuple[BaseOrder, Share, int, list[tuple[int, int, float, int]]],
) -> None:
    """Against a loop over the rows as they are documented; and no two rows could be one."""
    order, share, first, places = case
    per_step = order.batch_size // share.world_size
    start, stop = first * per_step, first * per_step + len(places)
    positions = share.positions(np.arange(start, stop))
    base, ids, weights, provenance = (np.array(column) for column in zip(*places, strict=True))
    rows = encode(order, positions, base, ids, weights.astype(np.float32), provenance, share=share)

    looped = []
    all_positions = [
        (micro * share.world_size + share.rank) * share.size + within
        for micro in range(100)
        for within in range(share.size)
    ]
    told_by = []
    for position, count, base_position, sample_id, weight, origin in zip(*rows, strict=True):
        at = all_positions.index(position)
        for place in all_positions[at : at + count]:
            follows = base_position + place - position
            sample = sample_id if base_position < 0 else order.at(np.array([follows]))[0]
            looped.append((place, int(sample), float(weight), int(origin)))
        shift = base_position - position if base_position >= 0 else None
        told_by.append((shift, int(sample_id), str(weight), int(origin)))
    want = [
        (int(p), s, float(np.float32(w)), o)
        for p, (_, s, w, o) in zip(positions, places, strict=True)
    ]
    assert str(looped) == str(want)  # as text, in which NaN equals NaN
    assert all(one != other for one, other in itertools.pairwise(told_by))

    for begin, end in ((start, stop), (start + 1, stop - 1), (stop - 2, stop + 5)):
        decoded = decode(rows, share, begin, end)
        got = zip(
            decoded.position.tolist(),
            decoded.ids(order).tolist(),
            decoded.weight.tolist(),
            decoded.provenance.tolist(),
            strict=True,
        )
        inside = [w for n, w in enumerate(want, start) if begin <= n < end]
        assert str(list(got)) == str(inside)


def test_untouched_steps_are_one_row_on_any_number_of_ranks() -> None:
    order = BaseOrder(50_000, 64, 1000)
    for share in (Share(64), Share(8, 1, 2), Share(1, 3, 4)):
        positions = share.positions(np.arange(1000 * 64 // share.world_size))
        ones = np.ones(len(positions), np.float32)
        rows = encode(order, positions, positions, order.at(positions), ones, ones * 0, share=share)
        assert len(rows.position) == 1
    rows = encode(order, positions, positions, order.at(positions + 1), ones, ones * 0)
    assert len(rows.position) > 1000, "ids that are not the base order's are written out"


# -- parts ----------------------------------------------------------------------------------------

ORDER = BaseOrder(40, 8, 20, seed=2)
SCHEDULE = Schedule(ORDER, Plan.mask([3, 4, 5, 30]) | Plan.insert([1, 2, 3], steps=(2, 17)))
ATTEMPT = {"start_step": 0, "weight_type": "float32", "read_from": {"weight": "batch"}}
STREAM = {
    "kind": "stream",
    "schema_version": 1,
    "steps": [0, 20],
    "began_from": None,
    "attempts": [ATTEMPT],
    "order": ORDER.describe(),
    "order_hash": ORDER.content_hash,
    "corpus": "corpus",
    "corpus_hash": "0" * 64,
    "plan_hash": SCHEDULE.plan.content_hash,
    "given_plan_hash": SCHEDULE.plan.content_hash,
    "n_steps": len(SCHEDULE),
    "complete": True,
}


def add(parts: LedgerParts, first: int, last: int) -> None:
    """This rank's places of steps [first, last), as the schedule has them."""
    share = parts.share
    batches = [SCHEDULE.batch(step) for step in range(first, last)]
    per_step = ORDER.batch_size // share.world_size
    numbers = np.arange(first * per_step, last * per_step)
    mine = share.positions(numbers) - first * ORDER.batch_size
    columns = [np.concatenate(column)[mine] for column in zip(*batches, strict=True)]
    parts.add(first, SCHEDULE.base_positions(first, last)[mine], *columns)


def opened(folder: Path) -> Ledger:
    write_json(folder / STREAM_FILE, STREAM)
    return Ledger.open(folder)


def check(ledger: Ledger, first: int, last: int) -> None:
    assert ledger.damaged == ()
    assert ledger.steps == [(first, last)]
    for step in range(first, last):
        for got, want in zip(ledger.step(step), SCHEDULE.batch(step), strict=True):
            assert got.dtype == want.dtype
            assert got.tolist() == want.tolist()


SHARES = [
    [Share(8)],
    [Share(4, 0, 2), Share(4, 1, 2)],
    [Share(1, rank, 4) for rank in range(4)],
]


@pytest.mark.parametrize("shares", SHARES, ids=["1 rank", "2 ranks", "4 ranks, accumulation"])
def test_parts_of_several_ranks_make_whole_steps(tmp_path: Path, shares: list[Share]) -> None:
    for share in shares:
        parts = LedgerParts(tmp_path / LEDGER_FOLDER, ORDER, share)
        for first in range(0, 20, 5):
            add(parts, first, first + 2)
            add(parts, first + 2, first + 5)
            parts.flush()
    ledger = opened(tmp_path)
    check(ledger, 0, 20)
    frame = ledger.frame(3, 6)
    assert frame.columns.tolist() == ["step", "slot", "sample_id", "weight", "provenance"]
    assert frame.step.tolist() == [3] * 8 + [4] * 8 + [5] * 8
    assert frame.slot.tolist() == list(range(8)) * 3
    assert frame.sample_id.tolist() == [
        int(i) for step in (3, 4, 5) for i in SCHEDULE.batch(step).sample_ids
    ]

    n_files = len(parts_of(tmp_path / LEDGER_FOLDER))
    for share in shares:
        LedgerParts(tmp_path / LEDGER_FOLDER, ORDER, share).merge()
    assert len(parts_of(tmp_path / LEDGER_FOLDER)) == len(shares) < n_files
    check(opened(tmp_path), 0, 20)


@pytest.mark.parametrize("step", [0, 3, 5, 7, 20])
@pytest.mark.parametrize("merged", [False, True])
def test_a_resume_goes_on_at_any_step_with_any_ranks(
    tmp_path: Path, step: int, merged: bool
) -> None:
    for share in SHARES[1]:
        parts = LedgerParts(tmp_path / LEDGER_FOLDER, ORDER, share)
        for first in range(0, 10, 2):
            add(parts, first, first + 2)
            parts.flush()
        if merged:
            parts.merge()
    for share in SHARES[0]:  # one rank goes on where two stopped
        parts = LedgerParts(tmp_path / LEDGER_FOLDER, ORDER, share)
        parts.discard_from(step)
    kept = opened(tmp_path)
    # Only now: every rank has to discard its own, and this one had to discard those of rank 1.
    if step:
        check(kept, 0, min(step, 10))
    else:
        assert kept.steps == []
    if step <= 10:
        add(parts, step, 20)
        parts.flush()
        parts.merge()
        check(opened(tmp_path), 0, 20)


class Killed(BaseException):
    """The process is gone: nothing after it runs."""


@pytest.mark.parametrize("operation", ["merge", "discard_from"])
def test_killed_between_any_two_changes_of_the_folder(
    tmp_path: Path, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left can be read, and a resume makes the same ledger of it."""
    real = {name: getattr(os, name) for name in ("replace", "unlink")}
    for allowed in itertools.count():
        folder = tmp_path / str(allowed)
        parts = LedgerParts(folder / LEDGER_FOLDER, ORDER, Share(8))
        for first in range(0, 12, 3):
            add(parts, first, first + 3)
            parts.flush()
        left = allowed

        def killing(name: str, *args: object) -> object:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return real[name](*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *a: killing("replace", *a))
            patch.setattr(os, "unlink", lambda *a, **k: killing("unlink", *a))
            try:
                parts.merge() if operation == "merge" else parts.discard_from(4)
                finished = True
            except Killed:
                finished = False
        ledger = opened(folder)
        ((first, last),) = ledger.steps
        assert first == 0 and (last == 12 if operation == "merge" else last >= 4)
        check(ledger, first, last)
        resumed = LedgerParts(folder / LEDGER_FOLDER, ORDER, Share(8))
        resumed.discard_from(4)
        check(opened(folder), 0, 4)
        add(resumed, 4, 12)
        resumed.flush()
        check(opened(folder), 0, 12)
        if finished:
            break
    assert allowed >= 3, "the operation was never interrupted"


def test_many_flushes_leave_few_parts(tmp_path: Path) -> None:
    order = BaseOrder(4000, 2, 1000)
    parts = LedgerParts(tmp_path / LEDGER_FOLDER, order, Share(2))
    positions = np.arange(2000)
    for step in range(1000):
        mine = positions[2 * step : 2 * step + 2]
        parts.add(step, mine, order.at(mine), np.ones(2, np.float32), np.zeros(2, np.uint8))
        parts.flush()
    assert len(list((tmp_path / LEDGER_FOLDER).iterdir())) < 70


def test_places_that_are_missing_or_there_twice_are_told(tmp_path: Path) -> None:
    folder = tmp_path / LEDGER_FOLDER
    with_rank = [LedgerParts(folder, ORDER, share) for share in SHARES[1]]
    for parts, last in zip(with_rank, (6, 4), strict=True):
        add(parts, 0, last)
        parts.flush()
    ledger = opened(tmp_path)
    assert ledger.steps == [(0, 4)]
    assert [(span.first, span.last, span.ranks) for span in ledger.spans] == [
        (0, 4, (0, 1)),
        (4, 6, (0,)),
    ]
    with pytest.raises(KeyError, match=r"slot 4 of step 4 is not in .* all of steps 0\.\.3"):
        ledger.step(4)
    with pytest.raises(ValueError, match="does not follow"):
        add(with_rank[0], 6, 7)
        add(with_rank[0], 8, 9)
    (path,) = (part.path for part in parts_of(folder) if part.rank == 1)
    path.with_name("part-r0001-00000002-00000009-000009.parquet").write_bytes(path.read_bytes())
    with pytest.raises(KeyError, match="slot 4 of step 1 is twice"):
        opened(tmp_path).step(1)


def test_a_large_part_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mda_lightning.schedule.ledger_file.ROWS_IN_GROUP", 5)
    for share in SHARES[1]:
        parts = LedgerParts(tmp_path / LEDGER_FOLDER, ORDER, share)
        add(parts, 2, 20)
        parts.flush()
    check(opened(tmp_path), 2, 20)
    (part, _) = parts_of(tmp_path / LEDGER_FOLDER)
    reader = PartReader(part.path)
    assert 0 < len(reader.rows(40, 44).position) <= 10 < len(reader.all_rows().position)


def test_damage_is_named(tmp_path: Path) -> None:
    parts = LedgerParts(tmp_path / LEDGER_FOLDER, ORDER, Share(8))
    for first in range(0, 20, 5):
        add(parts, first, first + 5)
        parts.flush()
    paths = [part.path for part in parts_of(tmp_path / LEDGER_FOLDER)]
    paths[1].write_bytes(paths[1].read_bytes()[:-20])
    ledger = opened(tmp_path)
    assert paths[1].name in ledger.damaged[0]
    assert ledger.steps == [(0, 5), (10, 20)]

    paths[1].write_bytes(b"")
    assert paths[1].name in opened(tmp_path).damaged[0]

    write_json(tmp_path / STREAM_FILE, STREAM | {"schema_version": 2})
    with pytest.raises(ValueError, match="schema 2"):
        Ledger.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="ledger=True"):
        Ledger.open(tmp_path / "nothing")


def test_a_changed_byte_never_gives_other_rows(tmp_path: Path) -> None:
    parts = LedgerParts(tmp_path / LEDGER_FOLDER, ORDER, Share(8))
    add(parts, 0, 20)
    parts.flush()
    (part,) = parts_of(tmp_path / LEDGER_FOLDER)
    whole, want = part.path.read_bytes(), PartReader(part.path).all_rows()
    refused = 0
    for at in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[at] ^= 255
        part.path.write_bytes(changed)
        try:
            got = PartReader(part.path).all_rows()
        except ValueError as error:
            assert part.path.name in str(error)
            refused += 1
            continue
        for one, other in zip(got, want, strict=True):
            assert one.tolist() == other.tolist()
    assert refused > len(whole) // 6
