"""``mda-lightning compare``: a recipe, run to its end and judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mda_lightning.analysis.comparison import StudyComparison, write_comparison
from mda_lightning.analysis.report import build_report
from mda_lightning.files import read_json
from mda_lightning.recipes.studies.arms import phrase_of
from mda_lightning.recipes.studies.contradictions import refuse_contradictions, remarks_on
from mda_lightning.recipes.studies.jobs import Watch
from mda_lightning.recipes.studies.rankings import names_needed
from mda_lightning.recipes.studies.recipe_file import Recipe
from mda_lightning.recipes.studies.settings import StudySettings
from mda_lightning.recipes.studies.study import Study, StudyFolderError
from mda_lightning.recipes.studies.study_corpus import study_corpus
from mda_lightning.recipes.studies.study_file import FILE, SCHEMA_VERSION


@dataclass(frozen=True)
class CompareResult:
    """Where the outcome lies.

    Attributes:
        seconds: of this call.
    """

    comparison: StudyComparison
    study: Path
    report: Path
    seconds: float


def run_compare(
    recipe: Recipe,
    folder: Path,
    *,
    corpora: Path | None = None,
    shared: Path | None = None,
    max_parallel: int = 2,
    wandb: str = "off",
    watch: Watch | None = None,
    preparing: Callable[[str, float], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> CompareResult:
    """Run what a recipe's study still lacks, and compare its arms with their controls.

    Args:
        recipe: see :func:`~mda_lightning.recipes.studies.recipe_file.read_recipe`.
        folder: of the study.
        corpora: where corpora are made and kept; None is ``corpora`` beside the folder.
        shared: see :class:`Study`.
        max_parallel: processes at a time, one thread each.
        wandb: "online", "offline" or "off".
        watch: told how each run is doing.
        preparing: told how the corpus is doing, as (what, share done).
        say: told what is done at the end.

    Raises:
        StudyFolderError: the folder holds another study.
        JobError: a run failed.
    """
    started = time.monotonic()
    refuse_contradictions(recipe.settings)
    corpus = study_corpus(recipe.settings.corpus, corpora or folder.parent / "corpora", preparing)
    study = Study(
        folder,
        recipe.settings,
        recipe.seeds,
        corpus.rows.folder,
        held_out=None if corpus.held_out is None else corpus.held_out.folder,
        max_parallel=max_parallel,
        wandb=wandb,
        title=recipe.title,
        shared=shared,
        watch=watch,
    ).run()
    if say is not None:
        say("all runs are there; drawing figures and writing the report, for some seconds")
    report = build_report(folder)
    return CompareResult(write_comparison(folder), study, report, time.monotonic() - started)


def recipe_of(folder: Path) -> Recipe:
    """The recipe that a study folder was made by.

    Raises:
        StudyFolderError: no study there, or one of another schema.
    """
    path = folder / FILE
    if not path.is_file():
        raise StudyFolderError(f"{folder} holds no {FILE}: it is no study; give a recipe")
    stored = read_json(path)
    if stored.get("schema_version") != SCHEMA_VERSION:
        raise StudyFolderError(
            f"{path} has schema_version {stored.get('schema_version')!r}; this version goes on "
            f"with {SCHEMA_VERSION}: run its recipe into another folder"
        )
    settings = StudySettings.from_dict(stored["config"])
    begun = {int(seed["seed"]) for seed in stored["seeds"]}
    seeds = tuple(sorted(begun | set(stored["asked_seeds"])))
    return Recipe(stored["title"], seeds, settings, path, "", remarks_on(settings, seeds))


def n_jobs(recipe: Recipe) -> int:
    """How many processes a study takes, if every seed has a window."""
    settings = recipe.settings
    ranked = settings.window.is_fixed or names_needed(settings) != ("influence",)
    each = 1 + int(ranked) + len(settings.arms) + int(settings.subsets.count > 0)
    return len(recipe.seeds) * each


def shared_of(folder: Path) -> Path | None:
    """The folder in which a study's runs are, where it is not its own."""
    shared = read_json(folder / FILE).get("shared")
    return None if shared is None else folder / shared


def describe(recipe: Recipe) -> Iterator[str]:
    """What a recipe would run, in lines."""
    settings = recipe.settings
    yield recipe.title
    window = settings.window
    if window.is_fixed:
        where = f"steps {window.start:,} to {window.end:,}, head {window.target or 'the highest'}"
    else:
        where = f"found in the base run, at most {settings.training.max_steps:,} steps"
    yield f"  {settings.mechanism}; window: {where}"
    rankings = ", ".join(names_needed(settings)) or "none"
    n_runs = len(recipe.seeds) * (1 + len(settings.arms))
    yield f"  rankings: {rankings}"
    yield f"  seeds {', '.join(map(str, recipe.seeds))}: {n_runs} runs"
    if settings.subsets.count:
        what = settings.subsets
        yield f"  and {what.count} random subsets a seed, {what.steps} steps each"
    yield "  arm                      against                  what"
    yield f"  {'baseline':24} {'':24} leaving the data alone"
    for name, arm in settings.arms.items():
        control = "" if arm.control_of is not None else settings.control_of(name) or "baseline"
        yield f"  {name:24} {control:24} {phrase_of(name, settings)}"
    for remark in recipe.remarks:
        yield f"  note: {remark}"
