"""What InfluenceScoring needs of a Trainer, and how it says so before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from torch import Tensor, nn

from mda_lightning.callbacks.attachment import UnsupportedTrainerError, callbacks_before
from mda_lightning.callbacks.critical_window import CriticalWindow
from mda_lightning.callbacks.unit_monitor import UnitMonitor
from mda_lightning.curvature import Fisher, check_damping
from mda_lightning.influence.inverse_probes import CurvatureSettings
from mda_lightning.mechanisms import Mechanism
from mda_lightning.units import parse_unit

Estimator = Literal["in_run", "replay"]


def check_arguments(
    *,
    estimator: str,
    units: Sequence[str] | str,
    active: object,
    replay_at: Sequence[str],
    has_curvature_set: bool,
    counts: Mapping[str, int | str | None],
    loss_reduction: str,
    curvature: CurvatureSettings,
) -> None:
    """Refuse arguments that mean nothing or contradict each other.

    Args:
        counts: by name; None where it is not given.

    Raises:
        ValueError: one is out of range or not among its choices, names a head twice, or is of the
            other estimator.
    """
    for name, value, choices in (
        ("estimator", estimator, get_args(Estimator)),
        ("loss_reduction", loss_reduction, ("mean", "sum")),
        ("curvature", curvature.kind, ("ekfac", "kfac", "identity")),
        ("fisher", curvature.fisher, get_args(Fisher)),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r}: one of {', '.join(map(repr, choices))}")
    in_run = estimator == "in_run"
    for name, count in counts.items():
        automatic = name == "n_curvature" and not in_run
        if count is None or (automatic and count == "auto"):
            continue
        if isinstance(count, str) or count < 1:
            hint = (", or 'auto' in replay" if in_run else ", or 'auto'") * (name == "n_curvature")
            raise ValueError(f"{name}={count!r}: a number, at least 1{hint}")
    check_damping(curvature.damping)
    if curvature.seed < 0:
        raise ValueError(f"seed={curvature.seed}: 0 or more")
    if not replay_at or set(replay_at) - {"start", "mid", "end"}:
        raise ValueError(f"replay_at={tuple(replay_at)}: one or more of 'start', 'mid', 'end'")
    if isinstance(units, str):
        if units not in ("all", "target"):
            raise ValueError(f"units={units!r}: 'all', 'target', or a list such as [{units!r}]")
        if units == "target" and in_run:
            raise ValueError("units='target' is known only afterwards: use estimator='replay'")
    else:
        named = [str(parse_unit(unit)) for unit in units]
        twice = sorted({name for name in named if named.count(name) > 1})
        if not named or twice:
            what = f"{', '.join(twice)} more than once" if twice else "no head"
            raise ValueError(f"units={list(units)} names {what}; name each to be scored once")
    if not in_run and has_curvature_set:
        raise ValueError("curvature_set is for estimator='in_run'; replay takes the window's own")
    if not in_run and active != "window":
        raise ValueError(f"active={active!r} is for estimator='in_run'; replay scores the window")


def monitor_before(trainer: pl.Trainer, me: pl.Callback) -> UnitMonitor | None:
    """The first UnitMonitor that acts before ``me``."""
    return next(iter(callbacks_before(trainer, me, UnitMonitor)[0]), None)


def window_before(trainer: pl.Trainer, me: pl.Callback, mechanism: str) -> CriticalWindow | None:
    """The CriticalWindow of a mechanism that acts before ``me``.

    Raises:
        ValueError: it stands after ``me``.
    """
    before, after = callbacks_before(trainer, me, CriticalWindow)
    for window in before:
        if window.mechanism == mechanism:
            return window
    if any(window.mechanism == mechanism for window in after):
        raise ValueError(
            f"InfluenceScoring({mechanism!r}) stands before the CriticalWindow it follows; put it "
            "after that one in callbacks=[...]"
        )
    return None


def check_names(mechanisms: Sequence[Mechanism]) -> None:
    """Refuse mechanisms that would share a table.

    Raises:
        ValueError: none, or two of one name.
    """
    names = [one.name for one in mechanisms]
    if not names or len(set(names)) != len(names):
        raise ValueError(
            f"mechanisms {names}: give one or more, each name once; settings of the same mechanism "
            "are compared by an InfluenceScoring each, with a folder of its own"
        )


def check_alone(trainer: pl.Trainer, me: Any, names: Sequence[str]) -> None:
    """Refuse another InfluenceScoring that would write the same table.

    Raises:
        ValueError: there is one.
    """
    before, _ = callbacks_before(trainer, me, type(me))
    for other in before:
        common = sorted(set(names) & set(other.mechanism_names))
        if other.folder == me.folder and common:
            raise ValueError(
                f"two InfluenceScoring write the scores of {', '.join(common)} to {me.folder}; "
                "give one of them folder='...'"
            )


def check_setup(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    *,
    mechanism: Mechanism,
    estimator: Estimator,
    by_window: bool,
    window: CriticalWindow | None,
) -> None:
    """Refuse what cannot work.

    Raises:
        ValueError: no CriticalWindow where one is needed, or replay without TokenDataModule.
        UnsupportedTrainerError: in-run scoring under manual optimization.
    """
    name = mechanism.name
    if window is None and (estimator == "replay" or by_window):
        raise ValueError(
            f"InfluenceScoring({name!r}) has no window to score: put CriticalWindow({name!r}) "
            "before it in callbacks=[...]"
            + ("" if estimator == "replay" else ", or give active='always'")
        )
    data: Any = getattr(trainer, "datamodule", None)
    if estimator == "replay" and not (hasattr(data, "rows") and hasattr(data, "schedule")):
        raise ValueError(
            "replay goes through the window's samples a second time, and only a TokenDataModule "
            f"says which they were (this run's data module: {type(data).__name__}); "
            "use estimator='in_run', which scores them as they are trained on"
        )
    if estimator == "in_run" and not module.automatic_optimization:
        raise UnsupportedTrainerError(
            "in-run scoring must know how the loss was scaled, which manual optimization does not "
            "tell; use automatic optimization or estimator='replay'"
        )


def check_not_wrapped(module: pl.LightningModule) -> None:
    """Refuse a model that was compiled by wrapping it.

    Raises:
        UnsupportedTrainerError: ``torch.compile(model)`` is somewhere in the module.
    """
    for name, part in module.named_modules():
        if type(part).__name__ == "OptimizedModule":
            raise UnsupportedTrainerError(
                f"{name or 'the module'} is wrapped by torch.compile(...); compile it in place, "
                "model.compile(...), or use estimator='replay'"
            )


def nothing_came(step: int, model: nn.Module) -> str:
    """Why a scored step left no gradient at the model's heads, as far as can be told."""
    name = type(model).__name__
    if any(part._compiled_call_impl is not None for part in model.modules()):
        return (
            f"step {step} left no gradient at the heads of {name}, which is compiled: code from "
            "before this fit knows nothing of the hooks by which in-run scoring listens. "
            "Call torch.compiler.reset() before trainer.fit(...), or use estimator='replay'"
        )
    return (
        f"step {step} left no gradient at the heads of {name}: the training step did not run it, "
        "or they are frozen; use estimator='replay', or score another model with model='...'"
    )


def to_summed_loss(
    trainer: pl.Trainer, tokens: Tensor, *, reduction: Literal["mean", "sum"]
) -> float:
    """What the loss that was differentiated must be multiplied by to be a sum over positions.

    Args:
        trainer: its gradient accumulation divides the loss, and its scaler multiplies it.
        tokens: the batch [B, T+1]; below 0 where it is filled up.
        reduction: how the loss is made of token losses.
    """
    factor = float(trainer.accumulate_grad_batches)
    if reduction == "mean":
        factor *= int((tokens[:, 1:] >= 0).sum())
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return factor if scaler is None else factor / float(scaler.get_scale())
