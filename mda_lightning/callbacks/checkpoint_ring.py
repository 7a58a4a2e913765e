"""A bounded ring of full checkpoints, of which those that turn out to matter are promoted."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import get_args

import lightning.pytorch as pl

from mda_lightning.callbacks.checkpoint_writing import write_checkpoint
from mda_lightning.files import atomic_path
from mda_lightning.window import Edge

EDGES: tuple[Edge, ...] = get_args(Edge)


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

    A checkpoint that cannot be written (no room, no permission) is reported once and counted, and
    training goes on without it.

    Args:
        size: how many checkpoints are on disk at most, but for a moment; at least 3.

    Attributes:
        steps: of the checkpoints that the ring holds, increasing.
        n_lost: checkpoints that could not be written or promoted.
    """

    def __init__(self, size: int) -> None:
        if size < 3:
            raise ValueError(
                f"ring={size} is too few checkpoints: a window's start, its newest and one between "
                "need 3"
            )
        self.size = size
        self.steps: list[int] = []
        self.n_lost = 0
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
        steps = [step for step in self.steps if self.holds(step)]
        return list(trainer.strategy.broadcast(steps))

    def holds(self, step: int) -> bool:
        """Whether this rank sees a checkpoint of ``step``, in the ring or promoted."""
        return self._source(step) is not None

    def _source(self, step: int) -> Path | None:
        if self.path(step).exists():
            return self.path(step)
        assert self._promoted is not None
        found = [self._promoted / f"{edge}-step{step}.ckpt" for edge in EDGES]
        return next((path for path in found if path.exists()), None)

    def save(
        self, trainer: pl.Trainer, step: int, *, wanted: Sequence[int], is_last: bool = False
    ) -> bool:
        """Save the Trainer's present state as that of ``step``; returns whether it is on disk.

        Must be called on all ranks, after ``global_step`` has changed and from a hook where
        Lightning's counters allow an exact resume.

        Args:
            wanted: see :func:`to_evict`.
            is_last: nothing is evicted: what is not promoted is cleared next.
        """
        former = self.steps
        # Before saving: the checkpoint's own state then lists what the ring will hold.
        self.steps = sorted({*former, step})
        while len(self.steps) > self.size and not is_last:
            self.steps.remove(to_evict(self.steps, wanted))
        if step not in former:
            failure = write_checkpoint(trainer, self.path(step))
            if failure is not None:
                self.steps = former
                self._lose(f"the checkpoint of step {step} could not be written", failure)
                return False
        self._tidy(trainer)
        return True

    def promote(self, trainer: pl.Trainer, step: int, destination: Path) -> bool:
        """Keep the checkpoint of ``step`` as ``destination`` too, whatever the ring does.

        Returns whether it is there; the same on all ranks.
        """
        failure = None
        if trainer.is_global_zero:
            failure = self._link(step, destination)
        failure = trainer.strategy.broadcast(failure)
        if failure is not None:
            self._lose(f"the checkpoint of step {step} could not be kept as {destination}", failure)
        return failure is None

    def _link(self, step: int, destination: Path) -> str | None:
        source = self._source(step)
        if source is None:
            return "it is gone"
        if source == destination:
            return None
        try:
            with atomic_path(destination) as part:
                try:
                    os.link(source, part)  # such a file is never written again, only replaced
                except OSError:
                    shutil.copyfile(source, part)
        except OSError as error:
            return str(error)
        return None

    def _lose(self, what: str, why: object) -> None:
        self.n_lost += 1
        if self.n_lost == 1:
            warnings.warn(
                f"{what} ({why}); training goes on, but a window's checkpoints may be missing",
                stacklevel=4,
            )

    def _tidy(self, trainer: pl.Trainer) -> None:
        """Remove files that the ring does not hold: evicted ones, and those of a run that was
        killed, from here or from before this run went back."""
        if trainer.is_global_zero and self._folder is not None and self._folder.is_dir():
            held = {self.path(step) for step in self.steps}
            for path in [*self._folder.glob("step-*.ckpt"), *self._folder.glob(".step-*.part")]:
                if path not in held:
                    with suppress(OSError):
                        path.unlink(missing_ok=True)

    def clear(self, trainer: pl.Trainer) -> None:
        """Remove the ring's own files, also those that an interrupted run left there."""
        self.steps = []
        self._tidy(trainer)
        if trainer.is_global_zero and self._folder is not None:
            with suppress(OSError):  # not there, or something of somebody else's is in it
                self._folder.rmdir()
