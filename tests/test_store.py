"""Score tables come back as written, and rank as a loop over the samples would."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mda_lightning.store import ScoreTable, layout

UNITS, BLOCKS = ["L0H0", "L1H2"], ["QK", "V", "O"]


def write(path: Path, scores: np.ndarray, sample_id: list[int], **more: object) -> ScoreTable:
    arguments: dict[str, object] = {
        "sample_id": sample_id,
        "step": np.arange(len(sample_id)),
        "units": UNITS,
        "blocks": BLOCKS,
        "values": scores,
        "loss": np.arange(len(sample_id)) / 7,
        "estimator": "in_run",
        "provenance": {"damping": 0.1, "checkpoint": {"step": 900}},
    }
    return ScoreTable.write(path, **(arguments | more))  # type: ignore[arg-type]


@given(st.integers(0, 30), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_table_comes_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, n: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, 2, 3)).astype(np.float32)
    ids = rng.integers(0, 10**12, n)
    path = tmp_path_factory.mktemp("t") / "scores"
    write(path, values, ids.tolist(), ihvp_step=np.arange(n) // 4 * 4)
    table = ScoreTable.open(path)
    assert (table.folder, len(table), table.complete) == (path, n, True)
    assert (table.units, table.blocks, table.estimator) == (tuple(UNITS), tuple(BLOCKS), "in_run")
    assert table.provenance == {"damping": 0.1, "checkpoint": {"step": 900}}
    for u, unit in enumerate(UNITS):
        for k, block in enumerate(BLOCKS):
            got_ids, got = table.scores(unit, block)
            assert (got_ids == ids).all() and (got == values[:, u, k]).all()
        total = (values[:, u, 0] + values[:, u, 1]) + values[:, u, 2]
        assert table.scores(unit)[1].dtype == np.float32 and (table.scores(unit)[1] == total).all()
        frame = table.frame(unit)
        assert frame["step"].tolist() == list(range(n)) and set(frame["unit"]) <= {unit}
        assert frame["ihvp_step"].tolist() == [step // 4 * 4 for step in range(n)]
        assert np.allclose(frame["loss"], np.arange(n) / 7) and (frame["score"] == total).all()
    assert len(table.frame()) == 2 * n


def test_the_columns_are_those_that_are_documented(tmp_path: Path) -> None:
    table = write(tmp_path / "s", np.zeros((2, 2, 3)), [1, 2], domain=["a", "b"])
    schema = ds.dataset(table.folder).schema
    scores = {f"{unit}.{block}": "float" for unit in UNITS for block in BLOCKS}
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        "sample_id": "int64",
        "step": "int32",
        "ihvp_step": "int32",
        "loss": "float",
        "domain": "string",
        **scores,
    }


@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(-3, 3) | st.just(float("nan"))),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 7),
)
@settings(max_examples=50, deadline=None)
def test_ranks_are_those_of_a_loop_over_samples(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, float]], count: int
) -> None:
    """Finite scores of a sample are averaged, ties go by id, those without are out and counted."""
    values = np.zeros((len(rows), 2, 3))
    values[:, 1, 0] = [score for _, score in rows]
    table = write(tmp_path_factory.mktemp("t") / "s", values, [i for i, _ in rows])
    means = {}
    for sample in {i for i, _ in rows}:
        mine = [score for i, score in rows if i == sample and not np.isnan(score)]
        means[sample] = sum(mine) / len(mine) if mine else float("nan")
    finite = sorted((i for i in means if not np.isnan(means[i])), key=lambda i: (-means[i], i))
    n_nan = len(means) - len(finite)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if count > len(finite):
            with pytest.raises(ValueError, match=f"has {len(finite)} with a finite score"):
                table.top("L1H2", count=count)
        else:
            assert table.top("L1H2", count=count).tolist() == finite[:count]
            backwards = sorted(finite, key=lambda i: (means[i], i))
            assert table.bottom("L1H2", count=count).tolist() == backwards[:count]
            share = max(1, round(0.3 * len(finite)))
            assert table.top("L1H2", fraction=0.3).tolist() == finite[:share]
    if n_nan:
        assert f"{n_nan} of {len(means)} samples have no finite score" in str(caught[0].message)
        assert caught[0].filename == __file__
    else:
        assert not caught
    assert table.n_not_finite == sum(np.isnan(score) for _, score in rows)


def test_many_rows_are_written_in_parts_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_SCORES_AT_ONCE", 6 * 40)
    step = np.random.default_rng(0).permutation(np.arange(100) // 4)
    table = write(tmp_path / "s", np.ones((100, 2, 3)), list(range(100)), step=step)
    held = [pd.read_parquet(path)["step"] for path in sorted(table.folder.glob("part-*"))]
    assert [len(one) for one in held] == [40, 40, 20]
    assert pd.concat(held).tolist() == sorted(step)


def test_a_block_ranks_alone(tmp_path: Path) -> None:
    values = np.zeros((3, 2, 3))
    values[:, 1] = [[1, 0, 5], [3, 0, 0], [2, 0, 9]]
    table = write(tmp_path / "s", values, [10, 20, 30])
    assert table.top("L1H2", count=3).tolist() == [30, 10, 20]
    assert table.top("L1H2", count=3, block="QK").tolist() == [20, 30, 10]
    assert table.top("L1H2", fraction=0.01).tolist() == [30]


@given(st.integers(1, 12), st.integers(0, 999), st.permutations("abc"), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_the_union_of_units_is_that_of_a_loop(
    tmp_path_factory: pytest.TempPathFactory, n: int, seed: int, units: list[str], n_asked: int
) -> None:
    asked = units[:n_asked]
    rng = np.random.default_rng(seed)
    values = rng.integers(-3, 4, (n, 3, 1)).astype(float)
    ids = rng.permutation(100)[:n]
    folder = tmp_path_factory.mktemp("t") / "s"
    table = write(folder, values, ids.tolist(), units=["a", "b", "c"], blocks=["QK"])
    count = int(rng.integers(1, n + 1))
    best: dict[int, tuple[int, int]] = {}
    for place, unit in enumerate(asked):
        scored = dict(zip(ids.tolist(), values[:, "abc".index(unit), 0], strict=True))
        order = sorted(scored, key=lambda i: (-scored[i], i))[:count]
        for rank, sample in enumerate(order):
            best[sample] = min(best.get(sample, (n, 0)), (rank, place))
    assert table.top(asked, count=count).tolist() == sorted(best, key=lambda i: best[i])


def test_samples_that_no_update_trained_on_have_no_step(tmp_path: Path) -> None:
    table = write(tmp_path / "s", np.ones((3, 2, 3)), [3, 1, 2], step=-1, estimator="replay")
    assert table.frame("L0H0")["sample_id"].tolist() == [1, 2, 3]
    assert len(table.steps(-1, 0, "L0H0")) == 3 and not len(table.steps(0, 9))
    assert set(table.frame()["ihvp_step"]) == {-1}


def test_several_units_rank_by_the_best_place_of_a_sample(tmp_path: Path) -> None:
    values = np.zeros((5, 2, 3))
    values[:, 0, 0] = [5, 4, 3, 2, 1]
    values[:, 1, 0] = [0, 300, 100, 0, 200]  # a hundred times the scale, and no more weight
    table = write(tmp_path / "s", values, [10, 20, 30, 40, 50])
    assert table.top(["L0H0", "L1H2"], count=1).tolist() == [10, 20]
    assert table.top(["L0H0", "L1H2"], count=2).tolist() == [10, 20, 50]
    assert table.top(["L1H2", "L0H0"], count=3).tolist() == [20, 10, 50, 30]
    assert table.bottom(["L0H0", "L1H2"], count=1).tolist() == [50, 10]
    with pytest.raises(ValueError, match="at least one"):
        table.top([], count=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "mixed"}, "kept in two tables"),
        ({"values": np.zeros((3, 2, 2))}, r"\(3, 2, 2\)"),
        ({"loss": np.zeros(2)}, r"loss \(2,\)"),
        ({"domain": ["a"]}, r"domain \(1,\)"),
        ({"step": -2}, "step is -2"),
        ({"ihvp_step": 2**31}, "ihvp_step is 2147483648"),
        ({"units": ["L0H0", "L0H0"]}, "names repeat"),
        ({"units": []}, "at least one"),
        ({"blocks": ["QK", "V", "loss"]}, "names repeat"),
        ({"provenance": {"damping": float("nan")}}, "JSON"),
    ],
)
def test_tables_that_cannot_be_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "s", np.zeros((3, 2, 3)), [1, 2, 3], **change)
    assert not list(tmp_path.iterdir())


def test_a_table_is_replaced_by_one_of_its_estimator_and_nothing_else_is(tmp_path: Path) -> None:
    write(tmp_path / "s", np.ones((3, 2, 3)), [1, 2, 3])
    table = write(tmp_path / "s", np.zeros((1, 2, 3)), [9])
    assert table.scores("L0H0")[0].tolist() == [9] and len(list(table.folder.iterdir())) == 2
    with pytest.raises(ValueError, match="holds in_run scores and these are of replay"):
        write(tmp_path / "s", np.zeros((1, 2, 3)), [9], estimator="replay")
    with pytest.raises(ValueError, match="something else than a score table"):
        write(tmp_path, np.zeros((1, 2, 3)), [9])
    assert ScoreTable.open(tmp_path / "s").scores("L0H0")[0].tolist() == [9]


def test_questions_a_table_cannot_answer(tmp_path: Path) -> None:
    table = write(tmp_path / "s", np.zeros((3, 2, 3)), [1, 2, 3])
    with pytest.raises(KeyError, match=r"L5H5.*L0H0, L1H2"):
        table.top("L5H5", count=1)
    with pytest.raises(KeyError, match="block 'MLP'"):
        table.scores("L0H0", "MLP")
    with pytest.raises(KeyError, match="sample 4 has no row"):
        table.sample(4)
    for wrong in ({}, {"count": 1, "fraction": 0.1}, {"fraction": 0.0}, {"fraction": 1.1}):
        with pytest.raises(ValueError, match="fraction"):
            table.top("L0H0", **wrong)


def test_folders_and_files_that_are_no_table(tmp_path: Path) -> None:
    table = write(tmp_path / "s", np.zeros((3, 2, 3)), [1, 2, 3])
    with pytest.raises(FileNotFoundError, match="absent"):
        ScoreTable.open(tmp_path / "absent")
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="not a Parquet file"):
        ScoreTable.open(tmp_path / "text.parquet")
    pd.DataFrame({"sample_id": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="not of a score table"):
        ScoreTable.open(tmp_path / "other.parquet")
    (part,) = table.folder.glob("part-*")
    with pytest.raises(ValueError, match="part of a score table; open its folder"):
        ScoreTable.open(part)
    old = pa.table({"sample_id": [1]}).replace_schema_metadata(
        {"mda_lightning": json.dumps({"kind": "scores", "schema_version": 1})}
    )
    pq.write_table(old, tmp_path / "old.parquet")
    with pytest.raises(ValueError, match="score schema 1, this version reads 2; score again"):
        ScoreTable.open(tmp_path / "old.parquet")
    file = table.folder / "_table.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {"schema_version": 99}))
    with pytest.raises(ValueError, match="score schema 99"):
        ScoreTable.open(table.folder)
    file.write_text(json.dumps(about | {"kind": "plan"}))
    with pytest.raises(ValueError, match="not of a score table"):
        ScoreTable.open(table.folder)
