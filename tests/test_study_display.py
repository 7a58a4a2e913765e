"""What a person sees while a study runs, off a terminal."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from mda_lightning.recipes.display import StudyDisplay
from mda_lightning.recipes.studies.compare import n_jobs
from mda_lightning.recipes.studies.jobs import Job
from mda_lightning.recipes.studies.recipe_file import read_recipe


def _job(title: str) -> Job:
    return Job("arm", title, Path("nowhere"), {}, {})


def test_runs_are_counted_and_the_rest_is_estimated(monkeypatch) -> None:
    out, now = io.StringIO(), [1000.0]
    monkeypatch.setattr("mda_lightning.recipes.display.time.monotonic", lambda: now[0])
    with StudyDisplay(Console(file=out, width=100)) as display:
        display.expect(5)
        display.watch(_job("first"), None, "kept")
        for title in ("second", "third"):
            now[0] += 120
            display.watch(_job(title), None, "finished")
        display.say("at the end")
    lines = out.getvalue().splitlines()
    assert "first: kept from before" in lines
    assert "2 of about 5 runs, about 6 min left" in lines  # one in 2 min, three to go
    assert "3 of about 5 runs, about 4 min left" in lines
    assert lines[-1] == "at the end"


def test_a_recipe_counts_every_process_of_a_seed() -> None:
    two = ("seeds=2",)
    assert n_jobs(read_recipe("induction-small", two)) == 2 * (1 + 4)  # scores are the base run's
    recipe = read_recipe("selection-baselines-small", two)
    assert n_jobs(recipe) == 2 * (1 + 1 + len(recipe.settings.arms) + 1)
    assert n_jobs(read_recipe("pythia-14m-induction", two)) == 2 * (1 + 1 + 4)
