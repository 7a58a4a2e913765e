"""Score tables: the influence of samples on units, read from parts of a folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from mda_lightning.files import atomic_path
from mda_lightning.store.domains import Domains, names_of, summary_by
from mda_lightning.store.layout import (
    ROW_COLUMNS,
    TABLE_FILE,
    Estimator,
    Layout,
    check_part,
    check_version,
    describe_table,
    holds_only_a_table,
    part_path,
    parts_of,
    read_table_file,
    rows_at_once,
    stored_in,
    write_part,
)
from mda_lightning.store.ranking import Means, by_best_place, extreme, mean_by_sample
from mda_lightning.store.reading import long_frame, read_columns, read_sample, sum_of
from mda_lightning.store.rows import ScoreRows, checked


class ScoreTable:
    """Scores of one estimator: positive means that training on the sample promotes the unit.

    A folder of Parquet parts, one row a sample and step, one column per unit and block. A sample
    trained on twice has two rows. Every query reads the columns and row groups that it needs.
    ``pandas.read_parquet(table.folder)`` has all of it.

    Attributes:
        folder: where it lies.
        units: in the order written, for example ``("L0H0", "L0H1")``.
        blocks: for example ``("QK", "V", "O")``.
        estimator: ``"replay"`` or ``"in_run"``; a table never holds both.
        domains: whether it has a column of domain names.
        complete: whether its writer has finished; if not, there may be more to come.
        provenance: JSON values; of an incomplete table, empty or as it was last finished.
        n_rows: rows as of :meth:`open`.
        n_not_finite: rows with a score that is not finite, kept as NaN.
    """

    def __init__(self, folder: Path, stored: Mapping[str, Any]) -> None:
        self.folder = folder
        self._layout = Layout.of(stored)
        self.units: tuple[str, ...] = self._layout.units
        self.blocks: tuple[str, ...] = self._layout.blocks
        self.estimator: Estimator = self._layout.estimator
        self.domains: bool = self._layout.domains
        self.complete: bool = stored["complete"]
        self.provenance: dict[str, Any] = stored["provenance"]
        self._parts = parts_of(folder)
        counts = [check_part(part.path, self._layout) for part in self._parts]
        self.n_rows = sum(count.n_rows for count in counts)
        self.n_not_finite = sum(count.n_not_finite for count in counts)
        if self.complete and self.n_rows != stored["n_rows"]:
            raise ValueError(
                f"{folder} was finished with {stored['n_rows']} rows and has {self.n_rows}: parts "
                "were lost or added; score again"
            )

    @classmethod
    def write(
        cls,
        folder: str | os.PathLike[str],
        *,
        sample_id: ArrayLike,
        step: ArrayLike,
        units: Sequence[str],
        blocks: Sequence[str],
        values: ArrayLike,
        loss: ArrayLike,
        estimator: Estimator,
        provenance: Mapping[str, Any],
        ihvp_step: ArrayLike = -1,
        domain: ArrayLike | None = None,
    ) -> ScoreTable:
        """Write a table and open it; one of the same estimator there is replaced.

        Args:
            folder: made when absent; whole or not there at all.
            sample_id: [N].
            step: [N], or one step for all; -1 where no update trained on the sample.
            units: U names.
            blocks: K names.
            values: [N, U, K]; what is not finite is stored as NaN.
            loss: [N].
            estimator: which one made the values.
            provenance: everything needed to read them later, JSON values.
            ihvp_step: [N], or one for all: step of the weights at which curvature and probe
                gradient were taken; -1 where several checkpoints are averaged.
            domain: names [N].

        Raises:
            ValueError: shapes that do not fit, repeated names, an unknown estimator, or a folder
                that holds anything but a table of this estimator.
        """
        layout = Layout(tuple(units), tuple(blocks), estimator, domain is not None)
        ids = np.asarray(sample_id, np.int64)
        rows = checked(
            ScoreRows(
                ids,
                np.broadcast_to(np.asarray(step, np.int64), ids.shape),
                np.asarray(values),
                np.asarray(loss),
                np.broadcast_to(np.asarray(ihvp_step, np.int64), ids.shape),
                None if domain is None else np.asarray(domain),
            ),
            n_units=len(units),
            n_blocks=len(blocks),
            domains=layout.domains,
        )
        destination = Path(folder)
        if not holds_only_a_table(destination):
            raise ValueError(
                f"{destination} holds something else than a score table; give another folder"
            )
        if (destination / TABLE_FILE).is_file():
            former = read_table_file(destination)
            if former["estimator"] != estimator:
                raise ValueError(
                    f"{destination} holds {former['estimator']} scores and these are of "
                    f"{estimator}; give another folder, or remove this one"
                )
        rows, size = rows.in_order(), rows_at_once(len(units), len(blocks))
        with atomic_path(destination) as aside:
            aside.mkdir()
            for number, first in enumerate(range(0, len(ids), size)):
                part = rows.where(np.arange(first, min(first + size, len(ids))))
                write_part(part_path(aside, part, rank=0, number=number), part, layout)
            counts = (len(ids), rows.n_not_finite)
            describe_table(aside, layout, complete=True, counts=counts, provenance=provenance)
        return cls.open(destination)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, mechanism: str | None = None) -> ScoreTable:
        """Open a table, or the only one among the folders in ``folder``.

        Args:
            folder: of the table, or of one table per mechanism, as a run leaves them.
            mechanism: which of them.

        Raises:
            FileNotFoundError: no table there, or none of this mechanism.
            ValueError: several tables and no mechanism, a table of another schema, or parts that do
                not belong to it.
        """
        path = Path(folder)
        if path.is_file():
            check_version(stored_in(path), path)  # schema 1 was a single file
            raise ValueError(f"{path} is a part of a score table; open its folder, {path.parent}")
        if mechanism is None and (path / TABLE_FILE).is_file():
            return cls(path, read_table_file(path))
        found = sorted(one.parent.name for one in path.glob(f"*/{TABLE_FILE}"))
        if mechanism is None and len(found) == 1:
            mechanism = found[0]
        if mechanism in found:
            return cls(path / mechanism, read_table_file(path / mechanism))
        has = (
            f"there are those of {', '.join(found)}"
            if found
            else "InfluenceScoring and `mda-lightning score` write one"
        )
        if mechanism is not None or not found:
            of = f" of {mechanism!r}" if mechanism is not None else ""
            raise FileNotFoundError(f"no score table{of} at {path}; {has}")
        raise ValueError(
            f"{path} holds score tables of {', '.join(found)}; say which: mechanism={found[0]!r}"
        )

    def __len__(self) -> int:
        return self.n_rows

    def __repr__(self) -> str:
        state = "" if self.complete else "incomplete, "
        return (
            f"ScoreTable({self.n_rows} rows, {len(self.units)} units, blocks {list(self.blocks)}, "
            f"{self.estimator}, {state}{self.folder})"
        )

    # -- one unit -----------------------------------------------------------------------------

    def scores(
        self, unit: str, block: str | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Sample ids [N] and scores [N] of a unit, row by row; ``None`` is the sum of blocks.

        Rows are by step, then sample id, within a part.

        Raises:
            KeyError: no such unit or block in this table.
        """
        columns = self._columns(unit, block)
        table = self._read(["sample_id", *columns])
        return table["sample_id"].to_numpy(), sum_of(table, columns)

    def row_scores(self, unit: str, block: str | None = None) -> NDArray[np.float32]:
        """As :meth:`scores`, the scores [N] alone."""
        columns = self._columns(unit, block)
        return sum_of(self._read(columns), columns)

    def columns(self, *names: str) -> dict[str, NDArray[Any]]:
        """What the table says of its rows besides scores, [N] each, row by row as :meth:`scores`.

        Args:
            names: of ``sample_id``, ``step``, ``ihvp_step``, ``loss`` and, where there is one,
                ``domain``.
        """
        read = self._read(list(names))
        return {name: read[name].to_numpy() for name in names}

    def mean_scores(
        self, unit: str, block: str | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Ascending unique sample ids [M] and the mean of each one's scores [M].

        Of its finite scores; NaN where it has none.
        """
        return mean_by_sample(*self.scores(unit, block))

    def top(
        self,
        unit: str | Sequence[str],
        *,
        fraction: float | None = None,
        count: int | None = None,
        block: str | None = None,
    ) -> NDArray[np.int64]:
        """Ids of the samples that promote the unit most, best first.

        A sample with several rows counts once, with its mean; ties go by id. Samples without a
        finite score are left out, with a warning that says how many.

        Of several units it is the union of their top sets, each id once, by its best place in any
        unit's ranking (then by the order of the units): places compare where scores, which differ
        in scale from unit to unit, do not.

        Args:
            unit: for example ``"L1H2"``, or several.
            fraction: share of the samples with a finite score, in (0, 1]; at least one sample.
            count: how many of each unit, instead of a fraction.
            block: rank by this block alone.

        Raises:
            KeyError: no such unit or block.
            ValueError: not exactly one of fraction and count, out of range, or no finite score.
        """
        return self._extreme(unit, fraction, count, block, sign=-1.0)

    def bottom(
        self,
        unit: str | Sequence[str],
        *,
        fraction: float | None = None,
        count: int | None = None,
        block: str | None = None,
    ) -> NDArray[np.int64]:
        """As :meth:`top`, for the samples that work against the unit most, worst first."""
        return self._extreme(unit, fraction, count, block, sign=1.0)

    def by_domain(
        self, unit: str, domains: Domains | None = None, *, block: str | None = None
    ) -> pd.DataFrame:
        """A unit's scores by domain; a sample counts once, with its mean.

        Args:
            unit: for example ``"L1H2"``.
            domains: names of samples: a mapping from ids, a sequence by id, or a function of ids
                such as ``TokenRows.domains``; None takes the table's own column.
            block: this block alone.

        Returns:
            Indexed by ``domain``, ascending: ``n`` samples with a finite score, ``n_not_finite``
            others, and of the former ``mean``, ``std``, ``sum`` and ``share_positive``.

        Raises:
            KeyError: no such unit or block, or a sample whose domain is not given.
            ValueError: the table has no domains and none are given.
        """
        columns = self._columns(unit, block)
        if domains is None and not self.domains:
            raise ValueError(
                f"{self.folder} has no column of domains; give them, for example as the function "
                "rows.domains of the TokenRows that were scored"
            )
        own = ["domain"] if domains is None else []
        table = self._read(["sample_id", *own, *columns])
        ids = table["sample_id"].to_numpy()
        unique, means = mean_by_sample(ids, sum_of(table, columns))
        if domains is None:
            names = table["domain"].to_numpy()[np.unique(ids, return_index=True)[1]]
        else:
            names = names_of(unique, domains)
        return summary_by(names, means)

    # -- rows ---------------------------------------------------------------------------------

    def frame(self, unit: str | None = None) -> pd.DataFrame:
        """The rows of one unit or, one unit after the other, of all.

        Columns ``sample_id``, ``step``, ``ihvp_step``, ``loss``, ``domain`` where there is one,
        ``unit``, one per block, and ``score``, their sum.

        Raises:
            KeyError: no such unit.
        """
        return self._long(self._read(self._row_columns(unit)), unit)

    def steps(self, first: int, last: int, unit: str | None = None) -> pd.DataFrame:
        """As :meth:`frame`, the rows of steps [first, last).

        Raises:
            KeyError: no such unit.
        """
        return self._long(self._read(self._row_columns(unit), steps=(first, last)), unit)

    def sample(self, sample_id: int, unit: str | None = None) -> pd.DataFrame:
        """As :meth:`frame`, the rows of one sample.

        The ids are read first, then the row groups that hold this one.

        Raises:
            KeyError: no such sample or unit.
        """
        columns = self._row_columns(unit)
        table = read_sample(self._parts, sample_id, columns)
        if table is None:
            raise KeyError(f"sample {sample_id} has no row in {self.folder}")
        return self._long(table, unit)

    # -- reading ------------------------------------------------------------------------------

    def _read(self, columns: list[str], steps: tuple[int, int] | None = None) -> pa.Table:
        return read_columns(self._parts, columns, self._layout.schema, steps=steps)

    def _long(self, table: pa.Table, unit: str | None) -> pd.DataFrame:
        return long_frame(table, self.units if unit is None else (unit,), self.blocks)

    def _row_columns(self, unit: str | None) -> list[str]:
        shared = [name for name in ROW_COLUMNS if name != "domain" or self.domains]
        if unit is None:
            return [*shared, *self._layout.score_columns]
        return [*shared, *self._columns(unit, None)]

    def _columns(self, unit: str, block: str | None) -> list[str]:
        if unit not in self.units:
            raise KeyError(f"unit {unit!r} is not in {self.folder}: it has {', '.join(self.units)}")
        if block is not None and block not in self.blocks:
            raise KeyError(f"block {block!r} is not in {self.folder}: it has {list(self.blocks)}")
        return [f"{unit}.{one}" for one in (self.blocks if block is None else (block,))]

    def _extreme(
        self,
        unit: str | Sequence[str],
        fraction: float | None,
        count: int | None,
        block: str | None,
        *,
        sign: float,
    ) -> NDArray[np.int64]:
        if (fraction is None) == (count is None):
            raise ValueError(f"give fraction or count, not both: {fraction=}, {count=}")
        rankings = []
        means = Means(self.columns("sample_id")["sample_id"])
        ids = means.ids
        for one in [unit] if isinstance(unit, str) else unit:
            scores = means.of(self.row_scores(one, block))
            n_left_out = int((~np.isfinite(scores)).sum())
            if n_left_out:
                warnings.warn(
                    f"{n_left_out} of {len(ids)} samples have no finite score for {one} in "
                    f"{self.folder} and are left out",
                    stacklevel=3,
                )
            what = f"{one} in {self.folder}"
            places = np.arange(len(ids))
            rankings.append(extreme(places, sign * scores, fraction=fraction, count=count, of=what))
        return ids[by_best_place(rankings, len(ids))]
