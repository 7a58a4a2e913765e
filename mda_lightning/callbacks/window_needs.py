"""What CriticalWindow needs of a Trainer, and how it says so before the first step."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

import lightning.pytorch as pl

from mda_lightning.callbacks.attachment import callbacks_before
from mda_lightning.callbacks.unit_monitor import UnitMonitor
from mda_lightning.callbacks.window_source import is_key_of
from mda_lightning.mechanisms import MECHANISMS
from mda_lightning.units import parse_unit
from mda_lightning.window import WindowRule


def monitor_of(trainer: pl.Trainer, me: pl.Callback, metric: str) -> UnitMonitor | None:
    """The monitor before ``me`` that measures ``metric``, as a mechanism or as a measure's key.

    Raises:
        ValueError: there is one, but it acts after ``me``.
    """
    before, after = callbacks_before(trainer, me, UnitMonitor)
    for monitor in before:
        if _measures(monitor, metric):
            return monitor
    if any(_measures(monitor, metric) for monitor in after):
        raise ValueError(
            f"CriticalWindow({metric!r}) stands before the UnitMonitor it follows; put it after "
            "that one in callbacks=[...]"
        )
    return None


def _measures(monitor: UnitMonitor, metric: str) -> bool:
    return any(is_key_of(name, metric) for name in monitor.measuring.names)


def check_arguments(
    *, targets: int | str | Sequence[str], on: str, every_n_steps: int, margin_steps: int
) -> None:
    """Refuse arguments of CriticalWindow that mean nothing.

    Raises:
        ValueError: one is out of range.
    """
    if every_n_steps < 1:
        raise ValueError(f"every_n_steps={every_n_steps}: read at most every step, 1")
    if margin_steps < 0:
        raise ValueError(f"margin_steps={margin_steps}: 0 or more steps after the close")
    if on not in ("train", "validation"):
        raise ValueError(f"on={on!r}: 'train' or 'validation'")
    if (targets if isinstance(targets, int) else len(targets)) < 1:
        raise ValueError(f"targets={targets}: at least one unit, by number or by name")


def check_metric(metric: str, *, chance: float | None, rule: WindowRule | None) -> None:
    """Refuse what is no monitor's mechanism and cannot be another metric.

    Raises:
        ValueError: a mechanism that no monitor measures, or a metric of which too little is known.
    """
    if metric in MECHANISMS:
        raise ValueError(
            f"CriticalWindow({metric!r}) follows a UnitMonitor that measures {metric!r} as a "
            f"mechanism, and there is none; put UnitMonitor(mechanisms=({metric!r},)) before it in "
            "callbacks=[...]"
        )
    if chance is None or rule is None:
        raise ValueError(
            f"CriticalWindow({metric!r}): no mechanism of a UnitMonitor has that name. Of another "
            "metric say where it begins and what a rise is: chance=..., and "
            "rule=WindowRule(minimum_up=..., level=None), which closes on a plateau; with "
            "falls=True, minimum_up is how far it must fall. Or put "
            f"UnitMonitor(mechanisms=({metric!r},)) before it in callbacks=[...]"
        )


def named_units(
    names: Sequence[object], units: Sequence[Hashable], monitor: UnitMonitor | None
) -> list[Hashable]:
    """The units of those names, in that order.

    Args:
        monitor: of the model whose heads they are, if they are.

    Raises:
        ValueError: one that the model lacks.
    """
    layout = None if monitor is None else monitor.layout
    known = {str(unit): unit for unit in units}
    for name in names:
        if str(name) not in known and layout is not None:
            try:
                layout.check(parse_unit(str(name)))
            except ValueError as error:
                raise ValueError(f"CriticalWindow(targets={list(names)}): {error}") from error
    if strangers := [name for name in names if str(name) not in known]:
        raise ValueError(
            f"CriticalWindow(targets={list(names)}): {strangers[0]} is not among the "
            f"{len(units)} units, {units[0]} to {units[-1]}"
        )
    return [known[str(name)] for name in names]


def own_folder(metric: str, base: Path, others: Iterable[tuple[str, Path]]) -> Path:
    """Where a window's files are: in ``base``, or, where others have the same, under its metric's
    name in there.

    Args:
        others: metric and base folder of the Trainer's other windows.

    Raises:
        ValueError: another one has the same name and folder.
    """
    alike = [other for other, folder in others if folder.resolve() == base.resolve()]
    if not alike:
        return base
    name = _file_name(metric)
    if any(_file_name(other) == name for other in alike):
        raise ValueError(
            f"two CriticalWindow({metric!r}) would write over each other's files in {base}; give "
            "one of them another folder=..."
        )
    return base / name


def _file_name(metric: str) -> str:
    return re.sub(r"[^\w.@+-]+", "-", metric)
