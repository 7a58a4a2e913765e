"""The ledger of a run: what its training step was given, written while it trains."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray

from mda_lightning import __version__
from mda_lightning.corpora import TokenRows
from mda_lightning.datamodules.resume import StreamPosition
from mda_lightning.files import write_json
from mda_lightning.interventions import Plan
from mda_lightning.pretraining.run_folder import run_folder
from mda_lightning.schedule import Schedule
from mda_lightning.schedule.ledger import (
    LEDGER_FOLDER,
    PLAN_FILE,
    SCHEMA_VERSION,
    STREAM_FILE,
    STREAM_FOLDER,
    read_stream,
)
from mda_lightning.schedule.ledger_parts import LedgerParts
from mda_lightning.schedule.ledger_rows import Share

FIELDS = ("sample_id", "weight", "provenance")
# Of the stream.json of a run that is gone on with.
_CARRIED_ON = (
    "steps",
    "began_from",
    "attempts",
    "corpus_hash",
    "order_hash",
    "plan_hash",
    "given_plan_hash",
)
# A killed run loses no more than since its last checkpoint anyway.
_FLUSH_EVERY = 100  # steps, and
_SECONDS = 10.0  # since the last time
_MOST_HELD = 2**20  # places, on the device


class StreamOwner(Protocol):
    """What a ledger needs of a :class:`~mda_lightning.datamodules.TokenDataModule`."""

    rows: TokenRows
    plan: Plan
    schedule: Schedule
    _position: StreamPosition


class LedgerWriter(Callback):
    """Write down the sample id, weight and provenance of every place of every step trained on.

    They are read from the batch that the training step was given, stay on its device, and are moved
    to disk now and then (after at least 100 steps and 10 seconds), whenever a checkpoint is saved
    and at the end. A step counts once it has been trained. Every rank writes its own. In
    ``stream/`` in the run's folder:

    ======================  ======================================================================
    ``ledger/``             the places, see :mod:`~mda_lightning.schedule.ledger_rows`
    ``plan.json``           the plan as it was run, with what was decided while it ran
    ``stream.json``         corpus, order, steps, attempts, and the checkpoint that it began from
    ======================  ======================================================================

    A run from step 0 replaces what an earlier one left there; a resumed one goes on with it. Where
    nothing can be written, a warning says so once and training goes on.

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
        self._parts: LedgerParts | None = None
        self._share = Share()
        self._stream: dict[str, Any] = {}
        self._saved_plan: Any = None
        self._now: tuple[int, Any, dict[str, torch.Tensor]] | None = None
        self._held: list[tuple[int, dict[str, torch.Tensor]]] = []
        self._flushed = time.monotonic()
        self._warned = False

    # -- Lightning ----------------------------------------------------------------------------

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._parent = checkpoint.get(type(self._data).__qualname__)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.folder = run_folder(trainer, self._wanted) / STREAM_FOLDER
        self._former = trainer.strategy.broadcast(_former(self.folder))
        n_ranks = trainer.world_size
        size = self._data.schedule.order.batch_size // (self._accumulate * n_ranks)
        self._share = Share(size, trainer.global_rank, n_ranks)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.folder is not None:
            self._now = batch_idx, batch, _fields_of(batch)

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
            self._flush(trainer)

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
        if whole:
            self._attempt(lambda: self._describe(trainer, complete=True))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._flush(trainer)
        self._now = None

    # -- what was trained on --------------------------------------------------------------------

    @property
    def _accumulate(self) -> int:
        return self._data._position.accumulate

    def _is_due(self) -> bool:
        if len(self._held) < _FLUSH_EVERY * self._accumulate:
            return False
        late = time.monotonic() - self._flushed >= _SECONDS
        return late or len(self._held) * self._share.size >= _MOST_HELD

    def _end_micro_batch(self) -> None:
        """Keep what the training step was given.

        Read again at the end, since callbacks that act later may have set other weights before the
        step; kept from the start too, since a training step may take fields out of its batch.
        """
        assert self._now is not None
        number, batch, fields = self._now
        self._now = None
        fields |= _fields_of(batch)
        kept = {name: field.detach().clone() for name, field in fields.items()}
        self._held.append((number, kept))

    def _flush(self, trainer: pl.Trainer) -> bool:
        """Write the steps that have been trained; returns whether all of them now are."""
        self._flushed = time.monotonic()
        if self.folder is None:
            return False
        if self._now is not None:
            # Within the last hooks of a step, where a checkpoint already counts it.
            number, *_ = self._now
            consumed = self._data._position.consumed_steps(trainer)
            if consumed * self._accumulate > number:
                self._end_micro_batch()
        if self._parts is None and self._held:
            self._attempt(lambda: self._begin(trainer))
        return self._parts is not None and self._attempt(lambda: self._write(trainer))

    def _begin(self, trainer: pl.Trainer) -> None:
        assert self.folder is not None
        data, former, start = self._data, self._former, self._data._position.start_step
        parts = LedgerParts(self.folder / LEDGER_FOLDER, data.schedule.order, self._share)
        parent = None
        if start and self._parent is not None:
            parent = {key: self._parent[key] for key in ("step", "plan_hash", "stream_hash")}
        if (
            former is None
            or parent is None
            or former["order_hash"] != data.schedule.order.content_hash
            or former["corpus_hash"] != data.rows.content_hash
            or former["steps"][0] > start
            or parent["plan_hash"] not in (former["plan_hash"], former["given_plan_hash"])
        ):
            former = {"steps": [start, start], "began_from": parent, "attempts": []}
            parts.discard_from(0)
        parts.discard_from(start)
        self._stream = {
            "kind": "stream",
            "schema_version": SCHEMA_VERSION,
            "steps": [former["steps"][0], start],
            "began_from": former["began_from"],
            "attempts": list(former["attempts"]),
        }
        self._stream["attempts"].append(
            {
                "start_step": start,
                "from": parent,
                "world_size": self._share.world_size,
                "accumulate": self._accumulate,
                "micro_batch": self._share.size,
                "read_from": dict.fromkeys(FIELDS, "batch"),
                "weight_type": "float32",
                "versions": {
                    "mda_lightning": __version__,
                    "torch": torch.__version__,
                    "lightning": version("lightning"),
                },
            }
        )
        self._describe(trainer, complete=False)
        self._parts = parts

    def _write(self, trainer: pl.Trainer) -> None:
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
            self._stream["steps"][1] = last
        self._parts.flush()
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
                    attempt["weight_type"] = str(together.dtype).removeprefix("torch.")
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
        """Write ``plan.json`` and ``stream.json`` where they have changed; by rank 0."""
        if not trainer.is_global_zero or self.folder is None:
            return
        data, schedule = self._data, self._data.schedule
        if self._saved_plan is not schedule.plan:
            schedule.plan.save(self.folder / PLAN_FILE)
            self._stream |= {
                "order": schedule.order.describe(),
                "order_hash": schedule.order.content_hash,
                "corpus": str(data.rows.folder.resolve()),
                "corpus_hash": data.rows.content_hash,
                "plan_hash": schedule.plan.content_hash,
                "given_plan_hash": data.plan.content_hash,
                "n_steps": len(schedule),
                "added_steps": len(schedule) - schedule.order.n_steps,
            }
            self._saved_plan = schedule.plan
        write_json(self.folder / STREAM_FILE, self._stream | {"complete": complete})

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
    if not isinstance(batch, Mapping):
        return {}
    return {
        name: batch[name]
        for name in FIELDS
        if name in batch and isinstance(batch[name], torch.Tensor)
    }


def _former(folder: Path) -> dict[str, Any] | None:
    """What an earlier run's ``stream.json`` says; None where there is none to go on with."""
    try:
        stored = read_stream(folder / STREAM_FILE)
        return {key: stored[key] for key in _CARRIED_ON}
    except (OSError, ValueError, KeyError):
        return None
