"""The ledger of a run: what each of its steps was trained on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mda_lightning.base_order import BaseOrder
from mda_lightning.files import read_json
from mda_lightning.schedule.ledger_file import PartReader, parts_of
from mda_lightning.schedule.ledger_rows import Places, decode
from mda_lightning.schedule.stream import ScheduledBatch

STREAM_FOLDER = "stream"
"""In the folder of a run: everything about what it was trained on."""
STREAM_FILE = "stream.json"
PLAN_FILE = "plan.json"
LEDGER_FOLDER = "ledger"
SCHEMA_VERSION = 1
WEIGHT_TYPES = ("float32", "bfloat16", "float16", "float64")
"""Types in which a batch may hold its weights."""
_PLACES_AT_ONCE = 2**20


class Span(NamedTuple):
    """Steps [first, last) of which the same parts have places.

    Attributes:
        first, last: the steps.
        ranks: whose places are there, ascending; a rank twice where two parts have the same.
        world_sizes: numbers of ranks that these parts were written with.
    """

    first: int
    last: int
    ranks: tuple[int, ...]
    world_sizes: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether each place is there exactly once."""
        return len(self.world_sizes) == 1 and self.ranks == tuple(range(self.world_sizes[0]))


class Ledger:
    """Sample ids, weights and provenance of the steps of a run, as the training step had them.

    Attributes:
        folder: ``stream/`` in the run's folder.
        order: the base order.
        provenance: ``stream.json``: the corpus, the plan, the attempts at the run and what it
            began from.
        damaged: a message for each part that cannot be read; the others can.
        spans: which steps are there, ascending, see :class:`Span`.
    """

    def __init__(self, folder: Path, stored: Mapping[str, Any]) -> None:
        self.folder = folder
        self.provenance: dict[str, Any] = dict(stored)
        self.order = BaseOrder(**stored["order"])
        self._parts: list[PartReader] = []
        damaged: list[str] = []
        for part in parts_of(folder / LEDGER_FOLDER):
            try:
                reader = PartReader(part.path)
            except ValueError as error:
                damaged.append(str(error))
                continue
            if reader.facts.order_hash != self.order.content_hash:
                damaged.append(f"{part.path} is of another base order than {STREAM_FILE}")
            else:
                self._parts.append(reader)
        self.damaged = tuple(damaged)
        self.spans = tuple(self._find_spans())

    @classmethod
    def open(cls, run_folder: str | os.PathLike[str]) -> Ledger:
        """Open the ledger in the folder of a run.

        Raises:
            FileNotFoundError: none there.
            ValueError: of a newer schema, or ``stream.json`` is damaged.
        """
        given = Path(run_folder)
        tried = (given, given / STREAM_FOLDER, given / "mda" / STREAM_FOLDER)
        for folder in tried:
            if (folder / STREAM_FILE).is_file():
                return cls(folder, read_stream(folder / STREAM_FILE))
        raise FileNotFoundError(
            f"{given} holds no ledger ({STREAM_FOLDER}/{STREAM_FILE} is absent); a run with "
            "TokenDataModule(ledger=True) writes one"
        )

    def __repr__(self) -> str:
        steps = ", ".join(f"{first}..{last - 1}" for first, last in self.steps)
        return f"Ledger(steps {steps or 'none'}, {self.folder})"

    @property
    def steps(self) -> list[tuple[int, int]]:
        """Ranges [first, last) of steps whose places are all there once, ascending."""
        ranges: list[tuple[int, int]] = []
        for span in self.spans:
            if not span.whole:
                continue
            if ranges and ranges[-1][1] == span.first:
                ranges[-1] = ranges[-1][0], span.last
            else:
                ranges.append((span.first, span.last))
        return ranges

    def step(self, step: int) -> ScheduledBatch:
        """What one update was trained on, by slot.

        Raises:
            KeyError: the ledger does not have it.
            ValueError: a part is damaged.
        """
        places = self.places(step, step + 1)
        return ScheduledBatch(places.ids(self.order), places.weight, places.provenance)

    def frame(self, first: int, last: int) -> pd.DataFrame:
        """One row a sample of steps [first, last): step, slot, sample_id, weight, provenance.

        Raises:
            KeyError: the ledger does not have them all.
            ValueError: a part is damaged.
        """
        places = self.places(first, last)
        step, slot = np.divmod(places.position, self.order.batch_size)
        return pd.DataFrame(
            {
                "step": step,
                "slot": slot,
                "sample_id": places.ids(self.order),
                "weight": places.weight,
                "provenance": places.provenance,
            }
        )

    def places(self, first: int, last: int) -> Places:
        """All places of steps [first, last), by position.

        Raises:
            KeyError: the ledger does not have them all.
            ValueError: a part is damaged.
        """
        found = []
        for reader in self._parts:
            facts = reader.facts
            begin, end = max(first, facts.first), min(last, facts.last)
            if begin < end:
                numbers = begin * facts.step_places, end * facts.step_places
                found.append(decode(reader.rows(*numbers), facts.share, *numbers))
            else:
                reader.release()
        columns: Any = zip(*found, strict=True) if found else [[np.empty(0, np.int64)]] * 5
        columns = [np.concatenate(column) for column in columns]
        by_position = np.argsort(columns[0], kind="stable")
        places = Places(*(column[by_position] for column in columns))
        size = self.order.batch_size
        expected = np.arange(first * size, last * size)
        if not np.array_equal(places.position, expected):
            wrong = np.setxor1d(expected, places.position)
            twice = places.position[1:][places.position[1:] == places.position[:-1]]
            step, slot = divmod(int(wrong[0] if wrong.size else twice[0]), size)
            how = "is not" if wrong.size else "is twice"
            has = ", ".join(f"{a}..{b - 1}" for a, b in self.steps) or "none"
            raise KeyError(
                f"slot {slot} of step {step} {how} in {self.folder}; it has all of steps {has}"
            )
        return places

    def blocks(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """[first, last) in pieces of about a million places."""
        size = max(1, _PLACES_AT_ONCE // self.order.batch_size)
        for begin in range(first, last, size):
            yield begin, min(begin + size, last)

    def _find_spans(self) -> Iterator[Span]:
        facts = [reader.facts for reader in self._parts]
        edges = sorted({edge for one in facts for edge in (one.first, one.last)})
        begun = sorted(facts, key=lambda one: one.first)
        there: list[Any] = []
        for first, last in pairwise(edges):
            there = [one for one in there if one.last > first]
            while begun and begun[0].first == first:
                there.append(begun.pop(0))
            if there:
                ranks = sorted(one.share.rank for one in there)
                worlds = sorted({one.share.world_size for one in there})
                yield Span(first, last, tuple(ranks), tuple(worlds))


# -- stream.json ----------------------------------------------------------------------------------


def read_stream(path: Path) -> dict[str, Any]:
    """``stream.json``, all keys that are documented there and of the right types.

    Raises:
        FileNotFoundError: none there.
        ValueError: damaged, of another kind, or of a newer schema.
    """
    stored: Any = read_json(path)
    if not isinstance(stored, dict) or stored.get("kind") != "stream":
        raise ValueError(f"{path} does not describe a training stream")
    schema: Any = stored.get("schema_version")
    if _is_count(schema) and schema > SCHEMA_VERSION:
        raise ValueError(
            f"{path} has stream schema {schema}, this version reads up to {SCHEMA_VERSION}; "
            "update mda-lightning"
        )
    _check(str(path), stored, _OF_STREAM | _OF_PLAN)
    for key, checks in (("attempts", _OF_ATTEMPT), ("announced", _OF_PLAN)):
        for number, one in enumerate(_listed(path, stored, key)):
            _check(f"{path}, {key}[{number}]", one, checks)
    return stored


def _listed(path: Path, stored: Mapping[str, Any], key: str) -> list[Any]:
    listed = stored.get(key, [])
    if not isinstance(listed, list):
        raise ValueError(f"{path}: {key} cannot be {listed!r}; {_TOLD}")
    return listed


def _check(where: str, value: Any, checks: Mapping[str, Callable[[Any], bool]]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} cannot be {value!r}; {_TOLD}")
    if missing := [key for key in checks if key not in value]:
        raise ValueError(f"{where} lacks {', '.join(missing)}; {_TOLD}")
    for key, is_right in checks.items():
        if not is_right(value[key]):
            raise ValueError(f"{where}: {key} cannot be {value[key]!r}; {_TOLD}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(map(_is_count, value))
        and value[0] <= value[1]
    )


def _is_order(value: Any) -> bool:
    if not isinstance(value, dict) or not all(type(one) in (int, bool) for one in value.values()):
        return False
    try:
        BaseOrder(**value)
    except (TypeError, ValueError):
        return False
    return True


def _is_checkpoint(value: Any) -> bool:
    if value is None:
        return True
    hashes = ("plan_hash", "stream_hash")
    return (
        isinstance(value, dict)
        and _is_count(value.get("step"))
        and all(_is_text(value.get(key)) for key in hashes)
    )


_TOLD = "it was edited or damaged"
_OF_STREAM: dict[str, Callable[[Any], bool]] = {
    "schema_version": _is_count,
    "steps": _is_range,
    "began_from": _is_checkpoint,
    "attempts": lambda value: isinstance(value, list),
    "complete": lambda value: isinstance(value, bool),
}
_OF_ATTEMPT: dict[str, Callable[[Any], bool]] = {
    "start_step": _is_count,
    "weight_type": lambda value: value in WEIGHT_TYPES,
    "read_from": lambda value: (
        isinstance(value, dict) and all(one in ("batch", "schedule") for one in value.values())
    ),
}
_OF_PLAN: dict[str, Callable[[Any], bool]] = {
    "order": _is_order,
    "order_hash": _is_text,
    "corpus": _is_text,
    "corpus_hash": _is_text,
    "plan_hash": _is_text,
    "given_plan_hash": _is_text,
    "n_steps": _is_count,
}
