"""Rows of a preshuffled corpus, whole or in shards: streamed, and the same as read at once."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from mda_lightning.corpora import megatron_rows as module
from mda_lightning.corpora import rows_from_megatron, streamed_rows
from mda_lightning.corpora.megatron_rows import MegatronFiles, megatron_rows
from mda_lightning.recipes.studies.settings import CorpusSettings
from mda_lightning.recipes.studies.study_corpus import study_corpus

TOKENS = np.random.default_rng(0).integers(0, 500, (37, 9)).astype("<u2")


def write_megatron(folder: Path, tokens=TOKENS, *, sizes=None, cuts=()) -> Path:
    """``document.idx`` and its tokens, cut into shards at these bytes."""
    folder.mkdir(exist_ok=True)
    sizes = np.asarray(sizes if sizes is not None else [tokens.shape[1]] * len(tokens), "<i4")
    pointers = np.concatenate([[0], np.cumsum(sizes[:-1], dtype=np.int64) * 2]).astype("<i8")
    documents = np.arange(len(sizes) + 1).astype("<i8")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(sizes), len(documents))
    body = sizes.tobytes() + pointers.tobytes() + documents.tobytes()
    (folder / "document.idx").write_bytes(header + body)
    data = tokens.tobytes()
    if not cuts:
        (folder / "document.bin").write_bytes(data)
    edges = [0, *cuts, len(data)]
    for number in range(len(edges) - 1 if cuts else 0):
        name = f"document-{number:05d}-of-{len(cuts):05d}.bin"
        (folder / name).write_bytes(data[edges[number] : edges[number + 1]])
    return folder


@pytest.mark.parametrize("cuts", [(), (100,), (101, 350), (18, 36, 37)])
@pytest.mark.parametrize("at_once", [1, 5, 4096])
def test_streamed_rows_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuts: tuple[int, ...], at_once: int
) -> None:
    """Shards may be cut anywhere: inside a row, inside a token."""
    monkeypatch.setattr(module, "ROWS_AT_ONCE", at_once)
    source = write_megatron(tmp_path / "pile", cuts=cuts)
    shares: list[float] = []
    rows = megatron_rows(
        tmp_path / "rows", source, start=3, n_rows=20, vocab_size=504, progress=shares.append
    )
    assert np.array_equal(rows.get(range(20)), TOKENS[3:23])
    assert rows.vocab_size == 504 and shares[-1] == 1 and shares == sorted(shares)
    write_megatron(tmp_path / "whole")
    at_once_read = rows_from_megatron(
        tmp_path / "other", tmp_path / "whole" / "document", start=3, stop=23, vocab_size=504
    )
    assert rows.content_hash == at_once_read.content_hash == rows.recomputed_hash()
    assert np.array_equal(rows.token_ids, at_once_read.token_ids)
    assert 0 not in rows.token_ids


def test_no_more_than_some_rows_are_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 5)
    read: list[int] = []
    plain = module._Joined.read
    monkeypatch.setattr(
        module._Joined, "read", lambda self, at, n: (read.append(n), plain(self, at, n))[1]
    )
    megatron_rows(tmp_path / "rows", write_megatron(tmp_path / "pile"), vocab_size=504)
    assert sum(read) == TOKENS.size and max(read) == 5 * 9


def test_a_source_may_be_named_in_several_ways(tmp_path: Path) -> None:
    whole = write_megatron(tmp_path / "whole")
    for name in ("", "document", "document.bin", "document.idx"):
        assert MegatronFiles.find(whole / name).binaries == (whole / "document.bin",)
    shards = write_megatron(tmp_path / "shards", cuts=(100,))
    for name in ("", "document", "document-00000-of-00001.bin"):
        assert len(MegatronFiles.find(shards / name).binaries) == 2


def test_the_tokenizer_is_kept_and_later_shards_may_be_absent(tmp_path: Path) -> None:
    source = write_megatron(tmp_path / "pile", cuts=(9 * 2 * 12 + 5,))
    (source / "document-00001-of-00001.bin").unlink()
    text = str(Tokenizer(models.WordLevel({str(i): i for i in range(500)}, unk_token="1")).to_str())
    rows = megatron_rows(tmp_path / "rows", source, tokenizer_json=text)
    assert len(rows) == 12 and rows.vocab_size == 500
    assert (rows.folder / "tokenizer.json").read_text("utf-8") == text
    with pytest.raises(ValueError, match=r"\[0, 13\).*the 1 files .* hold 12 of the 37"):
        megatron_rows(tmp_path / "more", source, n_rows=13, vocab_size=504)
    assert not (tmp_path / "more").exists()


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    source = write_megatron(tmp_path / "pile")
    refused = tmp_path / "refused"
    with pytest.raises(
        ValueError, match=r"have 9 tokens, sequence_length 128 .* sequence_length 8"
    ):
        megatron_rows(refused, source, row_length=129, vocab_size=504)
    with pytest.raises(ValueError, match=rf"token id {TOKENS.max()} .* not below vocab_size 100"):
        megatron_rows(refused, source, vocab_size=100)
    with pytest.raises(ValueError, match="give vocab_size"):
        megatron_rows(refused, source)
    with pytest.raises(FileNotFoundError, match=r"no Megatron index \(\.idx\) in the folder"):
        megatron_rows(refused, tmp_path, vocab_size=504)
    uneven = write_megatron(tmp_path / "uneven", TOKENS.reshape(-1), sizes=[4, 5, 324])
    with pytest.raises(ValueError, match="have 4 to 324 tokens"):
        megatron_rows(refused, uneven, vocab_size=504)
    gap = write_megatron(tmp_path / "gap", cuts=(50, 100))
    (gap / "document-00001-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard 1 .* is absent"):
        megatron_rows(refused, gap, vocab_size=504)
    (gap / "document-00000-of-00002.bin").unlink()
    (gap / "document-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match="no Megatron tokens beside the index"):
        megatron_rows(refused, gap, vocab_size=504)
    assert not refused.exists() and not list(tmp_path.glob(".*"))


def test_streamed_rows_must_be_those_announced(tmp_path: Path) -> None:
    def write(parts, n_rows: int) -> None:
        streamed_rows.write_streamed(
            tmp_path / "rows", parts, n_rows=n_rows, row_length=9, vocab_size=504, provenance={}
        )

    for parts, n_rows, said in (
        ([TOKENS], 36, "rows 0..36 .* 36 rows of 9"),
        ([TOKENS[:, :4]], 37, r"shape \(37, 4\)"),
        ([TOKENS], 38, "37 rows came, 38 were announced"),
        ([-TOKENS.astype(np.int64)], 37, "is negative"),
        ([], 0, "at least 1 row"),
    ):
        with pytest.raises(ValueError, match=said):
            write(parts, n_rows)
    assert not list(tmp_path.iterdir())


def test_a_study_holds_out_the_rows_after_its_own(tmp_path: Path) -> None:
    source = write_megatron(tmp_path / "pile")
    settings = CorpusSettings(
        "megatron",
        str(source),
        vocab_size=504,
        sequence_length=8,
        n_rows=30,
        held_out_rows=5,
        shuffle=False,
    )
    found = study_corpus(settings, tmp_path / "cache")
    assert found.held_out is not None
    assert np.array_equal(found.rows.get(range(30)), TOKENS[:30])
    assert np.array_equal(found.held_out.get(range(5)), TOKENS[30:35])
    assert study_corpus(settings, tmp_path / "cache").rows.folder == found.rows.folder
