"""Queries agree with plain pandas on the same rows, and read what they need of the files alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mda_lightning.corpora import TokenRows
from mda_lightning.store import ScoreRows, ScoreTable, ScoreWriter, layout

UNITS, BLOCKS = ("L0H0", "L0H1", "L1H0"), ("QK", "O")


def random_rows(rng: np.random.Generator, n: int, *, bad: float = 0.1) -> ScoreRows:
    """Few ids and steps, so that samples repeat; some scores are not finite."""
    values = rng.normal(size=(n, len(UNITS), len(BLOCKS))).astype(np.float32)
    kind = rng.random(values.shape)
    values[kind < bad] = np.nan
    values[kind < bad / 3] = np.inf
    return ScoreRows(
        rng.integers(0, 12, n),
        rng.integers(0, 6, n),
        values,
        rng.normal(4, 1, n).astype(np.float32),
        rng.integers(-1, 5, n),
        rng.choice(["code", "web"], n),
    )


def plain(rows: ScoreRows) -> pd.DataFrame:
    """The same rows, long, by pandas alone."""
    frames = []
    for u, unit in enumerate(UNITS):
        values = np.where(np.isfinite(rows.values[:, u]), rows.values[:, u], np.nan)
        frames.append(
            pd.DataFrame(
                {
                    "sample_id": rows.sample_id,
                    "step": rows.step,
                    "ihvp_step": rows.ihvp_step,
                    "loss": rows.loss,
                    "domain": rows.domain,
                    "unit": unit,
                    "QK": values[:, 0],
                    "O": values[:, 1],
                    "score": values[:, 0] + values[:, 1],
                }
            )
        )
    return pd.concat(frames)


def same(got: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Equal but for the order of rows and the width of integers."""
    columns = list(expected.columns)
    assert list(got.columns) == columns
    left, right = (
        frame.astype({"unit": str, "sample_id": int, "step": int, "ihvp_step": int})
        .sort_values(columns)
        .reset_index(drop=True)
        for frame in (got, expected)
    )
    pd.testing.assert_frame_equal(left, right, check_dtype=False, check_exact=True)


@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 999), st.integers(3, 20))
@settings(max_examples=15, deadline=None)
@pytest.mark.filterwarnings("ignore:.*have no finite score")
def test_queries_are_those_of_pandas(
    tmp_path_factory: pytest.TempPathFactory, n: int, n_ranks: int, seed: int, most_held: int
) -> None:
    """Whatever ranks wrote the rows, and into however many parts."""
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, n)
    folder = tmp_path_factory.mktemp("t") / "scores"
    writers = [
        ScoreWriter(
            folder,
            units=UNITS,
            blocks=BLOCKS,
            estimator="in_run",
            rank=rank,
            domains=True,
            most_held=most_held,
        )
        for rank in range(n_ranks)
    ]
    for i in range(n):
        writers[rng.integers(n_ranks)].add(rows.where(np.array([i])))
    for writer in writers:
        writer.flush()
    table = writers[0].finish({"seed": seed})
    expected = plain(rows)
    assert len(table) == n and table.n_not_finite == rows.n_not_finite
    same(table.frame(), expected)
    first, last = sorted(rng.integers(0, 7, 2).tolist())
    inside = expected[(expected["step"] >= first) & (expected["step"] < last)]
    same(table.steps(first, last), inside)
    same(table.steps(first, last, "L0H1"), inside[inside["unit"] == "L0H1"])
    sample = int(rng.choice(rows.sample_id))
    same(table.sample(sample), expected[expected["sample_id"] == sample])
    unit, block = str(rng.choice(UNITS)), rng.choice([None, *BLOCKS])
    of_unit = expected[expected["unit"] == unit].astype({block or "score": np.float64})
    by_sample = of_unit.groupby("sample_id")[block or "score"].mean()
    ids, means = table.mean_scores(unit, block)
    assert ids.tolist() == by_sample.index.tolist()
    np.testing.assert_allclose(means, by_sample, rtol=1e-6)
    finite = by_sample.dropna()
    if len(finite):
        order = finite.reset_index().sort_values(
            [block or "score", "sample_id"], ascending=[False, True]
        )["sample_id"]
        count = int(rng.integers(1, len(finite) + 1))
        assert table.top(unit, count=count, block=block).tolist() == order[:count].tolist()
        low = finite.nsmallest(count)
        assert table.bottom(unit, count=count, block=block).tolist() == low.index.tolist()
    names = {int(i): "even" if i % 2 == 0 else "odd" for i in by_sample.index}
    grouped = by_sample.groupby(names)
    for domains in (names, ["even", "odd"] * 6, lambda ids: [names[int(i)] for i in ids]):
        got = table.by_domain(unit, domains, block=block)
        assert got.index.tolist() == sorted(set(names.values()))
        assert got["n"].tolist() == grouped.count().tolist()
        assert (got["n"] + got["n_not_finite"]).tolist() == grouped.size().tolist()
        np.testing.assert_allclose(got["mean"], grouped.mean(), rtol=1e-6)
        np.testing.assert_allclose(got["std"], grouped.std(ddof=0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(got["sum"], grouped.sum(min_count=1), rtol=1e-5, atol=1e-6)
        positive = (finite > 0).groupby(names).mean().reindex(got.index)
        np.testing.assert_allclose(got["share_positive"].astype(float), positive.astype(float))


def write(folder: Path, n: int, **more: object) -> ScoreTable:
    rng = np.random.default_rng(0)
    given_ = {
        "sample_id": np.arange(n),
        "step": np.arange(n) // 10,
        "units": UNITS,
        "blocks": BLOCKS,
        "values": rng.normal(size=(n, len(UNITS), len(BLOCKS))),
        "loss": rng.normal(size=n),
        "estimator": "in_run",
        "provenance": {},
    }
    return ScoreTable.write(folder, **(given_ | more))  # type: ignore[arg-type]


def test_pandas_pyarrow_and_datasets_read_the_folder(tmp_path: Path) -> None:
    """Several parts, a description and what an interrupted writer left beside them."""
    rng = np.random.default_rng(1)
    rows = random_rows(rng, 50)
    folder = tmp_path / "scores"
    for rank in range(2):
        writer = ScoreWriter(
            folder, units=UNITS, blocks=BLOCKS, estimator="replay", rank=rank, domains=True
        )
        writer.add(rows.where(np.arange(50) % 2 == rank))
        writer.flush()
    (folder / ".part-r0000-00000000-00000001-000009.part-0a1b2c3d.parquet").write_bytes(b"PAR1")
    table = ScoreTable.open(folder)
    expected = np.sort(rows.sample_id)
    frame = pd.read_parquet(folder)
    assert np.sort(frame["sample_id"]).tolist() == expected.tolist()
    for unit in UNITS:
        got = np.sort(frame[[f"{unit}.{block}" for block in BLOCKS]].sum(axis=1, skipna=False))
        np.testing.assert_allclose(got, np.sort(table.scores(unit)[1]), rtol=1e-5, atol=1e-6)
    assert ds.dataset(folder).to_table().num_rows == 50
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "parquet", data_files=f"{folder}/*.parquet", cache_dir=str(tmp_path / "cache")
    )["train"]
    assert np.sort(loaded["sample_id"]).tolist() == expected.tolist()
    assert set(loaded.column_names) == set(frame.columns)
    assert sorted(loaded["domain"]) == sorted(rows.domain)


def damage(table: ScoreTable, hit: object) -> int:
    """Overwrite the column chunks for which ``hit(row group, column)`` holds; how many."""
    n = 0
    for path in table.folder.glob("part-*"):
        about, content = pq.read_metadata(path), bytearray(path.read_bytes())
        for group in range(about.num_row_groups):
            for place in range(about.num_columns):
                chunk = about.row_group(group).column(place)
                if hit(group, chunk.path_in_schema):  # type: ignore[operator]
                    offsets = (chunk.dictionary_page_offset, chunk.data_page_offset)
                    start = min(offset for offset in offsets if offset)
                    content[start : start + chunk.total_compressed_size] = (
                        b"\xff" * chunk.total_compressed_size
                    )
                    n += 1
        path.write_bytes(bytes(content))
    return n


def test_queries_read_no_other_columns(tmp_path: Path) -> None:
    table = write(tmp_path / "s", 100)
    whole = table.top("L0H1", count=5), table.mean_scores("L0H1", "O"), table.sample(42, "L0H1")
    needed = {"sample_id", "L0H1.QK", "L0H1.O"}
    assert damage(table, lambda _, column: column not in needed) == 3 + 4
    assert table.top("L0H1", count=5).tolist() == whole[0].tolist()
    with pytest.raises(OSError):
        table.scores("L0H0")
    with pytest.raises(OSError):
        table.frame("L0H1")
    damage(table, lambda _, column: column == "L0H1.QK")
    assert np.array_equal(table.mean_scores("L0H1", "O")[1], whole[1][1])
    with pytest.raises(OSError):
        table.top("L0H1", count=5)


def test_queries_read_no_other_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "ROWS_IN_GROUP", 25)
    table = write(tmp_path / "s", 100)
    (part,) = table.folder.glob("part-*")
    assert pq.read_metadata(part).num_row_groups == 4
    steps, sample = table.steps(5, 7), table.sample(55)
    assert (len(steps), len(sample)) == (20 * len(UNITS), len(UNITS))
    assert damage(table, lambda group, _: group != 2) == 3 * (4 + 6)
    pd.testing.assert_frame_equal(table.steps(5, 7), steps)
    pd.testing.assert_frame_equal(table.sample(55), sample)
    for question in (lambda: table.steps(4, 7), lambda: table.sample(42), table.frame):
        with pytest.raises(OSError):
            question()


def test_steps_outside_a_parts_name_leave_it_closed(tmp_path: Path) -> None:
    table = write(tmp_path / "s", 100)
    before = table.steps(20, 30)
    for path in table.folder.glob("part-*"):
        path.write_bytes(b"")
    pd.testing.assert_frame_equal(table.steps(20, 30), before)
    assert not len(before) and list(before.columns) == [
        *("sample_id", "step", "ihvp_step", "loss", "unit", "QK", "O", "score")
    ]
    with pytest.raises((OSError, ValueError)):
        table.steps(9, 30)


def test_domains_come_from_the_table_or_from_the_corpus(tmp_path: Path) -> None:
    names = ["code", "web", "web", "code"]
    values = np.zeros((4, 3, 2))
    values[:, 0, 0] = [1, 2, 4, -7]
    own = write(tmp_path / "own", 4, values=values, domain=names)
    found = own.by_domain("L0H0")
    assert found.index.tolist() == ["code", "web"] and found["mean"].tolist() == [-3.0, 3.0]
    assert found["share_positive"].tolist() == [0.5, 1.0] and found["std"].tolist() == [4.0, 1.0]
    assert own.frame("L0H0")["domain"].tolist() == names
    tokens = np.arange(8).reshape(4, 2)
    corpus = TokenRows.write(tmp_path / "corpus", tokens, domains=names, provenance={})
    without = write(tmp_path / "without", 4, values=values)
    pd.testing.assert_frame_equal(without.by_domain("L0H0", corpus.domains), found)
    with pytest.raises(ValueError, match="no column of domains"):
        without.by_domain("L0H0")
    bare = TokenRows.write(tmp_path / "bare", tokens, provenance={})
    with pytest.raises(ValueError, match="the corpus has no domains"):
        without.by_domain("L0H0", bare.domains)
    with pytest.raises(KeyError, match=r"2 of 4 samples have no domain .* first 2"):
        without.by_domain("L0H0", ["code", "web"])
    with pytest.raises(KeyError, match=r"1 of 4 samples have no domain .* first 0"):
        without.by_domain("L0H0", {1: "a", 2: "a", 3: "b"})


def test_a_folder_of_mechanisms_opens_its_only_table(tmp_path: Path) -> None:
    write(tmp_path / "scores" / "induction", 3)
    assert ScoreTable.open(tmp_path / "scores").folder == tmp_path / "scores" / "induction"
    write(tmp_path / "scores" / "previous_token", 4)
    with pytest.raises(ValueError, match=r"induction, previous_token; say which: mechanism='ind"):
        ScoreTable.open(tmp_path / "scores")
    assert len(ScoreTable.open(tmp_path / "scores", mechanism="previous_token")) == 4
    with pytest.raises(FileNotFoundError, match=r"'copying' .* of induction, previous_token"):
        ScoreTable.open(tmp_path / "scores", mechanism="copying")
    with pytest.raises(ValueError, match="something else than a score table"):
        write(tmp_path / "scores", 3)


def test_parts_of_another_table_and_lost_ones_are_refused(tmp_path: Path) -> None:
    table = write(tmp_path / "s", 30)
    other = write(tmp_path / "other", 30, blocks=("QK", "V"))
    (part,) = table.folder.glob("part-*")
    (foreign,) = other.folder.glob("part-*")
    kept = part.read_bytes()
    part.write_bytes(foreign.read_bytes())
    with pytest.raises(ValueError, match=r"blocks \['QK', 'V'\] instead of \['QK', 'O'\]"):
        ScoreTable.open(table.folder)
    part.write_bytes(kept[:-20])
    with pytest.raises(ValueError, match="not a Parquet file"):
        ScoreTable.open(table.folder)
    part.unlink()
    with pytest.raises(ValueError, match="finished with 30 rows and has 0"):
        ScoreTable.open(table.folder)
