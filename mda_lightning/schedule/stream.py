"""The batches of a run.

Nothing here has state that matters: a schedule can be read at any step in any order, by any number
of processes, and gives the same batches. Memory is that of the samples that the plan names, never
that of the corpus or the run.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mda_lightning.base_order import BaseOrder
from mda_lightning.files import sha256_of
from mda_lightning.interventions.operations import (
    Insert,
    Mask,
    Operation,
    Steps,
    is_online,
    overlap,
)
from mda_lightning.interventions.plan import Plan
from mda_lightning.sample_ids import unique_ids
from mda_lightning.schedule.fitting import check_fits, check_order, check_run_clock
from mda_lightning.schedule.placing import Placed, find, nothing, replaced, shifted
from mda_lightning.schedule.rewriting import BaseChanges, Masks
from mda_lightning.shuffling import key_of

BASE = 0
"""Provenance of a sample that the base order put there."""
INSERTED = 1
"""Provenance of a sample that an insertion put there."""
REPLACED = 2
"""Provenance of a sample that a replacement put in a base sample's place."""

_SAMPLES_PER_BLOCK = 4096  # the stream is computed in blocks, so that small batches cost little


class ScheduledBatch(NamedTuple):
    """One optimizer step's samples: ids int64 [B], weights float32 [B], provenance uint8 [B]."""

    sample_ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    provenance: NDArray[np.uint8]


class Schedule:
    """The batches of a run: a base order, changed by a plan.

    At a place of the base order, a replacement comes before an insertion with ``replace``, which
    leaves alone the places of samples that the plan names. Weights are given last.

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
        check_order(order, self.plan)
        self._shifted = self._replaced = nothing()
        self._base_changes = BaseChanges(order, self.plan)
        self._masks = Masks(order)
        self._take(0)
        self._block_steps = max(1, _SAMPLES_PER_BLOCK // order.batch_size)
        self._blocks: dict[int, ScheduledBatch] = {}

    def _take(self, first: int) -> None:
        """Carry out the plan's operations from number ``first`` on."""
        order, plan, new = self.order, self.plan, self.plan.operations[first:]
        check_fits(order, plan, new)
        inserts = [
            (key_of("insertion", plan.seed or 0, number), op)
            for number, op in enumerate(new, first)
            if isinstance(op, Insert)
        ]
        by_shift = [(key, op) for key, op in inserts if op.placement == "shift"]
        by_replacement = [(key, op) for key, op in inserts if op.placement == "replace"]
        self._shifted = shifted(order, by_shift, self._shifted)
        self._replaced = replaced(order, by_replacement, self._spared_by, self._replaced)
        self._masks = self._masks.extended(new)
        check_run_clock(new, len(self))

    def __len__(self) -> int:
        """Optimizer steps of the run, those that shifted insertions add included."""
        return self.order.n_steps + -(-len(self._shifted.places) // self.order.batch_size)

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

    def base_positions(self, first_step: int, last_step: int) -> NDArray[np.int64]:
        """Where in the base order the places of steps [first, last) come from; int64 [n B].

        -1 where a shift inserted a sample.
        """
        positions, inserted = self._base_positions(first_step, last_step - first_step)
        return np.where(inserted, -1, positions)

    def base_step_at(self, run_step: int) -> int:
        """The first base step all of whose places come at or after a step of the run."""
        place = run_step * self.order.batch_size
        base_position = place - int(np.searchsorted(self._shifted.places, place))
        return -(-base_position // self.order.batch_size)

    def spared_in(self, steps: Steps) -> NDArray[np.int64]:
        """Samples whose places insertions into these base steps leave alone, besides their own.

        Those that the plan names there; what is decided later has no say in where the plan's own
        insertions stand. int64, unique, ascending.
        """
        named = [self.plan.spared]
        for op in self.plan.operations:
            by_run = isinstance(op, Mask) and op.clock == "run"
            if not is_online(op) and (by_run or overlap(op.steps, steps)):
                named.append(op.named_ids)
        return unique_ids(np.concatenate(named))

    def extended(self, operations: Sequence[Operation], from_step: int) -> Schedule:
        """This schedule with online operations added, which change nothing before ``from_step``.

        Raises:
            ValueError: an operation that is not ``online=True``, or whose window begins earlier.
        """
        for op in operations:
            if not isinstance(op, Mask | Insert) or not op.online:
                raise ValueError(
                    f"{type(op).__name__} is not an online operation; Mask(..., online=True) and "
                    "Insert(..., online=True) are"
                )
            by_run = isinstance(op, Mask) and op.clock == "run"
            if isinstance(op, Mask) and not by_run and op.occurrences == "all":
                raise ValueError(
                    "an online mask of inserted samples too counts in the run's own steps; give "
                    "clock='run'"
                )
            first = from_step if by_run else self.base_step_at(from_step)
            if op.steps is None or op.steps[0] < first:
                raise ValueError(
                    f"an operation in steps {op.steps} would change what has been trained on: "
                    f"the run is at step {from_step}, which is base step {first}; let it begin "
                    "there or later"
                )
        extended = copy.copy(self)
        extended.plan = self.plan.with_operations(operations)
        extended._blocks = {}
        extended._take(len(self.plan.operations))
        return extended

    @property
    def content_hash(self) -> str:
        """SHA-256 over the base order, the run's length and the plan."""
        return sha256_of(self.order.content_hash, str(self.order.n_steps), self.plan.content_hash)

    def _spared_by(self, insert: Insert) -> NDArray[np.int64]:
        return unique_ids(np.concatenate([self.spared_in(insert.steps), insert.sample_ids]))

    # -- computing ----------------------------------------------------------------------------

    def _base_positions(
        self, first_step: int, n_steps: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Of each place, the base position at or after it, and whether a shift inserted it."""
        size = self.order.batch_size
        positions = np.arange(first_step * size, (first_step + n_steps) * size, dtype=np.int64)
        before, inserted = find(self._shifted.places, positions)
        return positions - before, inserted

    def _compute(self, first_step: int, n_steps: int) -> ScheduledBatch:
        base_positions, by_shift = self._base_positions(first_step, n_steps)
        ids = self.order.at(base_positions)
        provenance = np.zeros(len(ids), np.uint8)
        changed = self._base_changes.apply(ids, base_positions)
        provenance[changed] = REPLACED
        by_replacement = _put(self._replaced, ids, base_positions, unless=by_shift)
        run_positions = first_step * self.order.batch_size + np.arange(len(ids))
        _put(self._shifted, ids, run_positions)
        provenance[by_replacement | by_shift] = INSERTED
        weights = self._masks.weights(ids, base_positions, run_positions, base=provenance == BASE)
        weights[provenance != INSERTED] *= self._base_changes.kept(base_positions)[
            provenance != INSERTED
        ]
        block = ScheduledBatch(ids, weights, provenance)
        for array in block:
            array.setflags(write=False)
        return block


def _put(
    placed: Placed,
    ids: NDArray[np.int64],
    positions: NDArray[np.int64],
    *,
    unless: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:
    """Write inserted ids where they stand; returns where."""
    index, hit = find(placed.places, positions)
    if unless is not None:
        hit &= ~unless
    ids[hit] = placed.sample_ids[index[hit]]
    return hit
