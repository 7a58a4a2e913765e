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
    UnitScores,
    attention_per_sequence,
    summarise,
)

__all__ = [
    "AblationContribution",
    "AblationDrops",
    "AttentionScore",
    "InductionScore",
    "PreviousTokenScore",
    "UnitScores",
    "ablation_drops",
    "attention_per_sequence",
    "summarise",
]
