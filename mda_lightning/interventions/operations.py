"""The single operations of a plan: values that say which samples, in which steps, and how.

Steps are 0-based: step ``k`` is the update that takes ``global_step`` from ``k`` to ``k + 1``. A
window ``(s, e)`` is half-open and, unless said otherwise, counts in the steps of the *base order*,
so that the windows of a plan do not depend on the plan's other operations.

An operation with ``online=True`` was decided while the run was going on. It is applied after those
of the plan and leaves their places as they are: a plan can be extended without changing what has
been trained on already.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Steps: TypeAlias = tuple[int, int]
Mode: TypeAlias = Literal["dispersed", "concentrated"]
Placement: TypeAlias = Literal["shift", "replace"]
Occurrences: TypeAlias = Literal["base", "all"]
Clock: TypeAlias = Literal["base", "run"]


@dataclass(frozen=True, eq=False)
class Mask:
    """Samples keep their place in the batch and get another weight, 0 unless said otherwise.

    Attributes:
        sample_ids: int64 [n], unique, ascending.
        steps: window; None is the whole run.
        weight: weight of these samples' occurrences within the window (others have 1).
            The denominator of the loss is not changed by it (SPEC section 6).
        occurrences: ``"base"``, where the base order put the sample, or ``"all"``, where a plan
            inserted it too.
        clock: whether the window counts in base steps or in the run's own, which later than a
            shifting insertion are not the same. With base steps, what a shift inserted counts as
            standing where the base sample after it does.
        online: see the module.
    """

    sample_ids: NDArray[np.int64]
    steps: Steps | None = None
    weight: float = 0.0
    occurrences: Occurrences = "base"
    clock: Clock = "base"
    online: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_ids", _unique_ids(self.sample_ids))
        object.__setattr__(self, "steps", _window(self.steps))
        object.__setattr__(self, "weight", _weight(self.weight, "a mask"))
        _one_of("occurrences", self.occurrences, ("base", "all"))
        _one_of("clock", self.clock, ("base", "run"))

    @property
    def named_ids(self) -> NDArray[np.int64]:
        """Every sample id that the operation names."""
        return self.sample_ids

    def describe(self) -> dict[str, Any]:
        """The operation as JSON values."""
        return {
            "operation": "mask",
            "steps": None if self.steps is None else list(self.steps),
            "weight": self.weight,
            "occurrences": self.occurrences,
            "clock": self.clock,
            "online": self.online,
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
        online: see the module.
    """

    sample_ids: NDArray[np.int64]
    steps: Steps
    mode: Mode = "dispersed"
    placement: Placement = "shift"
    copies: int = 1
    online: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_ids", _unique_ids(self.sample_ids))
        if self.steps is None:
            raise ValueError(
                "an insertion needs its window of steps, for example steps=(900, 1400)"
            )
        object.__setattr__(self, "steps", _window(self.steps))
        _one_of("mode", self.mode, ("dispersed", "concentrated"))
        _one_of("placement", self.placement, ("shift", "replace"))
        if self.copies < 1:
            raise ValueError(f"copies is {self.copies}; an inserted sample is seen at least once")
        object.__setattr__(self, "copies", operator.index(self.copies))

    @property
    def count(self) -> int:
        """How many places in the stream the operation fills."""
        return len(self.sample_ids) * self.copies

    @property
    def named_ids(self) -> NDArray[np.int64]:
        """Every sample id that the operation names."""
        return self.sample_ids

    def describe(self) -> dict[str, Any]:
        """The operation as JSON values."""
        return {
            "operation": "insert",
            "steps": list(self.steps),
            "mode": self.mode,
            "placement": self.placement,
            "copies": self.copies,
            "online": self.online,
            "sample_ids": self.sample_ids.tolist(),
        }


@dataclass(frozen=True, eq=False)
class Replace:
    """Base samples of a window give their places to other samples, one for one.

    Attributes:
        steps: window of base steps.
        sample_ids: int64 [n], unique, ascending: every base occurrence of ``sample_ids[j]`` in the
            window becomes ``by[j]``. None: every place of the window is taken.
        by: int64 [n], what comes in. With ``sample_ids`` None, the places take these again and
            again, each time in another random order.
        by_steps: instead of ``by``, with ``sample_ids`` None: the base samples of these steps, in
            their order, again and again.
    """

    steps: Steps
    sample_ids: NDArray[np.int64] | None = None
    by: NDArray[np.int64] | None = None
    by_steps: Steps | None = None

    def __post_init__(self) -> None:
        if self.steps is None:
            raise ValueError("a replacement needs its window, for example steps=(900, 1400)")
        object.__setattr__(self, "steps", _window(self.steps))
        object.__setattr__(self, "by_steps", _window(self.by_steps))
        if (self.by is None) == (self.by_steps is None):
            raise ValueError("a replacement needs by=ids or by_steps=(start, end), one of the two")
        if self.by is None:
            if self.sample_ids is not None:
                raise ValueError("by_steps replaces a whole window; give by=ids with sample_ids")
            return
        by = as_ids(self.by)
        if not by.size or by.min() < 0:
            raise ValueError("by names no sample, or an id below 0; give the ids that come in")
        if self.sample_ids is not None:
            given = as_ids(self.sample_ids)
            if len(given) != len(by):
                raise ValueError(
                    f"{len(given)} samples cannot be replaced one for one by {len(by)}; "
                    "give as many"
                )
            by = by[np.argsort(given, kind="stable")]
            object.__setattr__(self, "sample_ids", _unique_ids(given))
        by.setflags(write=False)
        object.__setattr__(self, "by", by)

    @property
    def named_ids(self) -> NDArray[np.int64]:
        """Every sample id that the operation names, on either side."""
        named = [ids for ids in (self.sample_ids, self.by) if ids is not None]
        return np.unique(np.concatenate(named)) if named else np.empty(0, np.int64)

    def describe(self) -> dict[str, Any]:
        """The operation as JSON values."""
        return {
            "operation": "replace",
            "steps": list(self.steps),
            "by_steps": None if self.by_steps is None else list(self.by_steps),
            "sample_ids": None if self.sample_ids is None else self.sample_ids.tolist(),
            "by": None if self.by is None else self.by.tolist(),
        }


@dataclass(frozen=True, eq=False)
class Prune:
    """A random share of a window's base places gets another weight, 0 unless said otherwise.

    Attributes:
        steps: window of base steps; None is the whole run, pass after pass over the corpus.
        fraction: share of the window's places, in (0, 1]; ``round(fraction * places)`` of them. Of
            the whole run, as many of every pass, wherever it ends.
        weight: theirs; it multiplies the one that a mask gives.
        draw: another number draws other places.
    """

    steps: Steps | None
    fraction: float
    weight: float = 0.0
    draw: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _window(self.steps))
        object.__setattr__(self, "weight", _weight(self.weight, "pruned places"))
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction {self.fraction!r} of a pruning must be in (0, 1]")
        object.__setattr__(self, "fraction", float(self.fraction))
        object.__setattr__(self, "draw", operator.index(self.draw))

    @property
    def named_ids(self) -> NDArray[np.int64]:
        """None: the places are drawn."""
        return np.empty(0, np.int64)

    def describe(self) -> dict[str, Any]:
        """The operation as JSON values."""
        return {
            "operation": "prune",
            "steps": None if self.steps is None else list(self.steps),
            "fraction": self.fraction,
            "weight": self.weight,
            "draw": self.draw,
        }


Operation: TypeAlias = Mask | Insert | Replace | Prune

_KINDS: dict[str, type[Any]] = {
    "mask": Mask,
    "insert": Insert,
    "replace": Replace,
    "prune": Prune,
}


def operation_from(item: dict[str, Any]) -> Operation:
    """The operation that ``describe`` gave ``item`` of.

    Raises:
        ValueError: no operation of that name, or other fields than it has.
    """
    if not isinstance(item, dict):
        raise ValueError(f"an operation is an object, not {item!r}")
    values = {key: value for key, value in item.items() if key != "operation"}
    kind = _KINDS.get(item.get("operation", ""))
    if kind is None:
        raise ValueError(f"no operation {item.get('operation')!r}; there are: {', '.join(_KINDS)}")
    try:
        operation: Operation = kind(**values)
    except TypeError as error:
        raise ValueError(f"not the fields of {item['operation']!r}: {error}") from error
    return operation


def is_online(operation: Operation) -> bool:
    """Whether it was decided while the run was going on."""
    return isinstance(operation, (Mask, Insert)) and operation.online


def overlap(first: Steps | None, second: Steps | None) -> bool:
    """Whether two windows have a step in common; None is the whole run."""
    if first is None or second is None:
        return True
    return first[0] < second[1] and second[0] < first[1]


def as_ids(sample_ids: ArrayLike) -> NDArray[np.int64]:
    """Sample ids as int64 [n], a copy, in the order given.

    Raises:
        ValueError: not integers.
    """
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
    try:
        start, end = (operator.index(step) for step in steps)
    except (TypeError, ValueError) as error:
        raise ValueError(f"steps {steps!r} is not a window: give two integers") from error
    if not 0 <= start < end:
        raise ValueError(
            f"steps ({start}, {end}) is not a window: it is half-open and 0-based, 0 <= start < end"
        )
    return start, end


def _weight(value: float, what: str) -> float:
    # In the stream it is a float32.
    if not 0 <= float(value) <= float(np.finfo(np.float32).max):
        raise ValueError(
            f"weight {value!r} of {what} must be finite, in float32, and at least 0; "
            "0 removes a sample from the loss, 1 leaves it as it is"
        )
    return float(value)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} {value!r} is not one of {listed}")
