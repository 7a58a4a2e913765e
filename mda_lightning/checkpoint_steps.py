"""At which steps to save: listed, log-spaced, every k, and their union; a value with a text.

Steps count completed optimizer steps; step 0 is before the first update.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeAlias

FORMS = (
    '"0, 5, 7" (those steps), "log2..512" (1, 2, 4, ..., 512), "20 log-spaced in 10..1000", '
    '"every 1000", "every 10 in 1000..2000", "last" (of the run) or "pythia", with commas between'
)


def _check_range(text: str, first: int, last: int | None) -> None:
    if first < 0 or (last is not None and last < 0):
        raise ValueError(f"{text!r} has a negative step; steps count from 0, before training")
    if last is not None and last < first:
        raise ValueError(
            f"{text!r} ends at {last}, before its first step {first}; "
            f"write {text.replace(f'{first}..{last}', f'{last}..{first}')!r}"
        )


@dataclass(frozen=True)
class Powers:
    """1, ``base``, ``base``², ... as far as they are at most ``last``."""

    rank: ClassVar[int] = 0
    base: int
    last: int

    def __post_init__(self) -> None:
        if self.base < 2:
            raise ValueError(f"{str(self)!r}: powers of {self.base} do not grow; use 2 or more")
        if self.last < 1:
            raise ValueError(
                f"{str(self)!r} ends at {self.last}, before its first step 1; list step 0 by itself"
            )

    def next_after(self, step: int) -> int | None:
        power = 1
        while power <= step:
            power *= self.base
        return power if power <= self.last else None

    def __str__(self) -> str:
        return f"log{self.base}..{self.last}"


@dataclass(frozen=True)
class LogSpaced:
    """``n`` points from ``first`` to ``last``, evenly spaced in their logarithm, rounded.

    Points that are rounded to the same step are one.
    """

    rank: ClassVar[int] = 1
    n: int
    first: int
    last: int

    def __post_init__(self) -> None:
        _check_range(str(self), self.first, self.last)
        if self.first < 1:
            raise ValueError(f"{str(self)!r}: 0 has no logarithm; start at 1 and list 0 by itself")
        n_steps = self.last - self.first + 1
        if not 2 <= self.n <= n_steps:
            raise ValueError(
                f"{str(self)!r}: {self.n} points, where {n_steps} steps are; ask for 2 to "
                f"{n_steps}, or list the steps"
                if n_steps > 1
                else f"{str(self)!r} is one step; write '{self.first}'"
            )

    @cached_property
    def _steps(self) -> tuple[int, ...]:
        ratio = self.last / self.first
        between = {round(self.first * ratio ** (i / (self.n - 1))) for i in range(1, self.n - 1)}
        return tuple(sorted({self.first, *between, self.last}))

    def next_after(self, step: int) -> int | None:
        return _next_of(self._steps, step)

    def __str__(self) -> str:
        return f"{self.n} log-spaced in {self.first}..{self.last}"


@dataclass(frozen=True)
class Every:
    """``first``, ``first + k``, ``first + 2k``, ... up to ``last``, itself included; None: on."""

    rank: ClassVar[int] = 2
    k: int
    first: int
    last: int | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"{str(self)!r}: save at most every step, 'every 1'")
        _check_range(str(self), self.first, self.last)

    def next_after(self, step: int) -> int | None:
        if step < self.first:
            return self.first
        due = self.first + ((step - self.first) // self.k + 1) * self.k
        return due if self.last is None or due <= self.last else None

    def __str__(self) -> str:
        if self.last is None:
            return f"every {self.k}" + ("" if self.first == self.k else f" in {self.first}..")
        return f"every {self.k} in {self.first}..{self.last}"


Rule: TypeAlias = Powers | LogSpaced | Every


@dataclass(frozen=True)
class CheckpointSteps:
    """The steps at which a run saves: a union of listed steps and rules.

    ``str()`` gives a text that :meth:`parse` reads back to an equal value. Two of them are equal
    when they list the same steps and rules, in whatever order; overlaps count once.

    Attributes:
        listed: single steps.
        rules: the others.
        last: whether the last step of the run is saved too, whichever it turns out to be. It is no
            part of :meth:`next_after`, :meth:`is_due` and :meth:`up_to`.

    Raises:
        ValueError: no step at all, a negative one, k below 1, a range whose end is before its
            start; the message says what to write instead.
    """

    listed: tuple[int, ...] = ()
    rules: tuple[Rule, ...] = ()
    last: bool = False

    def __post_init__(self) -> None:
        if not (self.listed or self.rules or self.last):
            raise ValueError(f"a schedule without steps; write {FORMS}")
        if self.listed and min(self.listed) < 0:
            raise ValueError(
                f"step {min(self.listed)} is negative; steps count from 0, before training"
            )
        # One form for one value, so that equality and text do not depend on how it was made.
        object.__setattr__(self, "listed", tuple(sorted(set(self.listed))))
        object.__setattr__(self, "rules", tuple(sorted(set(self.rules), key=_place)))

    # -- made from ----------------------------------------------------------------------------

    @classmethod
    def at(cls, *steps: int) -> CheckpointSteps:
        """Those steps."""
        return cls(listed=steps)

    @classmethod
    def every(cls, k: int, *, first: int | None = None, last: int | None = None) -> CheckpointSteps:
        """Every ``k`` steps from ``first`` on: first, first + k, ..., up to ``last``, inclusive.

        Without ``first`` it is k, 2k, ...: the multiples of k, without step 0.
        """
        return cls(rules=(Every(k, k if first is None else first, last),))

    @classmethod
    def log_spaced(cls, last: int, *, base: int = 2) -> CheckpointSteps:
        """1, ``base``, ``base``², ... as far as they are at most ``last``; without step 0."""
        return cls(rules=(Powers(base, last),))

    @classmethod
    def log_points(cls, n: int, first: int, last: int) -> CheckpointSteps:
        """``n`` points, evenly spaced in their logarithm, from ``first`` (1 or more) to ``last``.

        They are rounded to whole steps; those that fall together are one.
        """
        return cls(rules=(LogSpaced(n, first, last),))

    @classmethod
    def parse(cls, text: str) -> CheckpointSteps:
        """Read a text such as ``"0, log2..512, every 1000"``: terms with commas between.

        ======================================  ====================================================
        term                                    steps
        ======================================  ====================================================
        ``5``                                   5
        ``log2..512``                           1, 2, 4, ..., 512: :meth:`log_spaced`
        ``20 log-spaced in 10..1000``           :meth:`log_points`
        ``every 1000``                          1000, 2000, 3000, ...
        ``every 10 in 1000..2000``              1000, 1010, ..., 2000
        ``every 10 in 1000..``                  1000, 1010, ... without end
        ``last``                                the run's last step
        ``pythia``                              :data:`PYTHIA`
        ======================================  ====================================================

        A number such as ``1,500`` is refused: write ``1500``, or ``1, 500`` for two steps.
        """
        if found := _THOUSANDS.search(text):
            number = found[0]
            n_terms = number.count(",") + 1
            raise ValueError(
                f"{text!r}: a comma separates terms, so {number!r} may be one number or "
                f"{n_terms} steps; write {number.replace(',', '')} without a separator, or "
                f"{number.replace(',', ', ')!r} for {n_terms} steps"
            )
        if not text.strip():
            raise ValueError(f"a schedule without steps; write {FORMS}")
        return _union([_term(one) for one in text.split(",")])

    @classmethod
    def of(cls, value: CheckpointSteps | str | int | Sequence[str | int]) -> CheckpointSteps:
        """A schedule of plain values: a text, or a list of steps and texts.

        Raises:
            TypeError: anything else. A bare number is refused: step 1000, or every 1000?
        """
        if isinstance(value, CheckpointSteps):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        if isinstance(value, int) and not isinstance(value, bool):
            raise TypeError(
                f"steps={value} may mean one step or a rate; write 'every {value}', or [{value}] "
                "for that step alone"
            )
        if not isinstance(value, Sequence):
            raise TypeError(f"steps={value!r} is no schedule; write {FORMS}, or a list of these")
        if not value:
            raise ValueError(f"a schedule without steps; write {FORMS}")
        parts: list[CheckpointSteps] = []
        for one in value:
            if isinstance(one, str):
                parts.append(cls.parse(one))
            elif isinstance(one, int) and not isinstance(one, bool):
                parts.append(cls.at(one))
            else:
                raise TypeError(
                    f"{one!r} in steps={list(value)!r} is neither a whole step nor a text"
                )
        return _union(parts)

    def __or__(self, other: CheckpointSteps) -> CheckpointSteps:
        if not isinstance(other, CheckpointSteps):
            return NotImplemented
        return _union([self, other])

    # -- asked --------------------------------------------------------------------------------

    def next_after(self, step: int) -> int | None:
        """The first due step greater than ``step``, or None."""
        due = [_next_of(self.listed, step), *(rule.next_after(step) for rule in self.rules)]
        return min((one for one in due if one is not None), default=None)

    def is_due(self, step: int) -> bool:
        """Whether ``step`` is saved."""
        return self.next_after(step - 1) == step

    def up_to(self, n: int) -> list[int]:
        """The due steps that are at most ``n``, ascending."""
        found: list[int] = []
        step = self.next_after(-1)
        while step is not None and step <= n:
            found.append(step)
            step = self.next_after(step)
        return found

    def __str__(self) -> str:
        return ", ".join([*map(str, self.listed), *map(str, self.rules), *["last"] * self.last])


def _next_of(ascending: Sequence[int], step: int) -> int | None:
    place = bisect_right(ascending, step)
    return ascending[place] if place < len(ascending) else None


def _place(rule: Rule) -> tuple[int, ...]:
    """Where a rule stands in the one order of all rules."""
    fields = vars(rule)
    names = [name for name in ("base", "k", "n", "first", "last") if name in fields]
    return rule.rank, *(-1 if fields[name] is None else fields[name] for name in names)


def _union(parts: Sequence[CheckpointSteps]) -> CheckpointSteps:
    return CheckpointSteps(
        listed=tuple(step for part in parts for step in part.listed),
        rules=tuple(rule for part in parts for rule in part.rules),
        last=any(part.last for part in parts),
    )


_NUMBER = r"(-?(?:0|[1-9]\d*))"
_STEP = re.compile(_NUMBER)
_POWERS = re.compile(rf"log{_NUMBER}\.\.{_NUMBER}")
_LOG_SPACED = re.compile(rf"{_NUMBER} log-spaced in {_NUMBER}\.\.{_NUMBER}")
_EVERY = re.compile(rf"every {_NUMBER}(?: in {_NUMBER}\.\.{_NUMBER}?)?")
# "1,500" would be steps 1 and 500, "every 1,500" every step, and step 500.
_THOUSANDS = re.compile(r"(?<!\d)\d{1,3}(?:,\d{3})+(?!\d)")


def _term(text: str) -> CheckpointSteps:
    term = re.sub(r"\s*\.\.\s*", "..", " ".join(text.lower().split()))
    if term == "last":
        return CheckpointSteps(last=True)
    if term == "pythia":
        return PYTHIA
    if found := _STEP.fullmatch(term):
        return CheckpointSteps.at(int(term))
    if found := _POWERS.fullmatch(term):
        base, last = map(int, found.groups())
        return CheckpointSteps.log_spaced(last, base=base)
    if found := _LOG_SPACED.fullmatch(term):
        return CheckpointSteps.log_points(*map(int, found.groups()))
    if found := _EVERY.fullmatch(term):
        k, first, end = (None if one is None else int(one) for one in found.groups())
        assert k is not None
        return CheckpointSteps.every(k, first=first, last=end)
    raise ValueError(f"{term!r} is no term of a schedule; write {FORMS}")


PYTHIA = CheckpointSteps.at(0) | CheckpointSteps.log_spaced(512) | CheckpointSteps.every(1000)
"""Of the Pythia suite: 0, 1, 2, 4, ..., 512, then every 1,000 (154 of its 143,000 steps)."""
