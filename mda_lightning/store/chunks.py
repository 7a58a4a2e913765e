"""Scores of a scoring in progress: chunks on disk that an interrupted call takes up again."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mda_lightning.files import atomic_path

_CHUNK = re.compile(r"(\d+)-(\d+)\.npz")


class Chunk(NamedTuple):
    """Samples [first, last): values float32 [n, U, K] by mechanism, loss float32 [n]."""

    first: int
    last: int
    values: dict[str, NDArray[np.float32]]
    loss: NDArray[np.float32]


class ChunkFolder:
    """One checkpoint's chunks, which follow each other without a gap.

    Args:
        folder: made when absent.
        first: the first sample's number.
        most_held: samples in memory beyond which they are written.
        seconds: after which they are written too: what a killed process loses.
    """

    def __init__(self, folder: Path, *, first: int, most_held: int, seconds: float = 30.0) -> None:
        self._folder = folder
        self._first = first
        self._most_held = most_held
        self._seconds = seconds
        self._written = time.monotonic()
        self._held: list[tuple[dict[str, NDArray[np.float32]], NDArray[np.float32]]] = []
        self._spans: list[tuple[int, int]] = []
        at = first
        spans = dict(self._on_disk())
        while at in spans:  # what lies after a gap is scored again
            self._spans.append((at, spans[at]))
            at = spans[at]
        self.next = at  #: number of the first sample without a score

    def add(self, values: Mapping[str, NDArray[np.float32]], loss: NDArray[np.float32]) -> None:
        """Scores of the samples that follow."""
        self._held.append((dict(values), loss))
        self.next += len(loss)
        n_held = sum(len(own) for _, own in self._held)
        if n_held >= self._most_held or time.monotonic() - self._written >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Write what is in memory as one chunk."""
        if not self._held:
            return
        loss = np.concatenate([own for _, own in self._held])
        arrays = {
            f"values.{name}": np.concatenate([values[name] for values, _ in self._held])
            for name in self._held[0][0]
        }
        span = (self.next - len(loss), self.next)
        path = self._folder / f"{span[0]:012}-{span[1]:012}.npz"
        # An open file, since savez gives a name without .npz one.
        with atomic_path(path) as part, part.open("wb") as file:
            np.savez(file, loss=loss, **arrays)  # type: ignore[arg-type]
        self._spans.append(span)
        self._held, self._written = [], time.monotonic()

    def read(self, first: int, last: int) -> Chunk:
        """The scores of samples [first, last), which must be on disk."""
        found: list[tuple[dict[str, NDArray[np.float32]], NDArray[np.float32]]] = []
        for start, stop in self._spans:
            if start < last and stop > first:
                own = slice(max(first - start, 0), min(last, stop) - start)
                with np.load(self._folder / f"{start:012}-{stop:012}.npz") as arrays:
                    values = {
                        name.removeprefix("values."): arrays[name][own]
                        for name in arrays.files
                        if name != "loss"
                    }
                    found.append((values, arrays["loss"][own]))
        names = list(found[0][0])
        return Chunk(
            first,
            last,
            {name: np.concatenate([values[name] for values, _ in found]) for name in names},
            np.concatenate([loss for _, loss in found]),
        )

    def _on_disk(self) -> Iterator[tuple[int, int]]:
        if self._folder.is_dir():
            for name in sorted(os.listdir(self._folder)):
                if match := _CHUNK.fullmatch(name):
                    yield int(match[1]), int(match[2])


def mean_chunk(chunks: list[Chunk]) -> Chunk:
    """The mean of the same samples' scores at several checkpoints, in float64."""
    first = chunks[0]
    return Chunk(
        first.first,
        first.last,
        {name: _mean([c.values[name] for c in chunks]) for name in first.values},
        _mean([c.loss for c in chunks]),
    )


def _mean(arrays: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.asarray(np.mean(arrays, axis=0, dtype=np.float64), dtype=np.float32)
