"""``mda-lightning compare``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mda_lightning.cli.options import EXIT_OK, positive

if TYPE_CHECKING:
    from mda_lightning.recipes.studies.recipe_file import Recipe

_DESCRIPTION = """\
Retrain with the data changed, and compare with matched random controls: one base run a seed, then
every arm of the recipe from one checkpoint of it, on the same data in the same order but for what
the arm changes. Writes comparison.md, comparison.csv, comparison.json, figures/comparison.png and
report.html into the study's folder, and prints the table and what can and cannot be said.

Interrupted or killed, the same command goes on where it was. Seeds and arms may be added later.
"""

_EPILOG = """\
examples:
  mda-lightning compare --list                      the recipes that come with the package
  mda-lightning compare induction-small             run one of them, into runs/induction-small
  mda-lightning compare induction-small --dry-run   what it would run
  mda-lightning compare my-study.yaml --seeds 5 --jobs 4 --set training.max_steps=6000
  mda-lightning compare runs/induction-small        go on with a study, or judge it again
"""


def add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "compare",
        help="retrain with the data changed, against matched controls, over seeds",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "recipe", nargs="?", help="a recipe's name or file, or the folder of a study to go on with"
    )
    parser.add_argument("--list", action="store_true", help="list the recipes that come with it")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and stop")
    parser.add_argument(
        "--output", type=Path, help="the study's folder (default: runs/ and the recipe's name)"
    )
    parser.add_argument(
        "--seeds", type=positive, metavar="N", help="seeds 0..N-1 instead of the recipe's"
    )
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="K", help="with --seeds: K..K+N-1"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change a setting, such as training.max_steps=6000 or arms.prune=null; repeatable",
    )
    parser.add_argument(
        "--jobs", type=positive, default=2, metavar="N", help="processes at a time (default: 2)"
    )
    parser.add_argument(
        "--share",
        type=Path,
        metavar="FOLDER",
        help="keep runs in this folder, in which studies of equal base runs find each other's",
    )
    parser.add_argument(
        "--corpora", type=Path, metavar="FOLDER", help="where corpora are kept (default: beside)"
    )
    parser.add_argument(
        "--wandb",
        choices=("auto", "online", "offline", "off"),
        default="off",
        help="auto: online with a W&B key, offline without (default: off)",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="remove an earlier study in the folder first (not runs in --share)",
    )
    parser.add_argument("--quiet", action="store_true", help="print the result only")
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    from rich.console import Console

    from mda_lightning.recipes.studies.recipe_file import bundled_recipes

    console = Console()
    if options.list or options.recipe is None:
        for one in bundled_recipes():
            console.print(
                f"{one.name:36} {one.summary}", highlight=False, markup=False, soft_wrap=True
            )
        if not options.list:
            raise ValueError("name a recipe: one of these, or a file of your own")
        return EXIT_OK

    from mda_lightning.recipes.display import StudyDisplay
    from mda_lightning.recipes.studies.compare import describe, n_jobs, run_compare, shared_of
    from mda_lightning.recipes.studies.quickstart import wandb_mode
    from mda_lightning.recipes.summary import summary_lines

    recipe, folder = _chosen(options)
    if options.dry_run:
        for line in describe(recipe):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        return EXIT_OK
    if options.fresh and folder.exists():
        remove_study(folder)
    with StudyDisplay(console, quiet=options.quiet) as display:
        if not options.quiet:
            for remark in recipe.remarks:
                console.print(f"note: {remark}", highlight=False, markup=False, soft_wrap=True)
        display.expect(n_jobs(recipe))
        result = run_compare(
            recipe,
            folder,
            corpora=options.corpora,
            shared=shared_of(folder) if Path(options.recipe).is_dir() else options.share,
            max_parallel=options.jobs,
            wandb=wandb_mode() if options.wandb == "auto" else options.wandb,
            watch=display.watch,
            preparing=display.preparing,
            say=display.say,
        )
    for line in summary_lines(folder, result.comparison):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nreport: {result.report}\nin {result.seconds:.0f} s", highlight=False)
    return EXIT_OK


def remove_study(folder: Path) -> None:
    """Remove a study's folder.

    Raises:
        ValueError: it holds files and no study.
    """
    if not (folder / "study.json").is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files but no study; --fresh will not remove it")
    shutil.rmtree(folder)


def _chosen(options: argparse.Namespace) -> tuple[Recipe, Path]:
    from mda_lightning.recipes.studies.compare import recipe_of
    from mda_lightning.recipes.studies.recipe_file import read_recipe

    overrides = list(options.overrides)
    if options.seeds is not None:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        overrides.append(f"seeds={list(seeds)}")
    elif options.first_seed:
        raise ValueError("--first-seed goes with --seeds: --seeds 5 --first-seed 10 is 10 to 14")
    given = Path(options.recipe)
    if not given.is_dir():
        recipe = read_recipe(options.recipe, overrides)
        return recipe, options.output or Path("runs") / recipe.path.stem
    if overrides or options.output or options.fresh or options.share:
        raise ValueError(
            f"{given} is a study, which goes on as it is: --set, --seeds, --output, --share and "
            "--fresh go with a recipe"
        )
    return recipe_of(given), given
