"""Token rows written a part at a time, for corpora that memory does not hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mda_lightning.corpora.token_rows import SCHEMA_VERSION, TokenRows
from mda_lightning.files import atomic_path, write_json

ROWS_AT_ONCE = 2**12


def write_streamed(
    folder: str | os.PathLike[str],
    parts: Iterable[NDArray[Any]],
    *,
    n_rows: int,
    row_length: int,
    vocab_size: int,
    domains: Sequence[str] | None = None,
    tokenizer_json: str | None = None,
    special_ids: Sequence[int] = (),
    provenance: Mapping[str, Any],
    progress: Callable[[float], None] | None = None,
) -> TokenRows:
    """Write a corpus folder as :meth:`TokenRows.write` does, and open it.

    Args:
        folder: made when absent; complete or not there at all.
        parts: integers [n, T + 1] each, one after another.
        n_rows, row_length: of all parts together.
        vocab_size: ids are below it.
        domains: a name for each row.
        tokenizer_json: of the `tokenizers` library; its special tokens count as special.
        special_ids: further ids that ``token_ids`` leaves out.
        provenance: where the rows come from, JSON values.
        progress: told the share of the rows written.

    Raises:
        ValueError: no rows, another number or length than announced, or ids that are negative or
            not below ``vocab_size``.
    """
    if n_rows < 1 or row_length < 2:
        raise ValueError(
            f"{n_rows} rows of {row_length} tokens: a corpus needs at least 1 row of 2 tokens"
        )
    names, codes = ((), None) if domains is None else _codes(domains, n_rows)
    special = set(special_ids)
    if tokenizer_json is not None:
        added = Tokenizer.from_str(tokenizer_json).get_added_tokens_decoder().items()
        special |= {number for number, token in added if token.special}
    with atomic_path(folder) as part:
        part.mkdir()
        rows = np.lib.format.open_memmap(
            part / "rows.npy",
            mode="w+",
            dtype=np.uint16 if vocab_size <= 2**16 else np.uint32,
            shape=(n_rows, row_length),
        )
        counts, at = np.zeros(vocab_size, np.int64), 0
        for some in parts:
            if some.shape[1:] != (row_length,) or at + len(some) > n_rows:
                raise ValueError(
                    f"rows {at}..{at + len(some) - 1} have shape {some.shape}; {n_rows} rows of "
                    f"{row_length} tokens were announced"
                )
            _check_ids(some, vocab_size, at)
            rows[at : at + len(some)] = some
            counts += np.bincount(some.reshape(-1), minlength=vocab_size)
            at += len(some)
            if progress is not None:
                progress(at / n_rows)
        if at != n_rows:
            raise ValueError(f"{at} rows came, {n_rows} were announced; is the source cut short?")
        rows.flush()
        del rows
        used = np.setdiff1d(np.flatnonzero(counts), sorted(special)).astype(np.int64)
        np.save(part / "token_ids.npy", used)
        if codes is not None:
            np.save(part / "domains.npy", codes)
        if tokenizer_json is not None:
            (part / "tokenizer.json").write_text(tokenizer_json, "utf-8")
        meta = {
            "kind": "token_rows",
            "schema_version": SCHEMA_VERSION,
            "n_rows": n_rows,
            "row_length": row_length,
            "vocab_size": vocab_size,
            "domain_names": list(names),
            "content_hash": "",
            "provenance": dict(provenance),
        }
        write_json(part / "meta.json", meta)
        meta["content_hash"] = TokenRows.open(part).recomputed_hash()
        write_json(part / "meta.json", meta)
    return TokenRows.open(folder)


def _codes(domains: Sequence[str], n_rows: int) -> tuple[tuple[str, ...], NDArray[Any]]:
    if len(domains) != n_rows:
        raise ValueError(f"{len(domains)} domains were given for {n_rows} rows; give one for each")
    names, codes = np.unique(np.asarray(domains, dtype=str), return_inverse=True)
    dtype = np.uint8 if len(names) <= 2**8 else np.uint32
    return tuple(str(name) for name in names), codes.astype(dtype)


def _check_ids(rows: NDArray[Any], vocab_size: int, first: int) -> None:
    if not len(rows):
        return
    smallest, largest = int(rows.min()), int(rows.max())
    if smallest < 0:
        raise ValueError(f"token id {smallest} is negative; token ids count from 0")
    if largest >= vocab_size:
        raise ValueError(
            f"token id {largest} in rows {first}..{first + len(rows) - 1} is not below vocab_size "
            f"{vocab_size}; give the vocabulary size of the tokenizer that made these rows"
        )
