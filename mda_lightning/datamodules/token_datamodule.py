"""The one data module: token rows in the order of a schedule, resumed exactly."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler as _Accumulation
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from rich.progress import track

from mda_lightning.corpora import JoinedRows, TokenRows
from mda_lightning.datamodules.ledger_writer import LedgerWriter
from mda_lightning.datamodules.resume import ResumeAtStep, StreamPosition
from mda_lightning.datamodules.scheduled_batches import (
    Batch,
    BatchLoader,
    FromPosition,
    RowBatches,
    ScheduledBatches,
)
from mda_lightning.interventions import Insert, Operation, Plan, operation_from
from mda_lightning.schedule import BaseOrder, Schedule, StreamDigest

SCHEMA_VERSION = 2  # 1 had no online operations
_STEPS_TO_WALK = 2**18  # samples


class TokenDataModule(pl.LightningDataModule):
    """Batches of token rows for a Trainer, with or without a plan.

    A batch is a dict: ``tokens`` int64 [B, T + 1], ``sample_id`` int64 [B], ``weight`` float32 [B]
    and ``provenance`` uint8 [B] (:data:`~mda_lightning.schedule.BASE`, ``INSERTED`` or
    ``REPLACED``). The run is one Lightning epoch of ``len(self.schedule)`` steps; passes over the
    corpus are the order's own.
    Training resumes at the exact next sample from any checkpoint of a step, an exception or a
    signal. What was trained on is written down in ``stream/`` in the run's folder; see
    :class:`~mda_lightning.datamodules.ledger_writer.LedgerWriter`.

    Args:
        rows: the corpus, or its folder.
        batch_size: samples of an optimizer step, over all ranks and micro-batches.
        n_steps: optimizer steps of the base order; insertions with ``shift`` add to them.
        seed: of the base order.
        shuffle: False takes the rows in order.
        plan: what to change in the stream, or the file of a plan.
        sources: folders of the corpora that the plan inserts from, by the names that it gives them;
            those left out are looked for where the plan says.
        branch: allow to go on from a checkpoint of a run with another plan, where the two streams
            agree on everything that the checkpoint has already trained on.
        accumulate: micro-batches of a step; None takes the Trainer's ``accumulate_grad_batches``.
        num_workers: processes that load ahead; 0 loads in the training process.
        val_rows: a corpus for validation, or its folder.
        folder: where the ledger is written; None is ``mda/`` in the logger's folder.
        ledger: whether to write it.

    Attributes:
        plan: as given.
        rows: the corpus, joined by those that the plan inserts from.
        folder: as given.
        position: how far this fit has come in the stream.
        schedule: the stream: of the plan and, after :meth:`steer`, of what was decided since.

    Raises:
        FileNotFoundError: no corpus, or no plan, there.
        ValueError: a plan made for another corpus or order, or that does not fit; a corpus smaller
            than one batch, or changed since the plan was made.
    """

    def __init__(
        self,
        rows: TokenRows | str,
        *,
        batch_size: int,
        n_steps: int,
        seed: int = 0,
        shuffle: bool = True,
        plan: Plan | str | None = None,
        sources: Mapping[str, str] | None = None,
        branch: bool = False,
        accumulate: int | None = None,
        num_workers: int = 0,
        val_rows: TokenRows | str | None = None,
        folder: str | None = None,
        ledger: bool = True,
    ) -> None:
        super().__init__()
        self.rows = _opened(rows)
        self.val_rows = None if val_rows is None else _opened(val_rows)
        self.plan = Plan.load(plan) if isinstance(plan, str | os.PathLike) else plan or Plan()
        if self.plan.corpus_hash not in (None, self.rows.content_hash):
            raise ValueError(
                f"plan {self.plan.name!r} was made for corpus {self.plan.corpus_hash[:12]}, this "
                f"one is {self.rows.content_hash[:12]} ({self.rows.folder}); its sample ids mean "
                "other text here: use its corpus or build the plan again"
            )
        self.rows = _with_sources(self.rows, self.plan, sources or {})
        order = BaseOrder(len(self.rows), batch_size, n_steps, seed, shuffle)
        self.schedule = Schedule(order, self.plan)
        self._online: tuple[Operation, ...] = ()
        self.branch = branch
        self.num_workers = num_workers
        self._accumulate = accumulate
        self._seed = seed
        self.folder, self._ledger = folder, ledger
        self.position = StreamPosition(accumulate=accumulate or 1)
        self._digest = StreamDigest(self.schedule)

    def setup(self, stage: str) -> None:
        """Check that the Trainer and the schedule agree.

        Raises:
            ValueError: they do not; the message says what to set.
        """
        trainer: Any = self.trainer  # `callbacks` is set on it outside its declaration
        if stage != "fit" or trainer is None:
            return
        asked = trainer.accumulate_grad_batches
        if self._accumulate not in (None, asked):
            raise ValueError(
                f"accumulate is {self._accumulate}, Trainer(accumulate_grad_batches={asked}); "
                "make them equal, or leave accumulate out"
            )
        steps = len(self.schedule)
        if trainer.max_steps > steps or (trainer.max_steps < 0 and trainer.max_epochs != 1):
            raise ValueError(
                f"the schedule has {steps} steps, the Trainer has max_steps={trainer.max_steps} "
                f"and max_epochs={trainer.max_epochs}; use Trainer(max_steps={steps}) or a larger "
                "n_steps (passes over the corpus belong to the schedule, not to Lightning's epochs)"
            )
        if scheduler := [c for c in trainer.callbacks if isinstance(c, _Accumulation)]:
            raise ValueError(
                f"{type(scheduler[0]).__name__} changes how many micro-batches a step has, and the "
                "schedule's steps have as many throughout; use accumulate_grad_batches"
            )
        self.position.begin(asked)
        # A checkpoint's operations, where there is one, are read after this.
        self._set_online(())
        # What an interrupted fit left behind goes: Lightning calls no teardown on an exception.
        mine: list[Any] = [ResumeAtStep(self.position)]
        if self._ledger:
            mine.append(LedgerWriter(self, self.folder))
        trainer.callbacks = [*mine, *_without_own(trainer.callbacks)]

    def teardown(self, stage: str) -> None:
        """Take back what ``setup`` gave the Trainer."""
        trainer: Any = self.trainer
        if stage == "fit" and trainer is not None:
            trainer.callbacks = _without_own(trainer.callbacks)

    def steer(self, operations: Sequence[Operation], from_step: int) -> None:
        """Change the stream from a step on, while it is being trained on.

        It holds for the next batch, whatever number of workers load ahead: the training process
        puts right what they have loaded. Every rank must be told the same. The operations are kept
        in checkpoints, and ``schedule.plan`` has them after the plan's own: a run of its own under
        that plan trains on the same batches.

        Args:
            operations: ``Mask(..., online=True)`` or ``Insert(..., online=True)``.
            from_step: the first step whose samples may change; at the end of a step,
                ``global_step`` or later.

        Raises:
            ValueError: no fit is going on; an operation of another kind, or one that would change
                what has been given to training; an insertion that does not fit, or that shifts in
                a run without ``max_steps``.
        """
        trainer = self.trainer
        running = trainer is not None and trainer.state.status == TrainerStatus.RUNNING
        if trainer is None or not running or trainer.state.fn != TrainerFn.FITTING:
            raise ValueError("no fit is going on; give what is known before as plan=...")
        if from_step < self.position.next_step:
            raise ValueError(
                f"the stream cannot be changed from step {from_step}: the batches of the steps "
                f"before {self.position.next_step} have been given to training; steer from there "
                "on, at the end of a step (on_train_batch_end) or before the first"
            )
        shifts = any(isinstance(op, Insert) and op.placement == "shift" for op in operations)
        if shifts and trainer.max_steps < 0:
            raise ValueError(
                "a shift would make a run longer that has no end of its own: give "
                "Trainer(max_steps=...), at which it then ends, or placement='replace'"
            )
        self.schedule = self.schedule.extended(operations, from_step)
        self._online += tuple(operations)
        self._digest.schedule = self.schedule

    def train_dataloader(self) -> BatchLoader:
        """This rank's micro-batches, from the position that was restored, if any."""
        batches = ScheduledBatches(
            self.rows,
            self.schedule,
            accumulate=self.position.accumulate,
            world_size=self.trainer.world_size if self.trainer else 1,
            rank=self.trainer.global_rank if self.trainer else 0,
        )
        loaded_by = self.schedule

        def corrected(number: int, batch: Batch) -> Batch:
            self.position.handed_out = number
            if self.schedule is loaded_by:
                return batch
            return batches.corrected(number, batch, self.schedule)

        return BatchLoader(
            batches,
            FromPosition(len(batches), lambda: self.position.start),
            num_workers=self.num_workers,
            seed=self._seed,
            corrected=corrected,
        )

    def val_dataloader(self) -> BatchLoader | list[Any]:
        """The rows of ``val_rows`` in order; empty without them."""
        if self.val_rows is None:
            return []
        world_size = self.trainer.world_size if self.trainer else 1
        batches = RowBatches(
            self.val_rows,
            self.schedule.order.batch_size // (self.position.accumulate * world_size),
            world_size=world_size,
            rank=self.trainer.global_rank if self.trainer else 0,
        )
        return BatchLoader(
            batches,
            FromPosition(len(batches), lambda: 0),
            num_workers=self.num_workers,
            seed=self._seed,
        )

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream and what identifies the stream; JSON values."""
        trainer, step = self.trainer, self.position.start_step
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            step = self.position.consumed_steps(trainer)
        return {
            "schema_version": SCHEMA_VERSION,
            "step": step,
            "corpus_hash": self.rows.content_hash,
            "order_hash": self.schedule.order.content_hash,
            "plan_hash": self.plan.content_hash,
            "online": [op.describe() for op in self._online],
            "stream_hash": self._digest.at(step),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stopped.

        Raises:
            ValueError: the checkpoint is of another corpus, order or plan, and for another plan
                ``branch`` is False or the streams differ in what was already trained on.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        for name, mine in (
            ("corpus", self.rows.content_hash),
            ("order", self.schedule.order.content_hash),
        ):
            if state_dict[f"{name}_hash"] != mine:
                raise ValueError(
                    f"the checkpoint was trained on {name} {state_dict[f'{name}_hash'][:12]}, this "
                    f"run has {mine[:12]}; resume with the same corpus, batch_size, seed and "
                    "shuffle, or load the weights only"
                )
        step, stream_hash = state_dict["step"], state_dict["stream_hash"]
        version = state_dict["schema_version"]
        if version > SCHEMA_VERSION:
            raise ValueError(
                f"the checkpoint's position has schema {version}, this version reads up to "
                f"{SCHEMA_VERSION}; update mda-lightning"
            )
        same_plan = state_dict["plan_hash"] == self.plan.content_hash
        if version < SCHEMA_VERSION and step <= len(self.schedule):
            # Plans had other hashes: what was trained on decides.
            same_plan |= self._digest.at(step) == stream_hash
        if same_plan:
            self._set_online([operation_from(item) for item in state_dict.get("online", ())])
        if step > len(self.schedule):
            raise ValueError(
                f"the checkpoint has trained {step} steps, this schedule has only "
                f"{len(self.schedule)}; raise n_steps"
            )
        if not same_plan:
            self._check_branch(step, stream_hash, state_dict["plan_hash"])
        self.position.start_step = step
        self.position.restored = True
        self._digest = StreamDigest(self.schedule, step, stream_hash)

    def _check_branch(self, step: int, stream_hash: str, plan_hash: str) -> None:
        plans = f"plan {plan_hash[:12]}, this run has plan {self.plan.content_hash[:12]}"
        if not self.branch:
            raise ValueError(
                f"the checkpoint was trained with {plans}; resume with the same plan, or pass "
                "branch=True to go on from it with this one"
            )
        if self._walked(step) != stream_hash:
            raise ValueError(
                f"cannot branch: the checkpoint was trained with {plans} ({self.plan.name!r}), and "
                f"the two differ within the {step} steps that it has already trained; start the "
                f"plan's windows at step {step} or later, or branch from an earlier checkpoint. "
                "What a steered run was trained on is the plan in its stream/plan.json; operations "
                "added to a plan with online=True leave its insertions where they were"
            )

    def _walked(self, step: int) -> str:
        """The digest of the steps before ``step``, with a bar where it takes long."""
        digest, order = StreamDigest(self.schedule), self.schedule.order
        at_once = max(1, _STEPS_TO_WALK // order.batch_size)
        parts = range(0, step, at_once)
        quiet = len(parts) < 20 or (self.trainer is not None and not self.trainer.is_global_zero)
        for first in track(parts, "comparing what was trained on", disable=quiet, transient=True):
            digest.at(min(first + at_once, step))
        return digest.at(step)

    def _set_online(self, operations: Sequence[Operation]) -> None:
        if not operations and not self._online:
            return
        self._online = tuple(operations)
        self.schedule = Schedule(self.schedule.order, self.plan.with_operations(operations))
        self._digest = StreamDigest(self.schedule)


def _without_own(callbacks: Sequence[Any]) -> list[Any]:
    return [c for c in callbacks if not isinstance(c, (ResumeAtStep, LedgerWriter))]


def _with_sources(rows: TokenRows, plan: Plan, folders: Mapping[str, str]) -> TokenRows:
    """The corpus, joined by those that a plan inserts from."""
    unknown = sorted(set(folders) - {source.name for source in plan.sources})
    if unknown:
        raise ValueError(
            f"sources names {unknown[0]!r}, plan {plan.name!r} inserts from "
            f"{', '.join(repr(s.name) for s in plan.sources) or 'the corpus alone'}"
        )
    others = {}
    names = [source.name for source in plan.sources]
    if twice := sorted(name for name in folders if names.count(name) > 1):
        raise ValueError(
            f"plan {plan.name!r} inserts from two corpora named {twice[0]!r}; put them back where "
            f"the plan says ({', '.join(str(s.path) for s in plan.sources if s.name == twice[0])})"
        )
    for source in plan.sources:
        folder = folders.get(source.name, source.path)
        if folder is None or not (Path(folder) / "meta.json").is_file():
            raise FileNotFoundError(
                f"plan {plan.name!r} inserts samples of {source.name!r}, and there is no corpus at "
                f"{folder}; give its folder: sources={{{source.name!r}: ...}}"
            )
        found = TokenRows.open(folder)
        if found.content_hash != source.content_hash:
            raise ValueError(
                f"plan {plan.name!r} was made with source {source.content_hash[:12]} of "
                f"{source.name!r}, {folder} is {found.content_hash[:12]}; it has changed since: "
                "build the plan again"
            )
        others[source.namespace] = found
    return JoinedRows(rows, others) if others else rows


def _opened(rows: TokenRows | str | Path) -> TokenRows:
    return rows if isinstance(rows, TokenRows) else TokenRows.open(rows)
