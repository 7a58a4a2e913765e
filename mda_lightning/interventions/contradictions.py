"""Operations that cannot both be meant."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from mda_lightning.interventions.operations import (
    Insert,
    Mask,
    Operation,
    Replace,
    Steps,
    is_online,
    overlap,
)


def refuse_contradictions(operations: Sequence[Operation]) -> None:
    """Raise ValueError where two operations say different things of one sample and step.

    Online operations are left out: they are decided on what the others made of the stream.
    """
    planned = [op for op in operations if not is_online(op)]
    for first, second in combinations(planned, 2):
        told = _contradiction(first, second) or _contradiction(second, first)
        if told:
            raise ValueError(f"{told}; leave one of the two out, or make their steps differ")


def _contradiction(first: Operation, second: Operation) -> str:
    """What ``first`` says against ``second``, or ""."""
    if isinstance(first, Mask):
        if isinstance(second, Mask):
            return _two_masks(first, second)
        if isinstance(second, Replace):
            return _mask_of_what_is_replaced(first, second)
        if isinstance(second, Insert):
            return _mask_of_what_is_inserted(first, second)
    if isinstance(first, Replace) and isinstance(second, Replace):
        return _two_replacements(first, second)
    return ""


def _two_masks(first: Mask, second: Mask) -> str:
    # Windows of two clocks meet or not by how much is shifted before them, so they may.
    apart = first.clock == second.clock and not overlap(first.steps, second.steps)
    if first.weight == second.weight or apart:
        return ""
    both = np.intersect1d(first.sample_ids, second.sample_ids, assume_unique=True)
    if not both.size:
        return ""
    return (
        f"sample {both[0]} is given weight {first.weight} and weight {second.weight} "
        "in overlapping steps"
    )


def _mask_of_what_is_replaced(mask: Mask, replace: Replace) -> str:
    if mask.occurrences == "all" or mask.clock == "run":
        return ""
    if not overlap(mask.steps, replace.steps):
        return ""
    if replace.sample_ids is not None:
        both = np.intersect1d(mask.sample_ids, replace.sample_ids, assume_unique=True)
        if both.size:
            return f"sample {both[0]} is both masked and replaced in overlapping steps"
        return ""
    if mask.steps is not None and _within(mask.steps, replace.steps):
        return (
            f"a mask of base samples in steps {mask.steps} meets none: all places of steps "
            f"{replace.steps} are replaced"
        )
    return ""


def _mask_of_what_is_inserted(mask: Mask, insert: Insert) -> str:
    if mask.occurrences == "base" or mask.weight != 0 or not overlap(mask.steps, insert.steps):
        return ""
    both = np.intersect1d(mask.sample_ids, insert.sample_ids, assume_unique=True)
    return (
        f"sample {both[0]} is inserted in steps {insert.steps} and masked there wherever it comes"
        if both.size
        else ""
    )


def _two_replacements(first: Replace, second: Replace) -> str:
    if not overlap(first.steps, second.steps):
        return ""
    if first.sample_ids is None or second.sample_ids is None:
        return f"steps {first.steps} and {second.steps} overlap and places of both are replaced"
    both = np.intersect1d(first.sample_ids, second.sample_ids, assume_unique=True)
    return f"sample {both[0]} is replaced twice in overlapping steps" if both.size else ""


def _within(inner: Steps, outer: Steps) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]
