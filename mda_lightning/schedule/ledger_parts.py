"""What a rank trains on, appended to the ledger of its run."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mda_lightning.base_order import BaseOrder
from mda_lightning.schedule.ledger_file import (
    Part,
    PartReader,
    facts_of,
    leftovers,
    part_path,
    parts_of,
    read_facts,
    write_part,
)
from mda_lightning.schedule.ledger_rows import LedgerRows, Share, clipped, encode, joined

_MERGE_AFTER = 64  # parts: what keeps a long run's folder from filling with small files
_MOST_ROWS = 2**20  # of a merged part


class LedgerParts:
    """Append one rank's steps to a ledger; several ranks write to one folder at a time.

    Steps are in memory until :meth:`flush`, then in a part that carries the rank and the steps in
    its name. Killed at any moment, a process leaves each step once, in order and without a gap.

    Args:
        folder: of the parts; made when the first is written.
        order: the base order.
        share: this rank's places. Rank 0 also has the parts of ranks that a run on more processes
            left.
    """

    def __init__(self, folder: Path, order: BaseOrder, share: Share) -> None:
        self.folder = folder
        self.order = order
        self.share = share
        self._held: list[LedgerRows] = []
        self._first = self._last = 0  # steps held
        self._since_merged = 0
        for path in folder.glob(f".part-r{share.rank:04d}-*"):  # of a process that was killed
            path.unlink(missing_ok=True)
        for part in self._own(leftovers(folder)):
            part.path.unlink()

    def add(
        self,
        first: int,
        base_positions: NDArray[np.int64],
        ids: NDArray[np.int64],
        weights: NDArray[np.float32],
        provenance: NDArray[np.uint8],
    ) -> None:
        """Take over whole steps, from ``first`` on: this rank's places [n] of them, in order.

        Raises:
            ValueError: no whole steps, or not those that follow the ones held.
        """
        size = self.order.batch_size // self.share.world_size
        if len(ids) % size:
            raise ValueError(f"{len(ids)} places are no whole steps of {size}")
        if not len(ids):
            return
        if self._held and first != self._last:
            raise ValueError(f"step {first} does not follow step {self._last - 1}")
        numbers = np.arange(first * size, first * size + len(ids), dtype=np.int64)
        positions = self.share.positions(numbers)
        rows = encode(
            self.order, positions, base_positions, ids, weights, provenance, share=self.share
        )
        self._first = self._first if self._held else first
        self._last = first + len(ids) // size
        self._held.append(rows)

    def flush(self) -> None:
        """Write what is in memory as one part.

        Raises:
            OSError: it cannot be written; it stays in memory for the next call.
        """
        if not self._held:
            return
        rows = joined(_together(self._held), self.share)
        self._write(rows, self._first, self._last)
        self._held = []
        self._since_merged += 1
        if self._since_merged >= _MERGE_AFTER:
            self.merge()

    def discard_from(self, step: int) -> None:
        """Forget this rank's places of ``step`` and later, as a resume at ``step`` must."""
        self._held = []
        for part in reversed(self._own_parts()):  # the last first: what is left has no gap
            if part.first >= step:
                part.path.unlink()
            elif part.last >= step:
                self._truncate(part, step)

    def merge(self) -> None:
        """Make few parts of many."""
        self._since_merged = 0
        group: list[Part] = []
        n_rows = 0
        for part in [p for p in self._own_parts() if p.rank == self.share.rank]:
            facts = read_facts(part.path)
            mine = facts.share == self.share and facts.order_hash == self.order.content_hash
            follows = not group or group[-1].last + 1 == part.first
            if not (mine and follows and n_rows + facts.n_rows <= _MOST_ROWS):
                self._merge(group)
                group, n_rows = [], 0
            if mine:
                group.append(part)
                n_rows += facts.n_rows
        self._merge(group)

    def _merge(self, parts: list[Part]) -> None:
        if len(parts) > 1:
            rows = _together([PartReader(part.path).all_rows() for part in parts])
            self._write(joined(rows, self.share), parts[0].first, parts[-1].last + 1)
            for part in parts:
                part.path.unlink()

    def _write(self, rows: LedgerRows, first: int, last: int) -> None:
        facts = facts_of(self.order, self.share, rows, first, last)
        number = 1 + max((part.number for part in self._own_parts()), default=-1)
        write_part(part_path(self.folder, facts, number=number), rows, facts)

    def _truncate(self, part: Part, step: int) -> None:
        reader = PartReader(part.path)
        facts = reader.facts
        rows = clipped(reader.all_rows(), facts.share, step * facts.step_places)
        facts = facts._replace(
            last=step, n_rows=len(rows.position), n_places=int(rows.n_places.sum())
        )
        # Under its former name first, which then promises more steps than it holds.
        write_part(part.path, rows, facts)
        os.replace(part.path, part_path(self.folder, facts, number=part.number))

    def _own_parts(self) -> list[Part]:
        return self._own(parts_of(self.folder))

    def _own(self, parts: list[Part]) -> list[Part]:
        mine, n_ranks = self.share.rank, self.share.world_size
        return [p for p in parts if p.rank == mine or (mine == 0 and p.rank >= n_ranks)]


def _together(rows: list[LedgerRows]) -> LedgerRows:
    return LedgerRows(*(np.concatenate(column) for column in zip(*rows, strict=True)))
