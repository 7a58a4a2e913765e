"""Where in the stream a run is, and what makes Lightning's own counters agree with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


@dataclass
class StreamPosition:
    """How far a fit has read a schedule.

    Attributes:
        start_step: the step that this fit begins with; 0, or what the checkpoint had consumed.
        accumulate: micro-batches of a step.
        restored: whether ``start_step`` came from a checkpoint.
        handed_out: the last micro-batch that the loader has given, or -1.
    """

    start_step: int = 0
    accumulate: int = 1
    restored: bool = False
    handed_out: int = -1

    @property
    def start(self) -> int:
        """The micro-batch that this fit begins with."""
        return self.start_step * self.accumulate

    def consumed_steps(self, trainer: pl.Trainer) -> int:
        """Optimizer steps whose batches were trained; a started accumulation does not count.

        ``processed`` is the one counter that is right both in ``on_train_batch_end``, where
        checkpoints are saved before ``completed`` is counted, and on an exception, when ``ready``
        already counts the batch that failed. Between the optimizer's step and that counter, where
        Ctrl-C or a signal may come, ``global_step`` is ahead of it.
        """
        consumed = int(_batch_progress(trainer).current.processed) // self.accumulate
        if trainer.lightning_module.automatic_optimization and len(trainer.optimizers) == 1:
            return max(consumed, trainer.global_step)
        return consumed

    @property
    def next_step(self) -> int:
        """The first step of whose samples the loader has given none."""
        begun = -(-(self.handed_out + 1) // self.accumulate)
        return max(self.start_step, begun)

    def begin(self, accumulate: int) -> None:
        """Forget an earlier fit; a checkpoint, where there is one, is read after this."""
        self.start_step, self.restored, self.handed_out = 0, False, -1
        self.accumulate = accumulate


class ResumeAtStep(Callback):
    """Put Lightning's batch counters where the stream begins.

    A checkpoint of an exception may lie between the micro-batches of a step, whose gradients are
    lost: the stream goes back to the step's first micro-batch, and so must the counter that decides
    when the optimizer steps. The same holds when a run goes on with other micro-batches.
    """

    def __init__(self, position: StreamPosition) -> None:
        self.position = position
        self._epochs = 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epochs += 1
        if self._epochs > 1:
            raise ValueError(
                f"Lightning began a second epoch at step {trainer.global_step}, which would begin "
                "the stream anew: a run is one epoch. Leave out limit_train_batches "
                f"({trainer.limit_train_batches}), or give Trainer(max_steps=...) that many steps"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        position = self.position
        self._epochs = 0
        if trainer.global_step > 0 and not position.restored:
            trained = f"{trainer.global_step} steps"
            if trainer.ckpt_path is None:
                raise ValueError(
                    f"this Trainer has trained {trained} already, and the stream would begin anew; "
                    "go on from a checkpoint with a new Trainer: fit(..., ckpt_path=...)"
                )
            raise ValueError(
                f"{trainer.ckpt_path} was trained for {trained} but holds no "
                "position for TokenDataModule: it was saved by another data module, so where to go "
                "on in the data is unknown. Load its weights only, and start a run of its own"
            )
        progress = _batch_progress(trainer)
        shift = position.start - progress.current.processed
        if position.restored and progress.current.processed and shift:
            for tracker in (progress.current, progress.total):
                tracker.completed += shift
                # What was begun and not processed is forgotten, as Lightning does on a restart.
                tracker.processed += shift
                tracker.ready = tracker.started = tracker.processed


def _batch_progress(trainer: pl.Trainer) -> Any:
    # Lightning declares its trackers by a base class that lacks the fields used here.
    return trainer.fit_loop.epoch_loop.batch_progress
