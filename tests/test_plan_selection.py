"""Which samples a plan treats: against a loop over the rows of the table."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mda_lightning.base_order import BaseOrder
from mda_lightning.interventions import Insert, Mask, Plan, Replace, Source
from mda_lightning.interventions.from_scores import plan_from_scores, with_random_controls
from mda_lightning.interventions.id_files import read_ids
from mda_lightning.interventions.selection import samples_of, select
from mda_lightning.schedule import Schedule
from mda_lightning.store import ScoreTable

pytestmark = pytest.mark.filterwarnings("ignore:.* have no finite score:UserWarning")

UNITS, BLOCKS = ("L0H0", "L1H2", "L1H3"), ("QK", "V")
DOMAINS = ("code", "prose", "logs")
N = 60
ORDER = BaseOrder(N, 4, 15, seed=3)


def write(folder: Path, seed: int, *, n_rows: int = 90, steps: bool = True, **changes: Any):
    """A table in which samples repeat, tie and are not finite here and there."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, N, n_rows)
    values = rng.integers(-3, 4, (n_rows, len(UNITS), len(BLOCKS))).astype(np.float32)
    values[rng.random(values.shape) < 0.03] = np.nan
    names = np.array(DOMAINS)[np.arange(N) % 3]
    columns = {
        "sample_id": ids,
        "step": rng.integers(0, 15, n_rows) if steps else -1,
        "values": values,
        "domain": names[ids],
    } | changes
    return ScoreTable.write(
        folder,
        units=UNITS,
        blocks=BLOCKS,
        loss=np.zeros(n_rows),
        estimator="in_run",
        provenance={"data": {"corpus_hash": "c" * 64}},
        **columns,
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ScoreTable:
    return write(tmp_path_factory.mktemp("scores") / "induction", 0)


@pytest.fixture(scope="module")
def without_steps(tmp_path_factory: pytest.TempPathFactory) -> ScoreTable:
    return write(tmp_path_factory.mktemp("scores") / "replay", 1, steps=False)


def by_loop(
    table: ScoreTable,
    units: list[str],
    *,
    fraction: float | None,
    count: int | None,
    which: str,
    block: str | None,
    window: tuple[int, int] | None,
    domains: list[str],
    exclude_domains: list[str],
    exclude: list[int],
) -> list[int] | None:
    """Row by row, sample by sample; None where too few are left."""
    frame = table.frame()
    places: dict[int, tuple[int, int]] = {}
    for number, unit in enumerate(units):
        scores: dict[int, list[float]] = {}
        for row in frame[frame.unit == unit].itertuples():
            in_window = window is None or window[0] <= row.step < window[1]
            if not in_window and row.step == -1 and window is not None:
                met = [int(i) for step in range(*window) for i in ORDER.ids(step)]
                in_window = row.sample_id in met
            of_domain = not domains or row.domain in domains
            if not in_window or not of_domain or row.domain in exclude_domains:
                continue
            if row.sample_id not in exclude:
                score = row.score if block is None else getattr(row, block)
                if math.isfinite(score):
                    scores.setdefault(row.sample_id, []).append(score)
        means = {i: sum(own) / len(own) for i, own in scores.items()}
        sign = -1 if which == "top" else 1
        ranked = sorted(means, key=lambda i: (sign * means[i], i))
        wanted = count or max(1, round((fraction or 0) * len(means)))
        if wanted > len(ranked) or not ranked:
            return None
        for place, sample in enumerate(ranked[:wanted]):
            places[sample] = min(places.get(sample, (place, number)), (place, number))
    return sorted(places, key=lambda i: places[i])


@given(data=st.data())
def test_a_selection_is_what_a_loop_gives(
    table: ScoreTable, without_steps: ScoreTable, data: st.DataObject
) -> None:
    own = data.draw(st.sampled_from([table, without_steps]))
    by_share = data.draw(st.booleans())
    start = data.draw(st.integers(0, 13))
    wanted = data.draw(st.lists(st.sampled_from(DOMAINS), max_size=2, unique=True))
    settings: dict[str, Any] = {
        "fraction": data.draw(st.floats(0.01, 1.0)) if by_share else None,
        "count": None if by_share else data.draw(st.integers(1, 12)),
        "which": data.draw(st.sampled_from(["top", "bottom"])),
        "block": data.draw(st.sampled_from([None, *BLOCKS])),
        "window": data.draw(st.sampled_from([None, (start, start + 2), (start, 15)])),
        "domains": wanted,
        "exclude_domains": data.draw(
            st.lists(st.sampled_from([d for d in DOMAINS if d not in wanted]), max_size=1)
        ),
        "exclude": data.draw(st.lists(st.integers(0, N - 1), max_size=15)),
    }
    units = data.draw(st.lists(st.sampled_from(UNITS), min_size=1, unique=True))
    expected = by_loop(own, units, **settings)
    try:
        found = select(own, units, order=ORDER, **settings)
    except ValueError:
        # Too few are left, or no sample of a domain lies in the window.
        present = select_domains(own, settings["window"])
        named = {*settings["domains"], *settings["exclude_domains"]}
        assert expected is None or not named <= present
        return
    assert found.ids.tolist() == expected
    assert set(found.ids.tolist()) <= set(found.pool.tolist())
    assert not set(found.pool.tolist()) & set(settings["exclude"])


def select_domains(table: ScoreTable, window: tuple[int, int] | None) -> set[str]:
    frame = table.frame(UNITS[0])
    if window is not None:
        met = {int(i) for step in range(*window) for i in ORDER.ids(step)}
        inside = (frame.step >= window[0]) & (frame.step < window[1])
        frame = frame[inside | ((frame.step == -1) & frame.sample_id.isin(met))]
    return set(frame.domain)


def test_without_conditions_it_is_the_tables_own(table: ScoreTable) -> None:
    with pytest.warns(UserWarning, match="no finite score"):
        expected = table.top(UNITS, fraction=0.2)
    assert select(table, UNITS, fraction=0.2).ids.tolist() == expected.tolist()


def test_domains_may_come_from_the_corpus(table: ScoreTable) -> None:
    own = select(table, "L1H2", count=5, domains=["logs"])
    given = select(
        table, "L1H2", count=5, domains=["c"], domain_of=lambda ids: ["abc"[i % 3] for i in ids]
    )
    assert own.ids.tolist() == given.ids.tolist()
    assert set(own.ids % 3) == {2}


def test_what_is_wrong_with_a_selection(
    table: ScoreTable, without_steps: ScoreTable, tmp_path: Path
) -> None:
    for settings, message in (
        ({"units": "L9H9"}, "'L9H9' is not in .*: it has L0H0, L1H2, L1H3"),
        ({"units": []}, "no unit"),
        ({"block": "O"}, "'O' is not in .*: it has QK, V"),
        ({"fraction": 1.5}, r"1\.5; it is a share"),
        ({"fraction": float("nan")}, "nan; it is a share"),
        ({"fraction": None}, "one of the two"),
        ({"count": 3}, "one of the two"),
        ({"fraction": None, "count": 0}, "count is 0"),
        ({"fraction": None, "count": 1000}, "1000 samples were asked for of L1H2, [0-9]+ with"),
        ({"which": "best"}, "'top' or 'bottom'"),
        ({"window": (5, 5)}, "half-open"),
        ({"window": (100, 200)}, "no sample of steps 100:200: its rows have steps 0 to 14"),
        ({"domains": ["poems"]}, "no sample is of domain 'poems'; there are code, logs, prose"),
        ({"exclude": np.arange(N)}, "no sample of .* is left.*exclude fewer"),
    ):
        arguments: dict[str, Any] = {"units": "L1H2", "fraction": 0.1} | settings
        with pytest.raises(ValueError, match=message):
            select(table, arguments.pop("units"), **arguments)
    with pytest.raises(ValueError, match=r"90 of the 90 rows .* have no step.*give order="):
        select(without_steps, "L1H2", fraction=0.1, window=(2, 5))
    with pytest.raises(ValueError, match="no window of a run of 15 steps"):
        select(without_steps, "L1H2", fraction=0.1, window=(2, 50), order=ORDER)
    nothing = write(tmp_path / "nan", 0, values=np.full((90, 3, 2), np.nan))
    with pytest.raises(ValueError, match="L1H2 has no finite score"):
        select(nothing, "L1H2", fraction=0.1)
    bare = write(tmp_path / "bare", 0, domain=None)
    with pytest.raises(ValueError, match=r"domain_of=rows\.domains"):
        select(bare, "L1H2", fraction=0.1, domains=["code"])


def test_scored_samples_of_other_corpora_are_chosen_where_they_are_named(tmp_path: Path) -> None:
    source = Source("new", "5" * 64, 10, 9)
    ids = np.concatenate([np.arange(20), source.ids()])
    values = np.arange(30.0)[:, None, None] * np.ones((1, 3, 2))
    table = write(
        tmp_path / "t", 0, n_rows=30, sample_id=ids, values=values, step=3, domain=["a"] * 30
    )
    found = select(table, "L1H2", count=3)
    assert found.ids.tolist() == [19, 18, 17] and found.n_foreign == 10
    found = select(table, "L1H2", count=3, sources=[source])
    assert found.ids.tolist() == source.ids([9, 8, 7]).tolist() and found.n_foreign == 0
    plan = plan_from_scores(table, "L1H2", action="insert", count=3, steps=(0, 5), sources=[source])
    assert Schedule(ORDER, plan).batch(0) is not None


# -- exclusions -----------------------------------------------------------------------------------


def test_exclusions_are_ids_plans_and_files(table: ScoreTable, tmp_path: Path) -> None:
    first = select(table, "L1H2", count=10).ids
    rest = select(table, "L1H2", count=10, exclude=first).ids
    assert not set(first) & set(rest)
    plan = Plan.mask(first)
    plan.save(tmp_path / "plan.json")
    np.save(tmp_path / "ids.npy", first)
    (tmp_path / "ids.txt").write_text("\n".join(map(str, first)))
    (tmp_path / "ids.csv").write_text("sample_id,score\n" + "".join(f"{i},0.5\n" for i in first))
    (tmp_path / "ids.json").write_text(json.dumps([int(i) for i in first]))
    for exclude in (plan, *sorted(tmp_path.iterdir()), str(tmp_path / "ids.npy")):
        assert select(table, "L1H2", count=10, exclude=exclude).ids.tolist() == rest.tolist()
    both = [Plan.mask(first[:4]), tmp_path / "ids.txt"]
    assert select(table, "L1H2", count=10, exclude=both).ids.tolist() == rest.tolist()


def test_files_of_sample_ids(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("7 3\n3 12\n")
    assert read_ids(tmp_path / "ids.txt").tolist() == [7, 3, 12]
    (tmp_path / "one.csv").write_text("id\n5\n4\n")
    assert read_ids(tmp_path / "one.csv").tolist() == [5, 4]
    (tmp_path / "ids.json").write_text('{"sample_ids": [2, 1]}')
    assert read_ids(tmp_path / "ids.json").tolist() == [2, 1]
    for name, text, message in (
        ("a.txt", "7 x", "invalid literal"),
        ("b.txt", "", "no sample id"),
        ("c.txt", "-3", "ids count from 0"),
        ("d.json", "[1.5]", r"1\.5 is not an integer"),
        ("e.json", "{", "not valid JSON"),
        ("f.csv", "a,b\n1,2\n", "no column 'sample_id': a, b"),
        ("g.csv", "sample_id\n1.5\n", "integers"),
        ("h.doc", "1", "ends in none of"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_ids(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no file of sample ids"):
        read_ids(tmp_path / "absent.txt")


# -- plans ----------------------------------------------------------------------------------------


def test_a_plan_in_one_call_and_its_controls(table: ScoreTable) -> None:
    plan, *controls = plan_from_scores(
        table,
        ["L0H0", "L1H2"],
        fraction=0.2,
        window=(2, 9),
        order=ORDER,
        seed=5,
        control_seed=[1, 2, 3],
    )
    chosen = select(table, ["L0H0", "L1H2"], fraction=0.2, window=(2, 9))
    (mask,) = plan.operations
    assert mask.steps == (2, 9) and mask.named_ids.tolist() == sorted(chosen.ids)
    assert plan.corpus_hash == "c" * 64 and plan.order == ORDER and plan.seed == 5
    assert plan.source["fraction"] == 0.2 and plan.source["window"] == [2, 9]
    assert plan.name == "mask-top-L0H0+L1H2"
    assert [c.name[-9:] for c in controls] == ["-random-1", "-random-2", "-random-3"]
    for control in controls:
        assert len(control.treated_ids) == len(plan.treated_ids)
        assert not set(control.treated_ids) & set(plan.treated_ids)
        assert set(control.treated_ids) <= set(chosen.pool.tolist())
        assert control.source["control_of"] == plan.content_hash
    assert len({tuple(c.treated_ids) for c in controls}) == 3
    again = plan_from_scores(
        table, ["L0H0", "L1H2"], fraction=0.2, window=(2, 9), order=ORDER, seed=5
    )
    assert again.content_hash == plan.content_hash


def test_insertions_that_replace_and_their_controls_take_the_same_places(
    table: ScoreTable,
) -> None:
    plan, *controls = plan_from_scores(
        table,
        "L1H2",
        action="insert",
        placement="replace",
        count=4,
        window=(0, 15),
        order=ORDER,
        control_seed=[1, 2],
    )
    places = []
    for one in (plan, *controls):
        schedule = Schedule(ORDER, one)
        batches = [schedule.batch(step) for step in range(len(schedule))]
        places.append(np.concatenate([b.provenance for b in batches]).tolist())
        for other in (plan, *controls):
            # What any of them treats keeps its places in the base order.
            base = np.concatenate([b.sample_ids[b.provenance == 0] for b in batches])
            met = np.concatenate([ORDER.ids(step) for step in range(15)])
            for sample in other.treated_ids:
                assert (base == sample).sum() == (met == sample).sum()
    assert places[0] == places[1] == places[2] and sum(places[0]) == 4


def test_replacing_the_chosen(table: ScoreTable) -> None:
    plan, control = plan_from_scores(
        table, "L1H2", action="replace", count=4, window=(0, 15), order=ORDER, control_seed=2
    )
    chosen = select(table, "L1H2", count=4, window=(0, 15))
    (operation,) = plan.operations
    (of_control,) = control.operations
    assert isinstance(operation, Replace) and isinstance(of_control, Replace)
    assert set(operation.sample_ids) == set(chosen.ids)
    assert not set(operation.by) & set(chosen.ids) and set(operation.by) <= set(chosen.pool)
    # In the control others go out and the same come in.
    assert set(of_control.by) == set(operation.by)
    assert not set(of_control.sample_ids) & (set(operation.sample_ids) | set(operation.by))
    given = plan_from_scores(table, "L1H2", action="replace", count=2, window=(0, 15), by=[50, 51])
    best_first = dict(zip(chosen.ids[:2].tolist(), [50, 51], strict=True))
    (operation,) = given.operations
    pairs = dict(zip(operation.sample_ids.tolist(), operation.by.tolist(), strict=True))
    assert pairs == best_first


def test_which_side_of_a_replacement_is_random(table: ScoreTable) -> None:
    plan = Plan.replace(steps=(0, 15), sample_ids=[1, 2], by=[3, 4])
    _, (control,) = with_random_controls(plan, np.arange(N), [0])
    assert control.operations[0].sample_ids.tolist() == [1, 2]
    _, (control,) = with_random_controls(plan, np.arange(N), [0], treated="out")
    assert set(control.operations[0].by) == {3, 4}
    assert not set(control.operations[0].sample_ids) & {1, 2, 3, 4}
    with pytest.raises(ValueError, match="does not only replace"):
        with_random_controls(Plan.mask([1]), np.arange(N), [0], treated="out")


@pytest.mark.parametrize("placement", ["replace", None])
def test_the_control_of_a_steered_run_masks_as_many_in_every_step(placement: Any) -> None:
    """Of step by step masks, the stand-ins are samples of that very step."""
    order = BaseOrder(400, 10, 30)
    schedule, operations, rng = Schedule(order), list[Any](), np.random.default_rng(0)
    if placement:
        # Samples of earlier steps, of which some are masked where they were inserted.
        ids = np.unique(np.concatenate([order.ids(step) for step in (0, 1)]))
        operations.append(Insert(ids, (8, 16), placement=placement, online=True))
        schedule = schedule.extended(operations, 8)
    for step in range(6, 30, 2):
        ids = rng.choice(np.unique(schedule.batch(step).sample_ids), 3, replace=False)
        masks = [Mask(ids, (step, step + 1), 0.0, "all", "run", online=True)]
        schedule, operations = schedule.extended(masks, step), operations + masks
    plan = schedule.plan.bound(order=order, seed=0)
    pool = np.unique(order.at(np.arange(300)))
    excluded = order.ids(20)[:3]
    treated, (control, other) = with_random_controls(plan, pool, [3, 4], exclude=excluded)
    assert not set(control.treated_ids) & (set(treated.treated_ids) | set(excluded))
    assert control.content_hash != other.content_hash
    own = control.operations[len(control.operations) - 12 :]
    streams = [Schedule(order, one) for one in (treated, control)]
    for step in range(30):
        one, same = (schedule.batch(step) for schedule in streams)
        assert (one.provenance == same.provenance).all()
        if not placement:
            assert (
                (one.weights == 0).sum()
                == (same.weights == 0).sum()
                == 3 * (step >= 6 and step % 2 == 0)
            )
    for op in own:
        assert isinstance(op, Mask) and op.steps is not None and len(op.sample_ids) == 3
        base = set(order.ids(op.steps[0]).tolist())
        stand_ins = {int(i) for one in control.operations[: len(operations) - 12]
                     for i in one.named_ids}  # fmt: skip
        assert set(op.sample_ids.tolist()) <= base | stand_ins
    if not placement:
        with pytest.raises(ValueError, match=r"bound\(order=...\)"):
            Plan(tuple(operations)).random_control(pool, 3)
        few = np.concatenate([order.ids(step) for step in range(25)])
        with pytest.raises(ValueError, match=r"needs 3 samples of steps \(26, 27\).* 0 are left"):
            plan.random_control(few, 3)


def test_what_it_takes_to_draw_controls_of_a_replaced_window() -> None:
    plan = Plan.replace(steps=(2, 4), by_steps=(0, 1))
    pool = np.arange(N)
    with pytest.raises(ValueError, match=r"bound\(order=...\)"):
        with_random_controls(plan, pool, [1])
    same, (control,) = with_random_controls(plan, pool, [1], order=ORDER)
    assert same.content_hash == plan.content_hash == control.source["control_of"]
    assert control.order is None and control.operations[0].by is not None
    told = np.concatenate([ORDER.ids(step) for step in (0, 2, 3)])
    assert not np.intersect1d(control.operations[0].by, told).size


def test_what_is_wrong_with_a_plan_from_scores(table: ScoreTable, tmp_path: Path) -> None:
    for settings, message in (
        ({"action": "delete"}, "not one of 'mask', 'insert', 'replace'"),
        ({"action": "insert"}, "takes a window"),
        ({"corpus_hash": "d" * 64}, "are of corpus cccccccccccc, the one given is dddddddddddd"),
        ({"weight": -1.0}, "weight -1.0 .* at least 0"),
        ({"weight": float("inf")}, "finite"),
        ({"action": "replace", "steps": (0, 5), "by": [1]}, "1 come in"),
        ({"fraction": 0.7, "control_seed": 0}, "random control needs"),
    ):
        arguments: dict[str, Any] = {"fraction": 0.1} | settings
        with pytest.raises(ValueError, match=message):
            plan_from_scores(table, "L1H2", **arguments)
    with pytest.raises(FileNotFoundError, match="no score table"):
        plan_from_scores(tmp_path / "absent", "L1H2", fraction=0.1)
    with pytest.warns(UserWarning, match="chosen samples are not in steps 0:1"):
        plan_from_scores(table, "L1H2", fraction=0.5, steps=(0, 1), order=ORDER)


def test_samples_of_a_window() -> None:
    expected = sorted({int(i) for step in range(3, 8) for i in ORDER.ids(step)})
    assert samples_of(ORDER, (3, 8)).tolist() == expected


def test_samples_of_another_corpus_are_inserted_by_their_scores(table: ScoreTable) -> None:
    """The ids of the table are then rows of that corpus."""
    other = Source("other", "c" * 64, N, 9)
    plan, control = plan_from_scores(
        table, "L1H2", action="insert", count=3, steps=(0, 5), rows_of=other, control_seed=1
    )
    best = select(table, "L1H2", count=3)
    assert set(plan.treated_ids) == set(other.ids(best.ids)) and plan.sources == (other,)
    assert set(control.treated_ids) <= set(other.ids(best.pool)) - set(plan.treated_ids)
    assert plan.corpus_hash is None  # that of the run is not the scored one
    for settings, message in (
        ({"action": "mask"}, "they can be inserted"),
        ({"window": (2, 9)}, "have no window"),
        ({"rows_of": Source("other", "d" * 64, N, 9)}, "are of corpus cccccccccccc"),
        ({"rows_of": Source("other", "c" * 64, 5, 9)}, "rows 0..4; were these scores"),
    ):
        arguments: dict[str, Any] = {"action": "insert", "rows_of": other} | settings
        with pytest.raises(ValueError, match=message):
            plan_from_scores(table, "L1H2", count=3, steps=(0, 5), **arguments)


def test_samples_without_a_score_are_in_no_control(tmp_path: Path) -> None:
    """They are no candidates: what is compared are samples that could have been chosen."""
    values = np.ones((40, 1, 1))
    values[10:, 0, 0] = np.nan
    values[:4] = 2.0
    table = ScoreTable.write(
        tmp_path / "t",
        sample_id=np.arange(40),
        step=0,
        units=["L0H0"],
        blocks=["QK"],
        values=values,
        loss=np.zeros(40),
        estimator="replay",
        provenance={},
    )
    chosen = select(table, "L0H0", count=4)
    assert chosen.pool.tolist() == list(range(10)) and chosen.n_not_finite == 30
    for seed in range(5):
        _, control = plan_from_scores(table, "L0H0", count=4, control_seed=seed)
        assert set(control.treated_ids) <= set(range(4, 10))


def test_plans_alone_import_no_tables() -> None:
    """What reads tables comes with the same import, when it is asked for."""
    code = (
        "import sys\n"
        "from mda_lightning.interventions import Plan\n"
        "assert 'pandas' not in sys.modules and 'mda_lightning.store' not in sys.modules\n"
        "from mda_lightning.interventions import plan_from_scores, select\n"
        "from mda_lightning.interventions import from_scores, selection\n"
        "assert plan_from_scores is from_scores.plan_from_scores and select is selection.select\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
