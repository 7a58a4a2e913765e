"""Dense checkpoints: at the steps of an explicit schedule."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from mda_lightning.callbacks.attachment import (
    callbacks_of,
    is_rehearsal,
    state_key,
    versions,
    warn_of_other_folder,
)
from mda_lightning.callbacks.checkpoint_writing import check_checkpointing, write_checkpoint
from mda_lightning.checkpoint_steps import CheckpointSteps
from mda_lightning.files import write_json
from mda_lightning.pretraining.run_folder import run_folder

FOLDER_NAME = "checkpoints"
INDEX_NAME = "checkpoints.json"
SCHEMA_VERSION = 1

_FILE = re.compile(r"step-(\d+)\.ckpt")


class ScheduledCheckpoints(pl.Callback):
    """Save ``checkpoints/step-<k>.ckpt`` in the run's folder at the steps of a schedule.

    The paper's dense checkpoints (App. E.1) are ``"every 10 in 1000..2000"`` or the like; Pythia's
    own are ``"pythia"``. A step k is after k updates; step 0 is before the first. Training goes on
    from a full checkpoint exactly. Place it last among callbacks that change training state on
    ``on_train_batch_end``, so that its checkpoints hold what those did.

    ``checkpoints/checkpoints.json`` says which steps were saved, which could not be, and which had
    passed before this run went on here. Where ``global_step`` jumps over a due step (several
    optimizers), the first step after it is saved, under its own number.

    A checkpoint that cannot be written (no room, no permission) is reported once and counted, and
    training goes on.

    Args:
        steps: a :class:`~mda_lightning.checkpoint_steps.CheckpointSteps`, its text such as
            ``"0, log2..512, every 1000"``, or a list of steps and texts. With ``last``, the step at
            which the fit ends is saved too, unless it ends in an exception.
        folder: the run's folder; None is ``mda/`` in the first logger's folder.
        weights_only: save the weights and hyperparameters without optimizers, schedulers and
            callbacks: what ``mda-lightning monitor`` reads, a third of the size under AdamW.
            Training cannot go on from these.

    Raises:
        ValueError: a schedule that is none, negative or reversed; at ``setup``, two of these that
            write to one folder.
        TypeError: ``steps`` of another kind.
        UnsupportedTrainerError: at ``setup``, weights in shards or checkpoints in the background.
    """

    def __init__(
        self,
        steps: CheckpointSteps | str | int | Sequence[int | str],
        *,
        folder: str | None = None,
        weights_only: bool = False,
    ) -> None:
        super().__init__()
        self.steps = CheckpointSteps.of(steps)
        self.weights_only = weights_only
        self.folder: Path | None = None
        # The schedule may change when a run is resumed. Kept: Lightning asks at every hook.
        arguments = {"folder": folder, "weights_only": weights_only}
        self._state_key = state_key("ScheduledCheckpoints", arguments)
        self._wanted_folder = folder
        self._former_folder = "None"
        self._seen_step = -1
        self._written: set[int] = set()
        self._lost: set[int] = set()
        self._passed: list[int] = []
        self._has_told_loss = self._has_told_index = False

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Step -> file, of what this run has saved."""
        return {step: self._path(step) for step in sorted(self._written)}

    @property
    def lost(self) -> list[int]:
        """Steps whose checkpoints could not be written."""
        return sorted(self._lost)

    # -- Lightning ----------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "folder": str(self.folder or self._former_folder),
            "written": sorted(self._written),
            "lost": sorted(self._lost),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._former_folder = state_dict["folder"]
        warn_of_other_folder("ScheduledCheckpoints", self._former_folder, self.folder)
        self._written, self._lost = set(state_dict["written"]), set(state_dict["lost"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_checkpointing(trainer, "ScheduledCheckpoints")
        self.folder = run_folder(trainer, self._wanted_folder) / FOLDER_NAME
        self._check_alone(trainer)
        if trainer.global_step == 0:
            # A checkpoint's state, if there is one, is loaded after this.
            self._written, self._lost = set(), set()
        self._has_told_loss = self._has_told_index = False
        first, end = self.steps.next_after(-1), trainer.max_steps
        if not self.steps.last and first is not None and 0 <= end < first:
            self._warn(
                trainer,
                f"ScheduledCheckpoints('{self.steps}') saves nothing: its first step is {first}, "
                f"and the Trainer stops at max_steps={end}",
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = step = trainer.global_step
        if is_rehearsal(trainer):
            return
        self._take_up(trainer)
        if self.steps.is_due(step) and step not in self._written:
            self._save(trainer, step)
        else:
            self._write_index(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # After a micro-batch of an accumulated step the next due one is still ahead.
        step, due = trainer.global_step, self.steps.next_after(self._seen_step)
        self._seen_step = step
        if due is not None and due <= step and not is_rehearsal(trainer):
            self._save(trainer, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_rehearsal(trainer):
            return
        step = trainer.global_step
        if self.steps.last and step not in self._written:
            self._save(trainer, step)

    # -- what it does -------------------------------------------------------------------------

    def _check_alone(self, trainer: pl.Trainer) -> None:
        assert self.folder is not None
        for other in callbacks_of(trainer):
            if other is self or not isinstance(other, ScheduledCheckpoints):
                continue
            if other.folder is not None and other.folder.resolve() == self.folder.resolve():
                raise ValueError(
                    f"ScheduledCheckpoints('{other.steps}') and ('{self.steps}') would write over "
                    f"each other's files in {self.folder}; make one schedule of both, "
                    f"'{other.steps | self.steps}', or give one of them another folder=..."
                )

    def _take_up(self, trainer: pl.Trainer) -> None:
        """Keep of the state what is on disk, and tell of files that are of another run."""
        assert self.folder is not None
        now = trainer.global_step
        if trainer.is_global_zero:
            matches = map(_FILE.fullmatch, (path.name for path in self.folder.glob("*.ckpt")))
            here = {int(match[1]) for match in matches if match}
            self._written = {step for step in self._written if step <= now} & here
            if strange := sorted(here - self._written):
                self._warn(
                    trainer,
                    f"{self.folder} holds checkpoints that are no past of this run, which goes on "
                    f"from step {now}: of step {_shown(strange)}. Those whose step it saves are "
                    "written over, the others stay; remove them, or give another folder=...",
                )
        # Saving is collective: all ranks must know the same.
        self._written = trainer.strategy.broadcast(self._written)
        self._lost = {step for step in self._lost if step <= now} - self._written
        known = self._written | self._lost
        self._passed = [step for step in self.steps.up_to(now) if step not in known]

    def _save(self, trainer: pl.Trainer, step: int) -> None:
        self._written.add(step)  # before saving: the checkpoint's own state then lists it
        self._lost.discard(step)
        failure = write_checkpoint(trainer, self._path(step), weights_only=self.weights_only)
        if failure is not None:
            self._written.discard(step)
            self._lost.add(step)
            if not self._has_told_loss:
                self._has_told_loss = True
                self._warn(
                    trainer,
                    f"ScheduledCheckpoints: the checkpoint of step {step} could not be written to "
                    f"{self.folder} ({failure}); training goes on. This is told once; "
                    f"{INDEX_NAME} there, if it can be written, lists all that are lost",
                )
        self._write_index(trainer)

    def _warn(self, trainer: pl.Trainer, text: str) -> None:
        if trainer.is_global_zero:
            warnings.warn(text, stacklevel=3)

    def _path(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"step-{step}.ckpt"

    def _write_index(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        assert self.folder is not None
        index = {
            "kind": "checkpoints",
            "schema_version": SCHEMA_VERSION,
            "schedule": str(self.steps),
            "weights_only": self.weights_only,
            "step": trainer.global_step,
            "written": sorted(self._written),
            "lost": sorted(self._lost),
            "passed": [s for s in self._passed if s not in self._written | self._lost],
            "provenance": {"versions": versions()},
        }
        try:
            write_json(self.folder / INDEX_NAME, index)
        except OSError as error:
            if not (self._has_told_loss or self._has_told_index):
                self._has_told_index = True
                self._warn(
                    trainer, f"ScheduledCheckpoints: {INDEX_NAME} could not be written ({error})"
                )


def _shown(steps: Sequence[int], at_most: int = 5) -> str:
    words = ", ".join(map(str, steps[:at_most]))
    return words if len(steps) <= at_most else f"{words} and {len(steps) - at_most} more"
