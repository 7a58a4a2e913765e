"""A corpus and further ones beside it, read by sample id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mda_lightning.corpora.token_rows import TokenRows
from mda_lightning.sample_ids import split_ids


class JoinedRows(TokenRows):
    """The base corpus, whose attributes these are, with rows of other corpora under their ids.

    Args:
        base: rows 0 .. N - 1.
        others: by the namespace of their ids; see :mod:`mda_lightning.sample_ids`.

    Raises:
        ValueError: rows of another length or tokenizer, or of a larger vocabulary than the base
            corpus.
    """

    def __init__(self, base: TokenRows, others: Mapping[int, TokenRows]) -> None:
        self.__dict__.update(base.__dict__)
        self.base = base
        self.others = dict(others)
        for rows in others.values():
            if rows.row_length != base.row_length:
                raise ValueError(
                    f"{rows.folder} has rows of {rows.row_length} tokens and {base.folder} of "
                    f"{base.row_length}; inserted rows must be as long"
                )
            if rows.vocab_size > base.vocab_size:
                raise ValueError(
                    f"{rows.folder} has a vocabulary of {rows.vocab_size} and {base.folder} of "
                    f"{base.vocab_size}; inserted rows must be of the same tokenizer"
                )

            if _tokenizer(rows) not in (None, _tokenizer(base)) and _tokenizer(base) is not None:
                raise ValueError(
                    f"{rows.folder} has another tokenizer than {base.folder}, so its tokens mean "
                    "other text there; make its rows with the base corpus's tokenizer.json"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return JoinedRows, (self.base, self.others)

    def get(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Tokens of the samples ``ids`` [n]; int64 [n, T + 1].

        Raises:
            IndexError: an id is no row of these corpora.
        """
        wanted = np.asarray(ids, dtype=np.int64)
        found = np.empty((len(wanted), self.row_length), np.int64)
        for rows, at, numbers in self._shares(wanted):
            found[at] = rows.get(numbers)
        return found

    def domains(self, ids: ArrayLike) -> list[str] | None:
        """The domain of each sample, or None where the base corpus has none.

        Where another corpus has none, its folder's name.
        """
        if not self.domain_names:
            return None
        wanted = np.asarray(ids, dtype=np.int64)
        names: list[str] = [""] * len(wanted)
        for rows, at, numbers in self._shares(wanted):
            own = rows.domains(numbers) or [rows.folder.name] * len(at)
            for place, name in zip(at, own, strict=True):
                names[place] = name
        return names

    def _shares(
        self, ids: NDArray[np.int64]
    ) -> list[tuple[TokenRows, NDArray[np.int64], NDArray[np.int64]]]:
        """Each corpus concerned, the places of its samples, and their rows."""
        namespaces, numbers = split_ids(ids)
        shares = []
        for namespace in np.unique(namespaces).tolist():
            rows = self.others.get(namespace) if namespace else self.base
            at = np.flatnonzero(namespaces == namespace)
            if rows is None:
                raise IndexError(f"sample {ids[at[0]]} is of a source that is not at hand")
            shares.append((rows, at, numbers[at]))
        return shares


def _tokenizer(rows: TokenRows) -> str | None:
    path = rows.folder / "tokenizer.json"
    return path.read_text("utf-8") if path.is_file() else None
