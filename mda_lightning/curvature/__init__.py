"""Curvature restricted to a unit's own weights: EK-FAC, K-FAC, and the plain dot product."""

from mda_lightning.curvature.convergence import fit_converged, score_correlation
from mda_lightning.curvature.ekfac import SubspaceEKFAC
from mda_lightning.curvature.factor_file import (
    FactorKey,
    load_factors,
    save_factors,
    tokens_hash,
)
from mda_lightning.curvature.factors import BlockFactors, CurvatureError, check_damping
from mda_lightning.curvature.fisher import Fisher, sampled_uniform

__all__ = [
    "BlockFactors",
    "CurvatureError",
    "FactorKey",
    "Fisher",
    "SubspaceEKFAC",
    "check_damping",
    "fit_converged",
    "load_factors",
    "sampled_uniform",
    "save_factors",
    "score_correlation",
    "tokens_hash",
]
