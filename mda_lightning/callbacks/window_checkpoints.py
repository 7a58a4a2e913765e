"""The checkpoints of a window: which are kept while it may come, and which when it is over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from mda_lightning.callbacks.checkpoint_ring import CheckpointRing
from mda_lightning.window import Edge, MechanismWindow, WindowEvent

PROMOTED = "window"
_QUIET = 5  # how many times as seldom checkpoints are kept while nothing stirs


class WindowCheckpoints:
    """A bounded ring of full checkpoints, and those of the window's start, midpoint and end.

    What is kept is decided from the steps alone, not from what is on disk: a resumed run decides as
    the run that never stopped.

    Args:
        size: checkpoints in the ring at most.
        every: evaluations between two of them while a unit is about to rise or rises; five times as
            many before.
    """

    def __init__(self, size: int, every: int) -> None:
        if every < 1:
            raise ValueError(f"ring_every={every}: at most every evaluation, 1")
        self._ring = CheckpointRing(size)
        self._every = every
        self._folder: Path | None = None
        self._kept: dict[Edge, int] = {}

    @property
    def paths(self) -> dict[Edge, tuple[int, Path]]:
        """Promoted checkpoints: edge -> (step, path)."""
        return {edge: (step, self._path(edge, step)) for edge, step in self._kept.items()}

    @property
    def n_lost(self) -> int:
        """Checkpoints that could not be written."""
        return self._ring.n_failed

    def attach(self, folder: Path) -> None:
        """Keep the ring in ``folder/ring`` and what is promoted in ``folder/window``."""
        self._folder = folder
        self._ring.attach(folder / "ring", promoted=folder / PROMOTED)

    def begin(self) -> None:
        """Forget the checkpoints of a former fit; their files stay."""
        self._kept, self._ring.steps = {}, []

    def keep(
        self,
        trainer: pl.Trainer,
        step: int,
        follower: MechanismWindow[Any],
        events: Sequence[WindowEvent],
    ) -> None:
        """After an evaluation at ``step``, the training's present state: save it where it may be
        wanted, and promote what is, once the window is over. On all ranks."""
        closed = follower.phase == "closed"
        every = self._every * (1 if follower.asks else _QUIET)
        due = (follower.detector.n_evaluations - 1) % every == 0
        turning = any(event.kind in ("warning", "closed") for event in events)
        if not (due or closed or turning):
            return
        if closed:
            # Known before it is saved, so that the end's own checkpoint lists all three.
            self._kept = follower.edges([*self._ring.available(trainer), step])
        self._ring.save(trainer, step, wanted=follower.wanted())
        if closed:
            self.promote(trainer, follower)
            self._ring.clear(trainer)

    def promote(self, trainer: pl.Trainer, follower: MechanismWindow[Any]) -> None:
        """Keep the checkpoints of the window's edges for good. On all ranks."""
        former = self.paths
        self._kept = follower.edges(self._ring.available(trainer))
        for step, path in self.paths.values():
            self._ring.promote(trainer, step, path)
        stale = {path for _, path in former.values()} - {path for _, path in self.paths.values()}
        if trainer.is_global_zero:
            for path in stale:
                path.unlink(missing_ok=True)

    def clear(self, trainer: pl.Trainer) -> None:
        """Remove the ring's files. On all ranks."""
        self._ring.clear(trainer)

    def _path(self, edge: Edge, step: int) -> Path:
        assert self._folder is not None
        return self._folder / PROMOTED / f"{edge}-step{step}.ckpt"

    def state_dict(self) -> dict[str, Any]:
        return {
            "ring": list(self._ring.steps),
            "kept": {str(edge): step for edge, step in self._kept.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], *, now: int) -> None:
        """Take up the state of a checkpoint saved at step ``now``."""
        self._ring.steps = [int(step) for step in state["ring"] if step <= now]
        self._kept = {
            edge: int(step)
            for edge, step in state["kept"].items()
            if self._path(edge, int(step)).exists()
        }
