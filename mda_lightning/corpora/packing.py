"""Documents of token ids cut into rows, each row from one domain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class PackedRows:
    """What :func:`pack` made.

    Attributes:
        rows: uint32 [N, T + 1], domain after domain.
        domains: the domain of each row.
        dropped: domain -> tokens left over at its end, too few for a row.
    """

    rows: NDArray[Any]
    domains: list[str]
    dropped: dict[str, int]


def pack(
    documents: Iterable[tuple[str, NDArray[Any]]], *, row_length: int, end_of_text: int | None
) -> PackedRows:
    """Cut documents into rows of ``row_length`` tokens that do not overlap.

    The documents of a domain are joined in the order given, each followed by ``end_of_text``; a row
    may begin and end inside a document, as in the Pile. No row holds two domains.

    Args:
        documents: (domain, token ids [n]) pairs.
        row_length: T + 1.
        end_of_text: id that closes a document; None for none.

    Raises:
        ValueError: not one row can be filled.
    """
    if row_length < 2:
        raise ValueError(f"row_length is {row_length}; a row needs an input and a target token")
    closing = np.array([] if end_of_text is None else [end_of_text], dtype=np.uint32)
    by_domain: dict[str, list[NDArray[Any]]] = {}
    for domain, ids in documents:
        by_domain.setdefault(domain, []).extend([np.asarray(ids, dtype=np.uint32), closing])
    rows: list[NDArray[Any]] = []
    domains: list[str] = []
    dropped: dict[str, int] = {}
    n_tokens = 0
    for domain, parts in by_domain.items():
        stream = np.concatenate(parts)
        n_tokens += len(stream)
        n_rows, dropped[domain] = divmod(len(stream), row_length)
        rows.append(stream[: n_rows * row_length].reshape(n_rows, row_length))
        domains += [domain] * n_rows
    if not domains:
        raise ValueError(
            f"the corpus has {n_tokens} tokens in {len(by_domain)} domains, not enough for one row "
            f"of {row_length} tokens; use more text or shorter rows"
        )
    return PackedRows(np.concatenate(rows), domains, dropped)
