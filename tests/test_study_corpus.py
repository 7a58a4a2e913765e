"""A study's corpus: what is held out, what is kept, and what is refused."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from mda_lightning.corpora import RecordStyle, TokenRows, embedded_corpus, rows_from_jsonl
from mda_lightning.recipes.studies.held_out_rows import stratified_blocks
from mda_lightning.recipes.studies.settings import CorpusSettings
from mda_lightning.recipes.studies.study_corpus import filled_in, study_corpus
from mda_lightning.shuffling import key_of

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "boxed",
    "five",
    "more",
]


def lines(n: int, *, seed: int = 0) -> list[dict]:
    """Documents of two domains, three of the first for each of the second."""
    rng = np.random.default_rng(seed)
    return [
        {
            "text": " ".join(rng.choice(WORDS, 60)) + f" {seed} {i}",
            "meta": {"domain": "code" if i % 4 == 0 else "prose"},
        }
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "train.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines(400))).encode()))
    return path


def jsonl(path: Path, **changes) -> CorpusSettings:
    settings = CorpusSettings("jsonl", str(path), sequence_length=32, vocab_size=300, n_rows=None)
    return dataclasses.replace(settings, **changes)


def as_set(rows: TokenRows) -> set[bytes]:
    return {row.tobytes() for row in rows.get(range(len(rows)))}


def test_without_held_out_rows_the_embedded_corpus_is_what_it_was(tmp_path: Path) -> None:
    settings = CorpusSettings(n_rows=200, sequence_length=64, vocab_size=300)
    found = study_corpus(settings, tmp_path)
    assert found.held_out is None
    plain = embedded_corpus(
        tmp_path / "other",
        seed=0,
        records_share=0.15,
        n_rows=200,
        row_length=65,
        vocab_size=300,
        style=RecordStyle(pieces_per_name=(4, 8), lines_per_record=(5, 8)),
    )
    assert found.rows.content_hash == plain.content_hash
    assert found.rows.folder.name == plain.folder.name


def test_held_out_rows_of_the_embedded_corpus_come_on_top(tmp_path: Path) -> None:
    settings = CorpusSettings(n_rows=400, sequence_length=64, vocab_size=300, held_out_rows=100)
    found = study_corpus(settings, tmp_path)
    assert found.held_out is not None
    assert (len(found.rows), len(found.held_out)) == (400, 100)
    assert not as_set(found.rows) & as_set(found.held_out)
    for rows in (found.rows, found.held_out):
        domains = rows.domains(range(len(rows)))
        assert domains is not None
        assert domains.count("library") / len(rows) == pytest.approx(0.85, abs=0.011)


def test_training_and_held_out_rows_make_up_the_corpus(tmp_path: Path, corpus_file: Path) -> None:
    whole = study_corpus(jsonl(corpus_file), tmp_path)
    assert whole.held_out is None
    # The same rows as the reader that is documented for such files.
    plain = rows_from_jsonl(tmp_path / "plain", corpus_file, row_length=33, vocab_size=300)
    assert np.array_equal(whole.rows.get(range(len(whole.rows))), plain.get(range(len(plain))))
    found = study_corpus(jsonl(corpus_file, held_out_rows=64), tmp_path)
    assert found.held_out is not None
    assert len(found.rows) + len(found.held_out) == len(plain)
    assert as_set(found.rows) | as_set(found.held_out) == as_set(plain)
    assert not as_set(found.rows) & as_set(found.held_out)
    assert found.rows.recomputed_hash() == found.rows.content_hash
    text = (plain.folder / "tokenizer.json").read_text("utf-8")
    for part in (found.rows, found.held_out):
        assert (part.folder / "tokenizer.json").read_text("utf-8") == text
        assert part.vocab_size == plain.vocab_size and 0 not in part.token_ids
    capped = study_corpus(jsonl(corpus_file, held_out_rows=64, n_rows=120), tmp_path)
    assert capped.held_out is not None and len(capped.rows) == 120
    assert as_set(capped.held_out) == as_set(found.held_out)
    assert as_set(capped.rows) < as_set(found.rows)


@pytest.mark.parametrize("n", [0, 1, 7, 200, 999, 1000])
def test_blocks_keep_the_shares_of_strata(n: int) -> None:
    strata = np.repeat([0, 1, 2], [600, 300, 100])
    chosen = stratified_blocks(strata, n, key=key_of("x", 1))
    assert len(chosen) == n and len(set(chosen.tolist())) == n
    assert (np.diff(chosen) > 0).all()
    for stratum, share in enumerate((0.6, 0.3, 0.1)):
        assert abs((strata[chosen] == stratum).sum() - n * share) < 1
    if n == 200:
        # In blocks: few rows outside have a neighbour inside; one by one it would be every fifth.
        edges = int((np.diff(np.isin(np.arange(1000), chosen).astype(int)) != 0).sum())
        assert edges <= 2 * 3 * 10
        other = stratified_blocks(strata, n, key=key_of("x", 2))
        assert not np.array_equal(chosen, other)


def test_in_order_the_rows_after_the_training_rows_are_held_out(
    tmp_path: Path, corpus_file: Path
) -> None:
    whole = study_corpus(jsonl(corpus_file), tmp_path).rows
    found = study_corpus(jsonl(corpus_file, shuffle=False, n_rows=50, held_out_rows=20), tmp_path)
    assert np.array_equal(found.rows.get(range(50)), whole.get(range(50)))
    assert found.held_out is not None
    assert np.array_equal(found.held_out.get(range(20)), whole.get(range(50, 70)))


def test_a_validation_file_is_read_with_the_training_tokenizer(
    tmp_path: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = tmp_path / "validation.jsonl"
    held.write_text("\n".join(map(json.dumps, lines(30, seed=9))), "utf-8")
    monkeypatch.setenv("HELD_OUT_FOLDER", str(tmp_path))
    settings = jsonl(corpus_file, held_out="$HELD_OUT_FOLDER/validation.jsonl")
    found = study_corpus(settings, tmp_path / "cache")
    assert found.held_out is not None
    assert len(found.rows) == len(study_corpus(jsonl(corpus_file), tmp_path / "cache").rows)
    assert found.held_out.row_length == 33 and found.held_out.vocab_size == found.rows.vocab_size
    prose = [line["text"] for line in lines(30, seed=9) if line["meta"]["domain"] == "prose"]
    decoded = found.held_out.decode(found.held_out.get([0])[0])
    assert decoded in "".join(prose) or decoded in "".join(
        line["text"] for line in lines(30, seed=9) if line["meta"]["domain"] == "code"
    )
    with pytest.raises(ValueError, match=r"held_out_rows is 5 .* one of the two"):
        study_corpus(dataclasses.replace(settings, held_out_rows=5), tmp_path / "cache")


def test_a_corpus_is_kept_under_all_that_determines_it(tmp_path: Path, corpus_file: Path) -> None:
    told: list[tuple[str, float]] = []
    first = study_corpus(jsonl(corpus_file, held_out_rows=8), tmp_path, lambda *a: told.append(a))
    assert any(what == "tokenising train.jsonl.gz" for what, _ in told)
    assert all(0 <= share <= 1 for _, share in told)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = study_corpus(jsonl(corpus_file, held_out_rows=8), tmp_path)
    assert again.rows.folder == first.rows.folder
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == made
    folders = {first.rows.folder}
    changes: list[dict] = [
        {"seed": 1}, {"sequence_length": 16}, {"vocab_size": 290}, {"held_out_rows": 9},
        {"n_rows": 40}, {"shuffle": False},
    ]  # fmt: skip
    for change in changes:
        settings = dataclasses.replace(jsonl(corpus_file, held_out_rows=8), **change)
        folders.add(study_corpus(settings, tmp_path).rows.folder)
    assert len(folders) == 1 + len(changes)
    other = tmp_path / "train.jsonl.gz"  # the same name, other text
    other.write_bytes(gzip.compress("\n".join(map(json.dumps, lines(400, seed=3))).encode()))
    assert study_corpus(jsonl(other, held_out_rows=8), tmp_path).rows.folder not in folders
    copy = tmp_path / "copy.jsonl.gz"  # the same text, another place
    copy.write_bytes(corpus_file.read_bytes())
    assert study_corpus(jsonl(copy, held_out_rows=8), tmp_path).rows.folder == first.rows.folder


def test_a_folder_of_rows_is_used_where_it_lies(tmp_path: Path) -> None:
    tokens = np.arange(300, dtype=np.int64).reshape(60, 5) % 40
    rows = TokenRows.write(
        tmp_path / "mine", tokens, domains=["a"] * 20 + ["b"] * 40, provenance={}
    )
    settings = CorpusSettings("rows", str(rows.folder), n_rows=None)
    assert study_corpus(settings, tmp_path / "cache").rows.folder == rows.folder
    found = study_corpus(dataclasses.replace(settings, held_out_rows=6), tmp_path / "cache")
    assert found.held_out is not None
    assert found.held_out.domains(range(6)) == ["a"] * 2 + ["b"] * 4
    assert (len(found.rows), len(found.held_out)) == (54, 6)
    with pytest.raises(ValueError, match="held_out_rows is 60, the corpus has 60 rows"):
        study_corpus(dataclasses.replace(settings, held_out_rows=60), tmp_path / "cache")
    text = tmp_path / "v.txt"
    text.write_text("words", "utf-8")
    with pytest.raises(ValueError, match="keep no tokenizer"):
        study_corpus(dataclasses.replace(settings, held_out=str(text)), tmp_path / "cache")


def test_paths_are_filled_in_or_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SOMEWHERE", "/data")
    monkeypatch.delenv("NOWHERE_AT_ALL", raising=False)
    assert filled_in("~/a/${SOMEWHERE}/b", "corpus.path") == f"{tmp_path}/a//data/b"
    with pytest.raises(
        ValueError, match=r"corpus\.path is '\$NOWHERE_AT_ALL/x'.*export NOWHERE_AT"
    ):
        study_corpus(CorpusSettings("jsonl", "$NOWHERE_AT_ALL/x"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"corpus\.path: there is nothing at /data/x"):
        study_corpus(CorpusSettings("jsonl", "$SOMEWHERE/x"), tmp_path)
    with pytest.raises(ValueError, match=r"'text' needs corpus\.path"):
        study_corpus(CorpusSettings("text"), tmp_path)
