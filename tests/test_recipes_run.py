"""Recipes for hundreds of GPU hours, shrunk until they run here: every arm, from its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mda_lightning.recipes.studies import study as study_module
from mda_lightning.recipes.studies.arm_settings import ArmSettings
from mda_lightning.recipes.studies.compare import run_compare
from mda_lightning.recipes.studies.recipe_file import read_recipe
from mda_lightning.recipes.studies.settings import StudySettings
from tests.study_runs import TINY, run_here

SHRUNK = (20, 40)
SLOW = [
    "cross-stage-replacement",
    "insertion-ablation",
    "transfer-across-heads",
    "selection-baselines",
    "online-steering",
    "pythia-160m-previous-token",
]


def shrunk(settings: StudySettings, text: Path) -> StudySettings:
    """The same study with a tiny model and corpus, its window 20 steps long."""
    first, last = settings.window.start, settings.window.end
    assert first is not None and last is not None

    def step(position: int | str) -> int | str:
        if isinstance(position, str):
            return position
        part = (position - first) / (last - first)
        return max(0, SHRUNK[0] + round(part * (SHRUNK[1] - SHRUNK[0])))

    def interval(steps: tuple | None) -> tuple | None:
        if steps is None:
            return None
        start, end = (step(one) for one in steps)
        return (start, max(end, start + 1)) if isinstance(start, int) else (start, end)

    def arm(one: ArmSettings) -> ArmSettings:
        count = None if one.count is None else max(2, one.count // 6_250)
        return replace(
            one, count=count, steps=interval(one.steps), from_steps=interval(one.from_steps)
        )

    return replace(
        settings,
        corpus=replace(TINY.corpus, icl_text=str(text), shuffle=settings.corpus.shuffle),
        model=TINY.model,
        training=replace(
            settings.training,
            batch_size=8,
            micro_batch=4,
            learning_rate=1e-2,
            schedule_steps=200,
            max_steps=60,
            checkpoint_every_n_steps=15,
            accelerator="cpu",
            precision="32-true",
        ),
        window=replace(settings.window, start=SHRUNK[0], end=SHRUNK[1], target="L1H1"),
        scoring=replace(settings.scoring, n_curvature=16),
        monitor=replace(TINY.monitor, text_rows=4),
        subsets=replace(settings.subsets, count=min(2, settings.subsets.count), steps=4),
        arms={name: arm(one) for name, one in settings.arms.items()},
    )


@pytest.mark.parametrize(
    "name",
    [
        "pythia-14m-induction",
        *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
    ],
)
def test_a_full_size_recipe_runs_shrunk(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(study_module, "run_jobs", run_here)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    recipe = read_recipe(name)
    recipe = replace(recipe, settings=shrunk(recipe.settings, text))
    result = run_compare(recipe, tmp_path / "study")
    (seed,) = json.loads(result.study.read_text())["seeds"]
    assert seed["status"] == "complete", seed["message"]
    assert set(seed["arms"]) == {"baseline", *recipe.settings.arms}
    assert seed["target"] == "L1H1" and result.report.stat().st_size > 10_000
