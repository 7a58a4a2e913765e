"""The ledger on disk: Parquet parts, each of whole steps of one rank."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mda_lightning.base_order import BaseOrder
from mda_lightning.files import atomic_path
from mda_lightning.schedule.ledger_rows import LedgerRows, Share

SCHEMA_VERSION = 1
SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("count", pa.int64()),
        ("base_position", pa.int64()),
        ("sample_id", pa.int64()),
        ("weight", pa.float32()),
        ("provenance", pa.uint8()),
    ]
)
ROWS_IN_GROUP = 2**17
"""What is read at a time."""

_METADATA_KEY = b"mda_lightning"
_PART = re.compile(r"part-r(\d+)-(\d+)-(\d+)-(\d+)\.parquet")


class Part(NamedTuple):
    """A file of one rank's rows; steps lie in [first, last], ``number`` is used once by a rank."""

    path: Path
    rank: int
    first: int
    last: int
    number: int


class PartFacts(NamedTuple):
    """What a part says of itself.

    Attributes:
        first, last: its steps are [first, last).
        share: whose places they are.
        order_hash: of the base order that its ids follow from.
        batch_size: places of a step, over all ranks.
        n_rows: rows.
        n_places: places that they stand for.
    """

    first: int
    last: int
    share: Share
    order_hash: str
    batch_size: int
    n_rows: int
    n_places: int

    @property
    def step_places(self) -> int:
        """Places of a step that are this share's."""
        return self.batch_size // self.share.world_size


def parts_of(folder: Path) -> list[Part]:
    """The parts in a folder, by rank and first step, without those of :func:`leftovers`."""
    found = _all_parts(folder)
    merged = _merged(found)
    return sorted((part for part in found if part not in merged), key=lambda part: part[1:])


def leftovers(folder: Path) -> list[Part]:
    """Parts that a process merged into a later one and was killed before it could remove them."""
    return sorted(_merged(_all_parts(folder)))


def _all_parts(folder: Path) -> list[Part]:
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _PART.fullmatch(path.name):
            found.append(Part(path, *(int(group) for group in match.groups())))
    return found


def _merged(parts: list[Part]) -> set[Part]:
    """Those whose steps a later part of the same rank covers."""
    later: dict[int, list[Part]] = {}
    merged = set()
    for part in sorted(parts, key=lambda one: -one.number):
        others = later.setdefault(part.rank, [])
        if any(other.first <= part.first and part.last <= other.last for other in others):
            merged.add(part)
        else:
            others.append(part)
    return merged


def part_path(folder: Path, facts: PartFacts, *, number: int) -> Path:
    """Where a part lies."""
    steps = f"{facts.first:08d}-{facts.last - 1:08d}"
    return folder / f"part-r{facts.share.rank:04d}-{steps}-{number:06d}.parquet"


def facts_of(order: BaseOrder, share: Share, rows: LedgerRows, first: int, last: int) -> PartFacts:
    """Of ``rows``, which are those of steps [first, last)."""
    counts = len(rows.position), int(rows.n_places.sum())
    return PartFacts(first, last, share, order.content_hash, order.batch_size, *counts)


def write_part(path: Path, rows: LedgerRows, facts: PartFacts) -> None:
    """Write a part, aside and then renamed."""
    about = {"kind": "ledger", "schema_version": SCHEMA_VERSION, **facts._asdict()}
    about["share"] = asdict(facts.share)
    table = pa.table(
        [pa.array(column, field.type) for column, field in zip(rows, SCHEMA, strict=True)],
        schema=SCHEMA.with_metadata({_METADATA_KEY: json.dumps(about)}),
    )
    numbers = SCHEMA.names[:4]
    with atomic_path(path) as aside:
        pq.write_table(
            table,
            aside,
            row_group_size=ROWS_IN_GROUP,
            compression="zstd",
            use_dictionary=SCHEMA.names[4:],
            column_encoding=dict.fromkeys(numbers, "DELTA_BINARY_PACKED"),
            write_statistics=["position"],
            write_page_checksum=True,
        )


def read_facts(path: Path) -> PartFacts:
    """A part's own description, from its footer.

    Raises:
        ValueError: damaged, no part of a ledger, or of a newer schema.
    """
    return _facts(_footer(path), path)


class PartReader:
    """Rows of a part, without reading more of it than is asked for.

    Raises:
        ValueError: as :func:`read_facts`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        footer = _footer(path)
        self.facts = _facts(footer, path)
        groups = [footer.row_group(group) for group in range(footer.num_row_groups)]
        try:
            starts = np.asarray([group.column(0).statistics.min for group in groups], np.int64)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        self._starts = self.facts.share.numbers(starts)
        self._read: tuple[tuple[int, int], LedgerRows] | None = None

    def rows(self, first: int, last: int) -> LedgerRows:
        """The row groups that hold the share's places with numbers [first, last).

        Raises:
            ValueError: a page does not agree with its checksum.
        """
        begin = max(int(np.searchsorted(self._starts, first, side="right")) - 1, 0)
        end = int(np.searchsorted(self._starts, last))
        if self._read is None or self._read[0] != (begin, end):
            self._read = (begin, end), self._groups(range(begin, end))
        rows = self._read[1]
        numbers = self.facts.share.numbers(rows.position)
        near = slice(
            max(int(np.searchsorted(numbers, first, side="right")) - 1, 0),
            int(np.searchsorted(numbers, last)),
        )
        return rows.where(near)

    def all_rows(self) -> LedgerRows:
        """Every row.

        Raises:
            ValueError: a page does not agree with its checksum.
        """
        return self._groups(range(len(self._starts)))

    def release(self) -> None:
        """Give back the memory of what was read last."""
        self._read = None

    def _groups(self, groups: range) -> LedgerRows:
        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                table = file.read_row_groups(list(groups))
            columns: Any = [table[name].to_numpy() for name in SCHEMA.names]
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error
        return LedgerRows(*columns)


def _footer(path: Path) -> Any:
    try:
        return pq.read_metadata(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _facts(footer: Any, path: Path) -> PartFacts:
    try:
        stored = json.loads((footer.metadata or {}).get(_METADATA_KEY, b"{}"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if stored.get("kind") != "ledger":
        raise ValueError(f"{path} is no part of a ledger; was it written over?")
    if stored["schema_version"] > SCHEMA_VERSION:
        raise ValueError(
            f"{path} has ledger schema {stored['schema_version']}, this version reads up to "
            f"{SCHEMA_VERSION}; update mda-lightning"
        )
    try:
        known = {name: stored[name] for name in PartFacts._fields}
        facts = PartFacts(**(known | {"share": Share(**stored["share"])}))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r} in what it says of itself") from error
    if footer.num_rows != facts.n_rows:
        raise ValueError(
            f"{path} was written with {facts.n_rows} rows and has {footer.num_rows}; "
            "it was written over"
        )
    return facts
