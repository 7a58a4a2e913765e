"""Samples that the base corpus does not hold: from texts, tokens and generators."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from mda_lightning.corpora import TokenRows, rows_from_texts
from mda_lightning.corpora.inserted import (
    inserted_from_generator,
    inserted_from_texts,
    inserted_from_tokens,
)

LENGTH = 9
VOCAB = 40


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> TokenRows:
    """A corpus with a tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "texts"
    words = [f"word{i} says {i * 7919 % 1000}. " for i in range(400)]
    return rows_from_texts(folder, [("a", "".join(words))], row_length=LENGTH, vocab_size=300)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenRows:
    """A corpus without one."""
    rows = np.random.default_rng(0).integers(1, VOCAB, (30, LENGTH))
    return TokenRows.write(
        tmp_path_factory.mktemp("base") / "rows", rows, vocab_size=VOCAB, provenance={}
    )


def by_hand(base: TokenRows, documents: list[str]) -> np.ndarray:
    """Encoded one by one, joined with the end of text after each, cut."""
    tokenizer = Tokenizer.from_file(str(base.folder / "tokenizer.json"))
    stream: list[int] = []
    for document in documents:
        stream += [*tokenizer.encode(document).ids, tokenizer.token_to_id("<|endoftext|>")]
    n = len(stream) // base.row_length
    return np.array(stream[: n * base.row_length]).reshape(n, base.row_length)


def everything(rows: TokenRows) -> np.ndarray:
    return rows.get(np.arange(len(rows)))


def test_texts_are_packed_as_the_corpus_is(texts: TokenRows, tmp_path: Path) -> None:
    documents = ["word1 says hello. " * 5, "", "word2 says little. " * 3]
    lines = [json.dumps({"text": one}) for one in documents]
    (tmp_path / "new.jsonl").write_text("\n".join(lines))
    rows = inserted_from_texts(tmp_path / "a", tmp_path / "new.jsonl", base=texts)
    np.testing.assert_array_equal(everything(rows), by_hand(texts, [d for d in documents if d]))
    assert (rows.row_length, rows.vocab_size) == (LENGTH, texts.vocab_size)
    assert rows.provenance["base_corpus"] == texts.content_hash
    assert "word1 says hello" in rows.decode(everything(rows).reshape(-1))

    (tmp_path / "new.txt").write_text(documents[0])
    one = inserted_from_texts(tmp_path / "b", tmp_path / "new.txt", base=texts)
    np.testing.assert_array_equal(everything(one), by_hand(texts, documents[:1]))

    for name, document in (("1.txt", documents[0]), ("sub/2.txt", documents[2])):
        (tmp_path / "many" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "many" / name).write_text(document)
    many = inserted_from_texts(tmp_path / "c", tmp_path / "many", base=texts)
    expected = np.concatenate([by_hand(texts, documents[:1]), by_hand(texts, documents[2:])])
    np.testing.assert_array_equal(everything(many), expected)
    assert set(many.domains(np.arange(len(many))) or []) == {"text", "sub"}


def test_bad_texts(texts: TokenRows, tokens: TokenRows, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("word1")
    (tmp_path / "new.pdf").write_text("word1")
    for name, message in (
        ("empty.txt", "holds no text"),
        ("short.txt", f"too few for one row of {LENGTH}.*give more text"),
        ("new.pdf", "no .txt"),
    ):
        with pytest.raises(ValueError, match=message):
            inserted_from_texts(tmp_path / "out", tmp_path / name, base=texts)
    with pytest.raises(FileNotFoundError, match="nothing at"):
        inserted_from_texts(tmp_path / "out", tmp_path / "absent.txt", base=texts)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        inserted_from_texts(tmp_path / "out", tmp_path / "short.txt", base=tokens)
    assert not (tmp_path / "out").exists()


def megatron(stem: Path, documents: list[np.ndarray]) -> Path:
    """A ``.bin``/``.idx`` pair, written by the format's description."""
    sizes = [len(one) for one in documents]
    pointers = np.concatenate([[0], np.cumsum(sizes)[:-1]]) * 2
    np.concatenate(documents).astype("<u2").tofile(stem.with_suffix(".bin"))
    n = len(documents)
    stem.with_suffix(".idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, n, n + 1)
        + np.asarray(sizes, "<i4").tobytes()
        + pointers.astype("<i8").tobytes()
        + np.arange(n + 1).astype("<i8").tobytes()
    )
    return stem.with_suffix(".bin")


def test_tokens_keep_their_rows(tokens: TokenRows, tmp_path: Path) -> None:
    rows = np.random.default_rng(1).integers(0, VOCAB, (7, LENGTH))
    np.save(tmp_path / "new.npy", rows)
    found = inserted_from_tokens(tmp_path / "a", tmp_path / "new.npy", base=tokens)
    np.testing.assert_array_equal(everything(found), rows)
    assert found.vocab_size == VOCAB

    binary = megatron(tmp_path / "equal", list(rows))
    found = inserted_from_tokens(tmp_path / "b", binary, base=tokens)
    np.testing.assert_array_equal(everything(found), rows)

    documents = [rows.reshape(-1)[:20], rows.reshape(-1)[20:43]]
    found = inserted_from_tokens(tmp_path / "c", megatron(tmp_path / "cut", documents), base=tokens)
    np.testing.assert_array_equal(everything(found).reshape(-1), rows.reshape(-1)[: 4 * LENGTH])


def test_bad_tokens(tokens: TokenRows, tmp_path: Path) -> None:
    rows = np.random.default_rng(1).integers(0, VOCAB, (7, LENGTH))
    wrong = rows.copy()
    wrong[3, 2] = VOCAB
    negative = rows.copy()
    negative[0, 0] = -1
    for name, array, message in (
        ("longer", np.zeros((3, LENGTH + 1), int), f"have {LENGTH + 1} tokens.*have {LENGTH}"),
        ("beyond", wrong, rf"token id {VOCAB}, the corpus's vocabulary has ids 0\.\.{VOCAB - 1}"),
        ("negative", negative, "-1 is negative"),
        ("none", rows[:0], "has no row"),
        ("flat", rows[0], "shape"),
        ("floats", rows.astype(float), "integers"),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match=message):
            inserted_from_tokens(tmp_path / "out", tmp_path / f"{name}.npy", base=tokens)
    (tmp_path / "empty.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        inserted_from_tokens(tmp_path / "out", tmp_path / "empty.npy", base=tokens)
    binary = megatron(tmp_path / "other", [rows.reshape(-1)[:5], rows.reshape(-1)[5:10]])
    with pytest.raises(ValueError, match=f"have 5 tokens.*have {LENGTH}"):
        inserted_from_tokens(tmp_path / "out", binary, base=tokens)
    with pytest.raises(FileNotFoundError):
        inserted_from_tokens(tmp_path / "out", tmp_path / "absent.bin", base=tokens)
    assert not (tmp_path / "out").exists()


def pairs(row: np.ndarray, shortest: int = 8, longest: int = 20) -> bool:
    """Whether a row is sequences of different tokens, each twice, one pair after another."""
    if len(row) <= 1:
        return True
    for size in range(shortest, longest + 1):
        first, second = row[:size], row[size : 2 * size]
        different = len(set(first)) == len(first)
        if different and (first[: len(second)] == second).all() and pairs(row[2 * size :]):
            return True
    return False


def test_repeated_tokens(tmp_path: Path) -> None:
    corpus = np.random.default_rng(0).integers(5, VOCAB, (30, 64))
    base = TokenRows.write(
        tmp_path / "base", corpus, vocab_size=VOCAB, special_ids=(6,), provenance={}
    )
    made = [
        inserted_from_generator(
            tmp_path / f"{i}", "repeated_tokens", base=base, n_rows=12, seed=seed
        )
        for i, seed in enumerate((3, 3, 4))
    ]
    rows = everything(made[0])
    assert rows.shape == (12, 64) and set(rows.flat) <= set(base.token_ids)
    assert all(pairs(row) for row in rows)
    assert not pairs(np.random.default_rng(0).integers(5, VOCAB, 64))
    assert made[0].content_hash == made[1].content_hash != made[2].content_hash
    assert made[0].provenance["seed"] == 3


def test_records(texts: TokenRows, tmp_path: Path) -> None:
    rows = inserted_from_generator(tmp_path / "a", "records", base=texts, n_rows=20)
    again = inserted_from_generator(tmp_path / "b", "records", base=texts, n_rows=20)
    assert len(rows) == 20 and rows.content_hash == again.content_hash
    assert rows.vocab_size == texts.vocab_size and rows.domain_names == ("records",)


def countdown(rng: np.random.Generator, n_rows: int) -> np.ndarray:
    return np.tile(np.arange(LENGTH)[::-1], (n_rows, 1)) + rng.integers(0, 5, (n_rows, 1))


def greetings(rng: np.random.Generator, n_rows: int) -> Iterator[str]:
    return (f"word{i} greets word{rng.integers(9)}" for i in itertools.count())


def test_ones_own_generators(texts: TokenRows, tokens: TokenRows, tmp_path: Path) -> None:
    for name, generator in (("a", countdown), ("b", f"{__name__}:countdown")):
        rows = inserted_from_generator(tmp_path / name, generator, base=tokens, n_rows=6, seed=2)
        expected = countdown(np.random.default_rng(2), 6)
        np.testing.assert_array_equal(everything(rows), expected)
        assert rows.provenance["generator"].endswith(":countdown")
    rows = inserted_from_generator(tmp_path / "c", greetings, base=texts, n_rows=6, seed=2)
    many = itertools.islice(greetings(np.random.default_rng(2), 6), 64)
    np.testing.assert_array_equal(everything(rows), by_hand(texts, list(many))[:6])


def test_bad_generators(texts: TokenRows, tokens: TokenRows, tmp_path: Path) -> None:
    for generator, message in (
        ("nonsense", "is no generator: there are repeated_tokens, records"),
        ("json:nonsense", "cannot be imported"),
        ("nonsense.none:f", "cannot be imported"),
        ("json:__name__", "not a function"),
        (lambda rng, n: countdown(rng, n + 1), "made 7 rows, 6 were asked for"),
        (lambda rng, n: np.zeros((n, 3), int), f"have 3 tokens.*have {LENGTH}"),
        (lambda rng, n: np.full((n, LENGTH), VOCAB + 2), f"token id {VOCAB + 2}"),
        (lambda rng, n: [1, 2], "has no tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            inserted_from_generator(tmp_path / "out", generator, base=tokens, n_rows=6)
    for generator, message in (
        (lambda rng, n: ["word1"], "made texts of .* let it make more"),
        (lambda rng, n: [1, 2], "made a int"),
    ):
        with pytest.raises(ValueError, match=message):
            inserted_from_generator(tmp_path / "out", generator, base=texts, n_rows=6)
    with pytest.raises(ValueError, match="n_rows is 0"):
        inserted_from_generator(tmp_path / "out", countdown, base=tokens, n_rows=0)
    small = TokenRows.write(tmp_path / "small", np.arange(18).reshape(2, 9), provenance={})
    with pytest.raises(ValueError, match="uses 18 token ids"):
        inserted_from_generator(tmp_path / "out", "repeated_tokens", base=small, n_rows=6)
    assert not (tmp_path / "out").exists()
