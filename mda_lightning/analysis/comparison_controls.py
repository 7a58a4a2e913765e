"""What an arm is held against, and how far that is a control of it.

A random control is matched to the arm that it was drawn for: as many samples, none of that arm's
own. Held against another arm it is a shared one, of which neither need hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mda_lightning.analysis.comparison_values import Against, ArmComparison, Treated
from mda_lightning.analysis.study import BASELINE, SeedRun, Study


def held_against(
    study: Study, seeds: Iterable[SeedRun], arm: str, other: str
) -> tuple[Against, tuple[Treated, ...]]:
    """The kind of comparison, and how many samples the two treat where the study says it.

    Args:
        seeds: those that have both arms.
    """
    counts = tuple(
        (seed.seed, seed.treated[arm], seed.treated[other])
        for seed in seeds
        if {arm, other} <= set(seed.treated)
    )
    if other == BASELINE:
        return "baseline", counts
    control = study.declared[other]
    if control.control_of == arm and not are_unequal(counts):
        return "matched", counts
    return ("shared" if control.is_random else "declared"), counts


def are_unequal(counts: Sequence[Treated]) -> bool:
    """Whether the two are known to treat different numbers of samples in some seed."""
    return any(mine != theirs for _, mine, theirs in counts)


def control_phrase(study: Study, against: Against, counts: Sequence[Treated], other: str) -> str:
    """How a sentence calls what an arm is held against.

    A control's own phrase says "as many random samples"; of a shared one that is kept where the
    study knows it to be so, and whom it was drawn for is added.
    """
    control = study.declared[other]
    if against != "shared":
        return control.phrase
    phrase = control.phrase
    if not counts or are_unequal(counts):
        phrase = phrase.replace("as many random samples", "random samples")
    return phrase if control.control_of is None else f"{phrase} (drawn for {control.control_of})"


def control_limits(study: Study, one: ArmComparison) -> list[str]:
    """What an arm's verdict has to say of its control."""
    other = study.declared[one.other]
    limits = []
    if one.against == "baseline":
        limits.append(
            "The untouched run is no matched control: how many samples were touched, rather than "
            "which, may be the reason."
        )
    elif one.against == "declared":
        limits.append(f"{one.other[:1].upper()}{one.other[1:]} is no random control, but an arm "
                      "of its own.")  # fmt: skip
    elif one.against == "shared" and other.control_of is None:
        limits.append(f"{one.other} is a random selection that was drawn for no arm.")
    elif one.against == "shared" and other.control_of != one.arm:
        limits.append(
            f"{one.other} is a shared random control, drawn for {other.control_of}: it may hold "
            "some of this arm's samples."
        )
    if one.other != BASELINE and are_unequal(one.treated):
        limits.append(f"{counts_text(one)}: that alone may be the reason.")
    return limits


def control_footnotes(study: Study, arms: Iterable[ArmComparison]) -> list[str]:
    """Below the table: which controls are shared, and where numbers of samples differ."""
    shared: dict[str, list[ArmComparison]] = {}
    for one in arms:
        if one.against == "shared":
            shared.setdefault(one.other, []).append(one)
    lines = []
    for other, group in shared.items():
        owner = study.declared[other].control_of
        drawn = "drawn for no arm" if owner is None else f"drawn for {owner}"
        of = ", ".join(one.arm for one in group if one.arm != owner)
        if of:
            lines.append(f"{other}: {drawn}; a shared random control, not matched, of {of}.")
    unequal = [
        counts_text(one) for one in arms if one.other != BASELINE and are_unequal(one.treated)
    ]
    return lines + ([f"Not as many samples: {'; '.join(unequal)}."] if unequal else [])


def counts_text(one: ArmComparison) -> str:
    """``generated treats 7 samples, insert-random 16``."""
    mine = _range([count for _, count, _ in one.treated])
    theirs = _range([count for _, _, count in one.treated])
    return f"{one.arm} treats {mine} samples, {one.other} {theirs}"


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
