"""What OnlineSteering needs of a Trainer and of its policies, and how it says so at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from mda_lightning.callbacks.attachment import UnsupportedTrainerError, callbacks_before
from mda_lightning.callbacks.critical_window import CriticalWindow
from mda_lightning.callbacks.influence_scoring import InfluenceScoring
from mda_lightning.callbacks.steering.amplify import Amplify
from mda_lightning.callbacks.steering.policies import Policy
from mda_lightning.callbacks.steering.targets import Target
from mda_lightning.callbacks.unit_monitor import UnitMonitor
from mda_lightning.pretraining.run_folder import run_folder
from mda_lightning.units import Head, parse_unit

Units = Literal["all", "target"] | Sequence[str]


def named(given: Policy | Sequence[Policy]) -> list[Policy]:
    """The policies, those without a name called as their class, and numbered where there are more.

    Raises:
        ValueError: none, something else, or two of one name.
    """
    some = [given] if isinstance(given, Policy | str) or not isinstance(given, Iterable) else given
    policies = list(some)
    if not policies:
        raise ValueError("policy=[]: give one or more, for example policy=Suppress(share=0.1)")
    for policy in policies:
        if not isinstance(policy, Policy):
            raise ValueError(f"policy={policy!r}: Amplify(...), Suppress(...) or FromScores(...)")
        if not policy.name:
            kind = type(policy).__name__
            taken = {one.name for one in policies}
            names = [kind, *(f"{kind}-{i}" for i in range(2, len(policies) + 2))]
            policy.name = next(name for name in names if name not in taken)
    names = [policy.name for policy in policies]
    if len(set(names)) < len(names):
        raise ValueError(f"policies named {names}: give each a name of its own")
    return policies


def check_directions(policies: Sequence[Policy], target: Target | None) -> None:
    """Refuse a target that no policy can serve; warn of policies that work against each other.

    Raises:
        ValueError: the target pushes in no direction that a policy has.
    """
    directions = {policy.direction for policy in policies}
    if target is not None:
        if not directions & set(target.directions):
            word = "up" if target.directions == (1,) else "down"
            raise ValueError(
                f"{type(target).__name__} pushes {word}, and no policy does "
                f"({', '.join(p.name for p in policies)}): Amplify of the top and Suppress of the "
                "bottom push up, Suppress of the top and Amplify of the bottom push down"
            )
        return
    far = 2**62
    for one, other in combinations(policies, 2):
        (first, last), (begin, end) = one.steps(far), other.steps(far)
        if one.direction != other.direction and first <= end and begin <= last:
            warnings.warn(
                f"{one.name} and {other.name} push in opposite directions in the same steps and "
                "there is no target to choose between them; give target=..., or active=(first, "
                "last) that do not meet",
                stacklevel=4,
            )


def named_units(units: Units) -> tuple[str, ...] | None:
    """Names of heads, None for "all" and "target".

    Raises:
        ValueError: another word, no head, or one twice.
    """
    if isinstance(units, str):
        if units not in ("all", "target"):
            raise ValueError(f"units={units!r}: 'all', 'target', or a list such as [{units!r}]")
        return None
    names = tuple(str(parse_unit(unit)) for unit in units)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"units={list(units)}: one or more heads, each once")
    return names


def check_trainer(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    me: pl.Callback,
    policies: Sequence[Policy],
) -> None:
    """Refuse what cannot be steered.

    Raises:
        ValueError: no TokenDataModule, another callback of the kind, or insertions with "shift"
            into a run whose number of steps is not given.
        UnsupportedTrainerError: manual optimization.
    """
    data: Any = getattr(trainer, "datamodule", None)
    if not (hasattr(data, "steer") and hasattr(data, "schedule")):
        raise ValueError(
            "OnlineSteering changes the stream of a TokenDataModule (this run's data module: "
            f"{type(data).__name__}); pass trainer.fit(..., datamodule=TokenDataModule(...))"
        )
    if not module.automatic_optimization:
        raise UnsupportedTrainerError(
            "OnlineSteering must know which step comes next, which manual optimization does not "
            "tell; use automatic optimization"
        )
    shifting = [one.name for one in policies if getattr(one, "placement", "") == "shift"]
    if shifting and trainer.max_steps < 0:
        raise ValueError(
            f"{', '.join(shifting)} has placement='shift', by which the stream grows while the run "
            "goes on: a resumed run would be longer than one that was not interrupted. Give "
            f"Trainer(max_steps={len(data.schedule)}), or use placement='replace'"
        )
    before, _ = callbacks_before(trainer, me, type(me))
    if before:
        raise ValueError(
            "two OnlineSteering change one stream, and one audit table would lack what the other "
            "decided; give one of them all policies: policy=[..., ...]"
        )


def monitor_of(trainer: pl.Trainer, me: pl.Callback, mechanism: str) -> UnitMonitor:
    """The UnitMonitor whose μ a target follows.

    Raises:
        ValueError: none that measures the mechanism acts before ``me``.
    """
    before, after = callbacks_before(trainer, me, UnitMonitor)
    for monitor in before:
        if monitor.mechanism(mechanism) is not None:
            return monitor
    is_after = any(monitor.mechanism(mechanism) is not None for monitor in after)
    raise ValueError(
        f"OnlineSteering({mechanism!r}) has a target and nobody measures {mechanism!r} before it: "
        + (
            "put it after its UnitMonitor in callbacks=[...]"
            if is_after
            else f"put UnitMonitor([{mechanism!r}]) before it in callbacks=[...]"
        )
    )


def folder_of(trainer: pl.Trainer, me: pl.Callback, wanted: str | None) -> Path:
    """Where steering writes: as told, else with a UnitMonitor before it, else with the ledger.

    Without either it is ``mda/`` in the logger's folder.
    """
    before, _ = callbacks_before(trainer, me, UnitMonitor)
    if wanted is None and before and before[0].folder is not None:
        return before[0].folder
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return run_folder(trainer, wanted or data.folder)


def window_of(trainer: pl.Trainer, me: pl.Callback, mechanism: str, why: str) -> CriticalWindow:
    """The CriticalWindow that acts before ``me``.

    Raises:
        ValueError: there is none.
    """
    before, _ = callbacks_before(trainer, me, CriticalWindow)
    for window in before:
        if window.mechanism == mechanism:
            return window
    raise ValueError(
        f"OnlineSteering({mechanism!r}) has {why} and no window to follow: put "
        f"CriticalWindow({mechanism!r}) before it in callbacks=[...]"
    )


def scoring_of(
    trainer: pl.Trainer, me: pl.Callback, mechanism: str, units: Sequence[Head]
) -> InfluenceScoring:
    """The in-run scoring that :class:`Amplify` reads.

    Raises:
        ValueError: none that scores these units of the mechanism acts before ``me``.
    """
    before, _ = callbacks_before(trainer, me, InfluenceScoring)
    for scoring in before:
        if scoring.estimator != "in_run" or mechanism not in scoring.mechanism_names:
            continue
        missing = [str(unit) for unit in units if unit not in scoring.units]
        if not missing:
            return scoring
        raise ValueError(
            f"InfluenceScoring({mechanism!r}) does not score {', '.join(missing)}, by which "
            "OnlineSteering is to steer; name the same units in both"
        )
    raise ValueError(
        f"{Amplify.__name__} inserts what in-run scoring found, and nobody scores {mechanism!r} "
        f"before it: put InfluenceScoring({mechanism!r}, estimator='in_run', active='always') "
        "before OnlineSteering in callbacks=[...]"
    )
