"""Samples from elsewhere than the base corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mda_lightning.sample_ids import ids_in, namespace_of, split_ids


class _Rows(Protocol):
    """What a :class:`~mda_lightning.corpora.TokenRows` has."""

    folder: Path
    row_length: int
    content_hash: str

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Source:
    """A corpus of samples besides the base corpus.

    Attributes:
        name: for people.
        content_hash: of its rows; decides the ids.
        n_rows: rows.
        row_length: T + 1.
        path: its folder; not part of a plan's hash.
    """

    name: str
    content_hash: str
    n_rows: int
    row_length: int
    path: str | None = None

    @classmethod
    def of(cls, rows: _Rows, *, name: str | None = None) -> Source:
        """The source that a corpus of token rows is."""
        folder = Path(rows.folder).absolute()
        return cls(name or folder.name, rows.content_hash, len(rows), rows.row_length, str(folder))

    @property
    def namespace(self) -> int:
        """1 .. 2^22 - 1."""
        return namespace_of(self.content_hash)

    def ids(self, rows: ArrayLike | None = None) -> NDArray[np.int64]:
        """Sample ids of these rows, or of all.

        Raises:
            IndexError: the source has no such row.
        """
        numbers = np.arange(self.n_rows) if rows is None else np.asarray(rows).reshape(-1)
        wrong = numbers[(numbers < 0) | (numbers >= self.n_rows)]
        if wrong.size:
            raise IndexError(
                f"row {wrong[0]} is not in {self.name!r}: it has rows 0..{self.n_rows - 1}"
            )
        return ids_in(self.namespace, numbers.astype(np.int64))

    def describe(self) -> dict[str, Any]:
        """The source as JSON values; ``Source(**source.describe())`` is the same."""
        return {
            "name": self.name,
            "content_hash": self.content_hash,
            "n_rows": self.n_rows,
            "row_length": self.row_length,
            "path": self.path,
        }


def describe_id(sample_id: int, sources: Sequence[Source]) -> str:
    """A sample id as people read it: ``"17"``, or ``"name#3"`` of a source."""
    namespace, row = (int(part) for part in split_ids(sample_id))
    if not namespace:
        return str(row)
    named = {source.namespace: source.name for source in sources}
    return f"{named.get(namespace, f'unknown source {namespace}')}#{row}"


def merge_sources(first: Sequence[Source], second: Sequence[Source]) -> tuple[Source, ...]:
    """Both, each once.

    Raises:
        ValueError: two of different content whose ids would be the same.
    """
    merged = {source.namespace: source for source in first}
    for source in second:
        other = merged.setdefault(source.namespace, source)
        if other.content_hash != source.content_hash:
            raise ValueError(
                f"the ids of sources {other.name!r} and {source.name!r} would be the same, by a "
                "rare accident of their hashes; change a row of one of the two"
            )
    return tuple(merged.values())
