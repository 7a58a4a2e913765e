"""The training stream as a pure function: step -> sample ids, weights, provenance.

Nothing here has state that matters: a schedule can be read at any step in any order, by any number
of processes, and gives the same batches. Memory is that of the inserted samples and masks, never
that of the corpus or the run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mda_lightning.files import sha256_of
from mda_lightning.interventions import Insert, Mask, Plan
from mda_lightning.shuffling import key_of, keyed_numbers, keyed_order, permute

BASE = 0
"""Provenance of a sample that the base order put there."""
INSERTED = 1
"""Provenance of a sample that an insertion put there."""

_STREAM_VERSION = "stream-1"  # changes when the same order and plan would give another stream
_SAMPLES_PER_BLOCK = 4096  # the stream is computed in blocks, so that small batches cost little


@dataclass(frozen=True)
class BaseOrder:
    """The order in which a run without a plan trains on the rows of a corpus.

    Every epoch is a permutation of all rows of its own; the stream runs on past ``n_steps``, which
    only says how long the run is (it is no part of ``content_hash``: a longer run of the same
    order starts with the same batches).

    Attributes:
        n_rows: rows of the corpus.
        batch_size: samples of one optimizer step, over all ranks and micro-batches.
        n_steps: optimizer steps of the run.
        seed: of the permutations.
        shuffle: False gives rows 0, 1, 2, ... in order.
    """

    n_rows: int
    batch_size: int
    n_steps: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.n_steps < 1:
            raise ValueError(
                f"batch_size {self.batch_size} and n_steps {self.n_steps} must be at least 1"
            )
        if self.n_rows < self.batch_size:
            raise ValueError(
                f"the corpus has {self.n_rows} rows, one batch needs {self.batch_size}; "
                "use more text, shorter rows or a smaller batch_size"
            )

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample ids at ``positions`` [n] of the endless base stream; int64 [n]."""
        epochs, offsets = np.divmod(positions, self.n_rows)
        if not self.shuffle:
            return offsets
        keys = keyed_numbers(key_of("base order", self.seed), epochs)
        return permute(offsets, self.n_rows, keys=keys)

    def ids(self, step: int) -> NDArray[np.int64]:
        """Sample ids of one step; int64 [batch_size]."""
        start = step * self.batch_size
        return self.at(np.arange(start, start + self.batch_size, dtype=np.int64))

    @property
    def content_hash(self) -> str:
        """SHA-256 over everything that decides the endless stream and its cut into steps."""
        return sha256_of(
            json.dumps([_STREAM_VERSION, self.n_rows, self.batch_size, self.seed, self.shuffle])
        )


class ScheduledBatch(NamedTuple):
    """One optimizer step's samples: ids int64 [B], weights float32 [B], provenance uint8 [B]."""

    sample_ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    provenance: NDArray[np.uint8]


class Schedule:
    """The batches of a run: a base order, changed by a plan.

    Args:
        order: the base order.
        plan: what to change; None changes nothing.

    Raises:
        ValueError: the plan was made for another order, names unknown samples, has a window outside
            the run, or replaces more samples than the window has places.
    """

    def __init__(self, order: BaseOrder, plan: Plan | None = None) -> None:
        self.order = order
        self.plan = plan if plan is not None else Plan()
        _check_fits(order, self.plan)
        seed = self.plan.seed or 0
        self._masks = [op for op in self.plan.operations if isinstance(op, Mask)]
        inserts = [
            (key_of("insertion", seed, number), op)
            for number, op in enumerate(self.plan.operations)
            if isinstance(op, Insert)
        ]
        self._inserted_at, self._inserted_ids = _shifted(
            order, [(key, op) for key, op in inserts if op.placement == "shift"]
        )
        self._replaced_at, self._replaced_ids = _replaced(
            order,
            [(key, op) for key, op in inserts if op.placement == "replace"],
            np.union1d(self.plan.treated_ids, self.plan.spared),
        )
        self._block_steps = max(1, _SAMPLES_PER_BLOCK // order.batch_size)
        self._blocks: dict[int, ScheduledBatch] = {}

    def __len__(self) -> int:
        """Optimizer steps of the run, those that shifted insertions add included."""
        return self.order.n_steps + -(-len(self._inserted_at) // self.order.batch_size)

    def batch(self, step: int) -> ScheduledBatch:
        """The samples of the update that takes ``global_step`` from ``step`` to ``step + 1``.

        The arrays are read-only views.

        Raises:
            IndexError: the run has no such step.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is outside the run: it has steps 0..{len(self) - 1}")
        number, step_in_block = divmod(step, self._block_steps)
        block = self._blocks.get(number)
        if block is None:
            block = self._compute(number * self._block_steps, self._block_steps)
            # Two blocks: the one being loaded and, behind the prefetch, the one being recorded.
            while len(self._blocks) > 1:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[number] = block
        size = self.order.batch_size
        part = slice(step_in_block * size, (step_in_block + 1) * size)
        return ScheduledBatch(block.sample_ids[part], block.weights[part], block.provenance[part])

    @property
    def content_hash(self) -> str:
        """SHA-256 over the base order, the run's length and the plan."""
        return sha256_of(self.order.content_hash, str(self.order.n_steps), self.plan.content_hash)

    def _compute(self, first_step: int, n_steps: int) -> ScheduledBatch:
        size = self.order.batch_size
        positions = np.arange(first_step * size, (first_step + n_steps) * size, dtype=np.int64)
        before, inserted = _find(self._inserted_at, positions)
        base_positions = positions - before
        ids = self.order.at(base_positions)
        place, replaced = _find(self._replaced_at, base_positions)
        replaced &= ~inserted
        weights = np.ones(len(ids), np.float32)
        for mask in self._masks:
            hit = _find(mask.sample_ids, ids)[1] & ~inserted & ~replaced
            if mask.steps is not None:
                start, end = _positions(self.order, mask.steps)
                hit &= (base_positions >= start) & (base_positions < end)
            weights[hit] = mask.weight
        ids[inserted] = self._inserted_ids[before[inserted]]
        ids[replaced] = self._replaced_ids[place[replaced]]
        block = ScheduledBatch(ids, weights, (inserted | replaced).astype(np.uint8))
        for array in block:
            array.setflags(write=False)
        return block


class StreamDigest:
    """A hash of what the first ``step`` steps of a schedule train on.

    Two schedules agree on these steps exactly when the digests agree; so a branch is checked
    against what its checkpoint has consumed. Chained step by step: ``step`` and ``value`` carry a
    digest on from a checkpoint.
    """

    def __init__(self, schedule: Schedule, step: int = 0, value: str = "") -> None:
        self.schedule = schedule
        self.step = step
        self.value = value

    def at(self, step: int) -> str:
        """The digest of steps ``0 .. step - 1``, walking on from the last one asked for."""
        if step < self.step:
            self.step, self.value = 0, ""
        for number in range(self.step, step):
            digest = hashlib.sha256(self.value.encode())
            for array in self.schedule.batch(number):
                digest.update(array.data)
            self.value = digest.hexdigest()
        self.step = step
        return self.value


def _check_fits(order: BaseOrder, plan: Plan) -> None:
    if plan.order_hash is not None and plan.order_hash != order.content_hash:
        raise ValueError(
            f"plan {plan.name!r} was made for base order {plan.order_hash[:12]}, this run has "
            f"{order.content_hash[:12]} ({order.n_rows} rows, batch {order.batch_size}, seed "
            f"{order.seed}, shuffle {order.shuffle}); use the order it was made for or build it "
            "again for this one"
        )
    treated = plan.treated_ids
    if treated.size and treated[-1] >= order.n_rows:
        raise ValueError(
            f"plan {plan.name!r} names sample {treated[-1]}, the corpus has rows "
            f"0..{order.n_rows - 1}; was the plan made for another corpus?"
        )
    for op in plan.operations:
        if op.steps is not None and op.steps[1] > order.n_steps:
            raise ValueError(
                f"the window {op.steps} of plan {plan.name!r} ends outside the run, which has "
                f"{order.n_steps} steps; make the run longer or the window end earlier"
            )


def _positions(order: BaseOrder, steps: tuple[int, int]) -> tuple[int, int]:
    return steps[0] * order.batch_size, steps[1] * order.batch_size


def _find(
    ascending: NDArray[np.int64], values: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For each value: how many of ``ascending`` are below it, and whether it is among them."""
    below = np.searchsorted(ascending, values)
    if not ascending.size:
        return below, np.zeros(len(values), bool)
    return below, ascending[np.minimum(below, len(ascending) - 1)] == values


def _in_stream_order(key: np.uint64, op: Insert) -> NDArray[np.int64]:
    ids = np.tile(op.sample_ids, op.copies)
    return ids[keyed_order(key, len(ids))]


def _shifted(
    order: BaseOrder, inserts: list[tuple[np.uint64, Insert]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions in the final stream (ascending) and ids of what is inserted with ``shift``.

    A dispersed insertion of N samples into a window of W base samples takes N of the W + N places
    of the stretched window, uniformly; a concentrated one takes the first N.
    """
    anchors, ids = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for key, op in inserts:
        start, end = _positions(order, op.steps)
        places = np.arange(op.count, dtype=np.int64)
        if op.mode == "dispersed":
            stretched = keyed_order(key ^ key_of("places"), end - start + op.count)
            places = np.sort(stretched[: op.count])
        # Subtracting the inserted ones before each leaves the base position that it comes before.
        anchors.append(start + places - np.arange(op.count))
        ids.append(_in_stream_order(key, op))
    anchor, flat = np.concatenate(anchors), np.concatenate(ids)
    by_anchor = np.argsort(anchor, kind="stable")
    return anchor[by_anchor] + np.arange(len(anchor)), flat[by_anchor]


def _replaced(
    order: BaseOrder, inserts: list[tuple[np.uint64, Insert]], spared: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Base positions (ascending) and ids of what is inserted with ``replace``.

    Places of spared samples are left alone. The treated ones are among them: an insertion must not
    undo a mask, nor take out what it is meant to add.
    """
    taken, ids = np.empty(0, np.int64), np.empty(0, np.int64)
    for key, op in inserts:
        start, end = _positions(order, op.steps)
        positions = np.arange(start, end, dtype=np.int64)
        free = ~_find(spared, order.at(positions))[1] & ~np.isin(positions, taken)
        if op.mode == "dispersed":
            # Ranks are drawn before the spared places are left out, so that plans that spare the
            # same samples take the same places.
            ranked = keyed_order(key ^ key_of("places"), len(positions))
            ranked = ranked[free[ranked]]
        else:
            ranked = np.flatnonzero(free)
        if len(ranked) < op.count:
            raise ValueError(
                f"{op.count} insertions by replacement do not fit into steps {op.steps}: "
                f"{len(ranked)} of its {len(positions)} places hold no spared sample; insert "
                "fewer, widen the window or use placement='shift'"
            )
        taken = np.concatenate([taken, start + np.sort(ranked[: op.count])])
        ids = np.concatenate([ids, _in_stream_order(key, op)])
    by_position = np.argsort(taken)
    return taken[by_position], ids[by_position]
