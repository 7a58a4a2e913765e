"""Token rows from arrays: ``.npy`` rows, and Megatron's ``.bin`` with its ``.idx``."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mda_lightning.corpora.packing import pack
from mda_lightning.corpora.token_rows import TokenRows

_NPY_MAGIC = b"\x93NUMPY"
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}


def rows_from_npy(
    folder: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    start: int = 0,
    stop: int | None = None,
    tokenizer_json: str | None = None,
    vocab_size: int | None = None,
    special_ids: tuple[int, ...] = (0,),
) -> TokenRows:
    """Rows ``[start, stop)`` of an integer array ``[N, T + 1]`` in a ``.npy`` file, as a corpus.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a two-dimensional array of token ids, or the range is empty.
    """
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no array file at {path}")
    with path.open("rb") as file:
        if file.read(len(_NPY_MAGIC)) != _NPY_MAGIC:
            raise ValueError(f"{path} is not a .npy file; np.save writes one")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim != 2:
        raise ValueError(f"{path} has shape {array.shape}; token rows are [N, T + 1]")
    return TokenRows.write(
        folder,
        array[_range(start, stop, len(array), str(path))],
        tokenizer_json=tokenizer_json,
        vocab_size=vocab_size,
        special_ids=special_ids,
        provenance={"reader": "npy", "source": path.name, "start": start, "stop": stop},
    )


@dataclass(frozen=True, eq=False)
class MegatronIndex:
    """A Megatron ``.idx`` file (MMapIndexedDataset, version 1).

    Attributes:
        dtype: of the tokens in the ``.bin``.
        sizes: int32 [n], tokens of each sequence.
        pointers: int64 [n], byte offset of each sequence in the ``.bin``.
        document_starts: int64 [m], sequence number at which each document begins.
    """

    dtype: np.dtype[Any]
    sizes: NDArray[np.int32]
    pointers: NDArray[np.int64]
    document_starts: NDArray[np.int64]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> MegatronIndex:
        """Read an index.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another format or version, float tokens, or cut short.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no Megatron index at {file}")
        data = file.read_bytes()
        if data[: len(_MAGIC)] != _MAGIC or len(data) < _HEADER.size:
            raise ValueError(f"{file} is not a Megatron index: it does not begin with MMIDIDX")
        _, version, code, n, m = _HEADER.unpack_from(data)
        if version != 1 or code not in _DTYPES:
            raise ValueError(
                f"{file} has version {version} and dtype code {code}; version 1 and the integer "
                f"codes {sorted(_DTYPES)} are read"
            )
        needed = _HEADER.size + 12 * n + 8 * m
        if len(data) < needed:
            raise ValueError(
                f"{file} is cut short: {n} sequences and {m} documents need {needed} bytes, it has "
                f"{len(data)}; fetch it again"
            )
        sizes = np.frombuffer(data, "<i4", n, _HEADER.size)
        pointers = np.frombuffer(data, "<i8", n, _HEADER.size + 4 * n)
        documents = np.frombuffer(data, "<i8", m, _HEADER.size + 12 * n)
        return cls(np.dtype(_DTYPES[code]).newbyteorder("<"), sizes, pointers, documents)


def rows_from_megatron(
    folder: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    row_length: int | None = None,
    start: int = 0,
    stop: int | None = None,
    end_of_text: int | None = None,
    tokenizer_json: str | None = None,
    vocab_size: int | None = None,
    special_ids: tuple[int, ...] = (0,),
) -> TokenRows:
    """Sequences ``[start, stop)`` of a Megatron ``.bin``/``.idx`` pair, as a corpus.

    Where all these sequences are equally long (the preshuffled Pile: 2,049 tokens; training step i
    is sequences ``[1024 i, 1024 (i + 1))``) and no other ``row_length`` is asked for, each is a row
    and keeps its order. Otherwise they are documents and are joined and cut into rows.

    Args:
        folder: to write.
        source: path of the ``.bin``, of the ``.idx``, or of both without the ending.
        row_length: T + 1; needed when the sequences differ in length.
        start, stop: which sequences.
        end_of_text: id put after each document when rows are cut anew; None where the documents
            already end with it, as NeoX writes them.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a damaged pair, an empty range, or a row length that is missing.
    """
    stem = Path(source)
    stem = stem.with_suffix("") if stem.suffix in (".bin", ".idx") else stem
    binary = stem.with_name(stem.name + ".bin")
    index = MegatronIndex.open(stem.with_name(stem.name + ".idx"))
    if not binary.is_file():
        raise FileNotFoundError(f"no Megatron tokens at {binary}, beside the index")
    chosen = _range(start, stop, len(index.sizes), str(stem))
    sizes, pointers = index.sizes[chosen], index.pointers[chosen]
    end_byte = int(pointers[-1]) + int(sizes[-1]) * index.dtype.itemsize
    if binary.stat().st_size < end_byte:
        raise ValueError(
            f"{binary} has {binary.stat().st_size} bytes, the index needs {end_byte} for sequences "
            f"{chosen.start}..{chosen.stop - 1}; fetch the rest or ask for fewer"
        )
    tokens = np.memmap(binary, dtype=index.dtype, mode="r")
    first = pointers // index.dtype.itemsize
    equal = bool((sizes == sizes[0]).all() and (np.diff(first) == sizes[0]).all())
    if equal and row_length in (None, int(sizes[0])):
        rows = tokens[first[0] : first[0] + int(sizes.sum())].reshape(len(sizes), int(sizes[0]))
    elif row_length is None:
        raise ValueError(
            f"the sequences of {stem.name} have {sizes.min()} to {sizes.max()} tokens; give "
            "row_length to join them and cut rows"
        )
    else:
        spans = zip(first, sizes, strict=True)
        documents = (("", tokens[at : at + size]) for at, size in spans)
        rows = pack(documents, row_length=row_length, end_of_text=end_of_text).rows
    return TokenRows.write(
        folder,
        rows,
        tokenizer_json=tokenizer_json,
        vocab_size=vocab_size,
        special_ids=special_ids,
        provenance={"reader": "megatron", "source": stem.name, "start": start, "stop": stop},
    )


def _range(start: int, stop: int | None, length: int, name: str) -> slice:
    end = length if stop is None else stop
    if not 0 <= start < end <= length:
        raise ValueError(
            f"rows [{start}, {end}) of {name} do not exist: it has {length}, at least 1 is needed"
        )
    return slice(start, end)
