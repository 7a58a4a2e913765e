"""The figures of a report, each a function from values to a matplotlib ``Figure``."""

from mda_lightning.analysis.figures.heads import heads_heatmap, scalar_curve
from mda_lightning.analysis.figures.influence import domain_composition, score_distribution
from mda_lightning.analysis.figures.style import DARK, LIGHT, Theme, png_bytes
from mda_lightning.analysis.figures.training import (
    ArmCurve,
    Comparison,
    arm_curves,
    effect_dots,
)

__all__ = [
    "DARK",
    "LIGHT",
    "ArmCurve",
    "Comparison",
    "Theme",
    "arm_curves",
    "domain_composition",
    "effect_dots",
    "heads_heatmap",
    "png_bytes",
    "scalar_curve",
    "score_distribution",
]
