"""A bounded ring of full checkpoints, of which those that turn out to matter are promoted."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl

from mda_lightning.callbacks.checkpoint_writing import write_checkpoint
from mda_lightning.files import atomic_path


def to_evict(steps: Sequence[int], wanted: Sequence[int]) -> int:
    """Which of the kept checkpoints, by increasing step, is missed least.

    Args:
        steps: increasing steps of the checkpoints, at least 3. The newest always stays.
        wanted: steps that may turn out to matter, the likeliest first: windows' starts and ends.
            Without any, the oldest checkpoint goes. With them, the last checkpoint at or before
            each of them stays, as long as there is room for more than those; that of the earliest
            stays always. Of the others the one goes whose neighbours are closest together,
            so that what remains spans the window evenly.
    """
    if not wanted:
        return steps[0]
    before = [max((s for s in steps if s <= start), default=None) for start in wanted]
    floors = [s for s in before if s is not None]
    if not floors:
        return steps[0]
    earliest = min(floors)
    if steps[0] < earliest:
        return steps[0]
    for n_kept in range(len(floors), -1, -1):
        kept = {earliest, steps[-1], *floors[:n_kept]}
        free = [i for i, s in enumerate(steps) if s not in kept]
        if free:
            return steps[min(free, key=lambda i: steps[i + 1] - steps[i - 1])]
    return steps[-2]


class CheckpointRing:
    """Checkpoints ``ring/step-<k>.ckpt`` in a folder, written aside and renamed.

    A checkpoint that cannot be written (no room, no permission) is reported once and training goes
    on without it.

    Args:
        size: how many checkpoints are on disk at most; at least 3.
    """

    def __init__(self, size: int) -> None:
        if size < 3:
            raise ValueError(
                f"ring={size} is too few checkpoints: a window's start, its newest and one between "
                "need 3"
            )
        self.size = size
        self.steps: list[int] = []
        self.n_failed = 0
        self._folder: Path | None = None
        self._promoted: Path | None = None

    def attach(self, folder: Path, *, promoted: Path) -> None:
        """Keep the checkpoints in ``folder``; those promoted lie in another."""
        self._folder, self._promoted = folder, promoted

    def path(self, step: int) -> Path:
        assert self._folder is not None
        return self._folder / f"step-{step}.ckpt"

    def available(self, trainer: pl.Trainer) -> list[int]:
        """The steps of which there is a checkpoint, in the ring or promoted; the same on all ranks.

        A run that is resumed from before its window's end finds its ring gone, but not what was
        promoted.
        """
        steps = [step for step in self.steps if self._source(step) is not None]
        return list(trainer.strategy.broadcast(steps))

    def _source(self, step: int) -> Path | None:
        if self.path(step).exists():
            return self.path(step)
        assert self._promoted is not None
        return next(iter(sorted(self._promoted.glob(f"*-step{step}.ckpt"))), None)

    def save(self, trainer: pl.Trainer, step: int, *, wanted: Sequence[int]) -> bool:
        """Save the Trainer's present state as that of ``step``; returns whether it is on disk.

        Must be called on all ranks, after ``global_step`` has changed and from
        ``on_train_batch_end``, where Lightning's counters allow an exact resume.
        """
        if step not in self.steps:
            self.steps.append(step)  # before saving: the checkpoint's own state then lists it
            failure = write_checkpoint(trainer, self.path(step))
            if failure is not None:
                self.steps.remove(step)
                self.n_failed += 1
                if self.n_failed == 1:
                    warnings.warn(
                        f"the checkpoint of step {step} could not be written to {self._folder} "
                        f"({failure}); training goes on, but a window's checkpoints may be missing",
                        stacklevel=2,
                    )
                return False
        while len(self.steps) > self.size:
            gone = to_evict(self.steps, wanted)
            self.steps.remove(gone)
            if trainer.is_global_zero:
                self.path(gone).unlink(missing_ok=True)
        return True

    def promote(self, trainer: pl.Trainer, step: int, destination: Path) -> None:
        """Keep the checkpoint of ``step`` as ``destination`` too, whatever the ring does."""
        source = self._source(step)
        if not trainer.is_global_zero or source is None or source == destination:
            return
        with atomic_path(destination) as part:
            try:
                os.link(source, part)  # such a file is never written again, only replaced
            except OSError:
                shutil.copyfile(source, part)

    def clear(self, trainer: pl.Trainer) -> None:
        """Remove the ring's own files, also those that an interrupted run left there."""
        if trainer.is_global_zero and self._folder is not None and self._folder.is_dir():
            for path in [*self._folder.glob("step-*.ckpt"), *self._folder.glob(".step-*.part")]:
                path.unlink(missing_ok=True)
            if not any(self._folder.iterdir()):
                self._folder.rmdir()
        self.steps = []
