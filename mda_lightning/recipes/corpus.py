"""``mda-lightning data``: corpora of token rows from the embedded text or a user's own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from mda_lightning.corpora import TokenRows, embedded_corpus, rows_from_folder, rows_from_jsonl
from mda_lightning.files import atomic_path

Source = Literal["embedded", "text", "jsonl"]


def make_corpus(
    source: Source,
    folder: Path,
    *,
    source_path: Path | None = None,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    sequence_length: int = 128,
    progress: Callable[[str, float], None] | None = None,
) -> TokenRows:
    """Write a corpus folder.

    Args:
        source: "embedded" (library text and records), "text" (a folder of .txt files) or "jsonl".
        folder: the corpus folder to write.
        source_path: the folder or file to read; not for "embedded".
        tokenizer: a ``tokenizer.json``; None trains a byte-level BPE on the text.
        vocab_size: of that BPE; None takes 512.
        sequence_length: T; rows hold T + 1 tokens.
        progress: told what is being done, for "embedded".

    Raises:
        ValueError: no input named, or too little text for one row.
        FileExistsError: ``folder`` exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is not empty; name another corpus folder")
    size = vocab_size or 512
    if source == "embedded":
        if source_path is not None or tokenizer is not None:
            raise ValueError("'embedded' takes no --input and no --tokenizer: it makes both")
        with atomic_path(folder) as part:
            kept = embedded_corpus(
                part.with_name(f"{part.name}.building"),
                row_length=sequence_length + 1,
                vocab_size=size,
                progress=progress,
            )
            os.replace(kept.folder, part)
            shutil.rmtree(kept.folder.parent, ignore_errors=True)
        return TokenRows.open(folder)
    if source_path is None:
        raise ValueError(f"'{source}' needs --input, the text to read")
    read = rows_from_folder if source == "text" else rows_from_jsonl
    return read(
        folder,
        source_path,
        row_length=sequence_length + 1,
        vocab_size=size,
        tokenizer_json=None if tokenizer is None else tokenizer.read_text("utf-8"),
    )
