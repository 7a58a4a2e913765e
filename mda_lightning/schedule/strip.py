"""A strip of the stream: how much of what a plan does lies in which steps.

Numbers are counted from the schedule's own batches, block by block, and only where an operation has
its window: memory is that of the plan, however long the run.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mda_lightning.interventions.operations import Insert, Mask, Operation, Prune, Replace, Steps
from mda_lightning.interventions.plan import Plan
from mda_lightning.schedule.placing import find
from mda_lightning.schedule.rewriting import BaseChanges
from mda_lightning.schedule.stream import BASE, INSERTED, REPLACED, Schedule

Kind: TypeAlias = Literal["masked", "reweighted", "pruned", "inserted", "replaced"]
KINDS: tuple[Kind, ...] = ("masked", "reweighted", "pruned", "inserted", "replaced")

_PLACES_AT_ONCE = 2**18
_NAMED = 10


@dataclass
class Tally:
    """Places of a kind a step, over the steps from the first that has any to the last.

    Attributes:
        total: places.
        first, last: the steps [first, last).
        least, most: places of one of these steps.
    """

    total: int = 0
    first: int = 0
    last: int = 0
    least: int = 0
    most: int = 0

    @property
    def mean(self) -> float:
        """Places a step."""
        return self.total / max(1, self.last - self.first)

    def add(self, first_step: int, counts: NDArray[np.int64]) -> None:
        """Count further steps, later than those before."""
        there = np.flatnonzero(counts)
        if not there.size:
            return
        begin, end = int(there[0]), int(there[-1]) + 1
        own = counts[begin:end]
        least = int(own.min())
        if self.total:
            gap = first_step + begin > self.last  # steps without any lie between
            self.least = 0 if gap else min(self.least, least)
        else:
            self.first, self.least = first_step + begin, least
        self.last = first_step + end
        self.most = max(self.most, int(own.max()))
        self.total += int(own.sum())


@dataclass
class OperationCount:
    """What one operation comes to.

    Attributes:
        operation: it.
        places: that it masks or replaces in the steps of the strip, or fills or prunes in all.
        met: for each sample that a mask or a replacement one for one names, bool [n]: whether the
            run has it in the window. Empty for other operations.
    """

    operation: Operation
    places: int
    met: NDArray[np.bool_]

    @property
    def unmet(self) -> NDArray[np.int64]:
        """Named samples on which the operation has no effect; int64 [n]."""
        named = getattr(self.operation, "sample_ids", None)
        if named is None or not self.met.size:
            return np.empty(0, np.int64)
        found: NDArray[np.int64] = named[~self.met]
        return found


@dataclass(frozen=True, eq=False)
class Strip:
    """Counts in spans of run steps.

    Attributes:
        edges: int64 [n + 1], the spans' first steps and the end.
        places: int64 [n].
        counts: places by kind, int64 [n] each: ``masked`` (weight 0 by a mask), ``reweighted``
            (another weight by a mask), ``pruned`` (a weight changed by a pruning), ``inserted``,
            ``replaced``.
        weight: float64 [n], mean weight.
        tallies: by kind, a step.
        n_fully_masked: steps in which every sample has weight 0: their gradient is zero.
        fully_masked: the first of them.
        operations: what each operation of the plan comes to, in the steps of the strip.
    """

    edges: NDArray[np.int64]
    places: NDArray[np.int64]
    counts: dict[Kind, NDArray[np.int64]]
    weight: NDArray[np.float64]
    tallies: dict[Kind, Tally]
    n_fully_masked: int
    fully_masked: tuple[int, ...]
    operations: tuple[OperationCount, ...]

    @property
    def touched(self) -> Steps | None:
        """The steps from the first that has a changed place to the last; None for none."""
        there = [tally for tally in self.tallies.values() if tally.total]
        if not there:
            return None
        return min(t.first for t in there), max(t.last for t in there)


def strip_of(
    schedule: Schedule,
    *,
    steps: Steps | None = None,
    n_spans: int = 60,
    progress: Callable[[int, int], None] | None = None,
) -> Strip:
    """Count what a schedule's plan does, in ``n_spans`` spans of about equal length.

    Args:
        steps: run steps [first, last); None is the whole run.
        n_spans: no more than there are steps.
        progress: told steps done and steps to look at.

    Raises:
        ValueError: steps outside the run.
    """
    first, last = (0, len(schedule)) if steps is None else steps
    if not 0 <= first < last <= len(schedule):
        raise ValueError(f"steps {first}:{last} are outside the run, which has {len(schedule)}")
    n_spans = min(n_spans, last - first)
    edges = first + (last - first) * np.arange(n_spans + 1, dtype=np.int64) // n_spans
    size = schedule.order.batch_size
    places = np.diff(edges) * size
    counts: dict[Kind, NDArray[np.int64]] = {kind: np.zeros(n_spans, np.int64) for kind in KINDS}
    tallies = {kind: Tally() for kind in KINDS}
    lost = np.zeros(n_spans)  # weight that is missing from 1 a place
    operations = [_uncounted(op, schedule) for op in schedule.plan.operations]
    n_fully_masked, fully_masked = 0, list[int]()
    unpruned = _without_pruning(schedule)
    blocks = _blocks(schedule, first, last)
    to_do = sum(end - begin for begin, end in blocks)
    done = 0
    for begin, end in blocks:
        block = _Block.of(schedule, unpruned, begin, end)
        spans = np.searchsorted(edges, np.arange(begin, end), side="right") - 1
        for kind, where in block.kinds().items():
            a_step = where.reshape(-1, size).sum(1)
            tallies[kind].add(begin, a_step)
            np.add.at(counts[kind], spans, a_step)
        np.add.at(lost, spans, (1.0 - block.weights).reshape(-1, size).sum(1))
        empty = np.flatnonzero(~block.weights.reshape(-1, size).any(1)) + begin
        n_fully_masked += len(empty)
        fully_masked += empty[: _NAMED - len(fully_masked)].tolist()
        for one in operations:
            block.count(one, schedule)
        done += end - begin
        if progress is not None:
            progress(done, to_do)
    return Strip(
        edges,
        places,
        counts,
        1.0 - lost / places,
        tallies,
        n_fully_masked,
        tuple(fully_masked),
        tuple(operations),
    )


def run_steps(schedule: Schedule, window: Steps) -> Steps:
    """The run's steps [first, last) that hold all places of a window of base steps.

    What a shift inserted into the window is among them, also before its first base place; at
    either end, one or two steps may hold places of other base steps.
    """
    numbers = range(len(schedule) + 1)
    first = bisect_left(numbers, window[0], key=schedule.base_step_at) - 1
    last = bisect_left(numbers, window[1] + 1, key=schedule.base_step_at)
    return max(0, first), min(last, len(schedule))


@dataclass(frozen=True, eq=False)
class _Block:
    """Places of some steps, [n] each."""

    ids: NDArray[np.int64]
    weights: NDArray[np.float64]
    by_masks: NDArray[np.float32]
    provenance: NDArray[np.uint8]
    base_positions: NDArray[np.int64]
    run_positions: NDArray[np.int64]

    @classmethod
    def of(cls, schedule: Schedule, unpruned: Schedule, begin: int, end: int) -> _Block:
        batches = [schedule.batch(step) for step in range(begin, end)]
        weights = np.concatenate([batch.weights for batch in batches])
        by_masks = weights
        if unpruned is not schedule:
            by_masks = np.concatenate([unpruned.batch(step).weights for step in range(begin, end)])
        size = schedule.order.batch_size
        return cls(
            np.concatenate([batch.sample_ids for batch in batches]),
            weights.astype(np.float64),
            by_masks,
            np.concatenate([batch.provenance for batch in batches]),
            _at_or_after(schedule, begin, end),
            np.arange(begin * size, end * size, dtype=np.int64),
        )

    def kinds(self) -> dict[Kind, NDArray[np.bool_]]:
        return {
            "masked": self.by_masks == 0,
            "reweighted": (self.by_masks != 0) & (self.by_masks != 1),
            "pruned": self.weights != self.by_masks,
            "inserted": self.provenance == INSERTED,
            "replaced": self.provenance == REPLACED,
        }

    def count(self, one: OperationCount, schedule: Schedule) -> None:
        """Add what an operation comes to in these steps."""
        op, size = one.operation, schedule.order.batch_size
        inside = np.ones(len(self.ids), bool)
        if op.steps is not None:
            by_run = isinstance(op, Mask) and op.clock == "run"
            positions = self.run_positions if by_run else self.base_positions
            start, end = op.steps[0] * size, op.steps[1] * size
            if positions[-1] < start or positions[0] >= end:
                return
            inside = (positions >= start) & (positions < end)
        if isinstance(op, Mask):
            if op.occurrences == "base":
                inside &= self.provenance == BASE
            self._count_named(one, op.sample_ids, self.ids, inside)
        elif isinstance(op, Replace):
            # An insertion in a replaced sample's place comes after the replacement.
            inside &= self.provenance == REPLACED
            if op.sample_ids is None:
                one.places += int(inside.sum())
            elif inside.any():
                base = schedule.order.at(self.base_positions)
                self._count_named(one, op.sample_ids, base, inside)

    @staticmethod
    def _count_named(
        one: OperationCount,
        named: NDArray[np.int64],
        ids: NDArray[np.int64],
        inside: NDArray[np.bool_],
    ) -> None:
        place, hit = find(named, ids[inside])
        one.places += int(hit.sum())
        one.met[place[hit]] = True


def _uncounted(op: Operation, schedule: Schedule) -> OperationCount:
    if isinstance(op, Insert):
        return OperationCount(op, op.count, np.empty(0, bool))
    if isinstance(op, Prune):
        return OperationCount(op, _n_pruned(op, schedule), np.empty(0, bool))
    named = op.sample_ids
    return OperationCount(op, 0, np.zeros(0 if named is None else len(named), bool))


def _n_pruned(op: Prune, schedule: Schedule) -> int:
    order = schedule.order
    if op.steps is not None:
        first, last = order.places(op.steps)
        return round(op.fraction * (last - first))
    # As many of every pass over the corpus; of the last, those that the run comes to.
    n_places = order.n_steps * order.batch_size
    begun = n_places // order.n_rows * order.n_rows
    found = begun // order.n_rows * round(op.fraction * order.n_rows)
    changes = BaseChanges(order, _with_weights(schedule.plan, 1.0, of_one=op))
    for start in range(begun, n_places, _PLACES_AT_ONCE):
        end = min(start + _PLACES_AT_ONCE, n_places)
        found += int((changes.kept(np.arange(start, end, dtype=np.int64)) == 0).sum())
    return found


def _with_weights(plan: Plan, weight: float, *, of_one: Prune | None = None) -> Plan:
    """The plan with another weight of its prunings, and 0 for one of them."""
    # All stay in their places: the numbers of the operations decide what is drawn for them.
    operations = tuple(
        dataclasses.replace(op, weight=0.0 if op is of_one else weight)
        if isinstance(op, Prune)
        else op
        for op in plan.operations
    )
    return dataclasses.replace(plan, operations=operations)


def _without_pruning(schedule: Schedule) -> Schedule:
    """The same schedule with prunings that change no weight; itself where there are none."""
    if not any(isinstance(op, Prune) for op in schedule.plan.operations):
        return schedule
    return Schedule(schedule.order, _with_weights(schedule.plan, 1.0))


def _at_or_after(schedule: Schedule, begin: int, end: int) -> NDArray[np.int64]:
    """The base position at or after each place of steps [begin, end)."""
    positions = schedule.base_positions(begin, end)
    base = positions >= 0
    following, step = positions[base], end
    while not following.size:
        following = schedule.base_positions(step, step + 1)
        following, step = following[following >= 0], step + 1
    # Base positions follow each other without a gap, whatever is inserted between them.
    found: NDArray[np.int64] = following[0] + np.cumsum(base) - base
    return found


def _blocks(schedule: Schedule, first: int, last: int) -> list[Steps]:
    """The steps of [first, last) in which an operation can be seen, in pieces."""
    windows = []
    for op in schedule.plan.operations:
        if op.steps is None:
            windows.append((0, len(schedule)))
        elif isinstance(op, Mask) and op.clock == "run":
            windows.append(op.steps)
        else:
            windows.append(run_steps(schedule, op.steps))
    together: list[Steps] = []
    for begin, end in sorted(windows):
        begin, end = max(begin, first), min(end, last)
        if together and begin <= together[-1][1]:
            together[-1] = together[-1][0], max(end, together[-1][1])
        elif begin < end:
            together.append((begin, end))
    at_once = max(1, _PLACES_AT_ONCE // schedule.order.batch_size)
    return [
        (start, min(start + at_once, end))
        for begin, end in together
        for start in range(begin, end, at_once)
    ]
