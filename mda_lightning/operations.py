"""The single operations of a plan: values that say which samples, in which steps, and how.

Steps are 0-based: step ``k`` is the update that takes ``global_step`` from ``k`` to ``k + 1``. A
window ``(s, e)`` is half-open and counts in the steps of the *base order*, so that the windows of a
plan do not depend on the plan's other operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Steps: TypeAlias = tuple[int, int]
Mode: TypeAlias = Literal["dispersed", "concentrated"]
Placement: TypeAlias = Literal["shift", "replace"]


@dataclass(frozen=True, eq=False)
class Mask:
    """Samples keep their place in the batch and get another weight, 0 unless said otherwise.

    Attributes:
        sample_ids: int64 [n], unique, ascending.
        steps: window of base steps; None is the whole run.
        weight: weight of these samples' base occurrences within the window (others have 1).
            The denominator of the loss is not changed by it (SPEC section 6).
    """

    sample_ids: NDArray[np.int64]
    steps: Steps | None = None
    weight: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_ids", _unique_ids(self.sample_ids))
        object.__setattr__(self, "steps", _window(self.steps))
        if not math.isfinite(self.weight) or self.weight < 0:
            raise ValueError(
                f"weight {self.weight!r} of a mask must be finite and at least 0; "
                "0 removes a sample from the loss, 1 leaves it as it is"
            )

    def describe(self) -> dict[str, Any]:
        """The operation as JSON values."""
        return {
            "operation": "mask",
            "steps": None if self.steps is None else list(self.steps),
            "weight": self.weight,
            "sample_ids": self.sample_ids.tolist(),
        }


@dataclass(frozen=True, eq=False)
class Insert:
    """Samples are trained on in addition to the base order.

    Attributes:
        sample_ids: int64 [n], unique, ascending.
        steps: window of base steps.
        mode: ``"dispersed"``, uniformly over the window, or ``"concentrated"``, all at its start.
        placement: ``"shift"`` moves later data back and makes the run longer; ``"replace"`` takes
            the places of base samples of the window and keeps the length.
        copies: how often each sample is inserted.
    """

    sample_ids: NDArray[np.int64]
    steps: Steps
    mode: Mode = "dispersed"
    placement: Placement = "shift"
    copies: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_ids", _unique_ids(self.sample_ids))
        if self.steps is None:
            raise ValueError(
                "an insertion needs its window of steps, for example steps=(900, 1400)"
            )
        object.__setattr__(self, "steps", _window(self.steps))
        if self.mode not in ("dispersed", "concentrated"):
            raise ValueError(f"mode {self.mode!r} is not one of 'dispersed', 'concentrated'")
        if self.placement not in ("shift", "replace"):
            raise ValueError(f"placement {self.placement!r} is not one of 'shift', 'replace'")
        if self.copies < 1:
            raise ValueError(f"copies is {self.copies}; an inserted sample is seen at least once")

    @property
    def count(self) -> int:
        """How many places in the stream the operation fills."""
        return len(self.sample_ids) * self.copies

    def describe(self) -> dict[str, Any]:
        """The operation as JSON values."""
        return {
            "operation": "insert",
            "steps": list(self.steps),
            "mode": self.mode,
            "placement": self.placement,
            "copies": self.copies,
            "sample_ids": self.sample_ids.tolist(),
        }


Operation: TypeAlias = Mask | Insert


def operation_from(item: dict[str, Any]) -> Operation:
    """The operation that ``describe`` gave ``item`` of."""
    ids = np.asarray(item["sample_ids"], dtype=np.int64)
    if item["operation"] == "mask":
        return Mask(ids, _window(item["steps"]), item["weight"])
    start, end = item["steps"]
    return Insert(ids, (start, end), item["mode"], item["placement"], item["copies"])


def refuse_contradictions(operations: Sequence[Operation]) -> None:
    """Raise ValueError when two masks give one sample two weights in the same step."""
    masks = [op for op in operations if isinstance(op, Mask)]
    for i, first in enumerate(masks):
        for second in masks[i + 1 :]:
            if first.weight == second.weight or not _overlap(first.steps, second.steps):
                continue
            both = np.intersect1d(first.sample_ids, second.sample_ids, assume_unique=True)
            if both.size:
                raise ValueError(
                    f"sample {both[0]} is given weight {first.weight} and weight {second.weight} "
                    "in overlapping steps; leave one of the two masks out"
                )


def _overlap(first: Steps | None, second: Steps | None) -> bool:
    if first is None or second is None:
        return True
    return first[0] < second[1] and second[0] < first[1]


def as_ids(sample_ids: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(sample_ids).reshape(-1)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"sample ids are integers, got {array.dtype}")
    return array.astype(np.int64)


def _unique_ids(sample_ids: ArrayLike) -> NDArray[np.int64]:
    ids = np.sort(as_ids(sample_ids))
    if not ids.size:
        raise ValueError("an operation needs at least one sample id, got none")
    if ids[0] < 0:
        raise ValueError(f"sample id {ids[0]} is negative; sample ids are rows of the corpus")
    repeated = ids[1:][ids[1:] == ids[:-1]]
    if repeated.size:
        raise ValueError(
            f"sample id {repeated[0]} is given twice; to insert samples k times use copies=k"
        )
    ids.setflags(write=False)
    return ids


def _window(steps: Any) -> Steps | None:
    if steps is None:
        return None
    start, end = (int(step) for step in steps)
    if not 0 <= start < end:
        raise ValueError(
            f"steps ({start}, {end}) is not a window: it is half-open and 0-based, 0 <= start < end"
        )
    return start, end
