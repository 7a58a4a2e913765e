"""Rows of token ids on disk: what a run trains on, memory-mapped.

A folder of ``rows.npy`` (``[N, T + 1]``, uint16 or uint32), ``token_ids.npy``, ``meta.json`` and,
where known, ``domains.npy`` (one code per row) and ``tokenizer.json``. A row is one training
sample: inputs are its first T tokens, targets its last T. Its number is the sample id.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from mda_lightning.files import atomic_path, read_json, sha256_of, write_json

SCHEMA_VERSION = 1


class TokenRows:
    """A corpus of equally long rows of token ids; open one with :meth:`open`.

    Attributes:
        folder: where it lies.
        row_length: T + 1, tokens in a row.
        vocab_size: ids are below it; the model needs at least this many.
        token_ids: int64, ascending; the ids that occur in the rows, special ones (end of text,
            padding) left out. Probe sequences are drawn from these.
        content_hash: SHA-256 over rows, domains and tokenizer.
        domain_names: the domains that occur, or empty.
        provenance: how the corpus was made, JSON values.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        self.folder = folder
        self.row_length: int = meta["row_length"]
        self.vocab_size: int = meta["vocab_size"]
        self.content_hash: str = meta["content_hash"]
        self.domain_names: tuple[str, ...] = tuple(meta["domain_names"])
        self.provenance: dict[str, Any] = meta["provenance"]
        self._rows: NDArray[Any] = np.load(folder / "rows.npy", mmap_mode="r")
        self.token_ids: NDArray[np.int64] = np.load(folder / "token_ids.npy")
        self._domains: NDArray[Any] | None = (
            np.load(folder / "domains.npy", mmap_mode="r") if self.domain_names else None
        )
        self._tokenizer: Tokenizer | None = None
        if self._rows.shape != (meta["n_rows"], self.row_length):
            raise ValueError(
                f"{folder}: rows.npy has shape {self._rows.shape}, meta.json says "
                f"({meta['n_rows']}, {self.row_length}); the folder was damaged, build it again"
            )

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> TokenRows:
        """Open a corpus folder.

        Raises:
            FileNotFoundError: no corpus there.
            ValueError: of a newer schema, or damaged.
        """
        path = Path(folder)
        if not (path / "meta.json").is_file():
            raise FileNotFoundError(
                f"{path} is not a folder of token rows (no meta.json); `rows_from_folder`, "
                "`rows_from_jsonl`, `rows_from_npy`, `rows_from_megatron` and `embedded_corpus` "
                "make one"
            )
        meta = read_json(path / "meta.json")
        if meta.get("kind") != "token_rows":
            raise ValueError(f"{path / 'meta.json'} does not describe token rows")
        if meta["schema_version"] > SCHEMA_VERSION:
            raise ValueError(
                f"{path} has token-row schema {meta['schema_version']}, this version reads up to "
                f"{SCHEMA_VERSION}; update mda-lightning"
            )
        return cls(path, meta)

    @classmethod
    def write(
        cls,
        folder: str | os.PathLike[str],
        rows: NDArray[Any],
        *,
        domains: Sequence[str] | None = None,
        tokenizer_json: str | None = None,
        vocab_size: int | None = None,
        special_ids: Sequence[int] = (),
        provenance: Mapping[str, Any],
    ) -> TokenRows:
        """Write a corpus folder and open it; an existing one there is replaced.

        Args:
            folder: made when absent; complete or not there at all.
            rows: integers [N, T + 1].
            domains: a name for each row.
            tokenizer_json: of the `tokenizers` library; its special tokens count as special.
            vocab_size: by default the tokenizer's, or the largest id plus one.
            special_ids: further ids that ``token_ids`` leaves out.
            provenance: where the rows come from, JSON values.

        Raises:
            ValueError: no rows, rows of fewer than two tokens, ids that are negative or not below
                ``vocab_size``, or another number of domains than of rows.
        """
        largest = _check_rows(rows)
        special = set(special_ids)
        if tokenizer_json is not None:
            tokenizer = Tokenizer.from_str(tokenizer_json)
            added = tokenizer.get_added_tokens_decoder().items()
            special |= {number for number, token in added if token.special}
            vocab_size = vocab_size or tokenizer.get_vocab_size(with_added_tokens=True)
        vocab_size = vocab_size or largest + 1
        if largest >= vocab_size:
            raise ValueError(
                f"token id {largest} is not below vocab_size {vocab_size}; "
                "give the vocabulary size of the tokenizer that made these rows"
            )
        used = np.flatnonzero(np.bincount(rows.reshape(-1), minlength=vocab_size))
        names, codes = _coded(domains, len(rows))
        dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
        stored = np.ascontiguousarray(rows, dtype=dtype)
        with atomic_path(folder) as part:
            part.mkdir()
            np.save(part / "rows.npy", stored)
            np.save(part / "token_ids.npy", np.setdiff1d(used, sorted(special)).astype(np.int64))
            if codes is not None:
                np.save(part / "domains.npy", codes)
            if tokenizer_json is not None:
                (part / "tokenizer.json").write_text(tokenizer_json, "utf-8")
            content_hash = _hash_of(stored, names, codes, tokenizer_json)
            meta = {
                "kind": "token_rows",
                "schema_version": SCHEMA_VERSION,
                "n_rows": len(rows),
                "row_length": rows.shape[1],
                "vocab_size": vocab_size,
                "domain_names": list(names),
                "content_hash": content_hash,
                "provenance": dict(provenance),
            }
            write_json(part / "meta.json", meta)
        return cls.open(folder)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return (
            f"TokenRows({len(self)} rows of {self.row_length} tokens, vocabulary "
            f"{self.vocab_size}, {self.content_hash[:12]}, {self.folder})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A loader's worker maps the file itself instead of being sent the tokens.
        return TokenRows.open, (self.folder,)

    def get(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Tokens of the samples ``ids`` [n]; int64 [n, T + 1].

        Raises:
            IndexError: an id is no row of this corpus.
        """
        return self._rows[self._checked(ids)].astype(np.int64)

    def domains(self, ids: ArrayLike) -> list[str] | None:
        """The domain of each sample, or None where the corpus has no domains."""
        if self._domains is None:
            return None
        return [self.domain_names[code] for code in self._domains[self._checked(ids)]]

    def decode(self, tokens: ArrayLike) -> str:
        """The text of token ids [t], special tokens left out.

        Raises:
            ValueError: the corpus has no tokenizer.
        """
        return str(self._get_tokenizer().decode(_as_list(tokens)))

    def token_strings(self, tokens: ArrayLike) -> list[str]:
        """The text of each token on its own; part of a character shows as U+FFFD.

        Raises:
            ValueError: the corpus has no tokenizer.
        """
        tokenizer = self._get_tokenizer()
        return [str(tokenizer.decode([t], skip_special_tokens=False)) for t in _as_list(tokens)]

    def recomputed_hash(self) -> str:
        """``content_hash`` of the files as they are now, all of which it reads."""
        tokenizer = self.folder / "tokenizer.json"
        tokenizer_json = tokenizer.read_text("utf-8") if tokenizer.is_file() else None
        return _hash_of(self._rows, self.domain_names, self._domains, tokenizer_json)

    def _checked(self, ids: ArrayLike) -> NDArray[np.int64]:
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < len(self):
            wrong = array[(array < 0) | (array >= len(self))].flat[0]
            raise IndexError(
                f"sample {wrong} is not in this corpus: it has rows 0..{len(self) - 1}"
            )
        return array

    def _get_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            path = self.folder / "tokenizer.json"
            if not path.is_file():
                raise ValueError(
                    f"{self.folder} holds no tokenizer.json, so its tokens have no text; "
                    "give tokenizer_json when the rows are written"
                )
            self._tokenizer = Tokenizer.from_file(str(path))
        return self._tokenizer


def _check_rows(rows: NDArray[Any]) -> int:
    """The largest id of valid rows."""
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"rows are integers [N, T + 1], got {rows.dtype} of shape {rows.shape}")
    if not len(rows) or rows.shape[1] < 2:
        raise ValueError(
            f"rows have shape {rows.shape}: a corpus needs at least 1 row of 2 tokens; "
            "use more text or shorter rows"
        )
    smallest, largest = int(rows.min()), int(rows.max())
    if smallest < 0:
        raise ValueError(f"token id {smallest} is negative; token ids count from 0")
    return largest


def _hash_of(
    rows: NDArray[Any],
    names: Sequence[str],
    codes: NDArray[Any] | None,
    tokenizer_json: str | None,
) -> str:
    return sha256_of(rows, "|".join(names), "" if codes is None else codes, tokenizer_json or "")


def _coded(
    domains: Sequence[str] | None, n_rows: int
) -> tuple[tuple[str, ...], NDArray[Any] | None]:
    if domains is None:
        return (), None
    if len(domains) != n_rows:
        raise ValueError(f"{len(domains)} domains were given for {n_rows} rows; give one for each")
    names, codes = np.unique(np.asarray(domains, dtype=str), return_inverse=True)
    dtype = np.uint8 if len(names) <= 2**8 else np.uint32
    return tuple(str(name) for name in names), codes.astype(dtype)


def _as_list(tokens: ArrayLike) -> list[int]:
    return [int(t) for t in np.asarray(tokens).reshape(-1)]
