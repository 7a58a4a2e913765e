"""The figures of a report, each a function from values to a matplotlib ``Figure``."""

from mda_lightning.analysis.figures.heads import heads_heatmap, scalar_curve
from mda_lightning.analysis.figures.influence import domain_composition, score_distribution
from mda_lightning.analysis.figures.style import DARK, LIGHT, Theme, png_bytes

__all__ = [
    "DARK",
    "LIGHT",
    "Theme",
    "domain_composition",
    "heads_heatmap",
    "png_bytes",
    "scalar_curve",
    "score_distribution",
]
