"""Rows of a preshuffled Megatron corpus, such as Pythia's Pile, without holding it in memory.

The Pile is stored as ``document.idx`` and 21 shards ``document-00000-of-00020.bin``, a plain byte
split of one ``.bin``. Early training lies in the first shards: the others may be absent.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mda_lightning.corpora.arrays import MegatronIndex
from mda_lightning.corpora.streamed_rows import ROWS_AT_ONCE, write_streamed
from mda_lightning.corpora.token_rows import TokenRows

_SHARD = re.compile(r"-(\d+)-of-(\d+)$")


@dataclass(frozen=True)
class MegatronFiles:
    """An index and the files that hold its tokens, in order; the last shards may be absent."""

    index: Path
    binaries: tuple[Path, ...]

    @classmethod
    def find(cls, source: str | os.PathLike[str]) -> MegatronFiles:
        """The files at a path.

        Args:
            source: a ``.bin``, a ``.idx``, both without the ending, or a folder that holds one
                ``.idx`` and its ``.bin``, whole or in shards ``NAME-00000-of-00020.bin``.

        Raises:
            FileNotFoundError: no index, no tokens, or a shard before the last one is absent.
            ValueError: a folder of several indices.
        """
        path = Path(source)
        if path.is_dir():
            found = sorted(path.glob("*.idx"))
            if not found:
                raise FileNotFoundError(f"no Megatron index (.idx) in the folder {path}")
            if len(found) > 1:
                names = ", ".join(one.name for one in found)
                raise ValueError(f"{path} holds several indices ({names}); name one of them")
            stem = found[0].with_suffix("")
        else:
            stem = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
            shard = _SHARD.search(stem.name)
            if shard and not stem.with_name(f"{stem.name}.idx").is_file():
                stem = stem.with_name(stem.name[: shard.start()])
        index, whole = stem.with_name(f"{stem.name}.idx"), stem.with_name(f"{stem.name}.bin")
        if not index.is_file():
            raise FileNotFoundError(f"no Megatron index at {index}")
        if whole.is_file():
            return cls(index, (whole,))
        return cls(index, _shards(stem, whole))


def megatron_rows(
    folder: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    start: int = 0,
    n_rows: int | None = None,
    row_length: int | None = None,
    vocab_size: int | None = None,
    tokenizer_json: str | None = None,
    special_ids: Sequence[int] = (0,),
    progress: Callable[[float], None] | None = None,
) -> TokenRows:
    """Sequences of a Megatron corpus as rows, in their order, read and written part by part.

    Args:
        folder: to write; complete or not there at all.
        source: see :meth:`MegatronFiles.find`.
        start: the first sequence.
        n_rows: how many; None takes all that the files hold.
        row_length: T + 1 that the sequences must have; None takes theirs.
        vocab_size: ids are below it; None takes the tokenizer's. Pythia's models have 50,304.
        tokenizer_json: of the tokenizer that made the corpus, kept with it.
        special_ids: ids that probe sequences are not drawn from; 0 closes documents in the Pile.
        progress: told the share of the rows written.

    Raises:
        FileNotFoundError: no index or no tokens.
        ValueError: sequences of different length or another one than asked for, more rows than the
            files hold, ids that the vocabulary lacks, or neither vocabulary size nor tokenizer.
    """
    files = MegatronFiles.find(source)
    index = MegatronIndex.open(files.index)
    sizes = [path.stat().st_size for path in files.binaries]
    first_byte, length = _regular(index, files.index)
    row_bytes = length * index.dtype.itemsize
    if row_length is not None and length != row_length:
        raise ValueError(
            f"the sequences of {files.index} have {length} tokens, sequence_length "
            f"{row_length - 1} asks for {row_length}; give sequence_length {length - 1}"
        )
    held = min(len(index.sizes), (sum(sizes) - first_byte) // row_bytes)
    wanted = held - start if n_rows is None else n_rows
    if start < 0 or wanted < 1 or start + wanted > held:
        raise ValueError(
            f"rows [{start}, {start + wanted}) are asked for; the {len(files.binaries)} files of "
            f"{files.index} here hold {held} of the {len(index.sizes)} it lists; fetch the next "
            "shard, or ask for fewer (n_rows)"
        )
    if vocab_size is None and tokenizer_json is None:
        raise ValueError("give vocab_size (50304 for Pythia) or the corpus's tokenizer_json")
    if vocab_size is None:
        vocab_size = Tokenizer.from_str(str(tokenizer_json)).get_vocab_size(with_added_tokens=True)
    tokens = _Joined(files.binaries, sizes, index.dtype)

    def parts() -> Iterator[NDArray[Any]]:
        for first in range(start, start + wanted, ROWS_AT_ONCE):
            n = min(ROWS_AT_ONCE, start + wanted - first)
            yield tokens.read(first_byte + first * row_bytes, n * length).reshape(n, length)

    return write_streamed(
        folder,
        parts(),
        n_rows=wanted,
        row_length=length,
        vocab_size=vocab_size,
        tokenizer_json=tokenizer_json,
        special_ids=special_ids,
        provenance={
            "reader": "megatron",
            "source": files.index.stem,
            "start": start,
            "stop": start + wanted,
        },
        progress=progress,
    )


class _Joined:
    """Files read as one, a stretch of bytes at a time."""

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int], dtype: np.dtype[Any]) -> None:
        self._paths, self._dtype = paths, dtype
        self._ends = np.cumsum(sizes)

    def read(self, first_byte: int, n: int) -> NDArray[Any]:
        """``n`` tokens from a byte on; a token may lie across two files."""
        missing, data = n * self._dtype.itemsize, b""
        number = int(np.searchsorted(self._ends, first_byte, side="right"))
        while missing:
            begins = int(self._ends[number - 1]) if number else 0
            with self._paths[number].open("rb") as file:
                file.seek(first_byte - begins)
                some = file.read(missing)
            if not some:
                raise ValueError(f"{self._paths[number]} became shorter while it was read")
            data += some
            missing -= len(some)
            first_byte += len(some)
            number += 1
        return np.frombuffer(data, self._dtype)


def _regular(index: MegatronIndex, path: Path) -> tuple[int, int]:
    """The first sequence's byte, and the tokens that every sequence has."""
    if not len(index.sizes):
        raise ValueError(f"{path} lists no sequence; is it the index of a corpus?")
    length = int(index.sizes[0])
    step = length * index.dtype.itemsize
    if not ((index.sizes == length).all() and (np.diff(index.pointers) == step).all()):
        raise ValueError(
            f"the sequences of {path} have {index.sizes.min()} to {index.sizes.max()} tokens and "
            "are no rows of one length, as the preshuffled Pile's are; make rows of them first "
            "(mda_lightning.corpora.rows_from_megatron with row_length) and give that folder"
        )
    return int(index.pointers[0]), length


def _shards(stem: Path, whole: Path) -> tuple[Path, ...]:
    found: dict[int, Path] = {}
    for path in stem.parent.glob(f"{stem.name}-*-of-*.bin"):
        if match := _SHARD.search(path.stem):
            found[int(match[1])] = path
    if not found:
        raise FileNotFoundError(
            f"no Megatron tokens beside the index: neither {whole} nor shards "
            f"{stem.name}-00000-of-NNNNN.bin"
        )
    for number in range(max(found) + 1):
        if number not in found:
            raise FileNotFoundError(
                f"shard {number} of {stem} is absent, and later ones are here; fetch it, since "
                "shards are read in order"
            )
    return tuple(found[number] for number in sorted(found))
