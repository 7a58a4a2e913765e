"""Monitoring metrics μ: pure functions, and ``torchmetrics`` classes over them."""

from mda_lightning.metrics.ablation import (
    AblationContribution,
    AblationDrops,
    ablation_drops,
)
from mda_lightning.metrics.attention_score import (
    AttentionScore,
    InductionScore,
    PreviousTokenScore,
    attention_per_sequence,
)
from mda_lightning.metrics.copying import (
    CopyingScore,
    copying_per_sequence,
    ov_eigenvalue_scores,
)
from mda_lightning.metrics.icl import ICLScore, icl_per_sequence, position_losses
from mda_lightning.metrics.over_sequences import MeanOverSequences, UnitScores, summarise
from mda_lightning.metrics.text_loss import TextLoss

__all__ = [
    "AblationContribution",
    "AblationDrops",
    "AttentionScore",
    "CopyingScore",
    "ICLScore",
    "InductionScore",
    "MeanOverSequences",
    "PreviousTokenScore",
    "TextLoss",
    "UnitScores",
    "ablation_drops",
    "attention_per_sequence",
    "copying_per_sequence",
    "icl_per_sequence",
    "ov_eigenvalue_scores",
    "position_losses",
    "summarise",
]
