"""What every callback here needs of a Trainer before the first step, checked at ``setup``."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from mda_lightning import __version__
from mda_lightning.measures import Measure
from mda_lightning.mechanisms import Mechanism, mechanism

C = TypeVar("C", bound=pl.Callback)


class UnsupportedTrainerError(RuntimeError):
    """The Trainer trains in a way in which a model's heads cannot be looked at."""


def check_strategy(
    trainer: pl.Trainer, who: str, *, why: str = "it runs the model by itself"
) -> None:
    """Refuse strategies under which no rank holds whole weights.

    Args:
        why: why ``who`` needs them.

    Raises:
        UnsupportedTrainerError: FSDP, FSDP2 (ModelParallel) or DeepSpeed.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        raise UnsupportedTrainerError(
            f"{who} cannot work under {type(trainer.strategy).__name__}: {why}, and no rank holds "
            "whole weights; use strategy='ddp' or one device"
        )


def build_mechanism(
    wanted: str | Mechanism, token_ids: Sequence[int] | None, **settings: Any
) -> Mechanism:
    """A mechanism by name or as given; ``token_ids`` are used where it has none of its own."""
    built = mechanism(wanted, **settings) if isinstance(wanted, str) else wanted
    if token_ids is not None and not has_token_ids(built):
        built = built.with_token_ids([int(i) for i in token_ids])
    return built


def has_token_ids(one: Mechanism | Measure) -> bool:
    """Whether it has token ids of its own: as an attribute, or among its settings."""
    own = getattr(one, "token_ids", None)
    return own is not None or one.settings().get("token_ids") is not None


def callbacks_before(
    trainer: pl.Trainer, me: pl.Callback, kind: type[C]
) -> tuple[list[C], list[C]]:
    """The Trainer's callbacks of one kind that act before ``me``, and those that act after."""
    callbacks = callbacks_of(trainer)
    mine = next(i for i, callback in enumerate(callbacks) if callback is me)
    before = [c for c in callbacks[:mine] if isinstance(c, kind)]
    after = [c for c in callbacks[mine:] if isinstance(c, kind)]
    return before, after


def is_rehearsal(trainer: pl.Trainer) -> bool:
    """Whether this is a ``fast_dev_run``, which leaves no files."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """All callbacks, in the order in which they act."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def warn_of_other_folder(who: str, former: str, now: Path | None) -> None:
    """Say that a resumed run writes elsewhere than the run it goes on from."""
    if now is not None and former not in ("None", str(now)):
        warnings.warn(
            f"{who}: the checkpoint's run wrote to {former}, this one writes to {now}; what the "
            f"former left there (checkpoints, rows) is not taken up. Give folder={former!r} to go "
            "on with it",
            stacklevel=3,
        )


def state_key(name: str, arguments: dict[str, Any]) -> str:
    """A short checkpoint key, the same for the same constructor arguments."""
    text = json.dumps(arguments, sort_keys=True, default=str)
    return f"{name}[{hashlib.sha256(text.encode()).hexdigest()[:16]}]"


def versions() -> dict[str, str]:
    """The versions that provenance records."""
    return {
        "mda_lightning": __version__,
        "torch": torch.__version__,
        "lightning": version("lightning"),
    }
