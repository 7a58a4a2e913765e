"""Files of plans: what they are called, and what is not written over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mda_lightning.interventions import Plan
from mda_lightning.interventions.operations import Steps


def name_of_plan(
    action: str, samples: str, steps: Steps | None, window: Steps | None = None
) -> str:
    """What a plan is called where nothing is said: what it does, to which samples, in which steps.

    Args:
        samples: such as ``"top-10-percent-L1H2"``; "" for none.
        steps: where it acts; None is the whole run.
        window: where its samples were chosen.
    """
    parts = [action, samples]
    if window is not None and window != steps:
        parts += [f"of-{window[0]}-{window[1]}"]
    if steps is not None:
        parts += [f"{steps[0]}-{steps[1]}"]
    return "-".join(part for part in parts if part)


def control_paths(path: Path, n_controls: int) -> list[Path]:
    """Where the controls of a plan file go: ``<plan>-random.json``, or numbered from 1."""
    if n_controls < 1:
        return []
    if n_controls == 1:
        return [path.with_name(f"{path.stem}-random{path.suffix}")]
    return [
        path.with_name(f"{path.stem}-random-{number}{path.suffix}")
        for number in range(1, n_controls + 1)
    ]


def refuse_overwriting(plans: Sequence[tuple[Plan, Path]], *, force: bool) -> None:
    """Check, before anything is written, that no file holds anything else than is to be written.

    Raises:
        ValueError: one does.
    """
    for plan, path in plans:
        if force or not path.exists():
            continue
        there = _held(path)
        if there is None or there.content_hash != plan.content_hash:
            refuse(path, there)


def refuse(path: Path, there: Plan | None) -> None:
    """Say that a file is not written over.

    Raises:
        ValueError: always.
    """
    what = "something else" if there is None else f"another plan ({there.content_hash[:12]})"
    raise ValueError(
        f"{path} holds {what}, which is kept; give another --output or --name, or --force to write "
        "over it"
    )


def controls_of_others(plan: Plan, path: Path, own: Sequence[Path]) -> list[str]:
    """Controls of another plan that lie where those of this one are looked for, as a warning."""
    beside = [
        one for one in sorted(path.parent.glob(f"{path.stem}-random*.json")) if one not in own
    ]
    wrong = [
        str(one)
        for one in beside
        if (held := _held(one)) is not None
        and held.source.get("control_of") not in (None, plan.content_hash)
    ]
    if not wrong:
        return []
    are = "is a control" if len(wrong) == 1 else "are controls"
    return [f"{', '.join(wrong)} {are} of another plan than the one that is there now"]


def _held(path: Path) -> Plan | None:
    try:
        return Plan.load(path)
    except (OSError, ValueError):
        return None
