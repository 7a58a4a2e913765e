"""Fixed rows of tokens from a text: what metrics that need text are measured on.

A text is a name that is known here, a file or folder, strings, or tokens that are there already.
The same text, tokenizer and sizes always give the same rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from mda_lightning.corpora import TokenRows
from mda_lightning.corpora.bpe import encode
from mda_lightning.corpora.texts import jsonl_documents, read_text
from mda_lightning.vocabulary import TokenizerLike, Vocabulary, read_vocabulary


@dataclass(frozen=True)
class HubText:
    """A text on the hub, read through `datasets`.

    Attributes:
        dataset: the hub's name of it, or a local folder.
        configuration: its configuration, or None.
        split: its split.
        lines: whether its rows are the lines of one text; otherwise each is a document.
    """

    dataset: str
    configuration: str | None
    split: str
    lines: bool


NAMED_TEXTS: dict[str, HubText] = {
    "wikitext-2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "validation", lines=True),
}
"""Texts by name. Rows of WikiText are the lines of one file."""

#: A name of :data:`NAMED_TEXTS`; a file (text, ``.jsonl``, ``.parquet``, ``.arrow``, the first two
#: also with ``.gz``) or a folder of such files; strings, one a document; a :class:`TokenRows`
#: corpus or its folder; or integers [N, T + 1] (rows) or [n] (a stream).
TextSource = str | os.PathLike[str] | Sequence[str] | TokenRows | Tensor | NDArray[np.integer]

_SUFFIXES = (".txt", ".text", ".md", ".raw", ".jsonl", ".parquet", ".arrow")
# Documents are tokenised no further than this many characters for each token still needed; no
# tokenizer's average comes near it.
_CHARACTERS_PER_TOKEN = 64


def text_rows(
    source: TextSource,
    *,
    row_length: int,
    n_rows: int,
    tokenizer: TokenizerLike | None = None,
    vocab_size: int | None = None,
    text_key: str = "text",
) -> Tensor:
    """Rows of tokens from a text, int64 [N, row_length], N <= n_rows.

    Documents are joined in order, each closed by the tokenizer's end of text where it has one, and
    cut from the start into rows that do not overlap. Of rows that exist already (a corpus, a
    tensor) evenly spaced ones are taken, each cut to its first ``row_length`` tokens.

    Args:
        source: see :data:`TextSource`.
        row_length: T + 1 for T predicted tokens.
        n_rows: rows at most; fewer where the text is shorter.
        tokenizer: for anything that is not tokens yet.
        vocab_size: of the model that will read the rows, to be checked against.
        text_key: the column or key of the text in ``.jsonl``, ``.parquet`` and ``.arrow``.

    Raises:
        ValueError: too little text for one row, a tokenizer or ids that the model lacks, or no
            tokenizer for a text.
        FileNotFoundError: no such name, file or folder.
        ModuleNotFoundError: a named text, without `datasets`.
    """
    if row_length < 2 or n_rows < 1:
        raise ValueError(f"{n_rows} rows of {row_length} tokens: give at least 1 row of 2 tokens")
    opened = _opened(source)
    if isinstance(opened, TokenRows | np.ndarray):
        rows = _of_tokens(opened, row_length, n_rows)
    else:
        if tokenizer is None:
            raise ValueError(
                f"{describe_text(source)} is text and needs a tokenizer: give tokenizer= a path to "
                "tokenizer.json, a folder or a hub name"
            )
        vocabulary = read_vocabulary(tokenizer)
        if vocab_size is not None:
            vocabulary.check_fits(vocab_size)
        stream = _encoded(_documents(opened, text_key), vocabulary, n_rows * row_length)
        rows = _cut(stream, row_length, describe_text(source))
    found = torch.from_numpy(np.array(rows[:n_rows], dtype=np.int64))
    smallest, largest = int(found.min()), int(found.max())
    if vocab_size is not None and not 0 <= smallest <= largest < vocab_size:
        raise ValueError(
            f"{describe_text(source)} has token ids {smallest}..{largest}, the model has "
            f"0..{vocab_size - 1}; give rows made by the model's own tokenizer"
        )
    return found


def own_row_length(source: TextSource) -> int | None:
    """Tokens in a row of a source that has rows already; None where rows are cut as asked."""
    opened = _opened(source)
    if isinstance(opened, TokenRows):
        return opened.row_length
    return opened.shape[1] if isinstance(opened, np.ndarray) and opened.ndim == 2 else None


def describe_text(source: TextSource) -> str:
    """A text in a few words, without the folders above it."""
    if isinstance(source, TokenRows):
        return f"corpus {source.content_hash[:12]}"
    if isinstance(source, Tensor | np.ndarray):
        return f"tokens of shape {tuple(source.shape)}"
    if isinstance(source, str | os.PathLike):
        return str(source) if source in NAMED_TEXTS else Path(source).name
    return f"{len(source)} strings"


def _opened(
    source: TextSource,
) -> str | Path | Sequence[str] | TokenRows | NDArray[np.integer]:
    """The source as a name, a path that exists, strings, a corpus, or an array."""
    if isinstance(source, Tensor | np.ndarray):
        array = source.detach().cpu().numpy() if isinstance(source, Tensor) else source
        if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (1, 2) or not array.size:
            raise ValueError(
                f"tokens are integers [N, T + 1] or [n], got {array.dtype} of shape {array.shape}"
            )
        return array
    if isinstance(source, str) and source in NAMED_TEXTS:
        return source
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(
                f"{os.fspath(source)!r} is no file or folder here, and no text known by name "
                f"({', '.join(NAMED_TEXTS)}); give a path, or strings as a list"
            )
        return TokenRows.open(path) if (path / "meta.json").is_file() else path
    if isinstance(source, TokenRows):
        return source
    if not isinstance(source, Sequence) or not all(isinstance(text, str) for text in source):
        raise TypeError(
            f"a text is a name, a path, a list of str, token rows or an integer tensor, not a "
            f"{type(source).__name__}"
        )
    return source


# -- rows of tokens ---------------------------------------------------------------------------


def _of_tokens(
    source: TokenRows | NDArray[np.integer], row_length: int, n_rows: int
) -> NDArray[np.integer]:
    if isinstance(source, np.ndarray) and source.ndim == 1:
        return _cut(source, row_length, describe_text(source))
    longest = own_row_length(source)
    assert longest is not None
    if longest < row_length:
        raise ValueError(
            f"{describe_text(source)} has rows of {longest} tokens, too short for {row_length}; "
            "ask for shorter rows or give longer ones"
        )
    chosen = np.linspace(0, len(source) - 1, min(n_rows, len(source))).round().astype(np.int64)
    rows = source.get(chosen) if isinstance(source, TokenRows) else source[chosen]
    return rows[:, :row_length]


def _cut(stream: NDArray[np.integer], row_length: int, what: str) -> NDArray[np.integer]:
    n = len(stream) // row_length
    if not n:
        raise ValueError(
            f"{what} gives {len(stream)} tokens, too little text for one row of {row_length}; use "
            "more text or shorter rows"
        )
    return stream[: n * row_length].reshape(n, row_length)


def _encoded(documents: Iterator[str], vocabulary: Vocabulary, needed: int) -> NDArray[np.integer]:
    """Documents as one stream of at least ``needed`` tokens, or all that there are."""
    closing = np.array([] if vocabulary.end_of_text is None else [vocabulary.end_of_text], np.int64)
    parts, n = [np.zeros(0, dtype=np.int64)], 0
    for text in documents:
        if not text:
            continue
        first = text[: _CHARACTERS_PER_TOKEN * (needed - n)]
        (ids,) = encode(vocabulary.tokenizer, [first])
        parts += [ids.astype(np.int64), closing]
        n += len(ids) + len(closing)
        if n >= needed:
            break
    return np.concatenate(parts)


# -- documents --------------------------------------------------------------------------------


def _documents(source: str | Path | Sequence[str], text_key: str) -> Iterator[str]:
    if isinstance(source, str):
        yield from _from_hub(NAMED_TEXTS[source], source, text_key)
    elif isinstance(source, Path):
        for path in _files(source):
            yield from _of_file(path, text_key)
    else:
        yield from source


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in _SUFFIXES)
    if not found:
        raise FileNotFoundError(
            f"no text in the folder {path}: files ending in {', '.join(_SUFFIXES)} are read; give "
            "the file itself if it is text under another name"
        )
    return found


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _of_file(path: Path, text_key: str) -> Iterator[str]:
    kind = _suffix(path)
    if kind == ".jsonl":
        yield from (text for _, text in jsonl_documents(path, text_key))
    elif kind == ".parquet":
        file = pq.ParquetFile(path)
        _check_column(path, file.schema_arrow, text_key)
        for batch in file.iter_batches(columns=[text_key]):
            yield from (text or "" for text in batch.column(0).to_pylist())
    elif kind == ".arrow":
        for batch in _arrow_batches(path):
            _check_column(path, batch.schema, text_key)
            yield from (text or "" for text in batch.column(text_key).to_pylist())
    else:
        yield read_text(path)


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as data:
        try:
            file = pa.ipc.open_file(data)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        except pa.ArrowInvalid:
            # `datasets` writes the streaming form under the same suffix.
            data.seek(0)
            batches = iter(pa.ipc.open_stream(data))
        yield from batches


def _check_column(path: Path, schema: pa.Schema, text_key: str) -> None:
    if text_key not in schema.names:
        raise ValueError(
            f"{path} has no column {text_key!r}, only {', '.join(schema.names)}; name the text's "
            "column with text_key"
        )


def _from_hub(text: HubText, name: str, text_key: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name!r} is read from the hub through the `datasets` package, which is not "
            "installed: pip install 'mda-lightning[data]', or give a file, a folder or strings"
        ) from error
    try:
        rows = load_dataset(text.dataset, text.configuration, split=text.split)[text_key]
    except OSError as error:
        raise OSError(
            f"{name!r} ({text.dataset}) could not be read from the hub: {error}. Without a network "
            "give the path of a copy"
        ) from error
    if text.lines:
        # The hub's rows are the file's lines, of which the blank ones lost their blank.
        yield "".join(row or " \n" for row in rows)
    else:
        yield from rows
