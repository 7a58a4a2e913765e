"""The audit table: what was decided when, from which scores, and where it was applied."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mda_lightning.base_order import BaseOrder
from mda_lightning.callbacks.steering.aiming import Aim
from mda_lightning.callbacks.steering.places import Ints
from mda_lightning.callbacks.steering.policies import Decision
from mda_lightning.files import atomic_path, write_json
from mda_lightning.interventions import Insert, Mask, Operation, Plan

FOLDER = "steering"
PLAN_NAME = "plan.json"
PROVENANCE_NAME = "steering.json"
SCHEMA_VERSION = 1
KIND = "steering decisions"

_PARTS = "decisions"
_MOST_HELD = 200_000  # rows
_EVERY = 10.0  # seconds
_SCHEMA = pa.schema(
    [
        ("decision", pa.int32()),
        ("decided_at", pa.int32()),
        ("policy", pa.string()),
        ("action", pa.string()),
        ("first_step", pa.int32()),
        ("last_step", pa.int32()),
        ("clock", pa.string()),
        ("mode", pa.string()),
        ("placement", pa.string()),
        ("copies", pa.int32()),
        ("weight", pa.float64()),
        ("sample_id", pa.int64()),
        ("run_step", pa.int32()),
        ("slot", pa.int32()),
        ("score", pa.float64()),
        ("score_step", pa.int32()),
        ("ihvp_step", pa.int32()),
        ("mu", pa.float64()),
        ("reference", pa.float64()),
        ("push", pa.float64()),
    ]
)
COLUMNS: dict[str, str] = {
    "decision": "number of the decision in its run, from 0 on; one operation each",
    "decided_at": "optimizer steps that were complete when it was taken",
    "policy": "name of the policy",
    "action": "mask or insert",
    "first_step": "first step of the operation's window",
    "last_step": "the window's end, exclusive",
    "clock": "run or base: which steps the window counts",
    "mode": "of an insertion: dispersed or concentrated",
    "placement": "of an insertion: replace or shift",
    "copies": "of an insertion: how often each sample is inserted",
    "weight": "of a mask: by which the sample's weight is multiplied",
    "sample_id": "the sample",
    "run_step": "step of the run at which it is applied; null for insertions with shift",
    "slot": "its place in that step's batch of all ranks and micro-batches; null likewise",
    "score": "of the sample: all blocks of all units steered, added up",
    "score_step": "updates of the weights that the score was taken at; null for an earlier run's",
    "ihvp_step": "updates of the weights that the probe gradient was taken at; null likewise",
    "mu": "the metric at its last evaluation; null without a target",
    "reference": "what the target aimed at; null without one",
    "push": "how hard the target pushed, in [-1, 1]; null without a target",
}
"""Every column and what it holds."""


class DecisionWriter:
    """Writes a run's decisions to ``<folder>/decisions/``, in parts of whole decisions.

    Args:
        folder: ``steering/`` in a run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: list[pa.Table] = []
        self._part: Path | None = None  # what of them is on disk
        self._flushed = time.monotonic()

    def discard_from(self, decision: int) -> None:
        """Drop what a run that goes on will decide again: this decision and all later ones."""
        self._held, self._part = [], None
        # The plan of a run that was here before is not this one's.
        (self.folder / PLAN_NAME).unlink(missing_ok=True)
        parts = _parts_of(self.folder)
        for path in set(_part_files(self.folder)) - {path for path, _, _ in parts}:
            path.unlink()
        for path, first, last in parts:
            if first >= decision:
                path.unlink()
            elif last >= decision:
                kept = pq.read_table(path)
                kept = kept.filter(pc.less(kept["decision"], decision))
                self._write(kept)
                path.unlink()

    def add(
        self,
        number: int,
        decided_at: int,
        decision: Decision,
        places: tuple[Ints, Ints, Ints] | None,
        aim: Aim,
    ) -> None:
        """Take up a decision: one row a place, or a sample where places are not known.

        Args:
            number: of the decision.
            decided_at: completed optimizer steps.
            decision: it.
            places: run steps, slots and sample ids [n] of what it changed.
            aim: of the target.
        """
        op = decision.operation
        ids = op.sample_ids if places is None else places[2]
        row = np.searchsorted(op.sample_ids, ids)
        if places is not None:  # a sample that met no place was decided on all the same
            missing = np.flatnonzero(~np.isin(op.sample_ids, ids))
            ids, row = np.concatenate([ids, op.sample_ids[missing]]), np.concatenate([row, missing])
        n = len(ids)
        where: list[Any] = [pa.nulls(n, pa.int32())] * 2
        if places is not None:
            where = [
                pa.concat_arrays(
                    [pa.array(part.astype(np.int32)), pa.nulls(n - len(part), pa.int32())]
                )
                for part in places[:2]
            ]
        assert op.steps is not None
        is_mask = isinstance(op, Mask)
        alike = {
            "decision": number,
            "decided_at": decided_at,
            "policy": decision.policy,
            "action": "mask" if is_mask else "insert",
            "first_step": op.steps[0],
            "last_step": op.steps[1],
            "clock": op.clock if isinstance(op, Mask) else "base",
            "mode": op.mode if isinstance(op, Insert) else None,
            "placement": op.placement if isinstance(op, Insert) else None,
            "copies": op.copies if isinstance(op, Insert) else None,
            "weight": op.weight if isinstance(op, Mask) else None,
            "mu": aim.mu,
            "reference": aim.reference,
            "push": aim.push,
        }
        columns: dict[str, Any] = {
            name: pa.repeat(pa.scalar(value, _SCHEMA.field(name).type), n)
            for name, value in alike.items()
        }
        columns |= {
            "sample_id": ids,
            "run_step": where[0],
            "slot": where[1],
            "score": decision.scores[row],
            "score_step": _known(decision.score_steps[row]),
            "ihvp_step": _known(decision.ihvp_steps[row]),
        }
        self._held.append(pa.table([columns[name] for name in _SCHEMA.names], schema=_SCHEMA))
        if time.monotonic() - self._flushed > _EVERY or self._n_held >= _MOST_HELD:
            self.flush()

    @property
    def _n_held(self) -> int:
        return sum(map(len, self._held))

    def flush(self) -> None:
        """Write what is held, in place of the part of it that is on disk already."""
        self._flushed = time.monotonic()
        if not self._held:
            return
        written = self._write(pa.concat_tables(self._held))
        if self._part not in (None, written):
            assert self._part is not None
            self._part.unlink(missing_ok=True)
        self._part = written
        if self._n_held >= _MOST_HELD:
            self._held, self._part = [], None

    def describe(self, provenance: Mapping[str, Any]) -> None:
        """Write what is to be known of all of them beside the table."""
        about = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "columns": COLUMNS,
            "provenance": dict(provenance),
        }
        write_json(self.folder / PROVENANCE_NAME, about)

    def _write(self, table: pa.Table) -> Path:
        first, last = (pc.min_max(table["decision"])[k].as_py() for k in ("min", "max"))
        note = json.dumps({"schema_version": SCHEMA_VERSION, "kind": KIND})
        table = table.replace_schema_metadata({b"mda_lightning": note.encode()})
        path = self.folder / _PARTS / f"{first:08d}-{last:08d}.parquet"
        with atomic_path(path) as part:
            pq.write_table(table, part, compression="zstd")
        return path


class Decisions:
    """The decisions of a run, as :class:`~mda_lightning.callbacks.OnlineSteering` wrote them.

    Attributes:
        folder: where they lie.
        frame: one row a place, or a sample, with the columns of :data:`COLUMNS`, in the order in
            which they were taken.
        provenance: JSON values; empty of a run that was cut off before its first step.
    """

    def __init__(self, folder: Path, frame: pd.DataFrame, provenance: dict[str, Any]) -> None:
        self.folder, self.frame, self.provenance = folder, frame, provenance

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Decisions:
        """Read them from a run's folder, or its ``steering/``.

        Raises:
            FileNotFoundError: there are none.
            ValueError: of another schema.
        """
        given = Path(folder)
        found = given if (given / PROVENANCE_NAME).is_file() else given / FOLDER
        about = found / PROVENANCE_NAME
        if not about.is_file():
            raise FileNotFoundError(
                f"no steering decisions in {given}: give the folder of a run with OnlineSteering, "
                f"which holds {FOLDER}/{PROVENANCE_NAME}"
            )
        stored = json.loads(about.read_text("utf-8"))
        if (stored.get("kind"), stored.get("schema_version")) != (KIND, SCHEMA_VERSION):
            raise ValueError(
                f"{about} is {stored.get('kind')!r} of schema {stored.get('schema_version')!r}, "
                f"this version reads {KIND!r} of schema {SCHEMA_VERSION}"
            )
        tables = [pq.read_table(path) for path, _, _ in _parts_of(found)]
        table = pa.concat_tables([_SCHEMA.empty_table(), *tables])
        return cls(found, table.to_pandas(), stored["provenance"])

    def __len__(self) -> int:
        return int(self.frame["decision"].nunique())

    def operations(self) -> list[Operation]:
        """The decided operations, in their order."""
        found: list[Operation] = []
        for _, rows in self.frame.groupby("decision", sort=True):
            one = rows.iloc[0]
            ids = np.unique(rows["sample_id"].to_numpy())
            steps = (int(one["first_step"]), int(one["last_step"]))
            if one["action"] == "mask":
                weight, clock = float(one["weight"]), one["clock"]
                found.append(Mask(ids, steps, weight, "all", clock, online=True))
            else:
                how = one["mode"], one["placement"], int(one["copies"])
                found.append(Insert(ids, steps, *how, online=True))
        return found

    def plan(self, base: Plan | None = None) -> Plan:
        """An ordinary plan that trains the same stream again, without steering.

        It is bound to the run's corpus and order, and equal to ``plan.json``.

        Args:
            base: the plan that the steered run was given; None for a run without one.

        Raises:
            ValueError: the run was given another plan, or went on here from another folder, where
                its first decisions are.
        """
        numbers = self.frame["decision"].unique()
        n_known = max(int(numbers.max(initial=-1)) + 1, self.provenance.get("decided_before", 0))
        missing = np.setdiff1d(np.arange(n_known), numbers)
        if missing.size:
            raise ValueError(
                f"{self.folder} lacks {missing.size} of {n_known} decisions, the first of them "
                f"number {missing[0]}: the run was resumed with another folder, or a part of the "
                f"table is gone. {self.folder / PLAN_NAME} has the whole plan: Plan.load(...)"
            )
        own = base or Plan()
        if own.content_hash != self.provenance["plan_hash"]:
            raise ValueError(
                f"{self.folder} was decided on plan {self.provenance['plan_hash'][:12]}, "
                f"{own.name!r} is {own.content_hash[:12]}; give the plan that the run was given"
            )
        return own.with_operations(self.operations()).bound(
            corpus_hash=self.provenance["corpus_hash"],
            order=BaseOrder(**self.provenance["order"]),
        )


def _known(steps: Ints) -> pa.Array:
    return pa.array(steps.astype(np.int32), mask=steps < 0)


def _parts_of(folder: Path) -> list[tuple[Path, int, int]]:
    """Parts with their first and last decision, in order."""
    found: dict[int, tuple[Path, int, int]] = {}
    for path in _part_files(folder):
        first, last = map(int, path.stem.split("-"))
        found[first] = (path, first, last)  # a longer one came in place of a shorter
    return list(found.values())


def _part_files(folder: Path) -> list[Path]:
    return sorted((folder / _PARTS).glob("[0-9]*-[0-9]*.parquet"))
