"""Scores as they come in, appended to a table by one or several processes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mda_lightning.store.layout import (
    TABLE_FILE,
    Counts,
    Estimator,
    Layout,
    Part,
    check_part,
    describe_table,
    holds_only_a_table,
    part_path,
    parts_of,
    read_part,
    read_table_file,
    rows_at_once,
    write_part,
)
from mda_lightning.store.rows import ScoreRows, checked, joined
from mda_lightning.store.table import ScoreTable


class ScoreWriter:
    """Append one rank's rows to a table; several ranks write to one folder at a time.

    Rows are in memory until :meth:`flush`, then in parts that carry the rank in their name. A part
    is flushed whenever a checkpoint is saved, so that what a checkpoint has seen is on disk; a run
    resumed from it calls :meth:`discard_from` its step and scores the rest again. What is read
    between, or after an interruption, is an incomplete table without a row twice.

    Args:
        folder: of the table; made when the first part is written.
        units: U names.
        blocks: K names.
        estimator: which one makes the scores.
        rank: this process's rank.
        world_size: how many ranks write; with it rank 0 also discards the rows of ranks that a
            run on more processes had.
        domains: whether every row comes with its domain's name.
        most_held: rows in memory beyond which they are flushed; by default 16 MiB of scores.

    Raises:
        ValueError: the folder holds scores of other units, blocks or another estimator, or of a
            schema that this version does not read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        units: Sequence[str],
        blocks: Sequence[str],
        estimator: Estimator,
        rank: int = 0,
        world_size: int | None = None,
        domains: bool = False,
        most_held: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._layout = Layout(tuple(units), tuple(blocks), estimator, domains)
        self._rank = rank
        self._world_size = world_size
        self._most_held = most_held or rows_at_once(len(units), len(blocks))
        self._held: list[ScoreRows] = []
        self._n_in_memory = 0
        self._refuse_another_table()
        self._remove_leftovers(f".part-r{rank:04d}-*")
        self._on_disk = {p.path.name: check_part(p.path, self._layout) for p in self._own_parts()}

    @property
    def n_held(self) -> int:
        """Rows of this rank, in memory and in parts."""
        return self._n_in_memory + sum(count.n_rows for count in self._on_disk.values())

    @property
    def n_not_finite(self) -> int:
        """How many of them hold a score that is not finite, which is stored as NaN."""
        in_memory = sum(rows.n_not_finite for rows in self._held)
        return in_memory + sum(count.n_not_finite for count in self._on_disk.values())

    def add(self, rows: ScoreRows) -> None:
        """Take over a copy of rows.

        Raises:
            ValueError: shapes that do not fit each other or the table, a step below -1, or domains
                given to a table without or not given to one with.
        """
        added = checked(
            rows,
            n_units=len(self._layout.units),
            n_blocks=len(self._layout.blocks),
            domains=self._layout.domains,
        )
        if not len(added.sample_id):
            return
        self._held.append(added)
        self._n_in_memory += len(added.sample_id)
        if self._n_in_memory >= self._most_held:
            self.flush()

    def flush(self) -> None:
        """Write what is in memory as one part."""
        if not self._held:
            return
        self._mark_incomplete()
        rows = joined(self._held)
        number = 1 + max((part.number for part in self._own_parts()), default=-1)
        path = part_path(self.folder, rows, rank=self._rank, number=number)
        write_part(path, rows, self._layout)
        self._on_disk[path.name] = Counts(len(rows.sample_id), rows.n_not_finite)
        self._held, self._n_in_memory = [], 0

    def discard_from(self, step: int) -> None:
        """Forget this rank's rows of ``step`` and later, as a resume at ``step`` must."""
        self._held = [rows.where(rows.step < step) for rows in self._held]
        self._held = [rows for rows in self._held if len(rows.sample_id)]
        self._n_in_memory = sum(len(rows.sample_id) for rows in self._held)
        beyond = [part for part in self._own_parts() if part.last >= step]
        if beyond:
            self._mark_incomplete()
        for part in beyond:
            self._keep(part, None, step)

    def finish(
        self,
        provenance: Mapping[str, Any],
        *,
        steps: tuple[int, int | None] | None = None,
    ) -> ScoreTable:
        """Mark the table complete and open it; by rank 0, once every rank has flushed.

        Args:
            provenance: everything needed to read the scores later, JSON values.
            steps: keep the rows of steps [start, end) alone, of every rank; no ``end`` keeps all
                from ``start`` on.

        Raises:
            ValueError: by another rank, or a provenance that is not JSON.
        """
        if self._rank != 0:
            raise ValueError(f"rank {self._rank} cannot finish a table; rank 0 does, for all")
        json.dumps(dict(provenance), allow_nan=False)  # before anything is dropped
        self.flush()
        self._mark_incomplete()
        if steps is not None:
            start, end = steps
            for part in parts_of(self.folder):
                if part.first < start or (end is not None and part.last >= end):
                    self._keep(part, start, end)
        self._remove_leftovers(".part-r*", f".{TABLE_FILE.partition('.')[0]}.part-*")
        counts = [check_part(part.path, self._layout) for part in parts_of(self.folder)]
        totals = (sum(c.n_rows for c in counts), sum(c.n_not_finite for c in counts))
        self._describe(complete=True, counts=totals, provenance=provenance)
        return ScoreTable.open(self.folder)

    # -- files --------------------------------------------------------------------------------

    def _own_parts(self) -> list[Part]:
        former = self._world_size if self._rank == 0 else None
        return [
            part
            for part in parts_of(self.folder)
            if part.rank == self._rank or (former is not None and part.rank >= former)
        ]

    def _keep(self, part: Part, start: int | None, end: int | None) -> None:
        """Drop a part's rows outside steps [start, end): every rename leaves each row kept once."""
        rows = read_part(part.path, self._layout)
        kept = np.ones(len(rows.step), bool)
        if start is not None:
            kept &= rows.step >= start
        if end is not None:
            kept &= rows.step < end
        counted = self._on_disk.pop(part.path.name, None)
        if not kept.any():
            part.path.unlink()
            return
        rows = rows.where(kept)
        if not kept.all():
            # Under its former name first, which then promises more steps than it holds.
            write_part(part.path, rows, self._layout)
        path = part_path(self.folder, rows, rank=part.rank, number=part.number)
        if path != part.path:
            os.replace(part.path, path)
        if counted is not None:
            self._on_disk[path.name] = Counts(len(rows.step), rows.n_not_finite)

    def _remove_leftovers(self, *patterns: str) -> None:
        """What :func:`atomic_path` left when the process was killed."""
        for pattern in patterns:
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def _refuse_another_table(self) -> None:
        if (self.folder / TABLE_FILE).is_file():
            stored = read_table_file(self.folder)
            if difference := Layout.of(stored).difference(self._layout):
                raise ValueError(
                    f"{self.folder} holds a score table and cannot take up {difference}; give "
                    "another folder, or remove this one"
                )
        elif not holds_only_a_table(self.folder):
            raise ValueError(
                f"{self.folder} is not empty and no score table ({TABLE_FILE} is absent); give "
                "another folder"
            )

    def _mark_incomplete(self) -> None:
        """Before any change, whichever rank makes it: readers of a complete table rely on it."""
        if not (self.folder / TABLE_FILE).is_file():
            self._describe(complete=False, counts=None, provenance={})
            return
        stored = read_table_file(self.folder)
        if stored["complete"]:
            self._describe(complete=False, counts=None, provenance=stored["provenance"])

    def _describe(self, **about: Any) -> None:
        describe_table(self.folder, self._layout, **about)
