"""Samples for insertions that the base corpus does not hold, as rows of its length and vocabulary.

They come from a file of texts, a file of tokens, or a generator, and become a folder of token rows
of their own: ``Source.of(rows)`` gives them sample ids that no row of the base corpus has.

A generator is called as ``generator(rng, n_rows)`` with a ``numpy.random.Generator`` and gives
either integers ``[n_rows, T + 1]`` or texts, one after another, as many as the rows take.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mda_lightning.corpora.arrays import MegatronIndex, rows_from_megatron
from mda_lightning.corpora.bpe import END_OF_TEXT, encode
from mda_lightning.corpora.packing import pack
from mda_lightning.corpora.records import GENERATOR_VERSION, RecordGenerator, RecordStyle
from mda_lightning.corpora.texts import folder_documents, jsonl_documents, read_text
from mda_lightning.corpora.token_rows import TokenRows

Generator: TypeAlias = Callable[[np.random.Generator, int], NDArray[Any] | Iterable[str]]
"""What :func:`inserted_from_generator` calls."""

_LENGTHS = (8, 20)  # of a repeated sequence, as in the probes (Appendix C)


def inserted_from_texts(
    folder: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    base: TokenRows,
    text_key: str = "text",
) -> TokenRows:
    """Texts as rows that fit a corpus, encoded with its tokenizer and packed as its own texts are.

    Documents of a domain are joined, each closed by the end-of-text token, and cut into rows; what
    is left at the end of a domain is dropped and counted in the provenance.

    Args:
        folder: to write.
        source: a ``.txt`` file (one document), a ``.jsonl`` (``.jsonl.gz``) file, or a folder of
            ``.txt`` files.
        base: the corpus that the rows are to be inserted into.
        text_key: of the JSON lines.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a corpus without a tokenizer, another kind of file, or too little text for one
            row.
    """
    path = Path(source)
    tokenizer_json = _tokenizer_of(base)
    pairs = [(domain, text) for domain, text in _documents(path, text_key) if text]
    tokenizer = Tokenizer.from_str(tokenizer_json)
    encoded = list(encode(tokenizer, (text for _, text in pairs)))
    longest = max((len(ids) for ids in encoded), default=0)
    if not longest:
        raise ValueError(f"{path} holds no text; give a file with at least one row of it")
    try:
        packed = pack(
            zip((domain for domain, _ in pairs), encoded, strict=True),
            row_length=base.row_length,
            end_of_text=tokenizer.token_to_id(END_OF_TEXT),
        )
    except ValueError as error:
        raise ValueError(
            f"{path} has {sum(map(len, encoded))} tokens, too few for one row of "
            f"{base.row_length}, the length of the corpus's rows; give more text"
        ) from error
    return TokenRows.write(
        folder,
        packed.rows,
        domains=packed.domains,
        tokenizer_json=tokenizer_json,
        vocab_size=base.vocab_size,
        provenance={
            "reader": "inserted texts",
            "source": path.name,
            "documents": len(pairs),
            "dropped_tokens": packed.dropped,
            "base_corpus": base.content_hash,
        },
    )


def inserted_from_tokens(
    folder: str | os.PathLike[str], source: str | os.PathLike[str], *, base: TokenRows
) -> TokenRows:
    """Token ids as rows that fit a corpus.

    Args:
        folder: to write.
        source: a ``.npy`` of rows [n, T + 1], or a Megatron ``.bin`` with its ``.idx``: sequences
            of T + 1 tokens each, or documents, which are joined and cut.
        base: the corpus that the rows are to be inserted into.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: rows of another length, ids that the corpus's vocabulary does not have, no row,
            or another kind of file.
    """
    path = Path(source)
    if path.suffix == ".npy":
        array = _array(path)
        _check_shape(array, str(path), base)
        about = {
            "reader": "inserted npy",
            "source": path.name,
            "base_corpus": base.content_hash,
        }
        return _written(folder, array, base, about, str(path))
    stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    index_file = stem.with_name(stem.name + ".idx")
    if not index_file.is_file():
        if not path.exists():
            raise FileNotFoundError(f"there is nothing at {path}; give a file of token ids")
        raise ValueError(f"{path} is no .npy and no Megatron .bin with its .idx beside it")
    sizes = MegatronIndex.open(index_file).sizes
    if not len(sizes):
        raise ValueError(f"{index_file} has no sequence; give at least one row of tokens")
    if (sizes == sizes[0]).all() and sizes[0] != base.row_length:
        raise ValueError(_another_length(f"the sequences of {stem}", int(sizes[0]), base))
    return rows_from_megatron(
        folder,
        path,
        row_length=base.row_length,
        tokenizer_json=_tokenizer_if_any(base),
        vocab_size=base.vocab_size,
        special_ids=(),
    )


def inserted_from_generator(
    folder: str | os.PathLike[str],
    generator: Generator | str,
    *,
    base: TokenRows,
    n_rows: int,
    seed: int = 0,
) -> TokenRows:
    """Rows that a generator makes, the same for the same seed.

    Args:
        folder: to write.
        generator: a callable, ``"package.module:function"``, or one of :data:`GENERATORS`:
            ``"repeated_tokens"`` (random sequences of 8 to 20 different tokens of the corpus, each
            twice, one pair after another, as in the probes of Appendix C) or ``"records"``
            (:mod:`mda_lightning.corpora.records`, which takes a tokenizer).
        base: the corpus that the rows are to be inserted into.
        n_rows: how many.
        seed: of ``numpy.random.default_rng``.

    Raises:
        ValueError: an unknown name, rows of another number or length, ids that the corpus's
            vocabulary does not have, or too few texts.
    """
    if n_rows < 1:
        raise ValueError(f"n_rows is {n_rows}; a generator makes at least one row")
    name, function = _named(generator, base)
    what = f"generator {name!r}"
    try:
        made = function(np.random.default_rng(seed), n_rows)
        texts = None if isinstance(made, np.ndarray) else iter(made)
    except Exception as error:  # whatever one's own code raises
        raise ValueError(
            f"{what} failed, called as generator(rng, n_rows): {type(error).__name__}: {error}; it "
            "gives integers [n_rows, T + 1], or texts"
        ) from error
    about = {
        "reader": "generator",
        "generator": name,
        "seed": seed,
        "n_rows": n_rows,
        "numpy": np.__version__,
        "base_corpus": base.content_hash,
    }
    if name == "records":
        about["generator_version"] = GENERATOR_VERSION
    if isinstance(made, np.ndarray) and made.dtype.kind not in "UOS":
        _check_shape(made, what, base)
        rows = made
    else:
        rows = _rows_of_texts(iter(made) if texts is None else texts, n_rows, base, what)
    if len(rows) != n_rows:
        raise ValueError(f"{what} made {len(rows)} rows, {n_rows} were asked for")
    return _written(folder, rows, base, about, what, domain=name.rpartition(":")[2])


def repeated_tokens(base: TokenRows) -> Generator:
    """Rows of random sequences ``s s``: s has 8 to 20 different tokens that the corpus uses."""
    shortest, longest = _LENGTHS
    if len(base.token_ids) < longest:
        raise ValueError(
            f"the corpus uses {len(base.token_ids)} token ids, repeated sequences of up to "
            f"{longest} different ones need as many; use another generator"
        )

    def generate(rng: np.random.Generator, n_rows: int) -> NDArray[np.int64]:
        rows = np.empty((n_rows, base.row_length), np.int64)
        for row in rows:
            at = 0
            while at < len(row):
                size = int(rng.integers(shortest, longest + 1))
                pair = np.tile(rng.choice(base.token_ids, size, replace=False), 2)[: len(row) - at]
                row[at : at + len(pair)] = pair
                at += len(pair)
        return rows

    return generate


def records(base: TokenRows) -> Generator:
    """Generated records in all layouts, with names of the corpus's own tokens."""
    tokenizer = Tokenizer.from_str(_tokenizer_of(base))
    style = RecordStyle()

    def generate(rng: np.random.Generator, n_rows: int) -> Iterator[str]:
        source = RecordGenerator(style, tokenizer, seed=int(rng.integers(2**63)))
        while True:
            yield source.record(style.layouts[int(rng.integers(len(style.layouts)))])

    return generate


GENERATORS: dict[str, Callable[[TokenRows], Generator]] = {
    "repeated_tokens": repeated_tokens,
    "records": records,
}
"""Built-in generators by name; each is made for a corpus."""


def _named(generator: Generator | str, base: TokenRows) -> tuple[str, Generator]:
    if not isinstance(generator, str):
        where = getattr(generator, "__module__", "?")
        return f"{where}:{getattr(generator, '__qualname__', type(generator).__name__)}", generator
    if generator in GENERATORS:
        return generator, GENERATORS[generator](base)
    module, colon, name = generator.partition(":")
    if not (module and colon and name):
        raise ValueError(
            f"{generator!r} is no generator: there are {', '.join(GENERATORS)}, and "
            "'package.module:function' for one of your own"
        )
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"generator {generator!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"generator {generator!r} is a {type(found).__name__}, not a function")
    return generator, found


def _rows_of_texts(texts: Iterator[str], n_rows: int, base: TokenRows, what: str) -> NDArray[Any]:
    """The first rows that texts fill, joined with the end-of-text token between them."""
    tokenizer = Tokenizer.from_str(_tokenizer_of(base))
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    closing = np.array([] if end_of_text is None else [end_of_text], np.uint32)
    wanted, found, parts = n_rows * base.row_length, 0, []
    for ids in encode(tokenizer, _checked_texts(texts, what)):
        parts += [ids, closing]
        found += len(ids) + len(closing)
        if found >= wanted:
            break
    if found < wanted:
        raise ValueError(
            f"{what} made texts of {found} tokens, {n_rows} rows of {base.row_length} take "
            f"{wanted}; let it make more, or ask for {found // base.row_length} rows"
        )
    return np.concatenate(parts)[:wanted].reshape(n_rows, base.row_length)


def _checked_texts(texts: Iterator[str], what: str) -> Iterator[str]:
    while True:
        try:
            text = next(texts)
        except StopIteration:
            return
        except Exception as error:  # whatever one's own code raises
            raise ValueError(f"{what} failed: {type(error).__name__}: {error}") from error
        if not isinstance(text, str):
            raise ValueError(
                f"{what} made a {type(text).__name__}; it gives integers [n_rows, T + 1], or texts"
            )
        yield text


def _documents(path: Path, text_key: str) -> Iterator[tuple[str, str]]:
    if path.is_dir():
        return folder_documents(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is nothing at {path}; give a file or folder of texts")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return jsonl_documents(path, text_key)
    if path.name.endswith((".txt", ".txt.gz")):
        return iter([("text", read_text(path))])
    raise ValueError(f"{path} is no .txt, no .jsonl and no folder of .txt files; give one of these")


def _array(path: Path) -> NDArray[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is nothing at {path}; give a file of token ids")
    try:
        found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an array of integers: {error}") from error
    return found


def _check_shape(rows: NDArray[Any], what: str, base: TokenRows) -> None:
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(
            f"{what} has {rows.dtype} of shape {rows.shape}; rows are integers "
            f"[n, {base.row_length}], as those of the corpus"
        )
    if not len(rows):
        raise ValueError(f"{what} has no row; give at least one")
    if rows.shape[1] != base.row_length:
        raise ValueError(_another_length(f"the rows of {what}", rows.shape[1], base))


def _another_length(what: str, length: int, base: TokenRows) -> str:
    return (
        f"{what} have {length} tokens, those of the corpus {base.folder} have {base.row_length}; "
        "inserted rows must be as long: cut or join them to that length"
    )


def _written(
    folder: str | os.PathLike[str],
    rows: NDArray[Any],
    base: TokenRows,
    provenance: dict[str, Any],
    what: str,
    *,
    domain: str | None = None,
) -> TokenRows:
    largest = int(rows.max())
    if largest >= base.vocab_size:
        raise ValueError(
            f"{what} has token id {largest}, the corpus's vocabulary has ids "
            f"0..{base.vocab_size - 1}; use the tokenizer that made the corpus"
        )
    return TokenRows.write(
        folder,
        rows,
        domains=None if domain is None else [domain] * len(rows),
        tokenizer_json=_tokenizer_if_any(base),
        vocab_size=base.vocab_size,
        provenance=provenance,
    )


def _tokenizer_if_any(base: TokenRows) -> str | None:
    path = base.folder / "tokenizer.json"
    return path.read_text("utf-8") if path.is_file() else None


def _tokenizer_of(base: TokenRows) -> str:
    found = _tokenizer_if_any(base)
    if found is None:
        raise ValueError(
            f"the corpus {base.folder} has no tokenizer.json, which texts take to become rows of "
            "it; give rows of token ids instead"
        )
    return found
