"""The order in which a run without a plan trains on a corpus."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mda_lightning.files import sha256_of
from mda_lightning.shuffling import key_of, keyed_numbers, permute

_STREAM_VERSION = "stream-1"  # changes when the same order would give another stream


@dataclass(frozen=True)
class BaseOrder:
    """The order in which a run without a plan trains on the rows of a corpus.

    Every epoch is a permutation of all rows of its own; the stream runs on past ``n_steps``, which
    only says how long the run is (it is no part of ``content_hash``: a longer run of the same
    order starts with the same batches).

    Attributes:
        n_rows: rows of the corpus.
        batch_size: samples of one optimizer step, over all ranks and micro-batches.
        n_steps: optimizer steps of the run.
        seed: of the permutations.
        shuffle: False gives rows 0, 1, 2, ... in order.
    """

    n_rows: int
    batch_size: int
    n_steps: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.n_steps < 1:
            raise ValueError(
                f"batch_size {self.batch_size} and n_steps {self.n_steps} must be at least 1"
            )
        if self.n_rows < self.batch_size:
            raise ValueError(
                f"the corpus has {self.n_rows} rows, one batch needs {self.batch_size}; "
                "use more text, shorter rows or a smaller batch_size"
            )

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample ids at ``positions`` [n] of the endless base stream; int64 [n]."""
        epochs, offsets = np.divmod(positions, self.n_rows)
        if not self.shuffle:
            return offsets
        keys = keyed_numbers(key_of("base order", self.seed), epochs)
        return permute(offsets, self.n_rows, keys=keys)

    def ids(self, step: int) -> NDArray[np.int64]:
        """Sample ids of one step; int64 [batch_size]."""
        start = step * self.batch_size
        return self.at(np.arange(start, start + self.batch_size, dtype=np.int64))

    def places(self, steps: tuple[int, int]) -> tuple[int, int]:
        """The first position of a window of steps, and the first one after it."""
        return steps[0] * self.batch_size, steps[1] * self.batch_size

    def describe(self) -> dict[str, Any]:
        """The order as JSON values: ``BaseOrder(**order.describe())`` is the same order."""
        return dataclasses.asdict(self)

    @property
    def content_hash(self) -> str:
        """SHA-256 over everything that decides the endless stream and its cut into steps."""
        return sha256_of(
            json.dumps([_STREAM_VERSION, self.n_rows, self.batch_size, self.seed, self.shuffle])
        )
