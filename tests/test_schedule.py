"""Over random plans, nothing is lost, repeated or reordered in the stream beyond the plan."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_reference import spared_by

from mda_lightning.interventions import Insert, Mask, Plan, Prune, Replace, Source
from mda_lightning.schedule import BASE, INSERTED, BaseOrder, Schedule, ScheduledBatch, StreamDigest

orders = st.builds(
    BaseOrder,
    n_rows=st.integers(12, 60),
    batch_size=st.integers(1, 7),
    n_steps=st.integers(4, 15),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
)


@st.composite
def windows(draw: st.DrawFn, order: BaseOrder) -> tuple[int, int]:
    start = draw(st.integers(0, order.n_steps - 1))
    return start, draw(st.integers(start + 1, order.n_steps))


@st.composite
def plans(draw: st.DrawFn, order: BaseOrder, placements: tuple[str, ...]) -> Plan:
    """Masks and insertions of few enough samples that replacements always fit."""
    plan = Plan(seed=draw(st.integers(0, 3)))
    for _ in range(draw(st.integers(1, 3))):
        ids = draw(st.sets(st.integers(0, order.n_rows - 1), min_size=1, max_size=4))
        if draw(st.booleans()):
            plan |= Plan.mask(sorted(ids), steps=draw(st.none() | windows(order)))
        else:
            plan |= Plan.insert(
                sorted(ids),
                steps=draw(windows(order)),
                mode=draw(st.sampled_from(["dispersed", "concentrated"])),
                placement=draw(st.sampled_from(placements)),
                copies=draw(st.integers(1, 2)),
            )
    return plan


@st.composite
def scheduled(draw: st.DrawFn, placements: tuple[str, ...] = ("shift", "replace")) -> Schedule:
    order = draw(orders)
    plan = draw(plans(order, placements))
    try:
        return Schedule(order, plan)
    except ValueError as error:
        assert "do not fit" in str(error)
        return Schedule(order, Plan(tuple(op for op in plan.operations if isinstance(op, Mask))))


def whole(schedule: Schedule) -> ScheduledBatch:
    batches = [schedule.batch(step) for step in range(len(schedule))]
    return ScheduledBatch(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))


def base_stream(order: BaseOrder, count: int) -> np.ndarray:
    steps = range(-(-count // order.batch_size))
    return np.concatenate([order.ids(step) for step in steps])[:count]


def inserts(schedule: Schedule, placement: str) -> list[Insert]:
    return [
        op
        for op in schedule.plan.operations
        if isinstance(op, Insert) and op.placement == placement
    ]


@given(orders)
def test_every_epoch_is_a_permutation_of_the_rows(order: BaseOrder) -> None:
    epochs = order.at(np.arange(3 * order.n_rows)).reshape(3, -1)
    for epoch in epochs:
        assert sorted(epoch) == list(range(order.n_rows))
    if order.shuffle and order.n_rows >= 20:
        assert not (epochs[0] == epochs[1]).all() and not (epochs[0] == np.sort(epochs[0])).all()


def test_permutations_are_uniform() -> None:
    """Over seeds, each row comes to each place equally often (chi-square)."""
    counts = np.zeros((7, 7))
    for seed in range(3000):
        counts[np.arange(7), BaseOrder(7, 7, 1, seed).ids(0)] += 1
    expected = 3000 / 7
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < 67.985  # the 99.9% point of chi-square with 36 degrees of freedom


@given(scheduled())
@settings(max_examples=200)
def test_base_samples_keep_their_order_and_none_is_lost(schedule: Schedule) -> None:
    """Without what was inserted, the stream is the base stream, minus the replaced places."""
    stream, order = whole(schedule), schedule.order
    n_shifted = sum(op.count for op in inserts(schedule, "shift"))
    n_replaced = sum(op.count for op in inserts(schedule, "replace"))
    assert len(schedule) == order.n_steps + -(-n_shifted // order.batch_size)
    assert len(stream.sample_ids) == len(schedule) * order.batch_size
    kept = stream.sample_ids[stream.provenance != INSERTED]
    base = base_stream(order, len(kept) + n_replaced)
    assert len(kept) >= order.n_steps * order.batch_size - n_replaced
    rest = iter(base)
    assert all(any(sample == other for other in rest) for sample in kept)  # a subsequence
    if not n_replaced:
        assert (kept == base).all()


@given(scheduled())
@settings(max_examples=200)
def test_exactly_the_planned_samples_are_inserted(schedule: Schedule) -> None:
    stream = whole(schedule)
    planned: Counter[int] = Counter()
    for op in schedule.plan.operations:
        if isinstance(op, Insert):
            planned.update({int(i): op.copies for i in op.sample_ids})
    found = stream.sample_ids[stream.provenance == INSERTED]
    assert Counter(found.tolist()) == planned
    assert (stream.weights[stream.provenance == INSERTED] == 1).all()


@given(scheduled(placements=("replace",)))
@settings(max_examples=200)
def test_masks_hit_base_occurrences_in_their_steps_and_nothing_else(schedule: Schedule) -> None:
    """With no shift, a place's base step is its step: compare with a loop over the definition."""
    stream, order = whole(schedule), schedule.order
    for place, sample in enumerate(base_stream(order, len(stream.sample_ids))):
        step = place // order.batch_size
        masked = any(
            sample in op.sample_ids and (op.steps is None or op.steps[0] <= step < op.steps[1])
            for op in schedule.plan.operations
            if isinstance(op, Mask)
        )
        if stream.provenance[place] == INSERTED:
            # No sample gives way that the plan names in an insertion's window, and only there.
            assert any(
                op.steps[0] <= step < op.steps[1] and sample not in spared_by(schedule, op)
                for op in inserts(schedule, "replace")
            )
        else:
            assert stream.sample_ids[place] == sample
            assert stream.weights[place] == (0 if masked else 1)


@given(st.data())
def test_a_shift_stretches_its_window_alone(data: st.DataObject) -> None:
    """Before the window nothing moves; its data and the inserted fill it; the rest moves back."""
    order = data.draw(orders)
    start, end = data.draw(windows(order))
    ids = sorted(data.draw(st.sets(st.integers(0, order.n_rows - 1), min_size=1, max_size=9)))
    mode = data.draw(st.sampled_from(["dispersed", "concentrated"]))
    stream = whole(Schedule(order, Plan.insert(ids, steps=(start, end), mode=mode)))
    size, inserted = order.batch_size, stream.provenance == INSERTED
    stretched = slice(start * size, end * size + len(ids))
    assert inserted[stretched].sum() == len(ids) == inserted.sum()
    if mode == "concentrated":
        assert inserted[start * size : start * size + len(ids)].all()


def test_dispersed_insertions_are_uniform_over_the_stretched_window() -> None:
    order = BaseOrder(400, 10, 40)
    counts = np.zeros(40)
    for seed in range(60):
        plan = Plan.insert(range(100), steps=(0, 30)).bound(seed=seed)
        provenance = whole(Schedule(order, plan)).provenance
        counts += provenance.reshape(-1, 10).sum(1)[:40]
    expected = 60 * 100 / 40
    assert ((counts - expected) ** 2 / expected).sum() < 72.06  # 99.9%, 39 degrees of freedom


@given(scheduled(), st.randoms(use_true_random=False))
def test_a_schedule_is_a_pure_function_of_order_and_plan(schedule: Schedule, random) -> None:  # type: ignore[no-untyped-def]
    """Any steps, in any order, from another object, with numpy's global generator moved on."""
    again = Schedule(schedule.order, schedule.plan)
    steps = [random.randrange(len(schedule)) for _ in range(10)]
    for step in steps:
        np.random.rand()  # noqa: NPY002
        for one, other in zip(schedule.batch(step), again.batch(step), strict=True):
            assert (one == other).all()
            assert not one.flags.writeable
    assert schedule.content_hash == again.content_hash


def test_blocks_do_not_show() -> None:
    """A stream longer than the block it is computed in is the same as step by step."""
    order = BaseOrder(9000, 1000, 12, seed=2)
    plan = Plan.insert(range(50), steps=(3, 9)) | Plan.mask(range(200))
    schedule = Schedule(order, plan)
    forward = whole(schedule)
    backward = [schedule.batch(step) for step in reversed(range(len(schedule)))]
    assert (np.concatenate([b.sample_ids for b in reversed(backward)]) == forward.sample_ids).all()
    kept = forward.sample_ids[forward.provenance != INSERTED]
    assert (kept == base_stream(order, len(kept))).all()


PLAN = Plan.mask([1, 2], steps=(0, 3)) | Plan.insert([1, 2], steps=(1, 3), copies=2)


@pytest.mark.parametrize(
    "other",
    [
        Plan.mask([1, 3], steps=(0, 3)) | Plan.insert([1, 2], steps=(1, 3), copies=2),
        Plan.mask([1, 2], steps=(0, 2)) | Plan.insert([1, 2], steps=(1, 3), copies=2),
        Plan.mask([1, 2], steps=(0, 3), weight=0.5) | Plan.insert([1, 2], steps=(1, 3), copies=2),
        Plan.mask([1, 2], steps=(0, 3)) | Plan.insert([1, 2], steps=(1, 3)),
        Plan.mask([1, 2], steps=(0, 3))
        | Plan.insert([1, 2], steps=(1, 3), copies=2, mode="concentrated"),
        Plan.mask([1, 2], steps=(0, 3))
        | Plan.insert([1, 2], steps=(1, 3), copies=2, placement="replace"),
        Plan.mask([1, 2], steps=(0, 3)),
        PLAN.bound(seed=1),
        PLAN.bound(corpus_hash="a"),
        PLAN.bound(order=BaseOrder(50, 5, 10)),
        dataclasses.replace(PLAN, spared=np.array([9])),
        dataclasses.replace(PLAN, sources=(Source("extra", "ab" * 32, 3, 9),)),
    ],
)
def test_the_hash_of_a_plan_changes_with_all_that_matters(other: Plan) -> None:
    assert PLAN.content_hash != other.content_hash
    assert PLAN.content_hash == PLAN.bound(name="x", source={"unit": "L1H2"}).content_hash


DIFFERENT = [
    Mask(np.array([1]), (1, 4)),
    Mask(np.array([1]), (1, 4), occurrences="all"),
    Mask(np.array([1]), (1, 4), clock="run"),
    Mask(np.array([1]), (1, 4), online=True),
    Insert(np.array([1]), (1, 4)),
    Insert(np.array([1]), (1, 4), online=True),
    Replace((1, 4), np.array([1, 2]), np.array([5, 6])),
    Replace((1, 4), np.array([1, 2]), np.array([6, 5])),
    Replace((1, 4), by=np.array([5, 6])),
    Replace((1, 4), by_steps=(5, 6)),
    Replace((1, 4), by_steps=(5, 7)),
    Prune((1, 4), 0.5),
    Prune(None, 0.5),
    Prune((1, 4), 0.25),
    Prune((1, 4), 0.5, 0.5),
    Prune((1, 4), 0.5, draw=1),
]


def test_every_field_of_an_operation_is_in_the_hash_and_in_the_file(tmp_path: Path) -> None:
    assert len({Plan((op,)).content_hash for op in DIFFERENT}) == len(DIFFERENT)
    for op in DIFFERENT:
        again = Plan.load(Plan((op,)).save(tmp_path / "p.json"))
        assert again.operations[0].describe() == op.describe()
    assert Plan.prune(1).content_hash == Plan.prune(1.0).content_hash  # type: ignore[arg-type]
    assert Plan.insert([1], steps=(np.int64(1), 4), copies=np.int64(2)).save(tmp_path / "n.json")


def test_the_hash_of_an_order_changes_with_the_stream_and_not_with_its_length() -> None:
    order = BaseOrder(50, 5, 10, 1)
    others = [
        BaseOrder(51, 5, 10, 1),
        BaseOrder(50, 4, 10, 1),
        BaseOrder(50, 5, 10, 2),
        BaseOrder(50, 5, 10, 1, shuffle=False),
    ]
    assert len({o.content_hash for o in [order, *others]}) == 5
    assert BaseOrder(50, 5, 99, 1).content_hash == order.content_hash
    assert Schedule(BaseOrder(50, 5, 99, 1)).content_hash != Schedule(order).content_hash


def test_the_digest_tells_streams_apart_from_where_they_part() -> None:
    order = BaseOrder(50, 5, 10, 1)
    base, treated = Schedule(order), Schedule(order, Plan.insert([7], steps=(4, 5)))
    one, other = StreamDigest(base), StreamDigest(treated)
    assert all(one.at(step) == other.at(step) for step in range(5))
    assert all(one.at(step) != other.at(step) for step in range(6, 11))
    carried_on = StreamDigest(base, 3, StreamDigest(base).at(3))
    assert carried_on.at(9) == StreamDigest(base).at(9)
    assert one.at(2) == StreamDigest(base).at(2)  # backwards


@given(st.data())
@settings(max_examples=200)
def test_a_random_control_is_matched_and_disjoint(data: st.DataObject) -> None:
    order = data.draw(orders)
    plan = data.draw(plans(order, ("shift", "replace")))
    pool = np.arange(200)
    control = plan.random_control(pool, seed=data.draw(st.integers(0, 9)), exclude=[150, 151])
    treated, drawn = plan.treated_ids, control.treated_ids
    assert not np.intersect1d(treated, drawn).size
    assert not np.intersect1d([150, 151], drawn).size
    assert len(treated) == len(drawn)
    for one, other in zip(plan.operations, control.operations, strict=True):
        assert len(one.sample_ids) == len(other.sample_ids)
        ours, theirs = one.describe(), other.describe()
        assert ours | {"sample_ids": 0} == theirs | {"sample_ids": 0}
    for i, first in enumerate(plan.operations):
        for j, second in enumerate(plan.operations):
            shared = np.intersect1d(first.sample_ids, second.sample_ids)
            stand_ins = np.intersect1d(
                control.operations[i].sample_ids, control.operations[j].sample_ids
            )
            assert len(shared) == len(stand_ins)
    assert control.content_hash != plan.content_hash
    assert control.source["control_of"] == plan.content_hash


def test_a_random_control_is_seeded_and_takes_the_same_places() -> None:
    order = BaseOrder(300, 10, 20)
    plan = Plan.insert(range(20), steps=(5, 15))
    one, same, other = (plan.random_control(range(300), seed=s) for s in (1, 1, 2))
    assert one.content_hash == same.content_hash != other.content_hash
    places = [whole(Schedule(order, p)).provenance for p in (plan, one)]
    assert (places[0] == places[1]).all()
    with pytest.raises(ValueError, match=r"needs 20 samples .* the pool has 5"):
        plan.random_control(range(25), seed=0)


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = PLAN.bound(
        corpus_hash="c", order=BaseOrder(50, 5, 10), seed=3, source={"unit": "L1H2"}, name="n"
    )
    loaded = Plan.load(plan.save(tmp_path / "plans" / "p.json"))
    assert loaded.content_hash == plan.content_hash
    assert (loaded.name, loaded.source, loaded.seed) == ("n", {"unit": "L1H2"}, 3)


def test_plan_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "p.json")
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"seed": 9}))
    with pytest.raises(ValueError, match="edited or damaged"):
        Plan.load(path)
    path.write_text(json.dumps(value | {"schema_version": 99}))
    with pytest.raises(ValueError, match="schema 99"):
        Plan.load(path)
    broken = {"operations": [{"operation": "mask"}]}, {"operations": [3]}, {"order": {"n": 1}}
    for wrong in (*broken, {"spared": "x"}, {"sources": [1]}):
        path.write_text(json.dumps(value | wrong))
        with pytest.raises(ValueError, match=r"p\.json is not a whole plan"):
            Plan.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Plan.load(path)
    with pytest.raises(FileNotFoundError, match="no plan file"):
        Plan.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: Schedule(o, Plan.mask([60])), r"sample 60, the corpus has rows 0\.\.49"),
        (lambda o: Schedule(o, Plan.insert([1], steps=(5, 11))), "ends outside the run"),
        (lambda o: Schedule(o, Plan.mask([1], steps=(5, 11))), "which has 10 steps"),
        (
            lambda o: Schedule(o, Plan.insert(range(9), steps=(2, 3), placement="replace")),
            "9 insertions by replacement do not fit",
        ),
        (
            lambda o: Schedule(o, Plan.mask([1]).bound(order=BaseOrder(51, 5, 10))),
            "made for base order",
        ),
        (lambda o: Schedule(o).batch(10), r"outside the run: it has steps 0\.\.9"),
        (lambda o: Plan.mask([1], weight=-0.5), "weight -0.5"),
        (lambda o: Plan.mask([1], weight=float("nan")), "weight nan"),
        (lambda o: Plan.mask([1], weight=1e39), r"weight 1e\+39 of a mask must be finite"),
        (lambda o: Plan.mask([1], steps=(1.5, 3)), "give two integers"),
        (lambda o: Schedule(o, Plan.prune(0.001, (1, 3))), "of 10 places is none"),
        (lambda o: Plan.mask([]), "at least one sample"),
        (lambda o: Plan.mask([-1]), "-1 is negative"),
        (lambda o: Plan.mask([1, 1]), "given twice"),
        (lambda o: Plan.mask([1.5]), "integers"),
        (lambda o: Plan.mask([1], steps=(3, 3)), "not a window"),
        (lambda o: Plan.insert([1], steps=(1, 2), copies=0), "copies is 0"),
        (lambda o: Plan.insert([1], steps=(1, 2), mode="even"), "mode 'even'"),
        (lambda o: Plan.insert([1], steps=(1, 2), placement="end"), "placement 'end'"),
        (lambda o: Plan.mask([1]) | Plan.mask([1, 2], weight=2.0), "weight 0.0 and weight 2.0"),
        (
            lambda o: Plan.mask([1]).bound(corpus_hash="a") | Plan.mask([2]).bound(corpus_hash="b"),
            "different corpora",
        ),
        (lambda o: BaseOrder(3, 4, 1), "3 rows, one batch needs 4"),
        (lambda o: BaseOrder(3, 0, 1), "at least 1"),
    ],
)
def test_what_cannot_be_is_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((ValueError, IndexError), match=message):
        make(BaseOrder(50, 5, 10))


def test_a_schedule_over_the_whole_pile_costs_no_memory() -> None:
    """146 million rows: nothing of the corpus' size is held."""
    import tracemalloc

    tracemalloc.start()
    schedule = Schedule(BaseOrder(146_432_000, 1024, 143_000), Plan.mask(range(1000)))
    assert len(np.unique(schedule.batch(142_999).sample_ids)) == 1024
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@given(seed=st.integers(0, 2**31), n=st.integers(1, 40))
def test_a_replacement_and_its_control_leave_the_same_base_samples(seed: int, n: int) -> None:
    """Each spares what the other treats, so neither removes treated samples of the other."""
    order = BaseOrder(400, 8, 60, seed=seed)
    pool = np.unique(np.concatenate([order.ids(step) for step in range(10, 40)]))
    ids = pool[:n]
    plan = Plan.insert(ids, steps=(10, 40), placement="replace").bound(seed=seed)
    treated, control = plan.with_random_control(pool, seed=seed + 1)
    standing = []
    for one in (treated, control):
        batches = [Schedule(order, one).batch(step) for step in range(10, 40)]
        standing.append([np.where(b.provenance == BASE, b.sample_ids, -1) for b in batches])
        assert sum((b.provenance == INSERTED).sum() for b in batches) == n
    np.testing.assert_array_equal(*standing)
    both = np.union1d(treated.treated_ids, control.treated_ids)
    assert np.isin(both, np.concatenate(standing[0])).all()
