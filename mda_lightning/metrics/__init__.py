"""Monitoring metrics μ: pure functions, and ``torchmetrics`` classes over them."""

from mda_lightning.metrics.attention_score import (
    AttentionScore,
    InductionScore,
    PreviousTokenScore,
    UnitScores,
    attention_per_sequence,
    summarise,
)

__all__ = [
    "AttentionScore",
    "InductionScore",
    "PreviousTokenScore",
    "UnitScores",
    "attention_per_sequence",
    "summarise",
]
