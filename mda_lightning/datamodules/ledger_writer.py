"""The ledger of a run: what its training step was given, written while it trains."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from numpy.typing import NDArray

from mda_lightning.corpora import TokenRows
from mda_lightning.datamodules.resume import StreamPosition
from mda_lightning.files import write_json
from mda_lightning.interventions import Plan
from mda_lightning.pretraining.run_folder import run_folder
from mda_lightning.schedule import Schedule
from mda_lightning.schedule.ledger import (
    LEDGER_FOLDER,
    SCHEMA_VERSION,
    STREAM_FILE,
    STREAM_FOLDER,
    WEIGHT_TYPES,
    read_stream,
)
from mda_lightning.schedule.ledger_folder import Beginning, keep_aside, new_attempt, save_plan
from mda_lightning.schedule.ledger_parts import LedgerParts
from mda_lightning.schedule.ledger_rows import Share

FIELDS = ("sample_id", "weight", "provenance")
# A killed run loses no more than since its last checkpoint anyway.
_FLUSH_EVERY = 100  # steps, and
_SECONDS = 10.0  # since the last time
_MOST_HELD = 2**20  # places, on the device
_PLAN_SHARE = 50  # of the time since a plan of many decisions was saved, at most one part saves it


class StreamOwner(Protocol):
    """What a ledger needs of a :class:`~mda_lightning.datamodules.TokenDataModule`."""

    rows: TokenRows
    plan: Plan
    schedule: Schedule
    position: StreamPosition


class LedgerWriter(Callback):
    """Write down the sample id, weight and provenance of every place of every step trained on.

    They are read from the batch when all callbacks have had their ``on_train_batch_start``: what
    these changed in it is in the ledger, what the module's own ``on_train_batch_start`` and its
    training step make of it afterwards is not. They stay on the batch's device and are moved to
    disk now and then (after at least 100 steps and 10 seconds), whenever a checkpoint is saved and
    at the end. A step counts once it has been trained; one whose batch a hook declined by returning
    -1 was not, and is missing where the run goes on behind it. Every rank writes its own. In
    ``stream/`` in the run's folder:

    ======================  ======================================================================
    ``ledger/``             the places, see :mod:`~mda_lightning.schedule.ledger_rows`
    ``plan.json``           the plan as it was run, with what was decided while it ran
    ``stream.json``         corpus, order, steps, attempts, and the checkpoint that it began from
    ======================  ======================================================================

    Places never reach the disk before the plan that they follow. Where decisions are so many that
    their plan takes long to save, both wait between checkpoints until that took no more than 2% of
    the time.

    A run from step 0 replaces what an earlier one left there; a resumed one goes on with it. Steps
    of a run with another plan are not lost by that: they are first copied to
    ``stream-former-<n>/``, with a warning. Where nothing can be written, a warning says so once and
    training goes on.

    Args:
        data: whose batches they are; it adds this callback to the Trainer.
        folder: as for :func:`~mda_lightning.pretraining.run_folder.run_folder`.
    """

    def __init__(self, data: StreamOwner, folder: str | None) -> None:
        self.folder: Path | None = None  #: ``stream/``; None where nothing is written
        self._data = data
        self._wanted = folder
        self._parent: dict[str, Any] | None = None  # the checkpoint's position
        self._former: dict[str, Any] | None = None  # what stream.json said before this fit
        self._beginning = Beginning(0, None, "", "")
        self._due: int | None = None  # the number of the next micro-batch
        self._last: int | None = None  # the step after those that were written
        self._stopped = ""  # why nothing more is written down
        self._parts: LedgerParts | None = None
        self._share = Share()
        self._stream: dict[str, Any] = {}
        self._saved_plan: Any = None
        self._plan_due = 0.0  # when it may be saved again
        self._now: tuple[int, dict[str, torch.Tensor]] | None = None
        self._held: list[tuple[int, dict[str, torch.Tensor]]] = []
        self._flushed = time.monotonic()
        self._warned = False

    # -- Lightning ----------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Come after the callbacks that may change a batch, and before those that save it."""
        ours: Any = trainer  # `callbacks` is set on it outside its declaration
        others = [callback for callback in ours.callbacks if callback is not self]
        saving = (n for n, callback in enumerate(others) if isinstance(callback, Checkpoint))
        at = next(saving, len(others))
        ours.callbacks = [*others[:at], self, *others[at:]]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._parent = checkpoint.get(type(self._data).__qualname__)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.folder = run_folder(trainer, self._wanted) / STREAM_FOLDER
        data, kept = self._data, True
        hashes = data.schedule.order.content_hash, data.rows.content_hash
        self._beginning = Beginning(data.position.start_step, self._parent, *hashes)
        if trainer.is_global_zero:
            self._former = _former(self.folder)
            kept = self._attempt(self._keep_aside)
        self._former, kept = trainer.strategy.broadcast((self._former, kept))
        if not kept:
            self.folder, self._warned = None, True
        n_ranks = trainer.world_size
        size = self._data.schedule.order.batch_size // (self._accumulate * n_ranks)
        self._share = Share(size, trainer.global_rank, n_ranks)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.folder is None or self._stopped:
            return
        due = self._data.position.start if self._due is None else self._due
        if batch_idx != due:
            self._stop(trainer, f"micro-batch {batch_idx} came where {due} was due")
            return
        self._now, self._due = (batch_idx, _fields_of(batch)), batch_idx + 1

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._now is None:
            return
        self._end_micro_batch()
        if self._parts is None:
            # Not before: what is refused until here leaves an earlier run's ledger alone.
            self._attempt(lambda: self._begin(trainer))
        if self._is_due():
            self._flush(trainer, wait=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._now = None  # a batch that a hook declined by returning -1

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._flush(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.folder is None and not self._warned:
            return
        whole = self._flush(trainer)
        if self._parts is not None:
            self._attempt(self._parts.merge)
        trainer.strategy.barrier()  # complete is what all ranks have written
        if whole and not self._stopped:
            self._attempt(lambda: self._describe(trainer, complete=True))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._flush(trainer)
        self._now = None

    # -- what was trained on --------------------------------------------------------------------

    @property
    def _accumulate(self) -> int:
        return self._data.position.accumulate

    def _is_due(self) -> bool:
        if len(self._held) < _FLUSH_EVERY * self._accumulate:
            return False
        late = time.monotonic() - self._flushed >= _SECONDS
        return late or len(self._held) * self._share.size >= _MOST_HELD

    def _end_micro_batch(self) -> None:
        assert self._now is not None
        self._held.append(self._now)
        self._now = None

    def _stop(self, trainer: pl.Trainer, why: str) -> None:
        """Write down nothing more: which step a batch belongs to is not known any longer."""
        self._stopped = why
        warnings.warn(
            f"the ledger of what is trained on ends here: {why}, so the batches are not those of "
            f"the schedule any more; training goes on. {self.folder} says so. Train the schedule "
            "in one Lightning epoch",
            stacklevel=2,
        )
        self._flush(trainer)

    def _flush(self, trainer: pl.Trainer, *, wait: bool = False) -> bool:
        """Write the steps that have been trained; returns whether all of them now are.

        Args:
            wait: leave them in memory while the plan that they follow is not to be saved yet.
        """
        self._flushed = time.monotonic()
        if self.folder is None:
            return False
        if self._now is not None:
            # Within the last hooks of a step, where a checkpoint already counts it.
            consumed = self._data.position.consumed_steps(trainer)
            if consumed * self._accumulate > self._now[0]:
                self._end_micro_batch()
        if self._parts is None and (self._held or self._stopped):
            self._attempt(lambda: self._begin(trainer))
        return self._parts is not None and self._attempt(lambda: self._write(trainer, wait))

    def _keep_aside(self) -> None:
        """Copy a ledger of which steps of another plan are about to be dropped."""
        assert self.folder is not None
        plan, former = self._data.plan, self._former
        dropped = former and self._beginning.drops(former, plan.content_hash)
        if not former or not dropped:
            return
        aside = keep_aside(self.folder)
        warnings.warn(
            f"{self.folder} has the ledger of a run with plan {former['given_plan_hash'][:12]}; "
            f"this run has plan {plan.content_hash[:12]} ({plan.name!r}) and takes the place of "
            f"its steps {dropped[0]}..{dropped[-1]}. The former ledger was copied to {aside}. Give "
            "each run a folder of its own: TokenDataModule(folder=...)",
            stacklevel=2,
        )

    def _begin(self, trainer: pl.Trainer) -> None:
        assert self.folder is not None
        told, beginning, former = self.folder / STREAM_FILE, self._beginning, self._former
        start, came_from = beginning.step, beginning.checkpoint
        parts = LedgerParts(self.folder / LEDGER_FOLDER, self._data.schedule.order, self._share)
        # What is discarded is not promised any more, if the process is killed before the rest.
        if former is None or not beginning.goes_on_with(former):
            if trainer.is_global_zero:
                told.unlink(missing_ok=True)
            parts.discard_from(0)
            former = {"kind": "stream", "schema_version": SCHEMA_VERSION}
            former |= {"steps": [start, start], "began_from": came_from, "attempts": []}
        else:
            first, last = former["steps"]
            former = former | {"steps": [first, min(last, start)], "complete": False}
            if trainer.is_global_zero:
                write_json(told, former)
            parts.discard_from(start)
        attempt = new_attempt(start, came_from, self._share, self._accumulate, FIELDS)
        self._stream = former | {
            "steps": [former["steps"][0], start],
            "attempts": [*former["attempts"], attempt],
        }
        self._describe(trainer, complete=False)
        self._parts = parts

    def _write(self, trainer: pl.Trainer, wait: bool) -> None:
        assert self._parts is not None
        accumulate, share, schedule = self._accumulate, self._share, self._data.schedule
        n_steps = len(self._held) // accumulate
        if n_steps:
            held = self._held[: n_steps * accumulate]
            first = held[0][0] // accumulate
            last = first + n_steps
            per_step = accumulate * share.size
            numbers = np.arange(first * per_step, last * per_step, dtype=np.int64)
            mine = share.positions(numbers) - first * schedule.order.batch_size
            columns = self._columns([fields for _, fields in held], schedule, first, last, mine)
            self._parts.add(first, schedule.base_positions(first, last)[mine], *columns)
            del self._held[: len(held)]
            self._last = last
        if self._stopped:
            self._stream["attempts"][-1]["stopped"] = self._stopped
        if trainer.is_global_zero and self._saved_plan is not schedule.plan:
            if wait and time.monotonic() < self._plan_due:
                return
            self._save_plan()
        self._parts.flush()
        if self._last is not None:
            self._stream["steps"][1] = self._last
        self._describe(trainer, complete=False)

    def _columns(
        self,
        held: list[dict[str, torch.Tensor]],
        schedule: Schedule,
        first: int,
        last: int,
        mine: NDArray[np.int64],
    ) -> list[Any]:
        """Ids, weights and provenance [n] of this rank's places of steps [first, last)."""
        attempt = self._stream["attempts"][-1]
        columns: list[Any] = []
        for name, type_ in zip(FIELDS, (np.int64, np.float32, np.uint8), strict=True):
            found = [fields[name] for fields in held if name in fields]
            if len(found) == len(held) and all(len(f) == self._share.size for f in found):
                together = torch.cat(found).cpu()
                if name == "weight":
                    weight_type = str(together.dtype).removeprefix("torch.")
                    attempt["weight_type"] = (
                        weight_type if weight_type in WEIGHT_TYPES else "float32"
                    )
                    together = together.float()
                columns.append(together.numpy().astype(type_, copy=False))
            else:
                attempt["read_from"][name] = "schedule"
                at = FIELDS.index(name)
                batches = [schedule.batch(step)[at] for step in range(first, last)]
                columns.append(np.concatenate(batches)[mine])
        return columns

    # -- files ----------------------------------------------------------------------------------

    def _describe(self, trainer: pl.Trainer, *, complete: bool) -> None:
        """Write ``stream.json``, and ``plan.json`` where it has changed; by rank 0."""
        if not trainer.is_global_zero or self.folder is None:
            return
        if self._saved_plan is not self._data.schedule.plan:
            self._save_plan()
        write_json(self.folder / STREAM_FILE, self._stream | {"complete": complete})

    def _save_plan(self) -> None:
        assert self.folder is not None
        data, began = self._data, time.monotonic()
        self._stream = save_plan(
            self.folder,
            self._stream,
            data.schedule,
            data.plan,
            corpus=data.rows.folder,
            corpus_hash=data.rows.content_hash,
        )
        self._saved_plan = data.schedule.plan
        ended = time.monotonic()
        self._plan_due = ended + _PLAN_SHARE * (ended - began)

    def _attempt(self, write: Callable[[], None]) -> bool:
        """Write, and go on training where that fails."""
        try:
            write()
            return True
        except (OSError, ValueError) as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"the ledger of what is trained on cannot be written to {self.folder} "
                    f"({error}); training goes on. `mda-lightning plan verify` will say which "
                    "steps are missing",
                    stacklevel=2,
                )
            if self._parts is None:
                self.folder, self._now, self._held = None, None, []
            return False


def _fields_of(batch: Any) -> dict[str, torch.Tensor]:
    """Copies: a training step may change its batch, or take fields out of it."""
    if not isinstance(batch, Mapping):
        return {}
    return {
        name: batch[name].detach().clone()
        for name in FIELDS
        if name in batch and isinstance(batch[name], torch.Tensor)
    }


def _former(folder: Path) -> dict[str, Any] | None:
    """What an earlier run's ``stream.json`` says; None where there is none to go on with."""
    try:
        return read_stream(folder / STREAM_FILE)
    except (OSError, ValueError):
        return None
