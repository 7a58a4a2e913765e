"""Operations on samples at their places: replaced, pruned and masked ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mda_lightning.base_order import BaseOrder
from mda_lightning.interventions.operations import Mask, Operation, Prune, Replace, Steps
from mda_lightning.interventions.plan import Plan
from mda_lightning.schedule.placing import find
from mda_lightning.shuffling import key_of, keyed_numbers, permute, shuffled


class BaseChanges:
    """A plan's replacements and prunings, which are functions of the base position."""

    def __init__(self, order: BaseOrder, plan: Plan) -> None:
        self._order = order
        seed = plan.seed or 0
        self._replacements = [
            (key_of("replacement", seed, number), op)
            for number, op in enumerate(plan.operations)
            if isinstance(op, Replace)
        ]
        self._prunings = [
            (key_of("pruning", seed, number, op.draw), op)
            for number, op in enumerate(plan.operations)
            if isinstance(op, Prune)
        ]

    def apply(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Write what comes in over ``ids`` [n] at base ``positions`` [n]; returns where, [n]."""
        changed = np.zeros(len(ids), bool)
        if not self._replacements:
            return changed
        base = ids.copy()
        for key, op in self._replacements:
            inside = self._inside(positions, op.steps)
            if not inside.any():
                continue
            if op.sample_ids is not None and op.by is not None:
                place, named = find(op.sample_ids, base)
                hit = inside & named
                ids[hit] = op.by[place[hit]]
            else:
                hit = inside
                offsets = positions[hit] - self._order.places(op.steps)[0]
                ids[hit] = self._coming_in(key, op, offsets)
            changed |= hit
        return changed

    def kept(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """What prunings multiply the weights at base ``positions`` [n] by; float32 [n]."""
        weights = np.ones(len(positions), np.float32)
        for key, op in self._prunings:
            # A place is pruned whose image under a permutation of the window is a low number.
            if op.steps is None:
                passes, places = np.divmod(positions, self._order.n_rows)
                size, inside = self._order.n_rows, np.arange(len(positions))
                ranks = permute(places, size, keys=keyed_numbers(key, passes))
            else:
                start, end = self._order.places(op.steps)
                size, inside = end - start, np.flatnonzero(self._inside(positions, op.steps))
                ranks = shuffled(positions[inside] - start, size, key=key)
            weights[inside[ranks < round(op.fraction * size)]] *= op.weight
        return weights

    def _coming_in(
        self, key: np.uint64, op: Replace, offsets: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        if op.by_steps is not None:
            start, end = self._order.places(op.by_steps)
            return self._order.at(start + offsets % (end - start))
        assert op.by is not None
        rounds, within = np.divmod(offsets, len(op.by))
        return op.by[permute(within, len(op.by), keys=keyed_numbers(key, rounds))]

    def _inside(self, positions: NDArray[np.int64], steps: Steps) -> NDArray[np.bool_]:
        start, end = self._order.places(steps)
        return (positions >= start) & (positions < end)


class Masks:
    """A plan's masks, of which an online run may have one for every step."""

    def __init__(self, order: BaseOrder) -> None:
        self._order = order
        self._masks: list[Mask] = []
        self._windows = np.empty((0, 3), np.int64)  # first and last position, whether of the run

    def extended(self, operations: Sequence[Operation]) -> Masks:
        """These and the masks among the operations."""
        masks = [op for op in operations if isinstance(op, Mask)]
        windows = np.array([self._window(mask) for mask in masks], np.int64).reshape(-1, 3)
        more = copy.copy(self)
        more._masks = [*self._masks, *masks]
        more._windows = np.concatenate([self._windows, windows])
        return more

    def weights(
        self,
        ids: NDArray[np.int64],
        base_positions: NDArray[np.int64],
        run_positions: NDArray[np.int64],
        *,
        base: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        """Weights float32 [n] of samples at these places.

        Args:
            ids, base_positions, run_positions: [n].
            base: [n], whether the base order put the sample there.
        """
        weights = np.ones(len(ids), np.float32)
        clocks = (base_positions, run_positions)
        starts, ends, by_run = self._windows.T
        meets = np.zeros(len(starts), bool)
        for clock, positions in enumerate(clocks):
            meets |= (by_run == clock) & (starts <= positions[-1]) & (ends > positions[0])
        for number in np.flatnonzero(meets):
            mask, positions = self._masks[number], clocks[by_run[number]]
            hit = (positions >= starts[number]) & (positions < ends[number])
            if mask.occurrences == "base":
                hit &= base
            hit[hit] = find(mask.sample_ids, ids[hit])[1]
            weights[hit] = weights[hit] * mask.weight if mask.online else mask.weight
        return weights

    def _window(self, mask: Mask) -> tuple[int, int, int]:
        start, end = (0, 2**62) if mask.steps is None else self._order.places(mask.steps)
        return start, end, int(mask.clock == "run")
