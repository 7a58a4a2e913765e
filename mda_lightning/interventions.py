"""What is to be changed in a training stream: plans, and their matched random controls.

A :class:`Plan` says which samples, in which steps, and how; a
:class:`mda_lightning.schedule.Schedule` turns a base order and a plan into batches.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mda_lightning.files import atomic_path, read_json, sha256_of
from mda_lightning.operations import (
    Insert,
    Mask,
    Mode,
    Operation,
    Placement,
    Steps,
    as_ids,
    operation_from,
    refuse_contradictions,
)
from mda_lightning.shuffling import key_of, keyed_order

__all__ = ["Insert", "Mask", "Operation", "Plan"]

SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class Plan:
    """Operations on a training stream, with what they were made for.

    ``Plan.mask(ids)`` and ``Plan.insert(ids, steps=...)`` make plans, ``|`` composes them,
    ``bound`` ties them to a corpus and an order, ``random_control`` draws the matched control.

    Attributes:
        operations: applied together; the order of the parts of ``|`` is kept.
        seed: of the places that insertions take; None counts as 0.
        corpus_hash, order_hash: content hashes of the corpus and base order that the sample ids and
            steps refer to; None is unbound and fits any.
        spared: sample ids whose base places no insertion with ``replace`` takes; treated samples
            are always spared. int64, unique, ascending.
        source: where the plan comes from (scores, unit, fraction...), JSON values; not hashed.
        name: for people; not hashed.
    """

    operations: tuple[Operation, ...] = ()
    seed: int | None = None
    corpus_hash: str | None = None
    order_hash: str | None = None
    spared: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    source: Mapping[str, Any] = field(default_factory=dict)
    name: str = "plan"

    def __post_init__(self) -> None:
        refuse_contradictions(self.operations)

    @classmethod
    def mask(
        cls, sample_ids: ArrayLike, steps: Steps | None = None, *, weight: float = 0.0
    ) -> Plan:
        """A plan that gives ``weight`` (0: removed from the loss) to these samples in ``steps``."""
        return cls((Mask(as_ids(sample_ids), steps, weight),), name="mask")

    @classmethod
    def insert(
        cls,
        sample_ids: ArrayLike,
        *,
        steps: Steps,
        mode: Mode = "dispersed",
        placement: Placement = "shift",
        copies: int = 1,
    ) -> Plan:
        """A plan that adds these samples to the stream in the window ``steps``."""
        operation = Insert(as_ids(sample_ids), steps, mode, placement, copies)
        return cls((operation,), name=f"insert-{mode}")

    def __or__(self, other: Plan) -> Plan:
        """Both plans' operations together.

        Raises:
            ValueError: the two are bound to different corpora, orders or seeds, or contradict.
        """
        return Plan(
            self.operations + other.operations,
            seed=_agreed("seed", self.seed, other.seed),
            corpus_hash=_agreed("corpus", self.corpus_hash, other.corpus_hash),
            order_hash=_agreed("order", self.order_hash, other.order_hash),
            spared=np.union1d(self.spared, other.spared),
            source={**self.source, **other.source},
            name=f"{self.name}+{other.name}",
        )

    def bound(
        self,
        *,
        corpus_hash: str | None = None,
        order_hash: str | None = None,
        seed: int | None = None,
        source: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> Plan:
        """The same operations tied to what is given; None leaves a field as it is."""
        given = {
            "corpus_hash": corpus_hash,
            "order_hash": order_hash,
            "seed": seed,
            "source": source,
            "name": name,
        }
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        return dataclasses.replace(self, **changes)

    @property
    def treated_ids(self) -> NDArray[np.int64]:
        """Every sample id that some operation names; int64, unique, ascending."""
        if not self.operations:
            return np.empty(0, np.int64)
        return np.unique(np.concatenate([op.sample_ids for op in self.operations]))

    def random_control(
        self, pool_ids: ArrayLike, seed: int, *, exclude: ArrayLike | None = None
    ) -> Plan:
        """The same operations on as many random samples, none of them treated by this plan.

        Each treated sample is given one stand-in, the same in every operation, so counts per
        operation and overlaps between operations (mask and insert of the same samples) match. The
        seed of the places stays: with the same ``shift`` insertions, treated and control samples
        take the same places. For ``replace`` use :meth:`with_random_control`.

        Args:
            pool_ids: the samples to draw from, usually those that the base run saw in the window.
            seed: of the draw.
            exclude: further ids never to be drawn.

        Raises:
            ValueError: the pool without the treated and excluded samples is too small.
        """
        treated = self.treated_ids
        excluded = treated if exclude is None else np.union1d(treated, as_ids(exclude))
        pool = np.setdiff1d(as_ids(pool_ids), excluded)
        if len(pool) < len(treated):
            raise ValueError(
                f"the random control needs {len(treated)} samples besides the treated and excluded "
                f"ones, the pool has {len(pool)}; treat a smaller fraction or widen the pool"
            )
        drawn = pool[keyed_order(key_of("random control", seed), len(pool))[: len(treated)]]
        operations = tuple(
            dataclasses.replace(op, sample_ids=drawn[np.searchsorted(treated, op.sample_ids)])
            for op in self.operations
        )
        return dataclasses.replace(
            self,
            operations=operations,
            source={"control_of": self.content_hash, "draw_seed": seed},
            name=f"{self.name}-random",
        )

    def with_random_control(
        self, pool_ids: ArrayLike, seed: int, *, exclude: ArrayLike | None = None
    ) -> tuple[Plan, Plan]:
        """This plan and its random control, each sparing the samples that the other treats.

        With ``replace``, an insertion takes out base samples. Left to itself it would take out some
        of the samples that the *other* plan treats and none of its own, and part of the difference
        between the two would be that removal. Sparing both sets, the two plans take the same
        places and leave the same base samples standing.

        Args, Raises: as for :meth:`random_control`.
        """
        control = self.random_control(pool_ids, seed, exclude=exclude)
        both = np.union1d(self.treated_ids, control.treated_ids)
        treated = dataclasses.replace(self, spared=np.union1d(self.spared, both))
        source = {**control.source, "control_of": treated.content_hash}
        return treated, dataclasses.replace(control, spared=treated.spared, source=source)

    @property
    def content_hash(self) -> str:
        """SHA-256 over everything that decides the stream; ``source`` and ``name`` do not."""
        settings = {"schema": SCHEMA_VERSION, "seed": self.seed or 0}
        parts: list[str | NDArray[Any]] = [
            json.dumps(settings),
            self.corpus_hash or "",
            self.order_hash or "",
            self.spared,
        ]
        for op in self.operations:
            described = op.describe() | {"sample_ids": None}
            parts += [json.dumps(described, sort_keys=True), op.sample_ids]
        return sha256_of(*parts)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON."""
        value = {
            "kind": "plan",
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "content_hash": self.content_hash,
            "corpus_hash": self.corpus_hash,
            "order_hash": self.order_hash,
            "seed": self.seed,
            "spared": self.spared.tolist(),
            "source": dict(self.source),
            "operations": [op.describe() for op in self.operations],
        }
        with atomic_path(path) as part:
            part.write_text(json.dumps(value, allow_nan=False) + "\n", "utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not a plan, of a newer schema, or its content hash does not fit its content.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no plan file at {path}; Plan.save writes one")
        value = read_json(path)
        if not isinstance(value, dict) or value.get("kind") != "plan":
            raise ValueError(f"{path} is not a plan file; Plan.save writes one")
        if value["schema_version"] > SCHEMA_VERSION:
            raise ValueError(
                f"{path} has plan schema {value['schema_version']}, this version reads up to "
                f"{SCHEMA_VERSION}; update mda-lightning"
            )
        plan = cls(
            tuple(operation_from(item) for item in value["operations"]),
            seed=value["seed"],
            corpus_hash=value["corpus_hash"],
            order_hash=value["order_hash"],
            spared=np.asarray(value["spared"], dtype=np.int64),
            source=value["source"],
            name=value["name"],
        )
        if plan.content_hash != value["content_hash"]:
            raise ValueError(
                f"{path} says content hash {value['content_hash'][:12]} but its content has "
                f"{plan.content_hash[:12]}; it was edited or damaged: build the plan again"
            )
        return plan


def _agreed(what: str, first: Any, second: Any) -> Any:
    if first is not None and second is not None and first != second:
        raise ValueError(
            f"cannot compose plans of different {what}: {str(first)[:12]} and {str(second)[:12]}; "
            "compose them first, then call bound()"
        )
    return second if first is None else first
