"""The checkpoints of a window: which are kept while it may come, and which when it is over."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from mda_lightning.callbacks.checkpoint_ring import EDGES, CheckpointRing
from mda_lightning.window import Edge, MechanismWindow, WindowEvent

PROMOTED = "window"
_QUIET = 5  # how many times as seldom checkpoints are kept while nothing stirs
_EDGES = "|".join(EDGES)
_FILE = re.compile(rf"(?:{_EDGES})-step(\d+)\.ckpt")
_PART = re.compile(rf"\.(?:{_EDGES})-step\d+\.part-[0-9a-f]+\.ckpt")


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
        """Checkpoints that could not be written or promoted."""
        return self._ring.n_lost

    def attach(self, folder: Path) -> None:
        """Keep the ring in ``folder/ring`` and what is promoted in ``folder/window``."""
        self._folder = folder
        self._ring.attach(folder / "ring", promoted=folder / PROMOTED)

    def begin(self) -> None:
        """Forget the checkpoints of a former fit; their files stay."""
        self._kept, self._ring.steps, self._ring.n_lost = {}, [], 0

    def start(self, trainer: pl.Trainer, follower: MechanismWindow[Any] | None) -> None:
        """At the start of training: see what a former run left in the folder. On all ranks."""
        if trainer.global_step == 0 and not self._ring.steps:
            self._ring.clear(trainer)
            self._warn_of_former(trainer)
            return
        # The run that found the end may have been killed before it had promoted.
        unfinished = follower is not None and follower.phase == "closed" and bool(self._ring.steps)
        here = {
            edge: step
            for edge, (step, path) in self.paths.items()
            if path.exists() or (unfinished and self._ring.holds(step))
        }
        self._kept = trainer.strategy.broadcast(here)
        if unfinished:
            self._finish(trainer)

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
        available = self._ring.available(trainer) if closed else []
        if closed:
            # Known before it is saved, so that the end's own checkpoint lists all three.
            self._kept = follower.edges([*available, step])
        saved = self._ring.save(trainer, step, wanted=follower.wanted(), is_last=closed)
        if closed:
            if not saved:
                self._kept = follower.edges(available)
            self._finish(trainer)

    def promote(self, trainer: pl.Trainer, follower: MechanismWindow[Any]) -> None:
        """Keep for good the checkpoints of the edges of a window that is not over. On all ranks."""
        self._kept = follower.edges(self._ring.available(trainer))
        self._promote(trainer)
        self._tidy(trainer)

    def clear(self, trainer: pl.Trainer) -> None:
        """Remove the ring's files. On all ranks."""
        self._ring.clear(trainer)

    def _finish(self, trainer: pl.Trainer) -> None:
        """Promote the checkpoints of a window that is over, and clear the ring."""
        if self._promote(trainer):
            self._ring.clear(trainer)
        else:
            self._ring.steps = []  # what could not be promoted is still there, for the user to find
        self._tidy(trainer)

    def _promote(self, trainer: pl.Trainer) -> bool:
        """Whether all of what is wanted is there; what is not is no longer listed."""
        done = {
            edge: self._ring.promote(trainer, step, path)
            for edge, (step, path) in self.paths.items()
        }
        self._kept = {edge: step for edge, step in self._kept.items() if done[edge]}
        return all(done.values())

    def _tidy(self, trainer: pl.Trainer) -> None:
        """Remove the promoted checkpoints that these ones replace, and what a killed run left.

        One of the ring's steps may be wanted yet, and of a run that has gone back it may be the
        only copy.
        """
        if not trainer.is_global_zero or not self._kept:
            return
        listed = {path for _, path in self.paths.values()}
        for path in self._promoted_files():
            match = _FILE.fullmatch(path.name)
            if path not in listed and not (match and int(match[1]) in self._ring.steps):
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _warn_of_former(self, trainer: pl.Trainer) -> None:
        old = [path for path in self._promoted_files() if _FILE.fullmatch(path.name)]
        if old and trainer.is_global_zero:
            warnings.warn(
                f"{old[0].parent} holds a former run's checkpoints, such as {old[0].name}; they "
                "are removed when this run's own are kept there. Give another folder=... to keep "
                "both",
                stacklevel=4,
            )

    def _promoted_files(self) -> list[Path]:
        """Files of these names, written in part ones among them."""
        assert self._folder is not None
        folder = self._folder / PROMOTED
        if not folder.is_dir():
            return []
        names = (_FILE, _PART)
        return sorted(p for p in folder.iterdir() if any(n.fullmatch(p.name) for n in names))

    def _path(self, edge: Edge, step: int) -> Path:
        assert self._folder is not None
        return self._folder / PROMOTED / f"{edge}-step{step}.ckpt"

    def state_dict(self) -> dict[str, Any]:
        return {
            "ring": list(self._ring.steps),
            "kept": {str(edge): step for edge, step in self._kept.items()},
            "lost": self._ring.n_lost,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ring.steps = [int(step) for step in state["ring"]]
        self._ring.n_lost = int(state.get("lost", 0))
        self._kept = {edge: int(state["kept"][edge]) for edge in EDGES if edge in state["kept"]}
