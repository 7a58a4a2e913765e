"""Reading parts: no column and no row group that a query does not need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mda_lightning.store.layout import ROW_COLUMNS, Part


def read_columns(
    parts: Sequence[Part],
    columns: list[str],
    schema: pa.Schema,
    *,
    steps: tuple[int, int] | None = None,
) -> pa.Table:
    """Columns of all rows, or of those of steps [first, last); part after part.

    Raises:
        OSError: a page does not agree with its checksum.
    """
    rows = None
    if steps is not None:
        first, last = steps
        parts = [part for part in parts if part.first < last and part.last >= first]
        rows = (ds.field("step") >= first) & (ds.field("step") < last)
    if not parts:
        return schema.empty_table().select(columns)
    options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    dataset = ds.dataset(
        [str(part.path) for part in parts],
        schema=schema,
        format=ds.ParquetFileFormat(default_fragment_scan_options=options),
    )
    return dataset.to_table(columns=columns, filter=rows)


def read_sample(parts: Sequence[Part], sample_id: int, columns: list[str]) -> pa.Table | None:
    """Columns of one sample's rows, or None; ids are read first, then its row groups.

    Raises:
        OSError: a page does not agree with its checksum.
    """
    found = []
    for part in parts:
        with pq.ParquetFile(part.path, page_checksum_verification=True) as file:
            groups = [g for g in range(file.num_row_groups) if _holds(file, g, sample_id)]
            if groups:
                found.append(file.read_row_groups(groups, columns=columns).select(columns))
    if not found:
        return None
    return pa.concat_tables(found).filter(pc.field("sample_id") == sample_id)


def sum_of(table: pa.Table, columns: Sequence[str]) -> NDArray[np.float32]:
    """Sum of columns [N] in float32, in their order."""
    total: NDArray[np.float32] = table[columns[0]].to_numpy()
    for column in columns[1:]:
        total = total + table[column].to_numpy()
    return total


def long_frame(table: pa.Table, units: Sequence[str], blocks: Sequence[str]) -> pd.DataFrame:
    """See :meth:`ScoreTable.frame`."""
    n, n_units = table.num_rows, len(units)
    codes = np.repeat(np.arange(n_units), n)
    shared = [name for name in ROW_COLUMNS if name in table.column_names]
    return pd.DataFrame(
        {
            **{name: np.tile(table[name].to_numpy(), n_units) for name in shared},
            "unit": pd.Categorical.from_codes(codes, categories=list(units)),
            **{
                block: np.concatenate([table[f"{unit}.{block}"].to_numpy() for unit in units])
                for block in blocks
            },
            "score": np.concatenate(
                [sum_of(table, [f"{unit}.{block}" for block in blocks]) for unit in units]
            ),
        }
    )


def _holds(file: Any, group: int, sample_id: int) -> bool:
    column = file.schema_arrow.get_field_index("sample_id")
    known = file.metadata.row_group(group).column(column).statistics
    if known is not None and known.has_min_max and not known.min <= sample_id <= known.max:
        return False
    ids = file.read_row_group(group, columns=["sample_id"])["sample_id"].to_numpy()
    return bool((ids == sample_id).any())
