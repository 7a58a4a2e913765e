"""What determines a scoring's numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mda_lightning.architectures import ModelLayout
from mda_lightning.curvature import Fisher, check_damping
from mda_lightning.influence.inverse_probes import CurvatureSettings
from mda_lightning.mechanisms import Mechanism
from mda_lightning.units import Head, parse_unit

CurvatureKind = Literal["ekfac", "kfac", "identity"]


@dataclass(frozen=True)
class ScoreSettings:
    """How samples are scored; see :class:`mda_lightning.curvature.SubspaceEKFAC`.

    Attributes:
        curvature: "ekfac", "kfac", or "identity" for the plain dot product with ∇f.
        n_curvature: sequences that the curvature is estimated on; "auto" takes as many as it takes
            until the scores stay (:func:`mda_lightning.curvature.fit_converged`), at most
            ``most_curvature``.
        tolerance: of "auto": correlation with the scores of half as many.
        fisher, damping, damping_rule, seed: of the curvature. The seed also draws the sequences.
    """

    curvature: CurvatureKind = "ekfac"
    n_curvature: int | Literal["auto"] = "auto"
    most_curvature: int = 1024
    tolerance: float = 0.98
    fisher: Fisher = "sampled"
    damping: float = 0.1
    damping_rule: Literal["relative", "absolute"] = "relative"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_curvature != "auto" and self.n_curvature < 1:
            raise ValueError(f"n_curvature is {self.n_curvature}; it is at least 1, or 'auto'")
        if self.most_curvature < 1:
            raise ValueError(f"most_curvature is {self.most_curvature}; it is at least 1")

        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it is at least 0")
        check_damping(self.damping)

    @property
    def curvature_settings(self) -> CurvatureSettings:
        """The same for one set of sequences."""
        return CurvatureSettings(
            self.curvature,
            self.fisher,
            self.damping,
            self.seed,
            self.damping_rule,
            self.tolerance if self.n_curvature == "auto" else None,
        )

    def curvature_ids(self, first: int, last: int) -> NDArray[np.int64]:
        """Numbers of the sequences offered to the curvature: drawn from samples [first, last)."""
        wanted = self.most_curvature if self.n_curvature == "auto" else self.n_curvature
        count = min(wanted, last - first)
        rng = np.random.default_rng([self.seed, last - first])
        return first + rng.choice(last - first, size=count, replace=False).astype(np.int64)


@dataclass(frozen=True)
class Share:
    """One of several processes that score parts of the same samples.

    Attributes:
        index, count: 0-based, and how many there are.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"share {self.index} of {self.count}: shares are 0..{self.count - 1}")

    def of(self, first: int, last: int) -> tuple[int, int]:
        """This share's samples of [first, last)."""
        n = last - first
        return first + n * self.index // self.count, first + n * (self.index + 1) // self.count


def parse_units(text: str | Sequence[str], layout: ModelLayout) -> list[Head]:
    """Heads from "all", "L1H2,L3H0" or a sequence of names.

    Raises:
        ValueError: no unit's name, or the model has no such head.
    """
    if text == "all":
        return layout.heads
    names = text.split(",") if isinstance(text, str) else text
    found = []
    for name in dict.fromkeys(name.strip() for name in names):
        try:
            found.append(layout.check(parse_unit(name)))
        except ValueError as error:
            raise ValueError(f"unit {name}: {error}") from error
    return found


def job_hash(
    settings: ScoreSettings,
    *,
    mechanisms: Sequence[Mechanism],
    units: Sequence[Head],
    data: str,
    dtype: str,
    **more: Any,
) -> str:
    """SHA-256 of everything but the weights that determines the scores of a call."""
    content = {
        "settings": asdict(settings),
        "mechanisms": [m.settings() | {"name": m.name} for m in mechanisms],
        "units": [str(unit) for unit in units],
        "data": data,
        "dtype": dtype,
        **more,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
