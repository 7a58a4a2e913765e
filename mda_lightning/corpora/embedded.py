"""The corpus that needs no download: the running Python's library, and generated records."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import secrets
import shutil
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mda_lightning.corpora.bpe import END_OF_TEXT_ID, encode, encode_ascii, train_bpe
from mda_lightning.corpora.packing import pack
from mda_lightning.corpora.records import GENERATOR_VERSION, RecordGenerator, RecordStyle
from mda_lightning.corpora.token_rows import TokenRows
from mda_lightning.files import sha256_of
from mda_lightning.shuffling import key_of, keyed_order

LIBRARY_DOMAIN = "library"
_BUILD_VERSION = 1  # changes when the same parameters would give another corpus
# Tests, what is not the library's own, and what not every version or distribution has.
_LEFT_OUT = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3"}
)
_RECORDS_PER_BATCH = 500

Progress: TypeAlias = Callable[[str, float], None]
"""Called with what is being done and the share done, from 0 to 1."""


def embedded_corpus(
    cache_dir: str | os.PathLike[str],
    *,
    seed: int = 0,
    records_share: float = 0.15,
    n_rows: int = 45_000,
    row_length: int = 129,
    vocab_size: int = 512,
    style: RecordStyle | None = None,
    sample_characters: int = 3_000_000,
    progress: Progress | None = None,
) -> TokenRows:
    """Library text and generated records, tokenised by a BPE trained on the spot.

    Built once and kept in ``cache_dir`` under a key of everything that determines it: all
    parameters, the Python and tokenizers versions, the library's text, the generator's version.
    Several processes may ask for it at once. Domains are ``"library"`` and the record layouts;
    every row is of one domain.

    Args:
        cache_dir: where corpora are kept.
        seed: of the choice of files, the tokenizer's sample and the records.
        records_share: share of the rows that are records, 0 to 1.
        n_rows: rows asked for. Where the library has too little text for its share, there are
            fewer, in the same proportion; ``provenance`` says how many were asked for.
        row_length: T + 1.
        vocab_size: ids, the end of text (0) included.
        style: how the records look.
        sample_characters: how much library text the tokenizer is trained on.
        progress: told what is being built.

    Raises:
        ValueError: a share outside [0, 1], too few rows, or no library text to read.
        PermissionError: ``cache_dir`` cannot be written to.
    """
    style = style or RecordStyle()
    if not 0 <= records_share <= 1:
        raise ValueError(f"records_share is {records_share}; it is a share of the rows, 0 to 1")
    if n_rows < 1 or row_length < 2:
        raise ValueError(
            f"n_rows is {n_rows}, row_length {row_length}; at least 1 and 2 are needed"
        )
    report = progress or (lambda message, done: None)
    report("reading the standard library", 0.0)
    texts = library_texts()
    settings = {
        "build_version": _BUILD_VERSION,
        "generator_version": GENERATOR_VERSION,
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "library": sha256_of(*texts),
        "seed": seed,
        "records_share": records_share,
        "n_rows": n_rows,
        "row_length": row_length,
        "vocab_size": vocab_size,
        "style": dataclasses.asdict(style),
        "sample_characters": sample_characters,
    }
    key = sha256_of(json.dumps(settings, sort_keys=True))
    destination = Path(cache_dir) / f"embedded-{key[:16]}"
    if destination.is_dir():
        return TokenRows.open(destination)
    # Beside its place, under a name of this process alone: another may be building the same.
    staged = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}")
    _build(staged, texts, settings, style, report)
    return _kept(staged, destination)


def library_texts() -> list[str]:
    """The text of the running Python's library modules, in the order of their paths.

    Tests, installed packages, IDLE and lib2to3 are left out. Characters outside ASCII are written
    as escapes, so that a small vocabulary can hold every byte.

    Raises:
        ValueError: this Python has no library source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: list[str] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _LEFT_OUT)
        for name in sorted(names):
            if name.endswith(".py"):
                with tokenize.open(Path(folder) / name) as file:
                    text = file.read()
                texts.append(text.encode("ascii", "backslashreplace").decode("ascii"))
    if not any(texts):
        raise ValueError(
            f"this Python has no library source under {root}; use a corpus of your own: "
            "rows_from_folder or rows_from_jsonl"
        )
    return texts


def _build(
    folder: Path,
    texts: list[str],
    settings: dict[str, Any],
    style: RecordStyle,
    report: Progress,
) -> None:
    seed, row_length, n_rows = settings["seed"], settings["row_length"], settings["n_rows"]
    share = settings["records_share"]
    report("training the tokenizer", 0.05)
    tokenizer_json = train_bpe(
        texts,
        vocab_size=settings["vocab_size"],
        seed=seed,
        sample_characters=settings["sample_characters"],
        whole_byte_alphabet=False,
    )
    tokenizer = Tokenizer.from_str(tokenizer_json)

    wanted = round(n_rows * (1 - share))
    library: list[NDArray[np.uint32]] = []
    n_tokens = 0
    chosen = keyed_order(key_of("library files", seed), len(texts))
    for ids in encode_ascii(tokenizer, (texts[number] for number in chosen)):
        if n_tokens >= wanted * row_length:
            break
        library.append(ids)
        n_tokens += len(ids) + 1
        done = min(1.0, n_tokens / (wanted * row_length))
        report("tokenising the library", 0.1 + 0.6 * done)
    n_library = min(wanted, n_tokens // row_length)
    n_records = n_rows - wanted if n_library == wanted else round(n_library * share / (1 - share))

    documents = [(LIBRARY_DOMAIN, ids) for ids in library]
    generator = RecordGenerator(style, tokenizer, seed=seed)
    quotas = {LIBRARY_DOMAIN: n_library}
    for number, layout in enumerate(style.layouts):
        quotas[layout] = (n_records + number) // len(style.layouts)
        report("writing records", 0.7 + 0.25 * number / len(style.layouts))
        documents += _records(generator, tokenizer, layout, quotas[layout] * row_length)
    packed = pack(documents, row_length=row_length, end_of_text=END_OF_TEXT_ID)
    domains = np.asarray(packed.domains)
    keep = np.concatenate([np.flatnonzero(domains == name)[:n] for name, n in quotas.items()])
    report("writing the corpus", 0.95)
    TokenRows.write(
        folder,
        packed.rows[keep],
        domains=[packed.domains[row] for row in keep],
        tokenizer_json=tokenizer_json,
        provenance={"reader": "embedded", **settings},
    )
    report("corpus ready", 1.0)


def _records(
    generator: RecordGenerator, tokenizer: Tokenizer, layout: str, n_tokens: int
) -> Iterator[tuple[str, NDArray[np.uint32]]]:
    """Records of one layout until they fill ``n_tokens``, ends of text included."""
    while n_tokens > 0:
        texts = [generator.record(layout) for _ in range(_RECORDS_PER_BATCH)]
        for ids in encode(tokenizer, texts, batch=_RECORDS_PER_BATCH):
            yield layout, ids
            n_tokens -= len(ids) + 1


def _kept(built: Path, destination: Path) -> TokenRows:
    """Move a built corpus to its place, unless another process was there first."""
    try:
        built.rename(destination)
    except OSError:
        if not destination.is_dir():
            raise
        shutil.rmtree(built)
    return TokenRows.open(destination)
