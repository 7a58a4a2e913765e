"""Score tables come back as written, and rank as a loop over the samples would."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mda_lightning.store import ScoreTable

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


@given(st.integers(1, 30), st.integers(0, 99))
@settings(max_examples=20)
def test_a_table_comes_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, n: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, 2, 3)).astype(np.float32)
    ids = rng.integers(0, 10**12, n)
    path = tmp_path_factory.mktemp("t") / "scores"
    write(path, values, ids.tolist())
    table = ScoreTable.open(path)
    assert table.path == path.with_suffix(".parquet")
    assert (table.units, table.blocks, table.estimator) == (tuple(UNITS), tuple(BLOCKS), "in_run")
    assert table.provenance == {"damping": 0.1, "checkpoint": {"step": 900}}
    for u, unit in enumerate(UNITS):
        for k, block in enumerate(BLOCKS):
            got_ids, got = table.scores(unit, block)
            assert (got_ids == ids).all() and (got == values[:, u, k]).all()
        assert np.allclose(table.scores(unit)[1], values[:, u].sum(1), atol=1e-6)
        frame = table.frame(unit)
        assert frame["step"].tolist() == list(range(n)) and set(frame["unit"]) == {unit}
        assert np.allclose(frame["loss"], np.arange(n) / 7)
    assert len(table.frame()) == 2 * n


def test_the_columns_are_those_that_are_documented(tmp_path: Path) -> None:
    schema = pq.read_schema(write(tmp_path / "s.parquet", np.zeros((2, 2, 3)), [1, 2]).path)
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        "sample_id": "int64",
        "step": "int32",
        "unit": "dictionary<values=string, indices=int32, ordered=0>",
        "QK": "float",
        "V": "float",
        "O": "float",
        "score": "float",
        "loss": "float",
    }


@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(-3, 3) | st.just(float("nan"))),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 7),
)
@settings(max_examples=50)
def test_ranks_are_those_of_a_loop_over_samples(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, float]], count: int
) -> None:
    """Repeated samples are averaged, ties go by id, samples with a NaN are out and counted."""
    values = np.zeros((len(rows), 2, 3))
    values[:, 1, 0] = [score for _, score in rows]
    table = write(tmp_path_factory.mktemp("t") / "s", values, [i for i, _ in rows])
    means = {}
    for sample in {i for i, _ in rows}:
        mine = [score for i, score in rows if i == sample]
        means[sample] = sum(mine) / len(mine)
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
    else:
        assert not caught


def test_a_block_ranks_alone(tmp_path: Path) -> None:
    values = np.zeros((3, 2, 3))
    values[:, 1] = [[1, 0, 5], [3, 0, 0], [2, 0, 9]]
    table = write(tmp_path / "s", values, [10, 20, 30])
    assert table.top("L1H2", count=3).tolist() == [30, 10, 20]
    assert table.top("L1H2", count=3, block="QK").tolist() == [20, 30, 10]
    assert table.top("L1H2", fraction=0.01).tolist() == [30]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "mixed"}, "kept in two tables"),
        ({"values": np.zeros((3, 2, 2))}, r"\(3, 2, 2\)"),
        ({"loss": np.zeros(2)}, r"loss \(2,\)"),
        ({"units": ["L0H0", "L0H0"]}, "names repeat"),
        ({"blocks": ["QK", "V", "loss"]}, "names repeat"),
    ],
)
def test_tables_that_cannot_be_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "s", np.zeros((3, 2, 3)), [1, 2, 3], **change)
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_table_and_questions_it_cannot_answer(tmp_path: Path) -> None:
    table = write(tmp_path / "s", np.zeros((3, 2, 3)), [1, 2, 3])
    with pytest.raises(KeyError, match=r"L5H5.*L0H0, L1H2"):
        table.top("L5H5", count=1)
    with pytest.raises(KeyError, match="block 'MLP'"):
        table.scores("L0H0", "MLP")
    for wrong in ({}, {"count": 1, "fraction": 0.1}, {"fraction": 0.0}, {"fraction": 1.1}):
        with pytest.raises(ValueError, match="fraction"):
            table.top("L0H0", **wrong)
    with pytest.raises(FileNotFoundError, match=r"absent\.parquet"):
        ScoreTable.open(tmp_path / "absent")
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="not a Parquet file"):
        ScoreTable.open(tmp_path / "text.parquet")
    stored = pq.read_table(table.path)
    metadata = json.loads(stored.schema.metadata[b"mda_lightning"]) | {"schema_version": 99}
    newer = stored.replace_schema_metadata({b"mda_lightning": json.dumps(metadata)})
    pq.write_table(newer, tmp_path / "newer.parquet")
    with pytest.raises(ValueError, match="score schema 99"):
        ScoreTable.open(tmp_path / "newer")
    pq.write_table(stored.replace_schema_metadata({}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="not a score table"):
        ScoreTable.open(tmp_path / "other")
