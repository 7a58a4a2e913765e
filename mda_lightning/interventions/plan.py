"""A plan: what is to be changed in a training stream."""

from __future__ import annotations

import dataclasses
import json
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mda_lightning.base_order import BaseOrder
from mda_lightning.files import sha256_of
from mda_lightning.interventions.contradictions import refuse_contradictions
from mda_lightning.interventions.controls import controlled
from mda_lightning.interventions.operations import (
    Insert,
    Mask,
    Mode,
    Occurrences,
    Operation,
    Placement,
    Prune,
    Replace,
    Steps,
    as_ids,
)
from mda_lightning.interventions.plan_file import SCHEMA_VERSION, read_plan_file, write_plan_file
from mda_lightning.interventions.sources import Source, merge_sources
from mda_lightning.sample_ids import unique_ids


@dataclass(frozen=True, eq=False)
class Plan:
    """Operations on a training stream, with what they were made for.

    ``Plan.mask(ids)``, ``Plan.insert(ids, steps=...)``, ``Plan.replace``, ``Plan.prune`` and
    ``Plan.duplicate`` make plans, ``|`` composes them, ``bound`` ties them to a corpus and an
    order, ``random_control`` draws the matched control.

    Attributes:
        operations: applied together; the order of the parts of ``|`` is kept.
        seed: of the places that are drawn; None counts as 0.
        corpus_hash: content hash of the corpus that the sample ids refer to; None fits any.
        order: the base order that ids and steps refer to; None fits any. How many steps it has is
            no part of what it must agree in.
        spared: sample ids whose base places no insertion with ``replace`` takes; samples that the
            plan names are always spared. int64, unique, ascending.
        sources: corpora of inserted samples besides the base corpus.
        source: where the plan comes from (scores, unit, fraction...), JSON values; not hashed.
        name: for people; not hashed.
    """

    operations: tuple[Operation, ...] = ()
    seed: int | None = None
    corpus_hash: str | None = None
    order: BaseOrder | None = None
    spared: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    sources: tuple[Source, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)
    name: str = "plan"

    def __post_init__(self) -> None:
        if self.seed is not None:
            object.__setattr__(self, "seed", operator.index(self.seed))
        refuse_contradictions(self.operations)

    # -- making plans -------------------------------------------------------------------------

    @classmethod
    def mask(
        cls,
        sample_ids: ArrayLike,
        steps: Steps | None = None,
        *,
        weight: float = 0.0,
        occurrences: Occurrences = "base",
    ) -> Plan:
        """A plan that gives ``weight`` (0: removed from the loss) to these samples in ``steps``."""
        return cls((Mask(as_ids(sample_ids), steps, weight, occurrences),), name="mask")

    @classmethod
    def insert(
        cls,
        sample_ids: ArrayLike,
        *,
        steps: Steps,
        mode: Mode = "dispersed",
        placement: Placement = "shift",
        copies: int = 1,
        sources: Sequence[Source] = (),
    ) -> Plan:
        """A plan that adds these samples to the stream in the window ``steps``."""
        operation = Insert(as_ids(sample_ids), steps, mode, placement, copies)
        return cls((operation,), sources=tuple(sources), name=f"insert-{mode}")

    @classmethod
    def insert_rows(
        cls,
        rows: Any,
        *,
        steps: Steps,
        mode: Mode = "dispersed",
        placement: Placement = "shift",
        copies: int = 1,
    ) -> Plan:
        """A plan that adds all rows of another corpus.

        Args:
            rows: a :class:`~mda_lightning.corpora.TokenRows` of as long rows, or a
                :class:`Source`.
        """
        own = rows if isinstance(rows, Source) else Source.of(rows)
        return cls.insert(
            own.ids(), steps=steps, mode=mode, placement=placement, copies=copies, sources=(own,)
        )

    @classmethod
    def duplicate(
        cls,
        sample_ids: ArrayLike,
        times: int,
        *,
        steps: Steps,
        mode: Mode = "dispersed",
        placement: Placement = "shift",
    ) -> Plan:
        """A plan by which samples that the base order has once are seen ``times`` times in all.

        Raises:
            ValueError: ``times`` below 2.
        """
        if times < 2:
            raise ValueError(
                f"times is {times}; the base order has a sample once already: 2 is "
                "the least that duplicates it"
            )
        plan = cls.insert(sample_ids, steps=steps, mode=mode, placement=placement, copies=times - 1)
        return dataclasses.replace(plan, name=f"duplicate-{times}")

    @classmethod
    def replace(
        cls,
        *,
        steps: Steps,
        sample_ids: ArrayLike | None = None,
        by: ArrayLike | None = None,
        by_steps: Steps | None = None,
        sources: Sequence[Source] = (),
    ) -> Plan:
        """A plan by which samples of ``steps`` give their places to others.

        ``sample_ids`` and ``by``: one for one. ``by`` or ``by_steps`` alone: every place of the
        window (Figure 3d). See :class:`~mda_lightning.interventions.Replace`.
        """
        operation = Replace(
            steps,
            None if sample_ids is None else as_ids(sample_ids),
            None if by is None else as_ids(by),
            by_steps,
        )
        return cls((operation,), sources=tuple(sources), name="replace")

    @classmethod
    def prune(
        cls, fraction: float, steps: Steps | None = None, *, weight: float = 0.0, draw: int = 0
    ) -> Plan:
        """A plan that masks a random share of the window's places (95% in Figure 3d)."""
        return cls((Prune(steps, fraction, weight, draw),), name="prune")

    def __or__(self, other: Plan) -> Plan:
        """Both plans' operations together.

        Raises:
            ValueError: the two are bound to different corpora, orders or seeds, or contradict.
        """
        return Plan(
            self.operations + other.operations,
            seed=_agreed("seeds", self.seed, other.seed),
            corpus_hash=_agreed("corpora", self.corpus_hash, other.corpus_hash),
            order=_agreed_order(self.order, other.order),
            spared=np.union1d(self.spared, other.spared),
            sources=merge_sources(self.sources, other.sources),
            source={**self.source, **other.source},
            name=f"{self.name}+{other.name}",
        )

    def bound(
        self,
        *,
        corpus_hash: str | None = None,
        order: BaseOrder | None = None,
        seed: int | None = None,
        source: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> Plan:
        """The same operations tied to what is given; None leaves a field as it is."""
        given = {
            "corpus_hash": corpus_hash,
            "order": order,
            "seed": seed,
            "source": source,
            "name": name,
        }
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        return dataclasses.replace(self, **changes)

    def with_operations(self, operations: Sequence[Operation]) -> Plan:
        """This plan and, after its own, these operations."""
        return dataclasses.replace(self, operations=(*self.operations, *operations))

    # -- its matched control ------------------------------------------------------------------

    def random_control(
        self, pool_ids: ArrayLike, seed: int, *, exclude: ArrayLike | None = None
    ) -> Plan:
        """The same operations on as many random samples, none of them named by this plan.

        Each treated sample is given one stand-in, the same in every operation, so counts per
        operation and overlaps between operations (mask and insert of the same samples) match. Of a
        plan with an order, a stand-in occurs as often in the steps of the masks as the sample, so
        that as many places are masked. The
        seed of the places stays: with the same ``shift`` insertions, treated and control samples
        take the same places. For insertions with ``replace`` use :meth:`with_random_control`.

        A replacement keeps the places that it takes, and random samples come in, none of those
        that it takes out; a replacement by an interval is one by as many random samples. A pruning
        is drawn anew.

        Args:
            pool_ids: the samples to draw from: for masks and insertions usually those that the base
                run saw in the window, for replacements others.
            seed: of the draw.
            exclude: further ids never to be drawn.

        Raises:
            ValueError: the pool without the treated and excluded samples is too small, or the
                replacement of a whole window in a plan without an order.
        """
        return dataclasses.replace(
            self,
            operations=controlled(self.operations, self.order, pool_ids, seed, exclude=exclude),
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

    # -- what it is ---------------------------------------------------------------------------

    @property
    def treated_ids(self) -> NDArray[np.int64]:
        """Every sample id that some operation names; int64, unique, ascending."""
        if not self.operations:
            return np.empty(0, np.int64)
        return unique_ids(np.concatenate([op.named_ids for op in self.operations]))

    @property
    def order_hash(self) -> str | None:
        """Content hash of the order, or None."""
        return None if self.order is None else self.order.content_hash

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over everything that decides the stream; ``source`` and ``name`` do not."""
        settings = {"schema": SCHEMA_VERSION, "seed": self.seed or 0}
        parts: list[str | NDArray[Any]] = [
            json.dumps(settings),
            self.corpus_hash or "",
            self.order_hash or "",
            self.spared,
            json.dumps(sorted(source.content_hash for source in self.sources)),
        ]
        for op in self.operations:
            arrays = [getattr(op, name, None) for name in ("sample_ids", "by")]
            fields = {f.name: getattr(op, f.name) for f in dataclasses.fields(op)}
            plain = {k: v for k, v in fields.items() if not isinstance(v, np.ndarray)}
            parts.append(json.dumps([type(op).__name__, plain], sort_keys=True))
            parts += [array for array in arrays if array is not None]
        return sha256_of(*parts)

    # -- its file -----------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON; folders of its sources are named relative to the file."""
        value = {
            "name": self.name,
            "content_hash": self.content_hash,
            "corpus_hash": self.corpus_hash,
            "order_hash": self.order_hash,
            "order": None if self.order is None else self.order.describe(),
            "seed": self.seed,
            "spared": self.spared.tolist(),
            "source": dict(self.source),
            "operations": [op.describe() for op in self.operations],
        }
        return write_plan_file(Path(path), value, self.sources)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not a plan, of another schema, or its content hash does not fit its content.
        """
        fields, said = read_plan_file(Path(path))
        try:
            plan = cls(**fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if plan.content_hash != said:
            raise ValueError(
                f"{path} says content hash {said[:12]} but its content has "
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


def _agreed_order(first: BaseOrder | None, second: BaseOrder | None) -> BaseOrder | None:
    if first is None or second is None:
        return second if first is None else first
    _agreed("orders", first.content_hash, second.content_hash)
    return max(first, second, key=lambda order: order.n_steps)
