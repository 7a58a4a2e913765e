"""Score tables: the influence of samples on units, as partitioned Parquet."""

from mda_lightning.store.layout import SCHEMA_VERSION, Estimator
from mda_lightning.store.rows import ScoreRows
from mda_lightning.store.table import ScoreTable
from mda_lightning.store.writer import ScoreWriter

__all__ = ["SCHEMA_VERSION", "Estimator", "ScoreRows", "ScoreTable", "ScoreWriter"]
