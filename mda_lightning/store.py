"""Score tables: the influence of samples on units, in one Parquet file each."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from mda_lightning.files import atomic_path

SCHEMA_VERSION = 1
Estimator: TypeAlias = Literal["replay", "in_run"]

_METADATA_KEY = b"mda_lightning"
_OWN_COLUMNS = ("sample_id", "step", "unit", "score", "loss")


class ScoreTable:
    """Scores of one estimator: positive means that training on the sample promotes the unit.

    Long by (unit, sample): columns ``sample_id`` int64, ``step`` int32 (the update that trained on
    it), ``unit`` (dictionary), one float32 column per block, ``score`` float32 (the sum over
    blocks), ``loss`` float32 (of the sample, mean over its positions). A sample trained on twice
    has two rows per unit.

    Attributes:
        path: the file.
        units: in the order written, for example ``("L0H0", "L0H1")``.
        blocks: for example ``("QK", "V", "O")``.
        estimator: ``"replay"`` or ``"in_run"``; a table never holds both.
        provenance: JSON values.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.units: tuple[str, ...] = tuple(metadata["units"])
        self.blocks: tuple[str, ...] = tuple(metadata["blocks"])
        self.estimator: Estimator = metadata["estimator"]
        self.provenance: dict[str, Any] = metadata["provenance"]

    @classmethod
    def write(
        cls,
        path: str | os.PathLike[str],
        *,
        sample_id: ArrayLike,
        step: ArrayLike,
        units: Sequence[str],
        blocks: Sequence[str],
        values: ArrayLike,
        loss: ArrayLike,
        estimator: Estimator,
        provenance: Mapping[str, Any],
    ) -> ScoreTable:
        """Write a table and open it.

        Args:
            path: of the file; ``.parquet`` is added where it has no ending.
            sample_id: [N].
            step: [N], or one step for all.
            units: U names.
            blocks: K names.
            values: [N, U, K].
            loss: [N].
            estimator: which one made the values.
            provenance: everything needed to read them later, JSON values.

        Raises:
            ValueError: shapes that do not fit, repeated names, or an unknown estimator.
        """
        if estimator not in get_args(Estimator):
            raise ValueError(
                f"estimator {estimator!r} is not one of {get_args(Estimator)}; scores of two "
                "estimators are kept in two tables"
            )
        ids, scores = np.asarray(sample_id, np.int64), np.asarray(values, np.float32)
        losses = np.asarray(loss, np.float32)
        steps = np.broadcast_to(np.asarray(step, np.int32), ids.shape)
        if scores.shape != (len(ids), len(units), len(blocks)) or losses.shape != ids.shape:
            raise ValueError(
                f"values {scores.shape} and loss {losses.shape} do not fit {len(ids)} samples, "
                f"{len(units)} units and {len(blocks)} blocks"
            )
        names = [*_OWN_COLUMNS, *blocks]
        if not len(units) == len(set(units)) or len(names) != len(set(names)):
            raise ValueError(f"names repeat in units {list(units)} or columns {names}")
        metadata = {
            "kind": "scores",
            "schema_version": SCHEMA_VERSION,
            "units": list(units),
            "blocks": list(blocks),
            "estimator": estimator,
            "provenance": dict(provenance),
        }
        # Unit after unit, a row group each, so that one unit is read without the others.
        unit_codes = np.repeat(np.arange(len(units), dtype=np.int32), len(ids))
        dictionary = pa.array(list(units), pa.string())
        columns: dict[str, Any] = {
            "sample_id": np.tile(ids, len(units)),
            "step": np.tile(steps, len(units)),
            "unit": pa.DictionaryArray.from_arrays(pa.array(unit_codes), dictionary),
            **{block: scores[:, :, k].T.reshape(-1) for k, block in enumerate(blocks)},
            "score": scores.sum(2).T.reshape(-1),
            "loss": np.tile(losses, len(units)),
        }
        table = pa.table(columns).replace_schema_metadata(
            {_METADATA_KEY: json.dumps(metadata, allow_nan=False)}
        )
        destination = _with_ending(path)
        with atomic_path(destination) as part:
            pq.write_table(table, part, row_group_size=max(1, len(ids)))
        return cls.open(destination)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ScoreTable:
        """Open a table; ``.parquet`` may be left out.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a score table, or of a newer schema.
        """
        file = _with_ending(path)
        if not file.is_file():
            raise FileNotFoundError(f"no score table at {file}; InfluenceScoring writes one")
        try:
            stored = pq.read_schema(file).metadata or {}
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file} is not a Parquet file ({error})") from error
        metadata = json.loads(stored.get(_METADATA_KEY, b"{}"))
        if metadata.get("kind") != "scores":
            raise ValueError(f"{file} is not a score table; ScoreTable.write makes one")
        if metadata["schema_version"] > SCHEMA_VERSION:
            raise ValueError(
                f"{file} has score schema {metadata['schema_version']}, this version reads up to "
                f"{SCHEMA_VERSION}; update mda-lightning"
            )
        return cls(file, metadata)

    def __repr__(self) -> str:
        return (
            f"ScoreTable({len(self.units)} units, blocks {list(self.blocks)}, "
            f"{self.estimator}, {self.path})"
        )

    def scores(
        self, unit: str, block: str | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Sample ids [N] and scores [N] of a unit as written; ``block=None`` is the sum of blocks.

        Raises:
            KeyError: no such unit or block in this table.
        """
        self._check_unit(unit)
        if block is not None and block not in self.blocks:
            raise KeyError(f"block {block!r} is not in {self.path}: it has {list(self.blocks)}")
        column = block or "score"
        table = self._read(unit, ["sample_id", column])
        return table["sample_id"].to_numpy(), table[column].to_numpy()

    def mean_scores(
        self, unit: str, block: str | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Ascending unique sample ids [M] and the mean of each one's scores [M].

        NaN where one of its scores is.
        """
        ids, scores = self.scores(unit, block)
        unique, which = np.unique(ids, return_inverse=True)
        sums = np.bincount(which, weights=scores.astype(np.float64), minlength=len(unique))
        return unique, sums / np.bincount(which, minlength=len(unique))

    def top(
        self,
        unit: str,
        *,
        fraction: float | None = None,
        count: int | None = None,
        block: str | None = None,
    ) -> NDArray[np.int64]:
        """Ids of the samples that promote the unit most, best first.

        A sample with several rows counts once, with its mean; ties go by id. Samples without a
        finite score are left out, with a warning that says how many.

        Args:
            unit: for example ``"L1H2"``.
            fraction: share of the samples with a finite score, in (0, 1]; at least one sample.
            count: how many, instead of a fraction.
            block: rank by this block alone.

        Raises:
            KeyError: no such unit or block.
            ValueError: not exactly one of fraction and count, out of range, or no finite score.
        """
        return self._extreme(unit, fraction, count, block, sign=-1.0)

    def bottom(
        self,
        unit: str,
        *,
        fraction: float | None = None,
        count: int | None = None,
        block: str | None = None,
    ) -> NDArray[np.int64]:
        """As :meth:`top`, for the samples that work against the unit most, worst first."""
        return self._extreme(unit, fraction, count, block, sign=1.0)

    def frame(self, unit: str | None = None) -> pd.DataFrame:
        """The table, or one unit's rows, as pandas.

        Raises:
            KeyError: no such unit.
        """
        if unit is not None:
            self._check_unit(unit)
        return self._read(unit, None).to_pandas()

    def _read(self, unit: str | None, columns: list[str] | None) -> Any:
        filters = None if unit is None else [("unit", "==", unit)]
        return pq.read_table(self.path, columns=columns, filters=filters)

    def _check_unit(self, unit: str) -> None:
        if unit not in self.units:
            raise KeyError(f"unit {unit!r} is not in {self.path}: it has {', '.join(self.units)}")

    def _extreme(
        self,
        unit: str,
        fraction: float | None,
        count: int | None,
        block: str | None,
        *,
        sign: float,
    ) -> NDArray[np.int64]:
        if (fraction is None) == (count is None):
            raise ValueError(f"give fraction or count, not both: {fraction=}, {count=}")
        ids, scores = self.mean_scores(unit, block)
        finite = np.isfinite(scores)
        n_left_out = int((~finite).sum())
        if n_left_out:
            warnings.warn(
                f"{n_left_out} of {len(ids)} samples have no finite score for {unit} in "
                f"{self.path} and are left out",
                stacklevel=3,
            )
        ids, scores = ids[finite], scores[finite]
        if count is None:
            assert fraction is not None
            if not 0 < fraction <= 1:
                raise ValueError(f"fraction is {fraction}; it is a share of the samples, (0, 1]")
            count = max(1, round(fraction * len(ids)))
        if not 0 < count <= len(ids):
            raise ValueError(
                f"{count} samples of {unit} were asked for, {self.path} has {len(ids)} with a "
                "finite score"
            )
        return ids[np.argsort(sign * scores, kind="stable")[:count]]


def _with_ending(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    return file if file.suffix else file.with_suffix(".parquet")
