"""What a run was trained on, checked against its plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mda_lightning.base_order import BaseOrder
from mda_lightning.corpora import TokenRows
from mda_lightning.interventions import Plan
from mda_lightning.schedule import BASE, INSERTED, REPLACED, Schedule, ScheduledBatch, StreamDigest
from mda_lightning.schedule.ledger import PLAN_FILE, STREAM_FILE, Ledger
from mda_lightning.schedule.ledger_rows import Places

_MOST_SHOWN = 5
_MOST_REREAD = 2 * 2**30  # bytes of a corpus whose hash is computed again

Progress = Callable[[int, int], None]
"""Called with the steps that are done and all steps."""


@dataclass
class VerifyReport:
    """What was checked.

    Attributes:
        verified: what holds, a sentence each.
        differences: what does not, the first few of a kind.
        notes: what limits the check.
    """

    verified: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def lines(self) -> list[str]:
        """The whole report, differences last."""
        return [
            *self.verified,
            *(f"note: {note}" for note in self.notes),
            *(f"DIFFERS: {difference}" for difference in self.differences),
        ]


def verify_run(
    folder: str | os.PathLike[str],
    *,
    corpus: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare the ledger of a run, place by place, with the stream that its plan makes.

    Args:
        folder: of the run.
        corpus: where the corpus lies now; by default where the run had it.
        progress: see :data:`Progress`.

    Raises:
        FileNotFoundError: no ledger there.
        ValueError: ``stream.json`` is damaged or of a newer schema.
    """
    ledger = Ledger.open(folder)
    report = VerifyReport()
    report.differences += ledger.damaged
    schedule = _schedule(ledger, report)
    if schedule is not None:
        _check_corpora(ledger, schedule.plan, None if corpus is None else Path(corpus), report)
    covered = _covered(ledger, report)
    if schedule is not None:
        _check_end(ledger, len(schedule), report)
        _Comparison(ledger, schedule, report, progress or (lambda done, total: None)).run(covered)
    return report


# -- what the folder says of itself ---------------------------------------------------------------


def _schedule(ledger: Ledger, report: VerifyReport) -> Schedule | None:
    """The stream as it should have been; None where the plan cannot be read."""
    stored = ledger.provenance
    try:
        plan = Plan.load(ledger.folder / PLAN_FILE)
        # Killed between the writing of the two files, a run leaves a plan that it announced.
        announced = stored.get("announced", [])
        fitting = [one for one in announced if one["plan_hash"] == plan.content_hash]
        stored = stored if stored["plan_hash"] == plan.content_hash else [stored, *fitting][-1]
        order = BaseOrder(**stored["order"])
        schedule = Schedule(order, plan)
    except (OSError, ValueError) as error:
        report.differences.append(f"{PLAN_FILE}: {error}")
        return None
    for what, recorded, now in (
        ("the plan", stored["plan_hash"], plan.content_hash),
        ("the base order", stored["order_hash"], order.content_hash),
        ("the corpus that the plan was made for", stored["corpus_hash"], plan.corpus_hash),
    ):
        if now not in (recorded, None):
            report.differences.append(
                f"{what} is {now[:12]}, the run recorded {recorded[:12]} in {STREAM_FILE}"
            )
    if len(schedule) != stored["n_steps"]:
        report.differences.append(
            f"the plan makes a run of {len(schedule)} steps, the run recorded {stored['n_steps']}"
        )
    if report.ok:
        n = len(plan.operations)
        operations = f"{n} operation{'s' if n != 1 else ''}" if n else "nothing changed"
        report.verified.append(
            f"plan {plan.name!r} ({operations}) is the one that the run recorded, "
            f"{plan.content_hash[:12]}"
        )
    return schedule


def _check_corpora(ledger: Ledger, plan: Plan, given: Path | None, report: VerifyReport) -> None:
    stored = ledger.provenance
    base, wanted = given or Path(stored["corpus"]), plan.corpus_hash or stored["corpus_hash"]
    _check_corpus("corpus", base, wanted, report, n_rows=ledger.order.n_rows)
    for source in plan.sources:
        if source.path is not None:
            name = f"source {source.name!r}"
            _check_corpus(name, Path(source.path), source.content_hash, report)


def _check_corpus(
    what: str, folder: Path, wanted: str, report: VerifyReport, n_rows: int | None = None
) -> None:
    try:
        rows = TokenRows.open(folder)
    except FileNotFoundError:
        report.notes.append(
            f"the {what} is not at {folder} any more, so it was not compared; say where it is"
        )
        return
    except (OSError, ValueError) as error:
        report.differences.append(f"{what}: {error}")
        return
    size = (folder / "rows.npy").stat().st_size
    read = size <= _MOST_REREAD
    found = rows.recomputed_hash() if read else rows.content_hash
    if found != wanted:
        report.differences.append(
            f"the {what} at {folder} is {found[:12]}, the run was trained on {wanted[:12]}"
        )
        return
    if n_rows not in (None, len(rows)):
        report.differences.append(
            f"the {what} at {folder} has {len(rows):,} rows, the base order is one of {n_rows:,}"
        )
        return
    report.verified.append(f"{what} {folder} is the one trained on, {wanted[:12]}")
    if not read:
        report.notes.append(
            f"the {what} has {size / 2**30:.0f} GiB: its recorded hash was compared, its rows were "
            "not read again"
        )


def _covered(ledger: Ledger, report: VerifyReport) -> list[tuple[int, int]]:
    """Steps whose places are all there once; what is not, goes into the report."""
    stored = ledger.provenance
    first, last = stored["steps"]
    whole = ledger.steps
    at = first
    for begin, end in [*whole, (last, last)]:
        if at < min(begin, last):
            _report_gap(ledger, at, min(begin, last), report)
        at = max(at, end)
    for span in ledger.spans:
        if len(set(span.ranks)) < len(span.ranks) or len(span.world_sizes) > 1:
            report.differences.append(
                f"{_steps(span.first, span.last)}: several parts hold the same places"
            )
        elif span.first < first:
            report.differences.append(
                f"{_steps(span.first, span.last)}: in the ledger, and the run began at step {first}"
            )
    if not stored["complete"]:
        report.notes.append(
            f"the run has not come to its end: it was interrupted, or is still training; its "
            f"ledger reaches step {max([last, *(end for _, end in whole)])} of {stored['n_steps']}"
        )
    elif last < stored["n_steps"]:
        report.notes.append(f"the run ended at step {last} of {stored['n_steps']}")
    for name in sorted(
        {n for one in stored["attempts"] for n, f in one["read_from"].items() if f != "batch"}
    ):
        report.notes.append(
            f"the batches had no {name} for the ledger to read: what the schedule says is recorded"
        )
    return whole


def _check_end(ledger: Ledger, n_steps: int, report: VerifyReport) -> None:
    """That the ledger has no more steps than the run, or than it says of itself."""
    stored = ledger.provenance
    (_, last), complete = stored["steps"], stored["complete"]
    for span in ledger.spans:
        # A rank alone may have got ahead of what a killed run had told.
        if span.last > n_steps and (span.whole or complete):
            report.differences.append(
                f"{_steps(max(span.first, n_steps), span.last)}: in the ledger, and the plan's "
                f"last step is {n_steps - 1}"
            )
        elif complete and span.last > last:
            report.differences.append(
                f"{_steps(max(span.first, last), span.last)}: in the ledger, and the run ended "
                f"before step {last}"
            )
    stopped = stored["attempts"][-1].get("stopped") if stored["attempts"] else None
    if stopped:
        report.differences.append(f"from step {last} on nothing was written down: {stopped}")


def _report_gap(ledger: Ledger, first: int, last: int, report: VerifyReport) -> None:
    there = [s for s in ledger.spans if s.first < last and s.last > first and s.ranks]
    at_end = last == ledger.provenance["steps"][1] and not ledger.provenance["complete"]
    if at_end and there and there[0].first <= first:
        ranks = ", ".join(str(rank) for rank in there[0].ranks)
        report.notes.append(
            f"{_steps(first, last)}: only rank {ranks} wrote them before the run was interrupted"
        )
    else:
        report.differences.append(f"{_steps(first, last)}: not all of their places are there")


# -- place by place -------------------------------------------------------------------------------


class _Comparison:
    """The walk over a ledger beside its schedule; memory is that of a block."""

    def __init__(
        self, ledger: Ledger, schedule: Schedule, report: VerifyReport, progress: Progress
    ) -> None:
        self._ledger = ledger
        self._schedule = schedule
        self._report = report
        self._progress = progress
        self._n_wrong = 0
        self._done = self._total = 0

    def run(self, covered: list[tuple[int, int]]) -> None:
        covered = [(first, min(last, len(self._schedule))) for first, last in covered]
        start: int = self._ledger.provenance["steps"][0]
        self._total = start + sum(last - first for first, last in covered)
        self._check_beginning(start)
        for first, last in covered:
            self._check_steps(first, last)
        if self._n_wrong > _MOST_SHOWN:
            self._report.differences.append(f"{self._n_wrong:,} places differ in all")

    def _check_beginning(self, start: int) -> None:
        """That the plan agrees with what the checkpoint had been trained on."""
        began = self._ledger.provenance["began_from"]
        if not start:
            return
        if began is None:
            self._report.notes.append(f"what came before step {start} is not recorded")
            return
        digest = StreamDigest(self._schedule)
        for _, step in self._ledger.blocks(0, start):
            digest.at(step)
            self._advance(step)
        same = began["plan_hash"] == self._ledger.provenance["given_plan_hash"]
        parent = "the same plan" if same else f"plan {began['plan_hash'][:12]}"
        said = f"the run began at step {start} from a checkpoint that was trained with {parent}"
        if digest.value == began["stream_hash"]:
            self._report.verified.append(f"{said}; {_steps(0, start)} are as the present plan says")
        else:
            self._report.differences.append(
                f"{said}; {_steps(0, start)} were others than the present plan says"
            )

    def _check_steps(self, first: int, last: int) -> None:
        n_wrong, counts = self._n_wrong, np.zeros(4, np.int64)
        for begin, end, weight_type in self._blocks(first, last):
            try:
                places = self._ledger.places(begin, end)
            except (KeyError, ValueError) as error:
                self._report.differences.append(f"{_steps(begin, end)}: {error.args[0]}")
                n_wrong = -1
            else:
                self._compare(begin, end, places, weight_type)
                counts += _counted(places)
            self._advance(end - begin)
        if n_wrong == self._n_wrong:
            n_places = (last - first) * self._ledger.order.batch_size
            named = zip(
                counts, ("masked", "of another weight", "inserted", "replaced"), strict=True
            )
            parts = [f"{count:,} {name}" for count, name in named if count]
            what = f": {', '.join(parts)}" if parts else ", none masked, inserted or replaced"
            self._report.verified.append(
                f"{_steps(first, last)}: {n_places:,} places, as the plan says{what}"
            )

    def _blocks(self, first: int, last: int) -> Iterator[tuple[int, int, str]]:
        """Pieces of one attempt each, with the type in which its batches had their weights."""
        attempts = self._ledger.provenance["attempts"]
        starts = [attempt["start_step"] for attempt in attempts]
        for begin, end in self._ledger.blocks(first, last):
            inside = [step for step in sorted(set(starts)) if begin < step < end]
            for one, other in zip([begin, *inside], [*inside, end], strict=True):
                there = [a for a in attempts if a["start_step"] <= one]
                yield one, other, there[-1]["weight_type"] if there else "float32"

    def _compare(self, first: int, last: int, places: Places, weight_type: str) -> None:
        order = self._ledger.order
        base = self._schedule.base_positions(first, last)
        wanted = self._wanted(first, last)
        if wanted is None:
            weights: Any = np.float32(1)
            provenance: Any = np.uint8(BASE)
        else:
            weights, provenance = _as(weight_type, wanted.weights), wanted.provenance
        # Equal places of the base order hold equal ids: most need not be computed.
        open_ = np.flatnonzero((places.base_position != base) | (provenance != BASE) | (base < 0))
        found = places.where(open_).ids(order)
        ids = order.at(base[open_]) if wanted is None else wanted.sample_ids[open_]
        wrong = (places.weight != weights) | (places.provenance != provenance)
        wrong[open_] |= found != ids
        at = np.flatnonzero(wrong)
        for place in at[: max(_MOST_SHOWN - self._n_wrong, 0)]:
            self._show(place, first, places)
        self._n_wrong += len(at)

    def _wanted(self, first: int, last: int) -> ScheduledBatch | None:
        """What the schedule has; None where it is the base order alone."""
        if not self._schedule.plan.operations:
            return None
        columns: Any = zip(
            *(self._schedule.batch(step) for step in range(first, last)), strict=True
        )
        return ScheduledBatch(*(np.concatenate(column) for column in columns))

    def _show(self, place: int, first: int, places: Places) -> None:
        step, slot = divmod(int(places.position[place]), self._ledger.order.batch_size)
        wanted = [column[slot] for column in self._schedule.batch(step)]
        one = places.where(slice(place, place + 1))
        found = [one.ids(self._ledger.order)[0], one.weight[0], one.provenance[0]]
        self._report.differences.append(
            f"step {step}, slot {slot}: expected {_sample(*wanted)}, found {_sample(*found)}"
        )

    def _advance(self, steps: int) -> None:
        self._done += steps
        self._progress(self._done, self._total)


def _counted(places: Places) -> NDArray[np.int64]:
    """How many have weight 0, another weight than 1, are inserted, are replaced."""
    masked = places.weight == 0
    return np.array(
        [
            masked.sum(),
            (~masked & (places.weight != 1)).sum(),
            (places.provenance == INSERTED).sum(),
            (places.provenance == REPLACED).sum(),
        ]
    )


def _as(weight_type: str, weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weights as a batch of this type holds them: Lightning converts batches at low precision."""
    if weight_type == "float32":
        return weights
    rounded = torch.from_numpy(weights.copy()).to(getattr(torch, weight_type))
    return rounded.float().numpy()


def _sample(sample_id: int, weight: float, provenance: int) -> str:
    origin = {BASE: "of the base order", INSERTED: "inserted", REPLACED: "as a replacement"}
    return f"sample {sample_id}, weight {weight:g}, {origin.get(int(provenance), provenance)}"


def _steps(first: int, last: int) -> str:
    return f"steps {first}..{last - 1}" if last - first > 1 else f"step {first}"
