"""Plans and their random controls, checked and written as files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from mda_lightning.base_order import BaseOrder
from mda_lightning.interventions import Operation, Plan, Replace
from mda_lightning.interventions.from_scores import Side, treat, with_random_controls
from mda_lightning.interventions.id_files import read_ids
from mda_lightning.interventions.operations import Steps
from mda_lightning.interventions.selection import samples_of
from mda_lightning.recipes.plan_choice import Choice
from mda_lightning.recipes.plan_numbers import (
    counted,
    n_places,
    numbers_of,
    some,
    warnings_of,
    words_of,
)
from mda_lightning.recipes.plan_stream import BaseStream, of_plan
from mda_lightning.sample_ids import split_ids
from mda_lightning.schedule import Schedule

_PLACES_AT_ONCE = 2**20
_MOST_PLACES = 2**22
"""Beyond which a plan's places are counted by ``plan show`` only."""


@dataclass(frozen=True, eq=False)
class Written:
    """A plan file.

    Attributes:
        path: of the file.
        plan: what is in it.
        numbers: see :func:`~mda_lightning.recipes.plan_numbers.numbers_of`.
        words: lines for people.
        warnings: what is probably not meant.
    """

    path: Path
    plan: Plan
    numbers: dict[str, Any]
    words: list[str]
    warnings: list[str]

    @property
    def use(self) -> str:
        """The line of code that trains with it."""
        return f'TokenDataModule(rows, ..., plan="{self.path}")'

    def stored(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "path": str(self.path),
            **self.numbers,
            "warnings": self.warnings,
            "use": self.use,
        }


def bound(plan: Plan, choice: Choice | None, stream: BaseStream, *, draw: int, name: str) -> Plan:
    """A plan tied to what is known of the stream, with where its samples come from."""
    corpus_hash = stream.corpus_hash or (choice.corpus_hash if choice is not None else None)
    source = {**plan.source, **({} if choice is None else choice.source)}
    tied = plan.bound(
        corpus_hash=corpus_hash, order=stream.order, seed=draw, source=source, name=name
    )
    sources = tied.sources if choice is None else (*tied.sources, *choice.sources)
    return dataclasses.replace(tied, sources=tuple(dict.fromkeys(sources)))


def replacement(
    choice: Choice | None,
    *,
    steps: Steps,
    by: Path | None,
    by_steps: Steps | None,
    stream: BaseStream,
    draw: int,
) -> Plan:
    """A replacement: of samples of the corpus, which go out, or of a whole window.

    Args:
        choice: samples of the corpus go out one for one; new ones take the whole window.
        by: a file of the samples that come in; None draws others where ``choice`` goes out.
        by_steps: the samples of these steps take the whole window.

    Raises:
        ValueError: samples that go out and come in differ in number, or two say what comes in.
    """
    coming = None if by is None else read_ids(by)
    if choice is None:
        return Plan.replace(steps=steps, by=coming, by_steps=by_steps)
    if choice.sources:
        if coming is not None:
            raise ValueError(f"both {by} and new samples are to come in; give one of the two")
        return Plan.replace(steps=steps, by=choice.ids, sources=choice.sources)
    pool = choice.pool
    if pool is None and coming is None:
        if stream.order is None:
            raise ValueError(
                "the samples that come in are drawn from those of the window, which takes the base "
                "order; give --run, or --corpus with --batch-size and --n-steps, or --by FILE"
            )
        pool = samples_of(stream.order, steps)
    pool = np.empty(0, np.int64) if pool is None else pool
    plan = treat(choice.ids, action="replace", steps=steps, by=coming, pool=pool, seed=draw)
    return plan.bound(source={"treated": "out"})


def write(plan: Plan, path: Path, *, stream: BaseStream, about: Sequence[str] = ()) -> Written:
    """Check a plan against the stream as far as it is known, and save it.

    Raises:
        ValueError: it names absent samples, has a window outside the run, more insertions than
            places, or was made for another corpus or order.
    """
    schedule, more = check(plan, stream), list[str]()
    if schedule is not None and _places(plan, schedule) > _MOST_PLACES:
        schedule = None
        more = ["what it meets in so long a run is counted by `mda-lightning plan show`"]
    numbers, _ = numbers_of(plan, schedule)
    saved = plan.save(path)
    words = [*about, *words_of(numbers), *_untied(plan), *more]
    return Written(saved, plan, numbers, words, warnings_of(numbers))


def check(plan: Plan, stream: BaseStream) -> Schedule | None:
    """The plan on its order, where that is known.

    Raises:
        ValueError: as for :func:`write`.
    """
    stream = of_plan(plan, stream)
    if stream.order is not None:
        return Schedule(stream.order, plan)  # refuses what does not fit
    if stream.rows is not None:
        _check_rows(plan, len(stream.rows))
    return None


def with_controls(
    plan: Plan,
    n_controls: int,
    *,
    pool: NDArray[np.int64] | None,
    stream: BaseStream,
    draw: int,
    exclude: NDArray[np.int64] | None = None,
    treated: Side | None = None,
) -> tuple[Plan, tuple[Plan, ...]]:
    """A plan and ``n_controls`` random controls, whose draws are numbered from ``draw + 1`` on.

    Args:
        pool: samples to draw from; None is what the base order has in the plan's windows, and of
            the whole run where a window is replaced as a whole.
        exclude: samples that are never drawn.
        treated: see :func:`with_random_controls`.
    """
    stream = of_plan(plan, stream)
    if pool is None:
        pool = pool_of(plan, stream)
    seeds = [draw + 1 + number for number in range(n_controls)]
    return with_random_controls(
        plan, pool, seeds, exclude=exclude, treated=treated, order=stream.order
    )


def pool_of(plan: Plan, stream: BaseStream, window: Steps | None = None) -> NDArray[np.int64]:
    """The samples that the base order has in a window, or in all windows of a plan.

    Where a window is replaced as a whole, none of its own samples is random: then of the whole run.

    Raises:
        ValueError: no order.
    """
    if stream.order is None:
        raise ValueError(
            f"plan {plan.name!r} is not tied to a base order, so which samples its window holds is "
            "not known; give --run, or --corpus with --batch-size and --n-steps, or the samples to "
            "draw from with --pool FILE"
        )
    if window is not None:
        return samples_of(stream.order, window)
    whole = (0, stream.order.n_steps)
    windows = sorted({_drawn_from(op, whole) for op in plan.operations})
    if whole in windows:
        windows = [whole]
    return np.unique(np.concatenate([samples_of(stream.order, one) for one in windows]))


def _drawn_from(op: Operation, whole: Steps) -> Steps:
    if op.steps is None or (isinstance(op, Replace) and op.sample_ids is None):
        return whole
    return op.steps


def sides_of(plans: Sequence[Plan]) -> list[str]:
    """Which sides of their replacements plans have as the treated ones."""
    replacing = [plan for plan in plans if any(isinstance(op, Replace) for op in plan.operations)]
    return sorted({str(plan.source.get("treated", "in")) for plan in replacing})


def forgotten(plan: Plan, excluded: Sequence[Path]) -> str:
    """A warning of conditions that a plan's samples were chosen by, and its controls are not."""
    source = plan.source
    told = [
        f"{words} {', '.join(source[key])}"
        for key, words in (("domains", "of domain"), ("exclude_domains", "not of domain"))
        if source.get(key)
    ]
    n_excluded = source.get("excluded") or 0
    if n_excluded and not excluded:
        told.append(f"without {counted(n_excluded, 'excluded sample')}")
    if not told:
        return ""
    return (
        f"the samples of plan {plan.name!r} were chosen {', '.join(told)}; its controls are drawn "
        "from all samples of its windows. --with-control draws them by the same conditions, as do "
        "--pool and --exclude here"
    )


def places_of(plan: Plan, stream: BaseStream) -> int | None:
    """How many places a plan treats, where the order is known and the run not too long."""
    order = of_plan(plan, stream).order
    if order is None:
        return None
    schedule = Schedule(order, plan)
    if _places(plan, schedule) > _MOST_PLACES:
        return None
    return n_places(numbers_of(plan, schedule)[0])


def never_met(ids: NDArray[np.int64], order: BaseOrder) -> str:
    """A warning of samples that a run meets only where they are inserted, or ""."""
    n_in_run = order.n_steps * order.batch_size
    left = np.sort(ids)
    if n_in_run >= order.n_rows:
        return ""
    parts = range(0, n_in_run, _PLACES_AT_ONCE)
    for start in track(parts, "looking for the samples", transient=True, disable=len(parts) < 20):
        if not left.size:
            return ""
        end = min(start + _PLACES_AT_ONCE, n_in_run)
        left = np.setdiff1d(left, order.at(np.arange(start, end, dtype=np.int64)))
    if not left.size:
        return ""
    are = "is" if len(left) == 1 else "are"
    them = "it is" if len(left) == 1 else "they are"
    return (
        f"{len(left):,} of the {counted(len(ids), 'sample')} {are} not in the run's base order, so "
        f"{them} seen once less: {some(left)}"
    )


def _untied(plan: Plan) -> list[str]:
    """What the plan is not checked against."""
    how = "give --run, or --corpus with --batch-size and --n-steps"
    if plan.corpus_hash is None:
        return [
            f"tied to no corpus{' and no base order' if plan.order is None else ''}: whether its "
            f"samples exist, and are those that are meant, is not known; {how}"
        ]
    if plan.order is None:
        return [f"tied to no base order: what it meets in the run is not known; {how}"]
    return []


def _check_rows(plan: Plan, n_rows: int) -> None:
    namespaces, rows = split_ids(plan.treated_ids)
    own = rows[namespaces == 0]
    if own.size and own.max() >= n_rows:
        raise ValueError(
            f"sample {own.max()} is not in the corpus, which has rows 0..{n_rows - 1}; was it "
            "scored, or written down, for another corpus?"
        )


def _places(plan: Plan, schedule: Schedule) -> int:
    size = schedule.order.batch_size
    steps = [
        len(schedule) if op.steps is None else op.steps[1] - op.steps[0] for op in plan.operations
    ]
    return sum(steps) * size
