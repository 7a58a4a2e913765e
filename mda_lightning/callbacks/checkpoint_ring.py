"""A bounded ring of full checkpoints, of which those that turn out to matter are promoted."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl

from mda_lightning.files import atomic_path


def to_evict(steps: Sequence[int], starts: Sequence[int]) -> int:
    """Which of the kept checkpoints, by increasing step, is missed least.

    Args:
        steps: increasing steps of the checkpoints, at least 3. The newest always stays.
        starts: first steps of the windows that may turn out to matter, those most likely first.
            Without any, the oldest checkpoint goes. With them, the last checkpoint at or before
            each start stays, as long as there is room for more than those; that of the earliest
            start stays always. Of the others the one goes whose neighbours are closest together,
            so that what remains spans the window evenly.
    """
    if not starts:
        return steps[0]
    before = [max((s for s in steps if s <= start), default=None) for start in starts]
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

    def attach(self, folder: Path) -> None:
        """Keep the checkpoints in ``folder``."""
        self._folder = folder

    def path(self, step: int) -> Path:
        assert self._folder is not None
        return self._folder / f"step-{step}.ckpt"

    def restore(self, steps: Sequence[int], *, now: int) -> None:
        """Take up the ring of a checkpoint saved at step ``now``: what is still on disk of it."""
        self.steps = [s for s in steps if s <= now and self._folder and self.path(s).exists()]

    def save(self, trainer: pl.Trainer, step: int, *, starts: Sequence[int]) -> bool:
        """Save the Trainer's present state as that of ``step``; returns whether it is on disk.

        Must be called on all ranks, after ``global_step`` has changed and from
        ``on_train_batch_end``, where Lightning's counters allow an exact resume.
        """
        if step not in self.steps:
            self.steps.append(step)  # before saving: the checkpoint's own state then lists it
            failure = self._write(trainer, self.path(step))
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
            gone = to_evict(self.steps, starts)
            self.steps.remove(gone)
            if trainer.is_global_zero:
                self.path(gone).unlink(missing_ok=True)
        return True

    def at_or_before(self, step: int) -> int | None:
        """The last checkpoint whose step is at most ``step``."""
        return max((s for s in self.steps if s <= step), default=None)

    def nearest(self, step: int) -> int | None:
        """The checkpoint nearest to ``step``; the earlier of two."""
        return min(self.steps, key=lambda s: (abs(s - step), s), default=None)

    def promote(self, trainer: pl.Trainer, step: int, destination: Path) -> None:
        """Keep the checkpoint of ``step`` as ``destination`` too, whatever the ring does."""
        if trainer.is_global_zero:
            with atomic_path(destination) as part:
                try:
                    os.link(self.path(step), part)  # the ring's files are never written again
                except OSError:
                    shutil.copyfile(self.path(step), part)

    def clear(self, trainer: pl.Trainer) -> None:
        """Remove the ring's own files."""
        if trainer.is_global_zero:
            for step in self.steps:
                self.path(step).unlink(missing_ok=True)
            if (
                self._folder is not None
                and self._folder.is_dir()
                and not any(self._folder.iterdir())
            ):
                self._folder.rmdir()
        self.steps = []

    def _write(self, trainer: pl.Trainer, path: Path) -> OSError | None:
        part = path.with_name(f".{path.name}.part")
        try:
            if trainer.is_global_zero:
                path.parent.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(part, weights_only=False)
            if trainer.is_global_zero:
                os.replace(part, path)
        except OSError as error:
            if trainer.is_global_zero:
                part.unlink(missing_ok=True)
            # The other ranks wait where save_checkpoint would have ended.
            trainer.strategy.barrier("CheckpointRing")
            return error
        return None
