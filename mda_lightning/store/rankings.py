"""Several rankings of one seed's samples, side by side: influence tables, loss, counts, chance.

A folder with ``rankings.json``, one score table for each way to compute influence, and one Parquet
file for what is of the sample alone (``loss``, ``repeated_ngrams``, ``random``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mda_lightning.files import atomic_path, read_json, write_json
from mda_lightning.store.ranking import Means
from mda_lightning.store.table import ScoreTable

SCHEMA_VERSION = 1
INDEX = "rankings.json"
_COLUMNS = "columns.parquet"

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Rankings:
    """Rankings of the samples of one run, as :func:`write_rankings` left them.

    Attributes:
        folder: where they lie.
        names: of all rankings.
        provenance: what they were made of, JSON values.
    """

    def __init__(self, folder: Path, stored: Mapping[str, Any]) -> None:
        self.folder = folder
        self._tables: dict[str, str] = dict(stored["tables"])
        self._columns: tuple[str, ...] = tuple(stored["columns"])
        self.names: tuple[str, ...] = (*self._tables, *self._columns)
        self.provenance: dict[str, Any] = stored["provenance"]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Rankings:
        """Open a folder of rankings.

        Raises:
            FileNotFoundError: there is none.
            ValueError: of another schema.
        """
        path = Path(folder) / INDEX
        if not path.is_file():
            raise FileNotFoundError(
                f"no rankings at {folder}: `mda-lightning compare` writes them for a study"
            )
        stored = read_json(path)
        if stored.get("schema_version") != SCHEMA_VERSION or stored.get("kind") != "rankings":
            raise ValueError(
                f"{path} has schema_version {stored.get('schema_version')!r}; this version reads "
                f"{SCHEMA_VERSION}: rank the samples again"
            )
        return cls(Path(folder), stored)

    def table(self, name: str) -> ScoreTable:
        """The score table of an influence ranking.

        Raises:
            KeyError: no such ranking, or one that is not of a head.
        """
        self._check(name)
        if name not in self._tables:
            raise KeyError(f"{name!r} ranks samples by themselves; it has no scores of heads")
        if name not in self._opened:
            self._opened[name] = ScoreTable.open(self.folder / self._tables[name])
        return self._opened[name]

    def units(self, name: str) -> tuple[str, ...]:
        """The heads that a ranking has scores of; none for one that is of the sample alone."""
        self._check(name)
        return () if name in self._columns else self.table(name).units

    def values(
        self, name: str, unit: str | None = None, *, steps: tuple[int, int] | None = None
    ) -> tuple[Ints, Floats]:
        """Sample ids [N], ascending, and their values [N]: the highest is treated first.

        A sample that was trained on more than once has the mean of its finite values; NaN where
        there is none.

        Args:
            name: of the ranking.
            unit: the head, for an influence ranking.
            steps: only samples trained on in [start, end).

        Raises:
            KeyError: no such ranking or head.
        """
        self._check(name)
        if name in self._columns:
            frame = self._frame
            ids, step = frame["sample_id"].to_numpy(), frame["step"].to_numpy()
            values = frame[name].to_numpy(dtype=np.float64)
        else:
            table = self.table(name)
            if unit not in table.units:
                raise KeyError(
                    f"ranking {name!r} has no head {unit!r}; it has {', '.join(table.units)}"
                )
            columns = table.columns("sample_id", "step")
            ids, step = columns["sample_id"], columns["step"]
            values = table.row_scores(unit)
        kept = None if steps is None else (step >= steps[0]) & (step < steps[1])
        means = Means(ids, kept)
        return means.ids, means.of(values)

    @cached_property
    def _frame(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / _COLUMNS)

    @cached_property
    def _opened(self) -> dict[str, ScoreTable]:
        return {}

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise KeyError(f"no ranking {name!r} in {self.folder}; it has {', '.join(self.names)}")


def write_rankings(
    folder: str | os.PathLike[str],
    *,
    tables: Mapping[str, str | os.PathLike[str]],
    sample_id: Ints,
    step: Ints,
    columns: Mapping[str, Floats],
    provenance: Mapping[str, Any],
) -> Rankings:
    """Write the index and the sample columns; the tables lie where they are.

    Args:
        folder: made when absent.
        tables: ranking -> folder of its score table, kept relative to ``folder``.
        sample_id, step: int64 [N], a row for each time that a sample was trained on.
        columns: ranking -> values [N], higher is treated first.
        provenance: JSON values.
    """
    destination = Path(folder)
    destination.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame({"sample_id": sample_id, "step": step, **columns})
    with atomic_path(destination / _COLUMNS) as part:
        frame.to_parquet(part, index=False)
    write_json(
        destination / INDEX,
        {
            "schema_version": SCHEMA_VERSION,
            "kind": "rankings",
            "tables": {
                name: Path(os.path.relpath(path, destination)).as_posix()
                for name, path in tables.items()
            },
            "columns": list(columns),
            "provenance": dict(provenance),
        },
    )
    return Rankings.open(destination)
