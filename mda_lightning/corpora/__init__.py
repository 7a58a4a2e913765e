"""Corpora: token rows on disk, and what makes them."""

from mda_lightning.corpora.arrays import MegatronIndex, rows_from_megatron, rows_from_npy
from mda_lightning.corpora.bpe import train_bpe
from mda_lightning.corpora.embedded import embedded_corpus
from mda_lightning.corpora.inserted import (
    GENERATORS,
    inserted_from_generator,
    inserted_from_texts,
    inserted_from_tokens,
)
from mda_lightning.corpora.joined import JoinedRows
from mda_lightning.corpora.records import RecordStyle
from mda_lightning.corpora.texts import rows_from_folder, rows_from_jsonl, rows_from_texts
from mda_lightning.corpora.token_rows import TokenRows

__all__ = [
    "GENERATORS",
    "JoinedRows",
    "MegatronIndex",
    "RecordStyle",
    "TokenRows",
    "embedded_corpus",
    "inserted_from_generator",
    "inserted_from_texts",
    "inserted_from_tokens",
    "rows_from_folder",
    "rows_from_jsonl",
    "rows_from_megatron",
    "rows_from_npy",
    "rows_from_texts",
    "train_bpe",
]
