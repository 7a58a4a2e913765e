"""Influence scores of training samples on units (Eq. 2; SPEC §5).

    s(z) = −∇L(z)ᵀ (H + λ)⁻¹ ∇f,   L summed over positions.

**Positive: training on z promotes the unit.** A gradient step on z moves θ along −∇L(z), and f with
it by −∇fᵀ∇L(z), here in the metric of the curvature.

Two estimators, never mixed: *replay* at one fixed θ (:func:`replay_scores`), and *in-run* at the θ
a sample was trained on, from the training step's own forward and backward
(:class:`TrainingStepScorer`).
"""

from mda_lightning.curvature import SubspaceEKFAC
from mda_lightning.gradients import probe_gradients, zero_probes
from mda_lightning.influence.in_run_scores import TrainingStepScorer
from mda_lightning.influence.inverse_probes import (
    CurvatureSettings,
    InverseProbes,
    inverse_probes,
    warn_of_unscored,
)
from mda_lightning.influence.model_hash import config_hash, weights_hash
from mda_lightning.influence.replay import (
    IHVPs,
    ReplayScorer,
    Scores,
    fit_and_score,
    replay_scores,
    token_scores,
)

__all__ = [
    "CurvatureSettings",
    "IHVPs",
    "InverseProbes",
    "ReplayScorer",
    "Scores",
    "SubspaceEKFAC",
    "TrainingStepScorer",
    "config_hash",
    "fit_and_score",
    "inverse_probes",
    "probe_gradients",
    "replay_scores",
    "token_scores",
    "warn_of_unscored",
    "weights_hash",
    "zero_probes",
]
