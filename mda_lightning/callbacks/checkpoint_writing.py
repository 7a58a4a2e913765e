"""One checkpoint of the Trainer, whole or absent; a failure to write it is told, not raised."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from mda_lightning.callbacks.attachment import UnsupportedTrainerError, check_strategy


def check_checkpointing(trainer: pl.Trainer, who: str) -> None:
    """Refuse Trainers whose checkpoints :func:`write_checkpoint` cannot write.

    Raises:
        UnsupportedTrainerError: a strategy that shards the weights, or checkpoints that are written
            in the background.
    """
    check_strategy(trainer, who, why="rank 0 writes its checkpoints")
    if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
        raise UnsupportedTrainerError(
            f"{who} cannot work with AsyncCheckpointIO: it renames a checkpoint once it is whole "
            "and tells when it could not be written, and must wait for that; leave the plugin out"
        )


def write_checkpoint(
    trainer: pl.Trainer, path: Path, *, weights_only: bool = False
) -> OSError | None:
    """Save the Trainer's present state as ``path``: written aside, then renamed over it.

    Must be called on all ranks; all come to the same result. Whatever was written in part is
    removed. Lightning first writes into the system's temporary folder (``TMPDIR``), which needs
    room for one checkpoint too.

    Args:
        weights_only: leave out optimizers, schedulers and callbacks.

    Returns:
        None, or why the checkpoint is not there: no room, no permission, ``path`` is a folder. What
        ``path`` was before then stays.

    Raises:
        Exception: whatever else goes wrong while the state is gathered.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        failure = _agreed(trainer, _prepare(trainer, path.parent))
        if failure is not None:
            return failure
        failure = _save(trainer, part, weights_only=weights_only)
        is_saved = trainer.strategy.reduce_boolean_decision(failure is None)
        if trainer.is_global_zero and failure is None:
            failure = _rename(part, path) if is_saved else OSError("another rank could not save")
        return _agreed(trainer, failure)
    finally:
        if trainer.is_global_zero:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def _prepare(trainer: pl.Trainer, folder: Path) -> OSError | None:
    if not trainer.is_global_zero:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error
    # Asked, since Lightning drops the PermissionError that it meets when it writes.
    if not os.access(folder, os.W_OK):
        return PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return None


def _save(trainer: pl.Trainer, part: Path, *, weights_only: bool) -> OSError | None:
    try:
        trainer.save_checkpoint(part, weights_only=weights_only)
    except (OSError, RuntimeError) as error:
        failure = _write_failure(error)
        if failure is None:
            raise
        # The other ranks wait where save_checkpoint would have ended.
        trainer.strategy.barrier("write_checkpoint")
        return failure
    return None


def _rename(part: Path, path: Path) -> OSError | None:
    try:
        os.replace(part, path)
    except OSError as error:
        return error
    return None


def _write_failure(error: OSError | RuntimeError) -> OSError | None:
    """The failure to write that an error stands for, or None where it is another."""
    if isinstance(error, OSError):
        return error
    for cause in (error.__cause__, error.__context__):
        if isinstance(cause, OSError):
            return cause
    # torch.save into a file, which a plugin may use: its zip writer forgets the system's reason.
    words = str(error).partition("\n")[0]
    return OSError(errno.EIO, words) if "inline_container.cc" in words else None


def _agreed(trainer: pl.Trainer, failure: OSError | None) -> OSError | None:
    """Rank 0's failure, on all ranks. Its words are sent, since not every exception can be."""
    words = trainer.strategy.broadcast(None if failure is None else str(failure))
    return None if words is None else failure or OSError(words)
