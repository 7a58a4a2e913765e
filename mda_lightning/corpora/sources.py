"""Token sequences to score, wherever they lie: read as they are, without a copy."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from mda_lightning.corpora.arrays import MegatronIndex
from mda_lightning.corpora.texts import jsonl_documents, read_text
from mda_lightning.corpora.token_rows import TokenRows

_CHUNK = 2**14


class TokenSource(Protocol):
    """Samples of up to ``row_length`` tokens, numbered from 0."""

    @property
    def row_length(self) -> int:
        """T + 1, tokens in the longest sample."""
        ...

    @property
    def token_ids(self) -> NDArray[np.int64] | None:
        """The ids in use, special ones left out; None where that is not known."""
        ...

    def __len__(self) -> int: ...

    def get(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Tokens [n, T + 1]; shorter samples are filled up with -1."""
        ...

    def domains(self, ids: ArrayLike) -> Sequence[str] | None:
        """A name for each sample, or None where there are none."""
        ...

    def digest(self, first: int, last: int) -> str:
        """SHA-256 over samples [first, last)."""
        ...

    def text(self, sample: int) -> str:
        """A sample's text, or "" where there is none."""
        ...


class RowsSource:
    """A corpus folder."""

    def __init__(self, rows: TokenRows) -> None:
        self.rows = rows
        self.row_length = rows.row_length
        self.token_ids: NDArray[np.int64] | None = rows.token_ids

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, ids: ArrayLike) -> NDArray[np.int64]:
        return self.rows.get(ids)

    def domains(self, ids: ArrayLike) -> Sequence[str] | None:
        return self.rows.domains(ids)

    def digest(self, first: int, last: int) -> str:
        text = f"{self.rows.content_hash} {first} {last}"
        return hashlib.sha256(text.encode()).hexdigest()

    def text(self, sample: int) -> str:
        try:
            return self.rows.decode(self.rows.get([sample])[0])
        except ValueError:  # a corpus without a tokenizer
            return ""


class ArraySource:
    """Rows of an integer array [N, T + 1], such as a memory-mapped file; negative ids at a row's
    end fill up a shorter sample."""

    token_ids: NDArray[np.int64] | None = None

    def __init__(self, array: NDArray[Any], name: str) -> None:
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or array.shape[1] < 2:
            raise ValueError(
                f"{name} has {array.dtype} of shape {array.shape}; samples are integers [N, T + 1]"
            )
        self._array = array
        self.row_length = int(array.shape[1])

    def __len__(self) -> int:
        return len(self._array)

    def get(self, ids: ArrayLike) -> NDArray[np.int64]:
        wanted = _checked(ids, len(self))
        found = self._array[wanted].astype(np.int64)
        inside = (found[:, :-1] < 0) & (found[:, 1:] >= 0)
        if inside.any():
            at = int(np.flatnonzero(inside.any(1))[0])
            raise ValueError(
                f"sample {wanted[at]} holds token id {found[at].min()} before a real one; ids "
                "count from 0, and negative ones may fill up a sample's end"
            )
        return np.maximum(found, -1)

    def text(self, sample: int) -> str:
        return ""

    def domains(self, ids: ArrayLike) -> Sequence[str] | None:
        return None

    def digest(self, first: int, last: int) -> str:
        digest = hashlib.sha256(f"{self._array.dtype.str} {self.row_length} {first}".encode())
        for start in range(first, last, _CHUNK):
            part = self._array[start : min(start + _CHUNK, last)]
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()


class DocumentSource:
    """One sample a document, cut at ``row_length`` tokens, numbered as the documents are.

    Args:
        documents: (domain, text) in order.
        tokenizer: encodes them, without special tokens.
        row_length: T + 1.

    Attributes:
        n_too_short: documents of fewer than 2 tokens, in which nothing is predicted.
    """

    token_ids: NDArray[np.int64] | None = None

    def __init__(
        self, documents: Sequence[tuple[str, str]], tokenizer: Tokenizer, row_length: int
    ) -> None:
        self.row_length = row_length
        self._documents = list(documents)
        encoded = tokenizer.encode_batch([t for _, t in documents], add_special_tokens=False)
        self._rows = np.full((len(documents), row_length), -1, dtype=np.int64)
        for row, one in zip(self._rows, encoded, strict=True):
            ids = one.ids[:row_length]
            row[: len(ids)] = ids
        self.n_too_short = int((self._rows[:, 1] < 0).sum())
        if self.n_too_short == len(documents):
            raise ValueError("no document has 2 tokens or more, so there is nothing to score")

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, ids: ArrayLike) -> NDArray[np.int64]:
        return self._rows[_checked(ids, len(self))]

    def domains(self, ids: ArrayLike) -> Sequence[str] | None:
        return [self._documents[i][0] for i in _checked(ids, len(self))]

    def digest(self, first: int, last: int) -> str:
        digest = hashlib.sha256(f"{self.row_length} {first}".encode())
        digest.update(self._rows[first:last].data)
        digest.update("\0".join(domain for domain, _ in self._documents[first:last]).encode())
        return digest.hexdigest()

    def text(self, sample: int) -> str:
        return self._documents[sample][1]


def holds_text(path: str | os.PathLike[str]) -> bool:
    """Whether what lies at a path is text, which takes a tokenizer to read."""
    place = Path(path).expanduser()
    if (place / "meta.json").is_file():
        return False
    return place.suffix in (".jsonl", ".txt") or (place.is_dir() and any(place.glob("**/*.txt")))


def open_tokens(
    path: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    row_length: int | None = None,
) -> TokenSource:
    """The samples at a path.

    Args:
        path: a corpus folder (``mda-lightning data``); a ``.npy`` of rows; a Megatron ``.bin`` with
            its ``.idx`` whose sequences are equally long (the preshuffled Pile); a ``.jsonl`` file,
            a ``.txt`` file or a folder of ``.txt`` files, one sample a document.
        tokenizer: of texts.
        row_length: T + 1, at which texts are cut.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not of these kinds, or texts without tokenizer or length.
    """
    place = Path(path).expanduser()
    if (place / "meta.json").is_file():
        return RowsSource(TokenRows.open(place))
    if place.suffix in (".bin", ".idx") or place.with_name(place.name + ".idx").is_file():
        return _megatron(place)
    if not place.exists():
        raise FileNotFoundError(f"there is nothing at {place}; give the data to score")
    if place.suffix == ".npy":
        try:
            array = np.load(place, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{place} cannot be read as an array of integers; np.save writes one"
            ) from error
        return ArraySource(array, str(place))
    if not holds_text(place):
        raise ValueError(
            f"{place} is no corpus folder, .npy, .bin with .idx, .jsonl, or folder of .txt files; "
            "`mda-lightning data` makes a corpus folder of text"
        )
    if place.suffix == ".jsonl":
        documents = list(jsonl_documents(place, "text"))
    elif place.suffix == ".txt":
        documents = [(place.stem, read_text(place))]
    else:
        files = sorted(place.glob("**/*.txt"))
        documents = [(str(file.relative_to(place)), read_text(file)) for file in files]
    if tokenizer is None or row_length is None:
        raise ValueError(f"{place} holds text: give the model's tokenizer and a length")
    return DocumentSource(documents, tokenizer, row_length)


def _megatron(place: Path) -> ArraySource:
    stem = place.with_suffix("") if place.suffix in (".bin", ".idx") else place
    index = MegatronIndex.open(stem.with_name(stem.name + ".idx"))
    binary = stem.with_name(stem.name + ".bin")
    if not binary.is_file():
        raise FileNotFoundError(f"no Megatron tokens at {binary}, beside the index")
    sizes, itemsize = index.sizes, index.dtype.itemsize
    length = int(sizes[0])
    regular = bool((sizes == length).all() and (np.diff(index.pointers) == length * itemsize).all())
    if not regular:
        raise ValueError(
            f"the sequences of {stem.name} have {sizes.min()} to {sizes.max()} tokens; make rows "
            "of them first (rows_from_megatron with row_length)"
        )
    whole = min(len(sizes), (binary.stat().st_size - int(index.pointers[0])) // (length * itemsize))
    shape = (whole, length)
    array = np.memmap(binary, index.dtype, "r", offset=int(index.pointers[0]), shape=shape)
    return ArraySource(array, str(binary))


def _checked(ids: ArrayLike, n: int) -> NDArray[np.int64]:
    array = np.asarray(ids, dtype=np.int64)
    if array.size and not 0 <= array.min() <= array.max() < n:
        wrong = array[(array < 0) | (array >= n)].flat[0]
        raise IndexError(f"sample {wrong} does not exist: there are samples 0..{n - 1}")
    return array
