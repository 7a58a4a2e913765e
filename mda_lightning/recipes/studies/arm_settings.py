"""What the arms of a study are, and how the samples that they treat are ranked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

CurvatureKind = Literal["ekfac", "kfac", "identity"]
ProbeFunction = Literal["attention", "log_attention", "copy_logprob"]
Position: TypeAlias = int | str
"""A step: a whole number, or a place in the window, ``"0%"`` its start and ``"100%"`` its end.

Percentages beyond 0 and 100 lie before and after the window.
"""


@dataclass(frozen=True)
class RankingSettings:
    """One way to rank the window's samples: what ``by`` of an arm names.

    Attributes:
        method: ``influence``; ``loss``, the highest first; ``repeated_ngrams``, how many of a
            sample's n-grams occurred in it before; ``random``.
        curvature, probe_function: of ``influence``, where they differ from the scoring's;
            ``identity`` is the plain dot product of gradients.
        n: of ``repeated_ngrams``, tokens.
    """

    method: Literal["influence", "loss", "repeated_ngrams", "random"] = "influence"
    curvature: CurvatureKind | None = None
    probe_function: ProbeFunction | None = None
    n: int = 3


RANKINGS: dict[str, RankingSettings] = {
    "influence": RankingSettings(),
    "ekfac": RankingSettings(curvature="ekfac"),
    "kfac": RankingSettings(curvature="kfac"),
    "dot": RankingSettings(curvature="identity"),
    "copy_logprob": RankingSettings(probe_function="copy_logprob"),
    "loss": RankingSettings("loss"),
    "repeated_ngrams": RankingSettings("repeated_ngrams"),
    "random": RankingSettings("random"),
}
"""Rankings that need not be defined; ``influence`` is by the base run's own scores."""


@dataclass(frozen=True)
class InterventionSettings:
    """What the arms do, where they do not say otherwise."""

    fraction: float = 0.10
    placement: Literal["shift", "replace"] = "replace"
    mode: Literal["dispersed", "concentrated"] = "dispersed"
    copies: int = 1


@dataclass(frozen=True)
class ArmSettings:
    """One arm: which samples are chosen, and what is done with them.

    Attributes:
        do: ``mask``, ``insert``, ``replace`` (the best of those in ``steps`` by the best of
            ``from_steps``), ``prune`` (a random share of the places), ``steer`` (decide while the
            arm runs).
        control_of: the arm whose matched random control this is; nothing else is given then but
            ``draw``.
        control: the arm that this one is compared with; None takes its own ``control_of``.
        by: the ranking, see :data:`RANKINGS`.
        unit: the head whose scores rank: ``target``; a head such as ``L1H2``; ``second``, the next
            highest μ at the window's end; ``lowest``, the lowest.
        which: the best or the worst of the ranking.
        generator: of an insertion, what makes the samples instead of a ranking: a name of
            :data:`~mda_lightning.corpora.inserted.GENERATORS` or ``package.module:function``.
        fraction, count: how many samples: a share of those in ``from_steps``, or a number.
        from_steps: where samples are chosen from, [start, end); None is the window.
        steps: where it is done; None is the window.
        mode, placement, copies: of an insertion.
        weight: of masked samples.
        policy: of ``steer``: ``suppress`` (mask that fraction of each batch) or ``amplify`` (show
            that fraction of recent samples again).
        refresh_every: of ``steer``, steps between fresh scores.
        draw: number of a random draw.
    """

    do: Literal["mask", "insert", "replace", "prune", "steer"] = "mask"
    control_of: str | None = None
    control: str | None = None
    by: str = "influence"
    unit: str = "target"
    which: Literal["top", "bottom"] = "top"
    generator: str | None = None
    fraction: float | None = None
    count: int | None = None
    from_steps: tuple[Position, Position] | None = None
    steps: tuple[Position, Position] | None = None
    mode: Literal["dispersed", "concentrated"] | None = None
    placement: Literal["shift", "replace"] | None = None
    copies: int | None = None
    weight: float = 0.0
    policy: Literal["suppress", "amplify"] = "suppress"
    refresh_every: int = 50
    draw: int = 0


STANDARD_ARMS: dict[str, ArmSettings] = {
    "mask-top": ArmSettings(do="mask"),
    "mask-random": ArmSettings(control_of="mask-top"),
    "insert-top": ArmSettings(do="insert"),
    "insert-random": ArmSettings(control_of="insert-top"),
}
