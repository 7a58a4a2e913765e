"""Token rows from text: strings in memory, a folder of files, JSON lines."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mda_lightning.corpora.bpe import END_OF_TEXT, encode, train_bpe
from mda_lightning.corpora.packing import pack
from mda_lightning.corpora.token_rows import TokenRows

DEFAULT_DOMAIN = "text"


def rows_from_texts(
    folder: str | os.PathLike[str],
    texts: Iterable[tuple[str, str]],
    *,
    row_length: int,
    tokenizer_json: str | None = None,
    vocab_size: int = 512,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
) -> TokenRows:
    """Tokenise and pack texts into the corpus folder ``folder``.

    Args:
        folder: to write.
        texts: (domain, text) pairs; rows hold one domain each.
        row_length: T + 1.
        tokenizer_json: of a tokenizer with an ``<|endoftext|>`` token; by default a byte-level BPE
            of ``vocab_size`` ids is trained on a sample of the texts, drawn with ``seed``.
        provenance: recorded with the corpus.

    Raises:
        ValueError: no text, or not enough for one row.
    """
    pairs = [(domain, text) for domain, text in texts if text]
    if not pairs:
        raise ValueError(
            f"the corpus is empty: no text was given for {folder}; at least one row of "
            f"{row_length} tokens is needed"
        )
    trained = tokenizer_json is None
    if tokenizer_json is None:
        tokenizer_json = train_bpe([text for _, text in pairs], vocab_size=vocab_size, seed=seed)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    encoded = encode(tokenizer, (text for _, text in pairs))
    packed = pack(
        zip((domain for domain, _ in pairs), encoded, strict=True),
        row_length=row_length,
        end_of_text=end_of_text,
    )
    made_from = {
        "documents": len(pairs),
        "dropped_tokens": packed.dropped,
        "tokenizer": {"trained_on_texts": trained, "seed": seed if trained else None},
    }
    return TokenRows.write(
        folder,
        packed.rows,
        domains=packed.domains,
        tokenizer_json=tokenizer_json,
        provenance=made_from | dict(provenance or {}),
    )


def rows_from_folder(
    folder: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    row_length: int,
    pattern: str = "**/*.txt",
    tokenizer_json: str | None = None,
    vocab_size: int = 512,
    seed: int = 0,
) -> TokenRows:
    """The text files under ``source`` as a corpus; a first-level subfolder names the domain.

    Files are read in the order of their paths. Files directly in ``source`` have domain ``"text"``.

    Raises:
        FileNotFoundError: ``source`` is no folder, or no file in it fits ``pattern``.
        ValueError: a file is not UTF-8, or there is not enough text.
    """
    root = Path(source)
    return rows_from_texts(
        folder,
        folder_documents(root, pattern),
        row_length=row_length,
        tokenizer_json=tokenizer_json,
        vocab_size=vocab_size,
        seed=seed,
        provenance={"reader": "folder", "source": root.name, "pattern": pattern},
    )


def rows_from_jsonl(
    folder: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    row_length: int,
    text_key: str = "text",
    tokenizer_json: str | None = None,
    vocab_size: int = 512,
    seed: int = 0,
) -> TokenRows:
    """JSON lines (``.jsonl``, ``.jsonl.gz``) as a corpus; a line's ``meta.domain`` is its domain.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is not JSON, has no text, or is not UTF-8; or there is not enough text.
    """
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no JSON lines at {path}")
    return rows_from_texts(
        folder,
        jsonl_documents(path, text_key),
        row_length=row_length,
        tokenizer_json=tokenizer_json,
        vocab_size=vocab_size,
        seed=seed,
        provenance={"reader": "jsonl", "source": path.name, "text_key": text_key},
    )


def folder_documents(root: Path, pattern: str = "**/*.txt") -> Iterator[tuple[str, str]]:
    """The (domain, text) pairs of the files under a folder, see :func:`rows_from_folder`.

    Raises:
        FileNotFoundError: ``root`` is no folder, or no file in it fits ``pattern``.
        ValueError: a file is not UTF-8.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder of text files")
    paths = sorted(path for path in root.glob(pattern) if path.is_file())
    if not paths:
        raise FileNotFoundError(
            f"no file in {root} fits {pattern!r}; give another pattern, for example '**/*.py'"
        )
    for path in paths:
        parts = path.relative_to(root).parts
        yield (parts[0] if len(parts) > 1 else DEFAULT_DOMAIN), read_text(path)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, unpacked where its name ends in ``.gz``.

    Raises:
        ValueError: it is not UTF-8; the message says where.
    """
    data = path.read_bytes()
    return _decoded(gzip.decompress(data) if path.suffix == ".gz" else data, path)


def jsonl_documents(path: Path, text_key: str) -> Iterator[tuple[str, str]]:
    """The (domain, text) pairs of JSON lines, gzipped where the name ends in ``.gz``.

    Raises:
        ValueError: a line is not JSON or has no text under ``text_key``; or the file is not UTF-8.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
            raise ValueError(
                f"{path}, line {number} has no text under {text_key!r}; name its key with text_key"
            )
        meta = record.get("meta")
        domain = meta.get("domain") if isinstance(meta, dict) else None
        yield str(domain or DEFAULT_DOMAIN), record[text_key]


def _decoded(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; convert "
            f"it, for example with `iconv -f latin1 -t utf-8`"
        ) from error
