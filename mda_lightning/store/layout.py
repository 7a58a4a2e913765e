"""What lies in a score table's folder: its description, and parts that agree with it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mda_lightning.files import atomic_path, read_json, write_json
from mda_lightning.store.rows import ScoreRows

SCHEMA_VERSION = 2
TABLE_FILE = "_table.json"  # pyarrow and pandas skip what starts with "_" or "."
Estimator: TypeAlias = Literal["replay", "in_run"]

ROWS_IN_GROUP = 8192
"""What a query skips or reads as a whole."""

_SCORES_AT_ONCE = 2**22  # 16 MiB of float32
_METADATA_KEY = b"mda_lightning"
ROW_COLUMNS = ("sample_id", "step", "ihvp_step", "loss", "domain")
_KEY_COLUMNS = ROW_COLUMNS[:3]
_TAKEN = (*ROW_COLUMNS, "unit", "score")
_PART = re.compile(r"part-r(\d+)-(-?\d+)-(-?\d+)-(\d+)\.parquet")


@dataclass(frozen=True)
class Layout:
    """What all parts of a table have in common.

    Attributes:
        units: for example ``("L0H0", "L0H1")``.
        blocks: for example ``("QK", "V", "O")``.
        estimator: which one made the scores.
        domains: whether there is a column of domain names.

    Raises:
        ValueError: repeated or missing names, or an unknown estimator.
    """

    units: tuple[str, ...]
    blocks: tuple[str, ...]
    estimator: Estimator
    domains: bool = False

    def __post_init__(self) -> None:
        if self.estimator not in get_args(Estimator):
            raise ValueError(
                f"estimator {self.estimator!r} is not one of {get_args(Estimator)}; scores of two "
                "estimators are kept in two tables"
            )
        if not self.units or not self.blocks:
            raise ValueError(f"units {self.units} and blocks {self.blocks}: name at least one each")
        columns = [*self.score_columns, *_TAKEN, *self.blocks]
        if len(columns) != len(set(columns)):
            raise ValueError(
                f"names repeat in units {list(self.units)} or blocks {list(self.blocks)}, or are "
                f"those of other columns: {', '.join(_TAKEN)}"
            )

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Layout:
        """From ``_table.json`` or a part's metadata."""
        return cls(
            tuple(stored["units"]), tuple(stored["blocks"]), stored["estimator"], stored["domains"]
        )

    def stored(self) -> dict[str, Any]:
        """JSON values, with the kind and the version of the schema."""
        return {"kind": "scores", "schema_version": SCHEMA_VERSION, **asdict(self)}

    @property
    def score_columns(self) -> list[str]:
        return [f"{unit}.{block}" for unit in self.units for block in self.blocks]

    @property
    def schema(self) -> pa.Schema:
        keys = [("sample_id", pa.int64()), ("step", pa.int32()), ("ihvp_step", pa.int32())]
        names = [("domain", pa.string())] if self.domains else []
        scores = [(column, pa.float32()) for column in self.score_columns]
        return pa.schema([*keys, ("loss", pa.float32()), *names, *scores])

    def difference(self, other: Layout) -> str:
        """What differs, for an error message; empty where nothing does."""
        ours, theirs = asdict(self), asdict(other)
        return "; ".join(
            f"{key} {_short(theirs[key])} instead of {_short(ours[key])}"
            for key in ours
            if ours[key] != theirs[key]
        )


class Part(NamedTuple):
    """A file of one rank's rows, by step, then sample id; steps lie in [first, last]."""

    path: Path
    rank: int
    first: int
    last: int
    number: int


class Counts(NamedTuple):
    """Rows of a part, and how many of them hold a score that is not finite."""

    n_rows: int
    n_not_finite: int


def rows_at_once(n_units: int, n_blocks: int) -> int:
    """Rows held in memory, or written as one part."""
    return max(1, _SCORES_AT_ONCE // (n_units * n_blocks))


def parts_of(folder: Path) -> list[Part]:
    """The parts in a folder, by rank, first step, last step and number."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _PART.fullmatch(path.name):
            found.append(Part(path, *(int(group) for group in match.groups())))
    return sorted(found, key=lambda part: part[1:])


def part_path(folder: Path, rows: ScoreRows, *, rank: int, number: int) -> Path:
    """Where a part with these rows lies; ``number`` is used once by a rank."""
    first, last = int(rows.step.min()), int(rows.step.max())
    return folder / f"part-r{rank:04d}-{first:08d}-{last:08d}-{number:06d}.parquet"


def write_part(path: Path, rows: ScoreRows, layout: Layout) -> None:
    """Write a part, aside and then renamed."""
    rows = rows.in_order()
    columns: list[Any] = [rows.sample_id, rows.step, rows.ihvp_step, rows.loss]
    columns += [rows.domain] if layout.domains else []
    flat = np.ascontiguousarray(rows.values.reshape(len(rows.sample_id), -1).T)
    schema = layout.schema
    about = layout.stored() | {"n_not_finite": rows.n_not_finite}
    table = pa.table(
        [pa.array(c, f.type) for c, f in zip([*columns, *flat], schema, strict=True)],
        schema=schema.with_metadata({_METADATA_KEY: json.dumps(about)}),
    )
    with atomic_path(path) as aside:
        pq.write_table(
            table,
            aside,
            row_group_size=ROWS_IN_GROUP,
            compression="zstd",  # splitting floats into bytes gains 7% at ten times the time
            use_dictionary=["step", "ihvp_step", *(["domain"] if layout.domains else [])],
            column_encoding={"sample_id": "DELTA_BINARY_PACKED"},
            write_statistics=list(_KEY_COLUMNS),
            write_page_checksum=True,
        )


def read_part(path: Path, layout: Layout) -> ScoreRows:
    """A part's rows."""
    table = pq.read_table(path, schema=layout.schema, page_checksum_verification=True)
    shape = (table.num_rows, len(layout.units), len(layout.blocks))
    scores = [table[column].to_numpy() for column in layout.score_columns]
    return ScoreRows(
        table["sample_id"].to_numpy(),
        table["step"].to_numpy().astype(np.int64),
        np.stack(scores, axis=1).reshape(shape),
        table["loss"].to_numpy(),
        table["ihvp_step"].to_numpy().astype(np.int64),
        table["domain"].to_numpy().astype(np.str_) if layout.domains else None,
    )


def stored_in(path: Path) -> Any:
    """What a Parquet file's metadata says of the scores in it; empty for a file without."""
    return _stored(_footer(path))


def check_part(path: Path, layout: Layout) -> Counts:
    """Read a part's footer.

    Raises:
        ValueError: not a part of a score table, or of another one than ``layout`` says.
    """
    footer = _footer(path)
    stored = _stored(footer)
    check_version(stored, path)
    if difference := layout.difference(Layout.of(stored)):
        raise ValueError(
            f"{path} does not belong to the score table in its folder: it has {difference}; "
            "move it to a folder of its own"
        )
    return Counts(footer.num_rows, stored["n_not_finite"])


def _footer(path: Path) -> Any:
    try:
        return pq.read_metadata(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file ({error}); it was damaged") from error


def _stored(footer: Any) -> Any:
    return json.loads((footer.metadata or {}).get(_METADATA_KEY, b"{}"))


def describe_table(
    folder: Path,
    layout: Layout,
    *,
    complete: bool,
    counts: tuple[int, int] | None,
    provenance: Mapping[str, Any],
) -> None:
    """Write ``_table.json``; ``counts`` are those of a complete table's rows, see Counts."""
    n_rows, n_not_finite = (None, None) if counts is None else counts
    about = {"complete": complete, "n_rows": n_rows, "n_not_finite": n_not_finite}
    stored = layout.stored() | about | {"provenance": dict(provenance)}
    write_json(folder / TABLE_FILE, stored)


def holds_only_a_table(folder: Path) -> bool:
    """Whether a folder is absent, empty, or has nothing but a table's files in it."""
    if not folder.is_dir():
        return not folder.exists()
    names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    is_table = TABLE_FILE in names
    return all(is_table and (name == TABLE_FILE or _PART.fullmatch(name)) for name in names)


def read_table_file(folder: Path) -> dict[str, Any]:
    """The description of a table.

    Raises:
        ValueError: of another kind or another version.
    """
    stored: dict[str, Any] = read_json(folder / TABLE_FILE)
    check_version(stored, folder / TABLE_FILE)
    return stored


def check_version(stored: Any, path: Path) -> None:
    """Refuse what is no score table, and one of a schema that this version does not read."""
    if not isinstance(stored, dict) or stored.get("kind") != "scores":
        raise ValueError(f"{path} is not of a score table; ScoreTable.write makes one")
    found = stored["schema_version"]
    if found < SCHEMA_VERSION:
        raise ValueError(
            f"{path} has score schema {found}, this version reads {SCHEMA_VERSION}; score again"
        )
    if found > SCHEMA_VERSION:
        raise ValueError(
            f"{path} has score schema {found}, this version reads {SCHEMA_VERSION}; update "
            "mda-lightning"
        )


def _short(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 6:
        return f"[{', '.join(value[:6])}, … {len(value)} in all]"
    return str(list(value)) if isinstance(value, tuple) else str(value)
