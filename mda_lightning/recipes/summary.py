"""The outcome of a study in a few lines, for a terminal."""

from __future__ import annotations

from pathlib import Path

from mda_lightning.analysis.comparison import StudyComparison
from mda_lightning.analysis.study import BASELINE, SeedRun, load_study


def summary_lines(folder: Path, comparison: StudyComparison) -> list[str]:
    """One line per seed, then the table and what can be said."""
    seeds = [_seed_line(seed) for seed in load_study(folder).seeds]
    return [*seeds, "", *comparison.lines()]


def _seed_line(seed: SeedRun) -> str:
    if seed.without_window:
        return f"seed {seed.seed}: {seed.message}"
    formed = "in the recipe's steps" if seed.window.end_reason == "recipe" else "formed in steps"
    text = f"seed {seed.seed}: {seed.target} {formed} {seed.window.start}-{seed.window.end}"
    baseline = seed.arms.get(BASELINE)
    if baseline is None or baseline.value is None:
        return text
    return f"{text} and reached {baseline.value:.3f} untouched"
