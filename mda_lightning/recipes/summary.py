"""The outcome of a study in a few lines, for a terminal."""

from __future__ import annotations

from pathlib import Path

from mda_lightning.analysis.study import SeedRun, load_study
from mda_lightning.analysis.verdicts import comparisons


def summary_lines(folder: Path) -> list[str]:
    """One line per seed, then one sentence per arm against its control."""
    study = load_study(folder)
    lines = [_seed_line(seed) for seed in study.seeds]
    treated, _ = comparisons(study)
    return [*lines, *(comparison.effect.verdict for comparison in treated)]


def _seed_line(seed: SeedRun) -> str:
    if seed.without_window:
        return f"seed {seed.seed}: {seed.message}"
    arms = ", ".join(f"{arm.name} {arm.value:.3f}" for arm in seed.arms.values() if arm.value)
    return (
        f"seed {seed.seed}: {seed.target} formed in steps {seed.window.start}-{seed.window.end}; "
        f"score at the window's end: {arms}"
    )
