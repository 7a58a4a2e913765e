"""Token rows come back as written, of one domain each; readers say what is wrong with a file."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mda_lightning.corpora import (
    MegatronIndex,
    TokenRows,
    rows_from_folder,
    rows_from_jsonl,
    rows_from_megatron,
    rows_from_npy,
    rows_from_texts,
    train_bpe,
)
from mda_lightning.corpora.bpe import encode, encode_ascii
from mda_lightning.corpora.embedded import library_texts
from mda_lightning.corpora.packing import pack

SHARED = Path(__file__).parents[1].parent / "shared" / "data"

TEXTS = [("prose", "Der Rhein fließt. " * 40), ("code", "def f(x):\n    return x\n" * 60)]


# -- token rows -------------------------------------------------------------------------------


@given(
    st.integers(1, 9), st.integers(2, 7), st.integers(2, 70_000), st.integers(0, 99), st.booleans()
)
@settings(max_examples=40)
def test_rows_come_back_as_written(
    tmp_path_factory: pytest.TempPathFactory,
    n_rows: int,
    row_length: int,
    vocab_size: int,
    seed: int,
    named: bool,
) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (n_rows, row_length))
    names = [f"d{i}" for i in rng.integers(0, 3, n_rows)] if named else None
    folder = tmp_path_factory.mktemp("rows") / "c"
    rows = TokenRows.write(folder, tokens, domains=names, vocab_size=vocab_size, provenance={})
    ids = rng.integers(0, n_rows, 5)
    assert rows.get(ids).dtype == np.int64
    assert (rows.get(ids) == tokens[ids]).all()
    assert rows.domains(ids) == (None if names is None else [names[i] for i in ids])
    assert rows.token_ids.tolist() == sorted(set(tokens.reshape(-1).tolist()))
    assert (len(rows), rows.row_length, rows.vocab_size) == (n_rows, row_length, vocab_size)
    copy = pickle.loads(pickle.dumps(rows))
    assert copy.content_hash == rows.content_hash and (copy.get(ids) == tokens[ids]).all()


def test_the_hash_changes_with_rows_domains_and_tokenizer(tmp_path: Path) -> None:
    tokens = np.arange(12).reshape(3, 4)
    tokenizer = train_bpe(["some text"], vocab_size=300, seed=0)

    def made(name: str, rows: np.ndarray, **more: object) -> str:
        return TokenRows.write(tmp_path / name, rows, provenance={"n": name}, **more).content_hash

    hashes = [
        made("a", tokens),
        made("b", tokens[:, ::-1]),
        made("c", tokens.reshape(4, 3)),
        made("d", tokens, domains=["x", "y", "y"]),
        made("e", tokens, domains=["x", "x", "y"]),
        made("f", tokens, tokenizer_json=tokenizer),
    ]
    assert len(set(hashes)) == len(hashes)
    assert made("g", tokens) == hashes[0]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (np.zeros((0, 5), int), {}, "at least 1 row"),
        (np.zeros((5, 1), int), {}, "at least 1 row of 2 tokens"),
        (np.zeros((5, 2)), {}, "float64"),
        (np.full((5, 2), -3), {}, "-3 is negative"),
        (np.full((5, 2), 9), {"vocab_size": 9}, "9 is not below vocab_size 9"),
        (np.zeros((5, 2), int), {"domains": ["a"]}, "1 domains were given for 5 rows"),
    ],
)
def test_rows_that_cannot_be_are_refused(
    tmp_path: Path, rows: np.ndarray, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TokenRows.write(tmp_path / "c", rows, provenance={}, **settings)
    assert not list(tmp_path.iterdir())


def test_folders_that_are_no_corpus_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no meta\.json"):
        TokenRows.open(tmp_path)
    rows = TokenRows.write(tmp_path / "c", np.zeros((3, 4), int), provenance={})
    with pytest.raises(IndexError, match=r"sample 3 .* rows 0\.\.2"):
        rows.get([0, 3])
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        rows.decode([0])
    meta = json.loads((tmp_path / "c" / "meta.json").read_text())
    (tmp_path / "c" / "meta.json").write_text(json.dumps(meta | {"n_rows": 4}))
    with pytest.raises(ValueError, match="damaged"):
        TokenRows.open(tmp_path / "c")
    (tmp_path / "c" / "meta.json").write_text(json.dumps(meta | {"schema_version": 2}))
    with pytest.raises(ValueError, match="schema 2"):
        TokenRows.open(tmp_path / "c")


# -- packing and text -------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.integers(1, 9), max_size=12)), min_size=1
    ),
    st.integers(2, 6),
)
def test_packing_keeps_every_token_in_order_and_domains_apart(
    documents: list[tuple[str, list[int]]], row_length: int
) -> None:
    streams: dict[str, list[int]] = {}
    for domain, ids in documents:
        streams.setdefault(domain, []).extend([*ids, 0])
    pairs = [(domain, np.array(ids, np.uint32)) for domain, ids in documents]
    if all(len(stream) < row_length for stream in streams.values()):
        with pytest.raises(ValueError, match="not enough for one row"):
            pack(pairs, row_length=row_length, end_of_text=0)
        return
    packed = pack(pairs, row_length=row_length, end_of_text=0)
    domains = np.array(packed.domains)
    for domain, stream in streams.items():
        found = packed.rows[domains == domain].reshape(-1).tolist()
        assert found == stream[: len(found)]
        assert packed.dropped[domain] == len(stream) - len(found) < row_length


def test_bpe_loses_no_text_and_is_the_same_each_time() -> None:
    texts = [text for _, text in TEXTS]
    first, second = (train_bpe(texts, vocab_size=300, seed=1) for _ in range(2))
    assert first == second
    tokenizer = Tokenizer.from_str(first)
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    for text in [*texts, "日本語 🙂 \x00\xff"]:
        ids = next(encode(tokenizer, [text]))
        assert ids.max() < 300 and 0 not in ids
        assert tokenizer.decode(ids.tolist()) == text


@given(st.text(st.characters(max_codepoint=127)))
def test_words_encoded_once_each_give_the_tokenizers_own_ids(text: str) -> None:
    tokenizer = Tokenizer.from_str(WHOLE_BYTES)
    words = "it's  we'll\n\n\tx  = 12ab('s')\r\n" + text
    (fast,), (own,) = encode_ascii(tokenizer, [words]), encode(tokenizer, [words])
    assert fast.tolist() == own.tolist()


WHOLE_BYTES = train_bpe(library_texts()[:5], vocab_size=400, seed=0)


def test_text_becomes_rows_that_decode_to_it(tmp_path: Path) -> None:
    rows = rows_from_texts(tmp_path / "c", TEXTS, row_length=20, vocab_size=300)
    assert rows.domain_names == ("code", "prose")
    everything = np.arange(len(rows))
    for domain, text in TEXTS:
        mine = [i for i in everything if rows.domains([i]) == [domain]]
        assert text.startswith(rows.decode(rows.get(mine).reshape(-1))[:200])
    assert 0 not in rows.token_ids
    row = rows.get([3])[0]
    assert "".join(rows.token_strings(row)) == rows.decode(row)


def test_a_folder_of_text(tmp_path: Path) -> None:
    for name in ("b.txt", "poems/a.txt", "poems/c.txt", "poems/skip.md"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(f"{name} says hello to you. " * 30)
    rows = rows_from_folder(tmp_path / "c", tmp_path / "in", row_length=16, vocab_size=300)
    assert rows.domain_names == ("poems", "text")
    assert rows.provenance["documents"] == 3
    (tmp_path / "in" / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8: byte 0xe9 at offset 3.*iconv"):
        rows_from_folder(tmp_path / "d", tmp_path / "in", row_length=16, vocab_size=300)
    with pytest.raises(FileNotFoundError, match=r"fits '\*\.rst'"):
        rows_from_folder(tmp_path / "d", tmp_path / "in", row_length=16, pattern="*.rst")
    with pytest.raises(FileNotFoundError, match="not a folder"):
        rows_from_folder(tmp_path / "d", tmp_path / "absent", row_length=16)


def test_json_lines_with_domains(tmp_path: Path) -> None:
    lines = [
        {"text": "one\u2028two " * 50, "meta": {"domain": "web"}},
        {"text": "three " * 50},
        {"text": "four " * 50, "meta": {"other": 1}},
    ]
    packed = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(packed.encode()))
    rows = rows_from_jsonl(tmp_path / "c", tmp_path / "a.jsonl.gz", row_length=8, vocab_size=300)
    assert rows.domain_names == ("text", "web")
    for line, message in [("{", "line 2 is not JSON"), ('{"body": "x"}', "no text under 'text'")]:
        (tmp_path / "b.jsonl").write_text(json.dumps(lines[0]) + "\n" + line)
        with pytest.raises(ValueError, match=message):
            rows_from_jsonl(tmp_path / "d", tmp_path / "b.jsonl", row_length=8, vocab_size=300)


def test_too_little_text_says_how_much_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"empty.*at least one row of 33 tokens"):
        rows_from_texts(tmp_path / "c", [("a", "")], row_length=33)
    with pytest.raises(ValueError, match=r"has 2 tokens in 1 domains, .* one row of 33 tokens"):
        rows_from_texts(tmp_path / "c", [("a", "x")], row_length=33, vocab_size=300)
    with pytest.raises(ValueError, match=r"vocab_size 100 is too small.*at least 258"):
        rows_from_texts(tmp_path / "c", TEXTS, row_length=33, vocab_size=100)


# -- arrays -----------------------------------------------------------------------------------


def write_megatron(stem: Path, documents: list[np.ndarray], code: int = 8) -> None:
    """By the format's table, not by our reader."""
    dtype = {4: "<i4", 8: "<u2"}[code]
    sizes = [len(document) for document in documents]
    pointers = np.cumsum([0, *sizes[:-1]]) * np.dtype(dtype).itemsize
    header = b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, code)
    header += struct.pack("<QQ", len(sizes), len(sizes) + 1)
    body = np.array(sizes, "<i4").tobytes() + pointers.astype("<i8").tobytes()
    body += np.arange(len(sizes) + 1, dtype="<i8").tobytes()
    stem.with_suffix(".idx").write_bytes(header + body)
    stem.with_suffix(".bin").write_bytes(np.concatenate(documents).astype(dtype).tobytes())


@pytest.mark.parametrize("code", [4, 8])
def test_megatron_sequences_of_one_length_are_rows(tmp_path: Path, code: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 60_000, (10, 7))
    write_megatron(tmp_path / "document", list(tokens), code)
    rows = rows_from_megatron(tmp_path / "c", tmp_path / "document.bin", start=2, stop=9)
    assert (rows.get(range(7)) == tokens[2:9]).all()
    assert MegatronIndex.open(tmp_path / "document.idx").document_starts.tolist() == [*range(11)]


def test_megatron_documents_are_joined_and_cut(tmp_path: Path) -> None:
    documents = [np.array([5, 6, 0]), np.array([7, 0]), np.array([8, 9, 4, 3, 0])]
    write_megatron(tmp_path / "document", documents)
    with pytest.raises(ValueError, match="2 to 5 tokens; give row_length"):
        rows_from_megatron(tmp_path / "c", tmp_path / "document")
    rows = rows_from_megatron(tmp_path / "c", tmp_path / "document", row_length=4)
    assert rows.get([0, 1]).tolist() == [[5, 6, 0, 7], [0, 8, 9, 4]]
    assert 0 not in rows.token_ids


def test_damaged_megatron_pairs_are_refused(tmp_path: Path) -> None:
    stem = tmp_path / "document"
    write_megatron(stem, [np.arange(5), np.arange(5)])
    data = stem.with_suffix(".idx").read_bytes()
    stem.with_suffix(".bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="has 3 bytes, the index needs 20"):
        rows_from_megatron(tmp_path / "c", stem)
    with pytest.raises(ValueError, match=r"rows \[0, 3\) .* it has 2"):
        rows_from_megatron(tmp_path / "c", stem, stop=3)
    for broken, message in [
        (b"PK" + data, "does not begin with MMIDIDX"),
        (data[:-8], "cut short"),
        (data[:17] + b"\x06" + data[18:], "dtype code 6"),
    ]:
        stem.with_suffix(".idx").write_bytes(broken)
        with pytest.raises(ValueError, match=message):
            rows_from_megatron(tmp_path / "c", stem)
    stem.with_suffix(".idx").unlink()
    with pytest.raises(FileNotFoundError, match="no Megatron index"):
        rows_from_megatron(tmp_path / "c", stem)


def test_npy_rows(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 300, (10, 7)).astype(np.uint16)
    np.save(tmp_path / "a.npy", tokens)
    rows = rows_from_npy(tmp_path / "c", tmp_path / "a.npy", start=1, vocab_size=512)
    assert (rows.get(range(9)) == tokens[1:]).all()
    assert rows.vocab_size == 512
    np.save(tmp_path / "b.npy", tokens[0])
    with pytest.raises(ValueError, match=r"shape \(7,\)"):
        rows_from_npy(tmp_path / "d", tmp_path / "b.npy")
    (tmp_path / "b.npy").write_text("text")
    with pytest.raises(ValueError, match=r"b\.npy is not a \.npy file"):
        rows_from_npy(tmp_path / "d", tmp_path / "b.npy")


# -- real text --------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is absent")
def test_natural_text_with_pythias_tokenizer(tmp_path: Path) -> None:
    tokenizer = (SHARED / "20B_tokenizer.json").read_text("utf-8")
    source = tmp_path / "few.jsonl"
    with gzip.open(SHARED / "minipile-validation.jsonl.gz", "rt", encoding="utf-8") as lines:
        source.write_text("".join(line for line, _ in zip(lines, range(40), strict=False)), "utf-8")
    rows = rows_from_jsonl(tmp_path / "c", source, row_length=257, tokenizer_json=tokenizer)
    assert rows.vocab_size == 50_277
    assert len(rows.domain_names) > 1
    assert rows.token_ids.min() > 1  # neither end of text nor padding
    assert rows.token_ids.max() < 50_277
