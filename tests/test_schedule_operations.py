"""Replacements, prunings, further corpora and operations decided on the way, place by place."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stream_reference import base_stream, check_against_definition, whole

from mda_lightning.interventions import Insert, Mask, Operation, Plan, Prune, Replace, Source
from mda_lightning.sample_ids import split_ids
from mda_lightning.schedule import INSERTED, REPLACED, BaseOrder, Schedule, StreamDigest

orders = st.builds(
    BaseOrder,
    n_rows=st.integers(20, 60),
    batch_size=st.integers(1, 7),
    n_steps=st.integers(4, 15),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
)


@st.composite
def windows(draw: st.DrawFn, order: BaseOrder, first: int = 0) -> tuple[int, int]:
    start = draw(st.integers(first, order.n_steps - 1))
    return start, draw(st.integers(start + 1, order.n_steps))


def ids(draw: st.DrawFn, order: BaseOrder, most: int = 4) -> list[int]:
    return sorted(draw(st.sets(st.integers(0, order.n_rows - 1), min_size=1, max_size=most)))


@st.composite
def operations(draw: st.DrawFn, order: BaseOrder) -> Operation:
    kind = draw(st.sampled_from(["mask", "insert", "replace", "interval", "refill", "prune"]))
    steps = draw(windows(order))
    if kind == "mask":
        return Mask(
            np.array(ids(draw, order)),
            draw(st.none() | st.just(steps)),
            draw(st.sampled_from([0.0, 0.5, 2.0])),
            draw(st.sampled_from(["base", "all"])),
            draw(st.sampled_from(["base", "run"])),
        )
    if kind == "insert":
        return Insert(
            np.array(ids(draw, order)),
            steps,
            draw(st.sampled_from(["dispersed", "concentrated"])),
            draw(st.sampled_from(["shift", "replace"])),
            draw(st.integers(1, 2)),
        )
    if kind == "replace":
        out = ids(draw, order)
        return Replace(steps, np.array(out), np.array(draw(st.permutations(range(20)))[: len(out)]))
    if kind == "interval":
        return Replace(steps, by_steps=draw(windows(order)))
    if kind == "refill":
        return Replace(steps, by=np.array(ids(draw, order)))
    return Prune(
        draw(st.none() | st.just(steps)),
        draw(st.sampled_from([0.05, 0.5, 0.95, 1.0])),
        draw(st.sampled_from([0.0, 0.25])),
        draw(st.integers(0, 3)),
    )


@st.composite
def scheduled(draw: st.DrawFn) -> Schedule:
    """A schedule of one to four operations that do not contradict and that fit."""
    order = draw(orders)
    plan = Plan(seed=draw(st.integers(0, 3)))
    for _ in range(draw(st.integers(1, 4))):
        try:
            more = plan.with_operations([draw(operations(order))])
            Schedule(order, more)
        except ValueError as error:
            told = ("do not fit", "leave one of the two out", "outside the run", "is none")
            assert any(words in str(error) for words in told)
        else:
            plan = more
    return Schedule(order, plan)


@given(scheduled())
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_place_holds_what_the_plan_says(schedule: Schedule) -> None:
    check_against_definition(schedule)


def test_a_replacement_by_fewer_takes_each_once_a_round() -> None:
    """14 places by 4 samples: three rounds with each once, and a started one."""
    order = BaseOrder(40, 7, 6, seed=1)
    stream = whole(Schedule(order, Plan.replace(steps=(2, 4), by=[30, 31, 32, 33])))
    new = stream.sample_ids[14:28]
    assert (stream.provenance[14:28] == REPLACED).all()
    rounds = [new[i : i + 4].tolist() for i in range(0, 12, 4)]
    assert all(sorted(one) == [30, 31, 32, 33] for one in rounds)
    assert len(set(new[12:].tolist())) == 2
    assert len({tuple(one) for one in rounds}) > 1


def test_one_intervals_samples_by_anothers_in_their_order() -> None:
    order = BaseOrder(400, 10, 30, seed=2)
    base = base_stream(order, 300)
    stream = whole(Schedule(order, Plan.replace(steps=(14, 15), by_steps=(10, 11))))
    assert (stream.sample_ids[140:150] == base[100:110]).all()
    assert (np.delete(stream.sample_ids, range(140, 150)) == np.delete(base, range(140, 150))).all()


@pytest.mark.parametrize("fraction", [0.95, 0.12395, 1.0])
def test_a_pruning_takes_its_share_exactly_and_at_random(fraction: float) -> None:
    order = BaseOrder(5000, 10, 300)
    counts = np.zeros(2000)
    for seed in range(40):
        plan = Plan.prune(fraction, (50, 250)).bound(seed=seed)
        weights = whole(Schedule(order, plan)).weights
        assert (weights[500:2500] == 0).sum() == round(fraction * 2000)
        assert (weights[:500] == 1).all() and (weights[2500:] == 1).all()
        counts += weights[500:2500] == 0
    if fraction < 1:
        # By place the number of hits is binomial(40, f): its variance, to four standard errors.
        expected = 40 * fraction * (1 - fraction)
        assert abs(counts.var() - expected) < 4 * expected * np.sqrt(2 / 2000) + 0.05
    other = whole(Schedule(order, Plan.prune(fraction, (50, 250), draw=1))).weights
    first = whole(Schedule(order, Plan.prune(fraction, (50, 250)))).weights
    assert fraction == 1 or (other != first).any()


def test_a_whole_runs_pruning_takes_its_share_of_every_pass() -> None:
    """However long the run is, and of the base samples that fill a shift's last step too."""
    short, long = (BaseOrder(500, 10, n_steps, seed=1) for n_steps in (90, 200))
    plan = Plan.prune(0.3)
    weights = whole(Schedule(long, plan)).weights
    assert ((weights.reshape(4, 500) == 0).sum(1) == 150).all()
    assert len({tuple(one) for one in weights.reshape(4, 500)}) == 4
    shifted = whole(Schedule(short, plan | Plan.insert(range(7), steps=(0, 1))))
    kept = shifted.weights[shifted.provenance != INSERTED]
    assert (kept == weights[: len(kept)]).all()


def test_weights_multiply() -> None:
    order = BaseOrder(50, 5, 8)
    twice = Plan.prune(1.0, (2, 4), weight=0.5) | Plan.prune(1.0, (3, 5), weight=0.25)
    weights = whole(Schedule(order, twice | Plan.mask(range(50), (3, 4), weight=2.0))).weights
    by_step = weights.reshape(8, 5)
    assert (by_step == by_step[:, :1]).all()
    assert by_step[:, 0].tolist() == [1, 1, 0.5, 0.25, 0.25, 1, 1, 1]
    masked = Schedule(order, Plan.mask(range(50), (3, 6), weight=0.5))
    online = [Mask(np.arange(50), (4, 7), 0.5, "all", "run", online=True)] * 2
    weights = whole(masked.extended(online, 4)).weights.reshape(8, 5)
    assert weights[:, 0].tolist() == [1, 1, 1, 0.5, 0.125, 0.125, 0.25, 1]


def test_a_mask_of_one_place_at_a_blocks_edge() -> None:
    order = BaseOrder(9000, 1, 9000, shuffle=False)
    for step in (4095, 4096, 8191):
        schedule = Schedule(order, Plan.mask(range(9000), (step, step + 1)))
        weights = [float(schedule.batch(k).weights[0]) for k in range(step - 1, step + 2)]
        assert weights == [1, 0, 1]


# -- operations decided on the way ----------------------------------------------------------------


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_decided_on_the_way_leaves_the_past_as_it_was(data: st.DataObject) -> None:
    """Operation after operation, each from a later step; and the whole is an ordinary plan."""
    schedule = data.draw(scheduled())
    order = schedule.order
    now = 0
    for _ in range(data.draw(st.integers(1, 4))):
        now = data.draw(st.integers(now, order.n_steps - 1))
        first = schedule.base_step_at(now)
        decided: list[Operation] = []
        if data.draw(st.booleans()):
            batch = schedule.batch(now)
            some = batch.sample_ids[:: data.draw(st.integers(1, 3))]
            decided.append(Mask(np.unique(some), (now, now + 1), 0.0, "all", "run", online=True))
        if first < order.n_steps and data.draw(st.booleans()):
            steps = data.draw(windows(order, first))
            named = np.array(ids(data.draw, order))
            placement = data.draw(st.sampled_from(["shift", "replace"]))
            decided.append(Insert(named, steps, "dispersed", placement, online=True))
        try:
            extended = schedule.extended(decided, now)
        except ValueError as error:
            assert "do not fit" in str(error)
            continue
        assert StreamDigest(extended).at(now) == StreamDigest(schedule).at(now)
        schedule = extended
    again = Schedule(order, schedule.plan)
    for one, other in zip(whole(schedule), whole(again), strict=True):
        np.testing.assert_array_equal(one, other)
    check_against_definition(schedule)


@given(st.integers(1, 23), st.integers(1, 6), st.sampled_from(["dispersed", "concentrated"]))
def test_the_first_base_step_after_a_step(n: int, size: int, mode: str) -> None:
    order = BaseOrder(60, size, 9)
    schedule = Schedule(order, Plan.insert(range(n), steps=(2, 5), mode=mode))  # type: ignore[arg-type]
    origins = schedule.base_positions(0, len(schedule))
    for step in range(len(schedule)):
        before = origins[: step * size]
        first = next(
            k for k in range(len(schedule) + 1) if not (before[before >= 0] >= k * size).any()
        )
        assert schedule.base_step_at(step) == first


def test_the_past_cannot_be_changed() -> None:
    order = BaseOrder(60, 5, 10)
    schedule = Schedule(order, Plan.insert(range(10), steps=(2, 4)))  # two steps more
    assert schedule.base_step_at(8) == 6
    late = Insert(np.array([3]), (6, 8), online=True)
    schedule.extended([late], 8)
    with pytest.raises(ValueError, match=r"at step 9, which is base step 7"):
        schedule.extended([late], 9)
    with pytest.raises(ValueError, match="has been trained on"):
        schedule.extended([Mask(np.array([3]), (7, 8), clock="run", online=True)], 8)
    with pytest.raises(ValueError, match="has been trained on"):
        schedule.extended([Mask(np.array([3]), online=True)], 8)
    with pytest.raises(ValueError, match="give clock='run'"):
        schedule.extended([Mask(np.array([3]), (8, 9), occurrences="all", online=True)], 8)
    with pytest.raises(ValueError, match="not an online operation"):
        schedule.extended([Mask(np.array([3]), (8, 9))], 2)
    with pytest.raises(ValueError, match="ends outside the run, which has 12 steps"):
        schedule.extended([Mask(np.array([3]), (11, 13), clock="run", online=True)], 8)


# -- further corpora ------------------------------------------------------------------------------


def source(name: str = "extra", digit: str = "ab", n_rows: int = 12) -> Source:
    return Source(name, digit * 32, n_rows, 9, None)


def test_inserted_samples_of_another_corpus_keep_their_ids_in_every_plan() -> None:
    order = BaseOrder(60, 5, 10)
    one, other = source(), source("more", "cd")
    plan = Plan.insert_rows(one, steps=(2, 8), placement="replace")
    both = Plan.insert_rows(other, steps=(2, 8)) | plan
    for made in (plan, both):
        stream = whole(Schedule(order, made))
        inserted = stream.sample_ids[stream.provenance == INSERTED]
        namespaces, rows = split_ids(inserted)
        mine = np.sort(rows[namespaces == one.namespace])
        assert mine.tolist() == list(range(12))
        assert set(one.ids().tolist()) <= set(inserted.tolist())
        check_against_definition(Schedule(order, made))
    assert both.sources == (other, one)
    control = plan.random_control(range(60), seed=1)
    assert control.treated_ids.max() < 60 and len(control.treated_ids) == 12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan.insert(source().ids(), steps=(1, 2)), "a source that it does not list"),
        (
            lambda: Plan.insert(source(n_rows=20).ids(), steps=(1, 9), sources=[source(n_rows=12)]),
            r"names sample 19, the source of inserted samples has rows 0\.\.11",
        ),
    ],
)
def test_samples_of_unknown_corpora_are_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        Schedule(BaseOrder(60, 5, 10), make())


# -- controls -------------------------------------------------------------------------------------


def test_the_control_of_a_replacement_keeps_its_places() -> None:
    order = BaseOrder(400, 10, 30)
    out, new = order.ids(14)[:5], order.ids(3)[:5]
    plan = Plan.replace(steps=(14, 15), sample_ids=out, by=new).bound(order=order)
    others = np.setdiff1d(np.arange(400), np.concatenate([out, new]))[:5]
    pool = np.concatenate([out, new, others])
    assert set(plan.random_control(pool, seed=3).operations[0].by.tolist()) == set(others.tolist())  # type: ignore[union-attr]
    control = plan.random_control(range(400), seed=3)
    streams = [whole(Schedule(order, one)) for one in (plan, control)]
    assert (streams[0].provenance == streams[1].provenance).all()
    (first,), (second,) = plan.operations, control.operations
    assert isinstance(first, Replace) and isinstance(second, Replace)
    assert second.by is not None and first.by is not None
    assert not np.intersect1d(second.by, np.concatenate([out, new])).size
    interval = Plan.replace(steps=(14, 16), by_steps=(3, 4))
    with pytest.raises(ValueError, match=r"bound\(order=...\) before drawing a control"):
        interval.random_control(range(400), seed=3)
    control = interval.bound(order=order).random_control(range(400), seed=3)
    (op,) = control.operations
    assert isinstance(op, Replace) and op.by is not None and len(op.by) == 10
    window = np.concatenate([order.ids(step) for step in (14, 15)])
    assert not np.intersect1d(op.by, np.concatenate([order.ids(3), window])).size
    others = np.setdiff1d(np.arange(400), np.concatenate([order.ids(3), window]))
    few = interval.bound(order=order).random_control(np.append(window, others[:10]), seed=3)
    assert set(few.operations[0].by.tolist()) == set(others[:10].tolist())  # type: ignore[union-attr]


@given(st.integers(0, 99), st.integers(1, 8))
def test_stand_ins_occur_as_often_as_the_samples(seed: int, n: int) -> None:
    """With two passes in the window, as many places are masked, in every step range."""
    order = BaseOrder(40, 10, 12, seed=seed)
    met = np.bincount(base_stream(order, 90)[20:], minlength=40)
    rng = np.random.default_rng(seed)
    often = rng.permutation(np.flatnonzero(met == 2))
    treated = np.append(
        often[: min(n, len(often) // 2)], rng.permutation(np.flatnonzero(met == 1))[:2]
    )
    plan = Plan.mask(treated, (2, 9)).bound(order=order)
    control = plan.random_control(range(40), seed=seed)
    weights = [whole(Schedule(order, one)).weights for one in (plan, control)]
    assert (weights[0] == 0).sum() == (weights[1] == 0).sum() == met[treated].sum()
    assert not np.intersect1d(control.treated_ids, treated).size
    rare = np.flatnonzero(met == 1)
    with pytest.warns(UserWarning, match="more or less often in the steps"):
        Plan.mask(often[:1], (2, 9)).bound(order=order).random_control(rare, seed=seed)


def test_the_controls_of_a_pruning_are_other_draws() -> None:
    order, plan = BaseOrder(400, 10, 30), Plan.prune(0.5, (3, 13))
    draws = [plan, *(plan.random_control([], seed=seed) for seed in (3, -3, 4))]
    weights = [whole(Schedule(order, one)).weights for one in draws]
    assert all((w == 0).sum() == 50 for w in weights)
    assert len({w.tobytes() for w in weights}) == 4


def test_a_later_mask_leaves_earlier_insertions_where_they_were() -> None:
    """So that a run can branch at step 5 to a plan that masks from there on."""
    order = BaseOrder(400, 10, 30)
    first = Plan.insert(range(40), steps=(0, 5), placement="replace")
    ids = np.unique(np.concatenate([order.ids(step) for step in range(5)]))[::3]
    both = first | Plan.mask(ids, (6, 9))
    assert StreamDigest(Schedule(order, first)).at(5) == StreamDigest(Schedule(order, both)).at(5)


# -- contradictions, bad values -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Plan.mask([1, 2], (0, 9)) | Plan.replace(steps=(3, 5), sample_ids=[2], by=[7]),
            "sample 2 is both masked and replaced",
        ),
        (lambda: Plan.mask([1], (3, 4)) | Plan.replace(steps=(3, 5), by=[7]), "meets none"),
        (
            lambda: Plan.replace(steps=(3, 5), by=[7]) | Plan.replace(steps=(4, 6), by=[8]),
            r"\(3, 5\) and \(4, 6\) overlap",
        ),
        (
            lambda: (
                Plan.replace(steps=(3, 5), sample_ids=[1, 2], by=[7, 8])
                | Plan.replace(steps=(4, 6), sample_ids=[2], by=[9])
            ),
            "sample 2 is replaced twice",
        ),
        (
            lambda: Plan.insert([4], steps=(1, 3)) | Plan.mask([4], (2, 5), occurrences="all"),
            "sample 4 is inserted in steps",
        ),
        (lambda: Plan.replace(steps=(3, 5), sample_ids=[1, 2], by=[7]), "2 samples .* by 1"),
        (lambda: Plan.replace(steps=(3, 5)), "by=ids or by_steps"),
        (lambda: Plan.replace(steps=(3, 5), by=[1], by_steps=(1, 2)), "one of the two"),
        (lambda: Plan.replace(steps=(3, 5), by=[]), "names no sample"),
        (lambda: Plan.prune(0.0), r"fraction 0.0 .* in \(0, 1\]"),
        (lambda: Plan.prune(float("nan")), "fraction nan"),
        (lambda: Plan.prune(0.5, weight=float("inf")), "weight inf of pruned places"),
        (lambda: Plan.duplicate([1], 1, steps=(1, 2)), "times is 1"),
    ],
)
def test_plans_that_cannot_be_meant_are_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


# -- the size of the Pile -------------------------------------------------------------------------


def test_windows_of_the_whole_pile_cost_no_memory() -> None:
    """146 million rows, windows of the whole run: memory is that of 300,000 samples."""
    order = BaseOrder(146_432_000, 1024, 143_000)
    tracemalloc.start()
    plan = (
        Plan.mask(range(100_000), (0, 1400))
        | Plan.prune(0.5)
        | Plan.insert(range(100_000), steps=(0, 143_000), placement="replace")
        | Plan.insert(range(200_000, 300_000), steps=(0, 143_000))
        | Plan.replace(steps=(1400, 1500), by_steps=(1900, 2000))
    )
    schedule = Schedule(order, plan)
    for step in (0, 1450, 70_000, len(schedule) - 1):
        assert len(schedule.batch(step).sample_ids) == 1024
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()
