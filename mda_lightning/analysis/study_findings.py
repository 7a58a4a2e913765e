"""What the analyses of a study found in one seed, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mda_lightning.analysis.distributions import Drive, TailFit
from mda_lightning.analysis.overlap import BlockContrast, OverlapMatrix
from mda_lightning.analysis.tail_alternatives import LikelihoodRatio
from mda_lightning.analysis.time_bins import Slope, TimeBin, Uniformity


@dataclass(frozen=True, eq=False)
class HeadOverlap:
    """Overlap of top sets between the heads of one seed.

    Attributes:
        target: the study's head in this seed.
        ranking: the influence ranking compared; None is the base run's own scores.
        matrix: heads in order of μ, the highest first.
        mu: of those heads.
        leading: heads at least halfway from chance to the highest μ.
        jaccard_blocks, rbo_blocks: leading heads against the others; None where fewer than two
            lead or all do.
        kinship: Spearman's correlation, over the other heads, of μ with their Jaccard index with
            the target: positive where a head shares the more data with it the more it does the
            same. NaN with fewer than four other heads.
    """

    seed: int
    target: str
    ranking: str | None
    matrix: OverlapMatrix
    mu: tuple[float, ...]
    leading: tuple[str, ...]
    jaccard_blocks: BlockContrast | None
    rbo_blocks: BlockContrast | None
    kinship: float


@dataclass(frozen=True, eq=False)
class SelectionOverlap:
    """Overlap of top sets between ways to rank the samples of one seed, for its target head.

    Attributes:
        aliases: ranking -> the one in ``matrix`` that it equals, value for value.
    """

    seed: int
    target: str
    matrix: OverlapMatrix
    aliases: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class SeedTime:
    """Influence on one head over training steps.

    Attributes:
        estimator: scores by "replay" are at fixed weights, those of "in_run" at the weights of
            their step.
        steps, scores: one a row of the score table, [N]; a sample counts at each of its steps.
        width: of ``bins`` and ``sliding``.
        uniformities: one a bin width.
    """

    seed: int
    unit: str
    estimator: str
    steps: NDArray[np.int64] = field(metadata={"stored": False})
    scores: NDArray[np.float64] = field(metadata={"stored": False})
    width: int
    bins: tuple[TimeBin, ...]
    sliding: tuple[TimeBin, ...]
    uniformities: tuple[Uniformity, ...]
    slope: Slope


@dataclass(frozen=True)
class SeedTail:
    """How one seed's influence scores are spread.

    Attributes:
        n: scores, one a row of the score table.
        share: of the positive influence held by the top set; ``noise_share`` the same of normal
            noise of the same mean and spread.
        drive: positive against negative influence.
        fit: of a power law to the upper tail; None where too few scores are positive.
        alternatives: other laws on the same tail.
        bin_exponents: of fits to each time bin alone (figure 8).
    """

    seed: int
    unit: str
    n: int
    share: float
    noise_share: float
    drive: Drive
    fit: TailFit | None
    alternatives: tuple[LikelihoodRatio, ...]
    bin_exponents: tuple[float, ...]
