"""Scores as they come in during training, kept on disk in shards that a resumed run takes up."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mda_lightning.files import atomic_path

_SHARD = re.compile(r"rank-(\d+)-steps-(\d+)-(\d+)\.npz")


class RowBlock(NamedTuple):
    """Rows of N samples: ids and steps int64 [N], values float32 [N, U, K], loss float32 [N]."""

    sample_id: NDArray[np.int64]
    step: NDArray[np.int64]
    values: NDArray[np.float32]
    loss: NDArray[np.float32]

    def where(self, kept: NDArray[np.bool_] | NDArray[np.int64]) -> RowBlock:
        """The chosen rows, by a mask or by their places."""
        return RowBlock(self.sample_id[kept], self.step[kept], self.values[kept], self.loss[kept])


def inside(rows: RowBlock, start: int, end: int | None) -> tuple[RowBlock, int]:
    """The rows of steps [start, end), and how many were not; no ``end`` is a window still open."""
    kept = rows.step >= start
    if end is not None:
        kept &= rows.step < end
    return rows.where(kept), int((~kept).sum())


class ScoreRows:
    """Rows in memory since the last :meth:`flush`, and shards of those before.

    A shard is flushed whenever the Trainer saves a checkpoint, so that what a checkpoint has seen
    is on disk; a run resumed from it reads the shards up to its step and scores the rest again.

    Args:
        folder: where the shards are; several ranks share it.
        rank: this process's rank.
    """

    def __init__(self, folder: Path, *, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self._held: list[RowBlock] = []
        self.n_held = 0

    def add(self, rows: RowBlock) -> None:
        self._held.append(rows)
        self.n_held += len(rows.sample_id)

    def flush(self) -> None:
        """Write what is held in memory as one shard, aside and then renamed."""
        if not self._held:
            return
        rows = _joined(self._held)
        name = f"rank-{self._rank}-steps-{rows.step.min()}-{rows.step.max()}.npz"
        with atomic_path(self._folder / name) as part:
            np.savez(part, **rows._asdict())
        self._held = []

    def discard_from(self, step: int) -> None:
        """Forget this rank's rows of ``step`` and later, as a resume at ``step`` must.

        A shard that reaches beyond is written again without them.
        """
        self._held, self.n_held = [], 0
        for path, rank, _, last in self._shards():
            if rank == self._rank and last >= step:
                rows = _read(path)
                earlier = rows.where(rows.step < step)
                path.unlink()
                if len(earlier.sample_id):
                    self._held = [earlier]
                    self.flush()

    def all(self) -> RowBlock | None:
        """Every rank's rows, by step, then sample id; None without any. Flush all ranks first."""
        blocks = [_read(path) for path, *_ in self._shards()]
        if not blocks:
            return None
        rows = _joined(blocks)
        order = np.lexsort((rows.sample_id, rows.step))
        return rows.where(order)

    def clear(self) -> None:
        """Remove the shards of every rank."""
        for path, *_ in self._shards():
            path.unlink(missing_ok=True)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _shards(self) -> list[tuple[Path, int, int, int]]:
        found = []
        for path in sorted(self._folder.glob("rank-*.npz")) if self._folder.is_dir() else ():
            if match := _SHARD.fullmatch(path.name):
                found.append((path, int(match[1]), int(match[2]), int(match[3])))
        return found


def _joined(blocks: list[RowBlock]) -> RowBlock:
    return RowBlock(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


def _read(path: Path) -> RowBlock:
    with np.load(path) as arrays:
        return RowBlock(**{name: arrays[name] for name in RowBlock._fields})
