"""``mda-lightning quickstart``, ``data`` and ``report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from mda_lightning.cli.compare import remove_study
from mda_lightning.cli.options import EXIT_OK, positive

_DEFAULT_FOLDER = Path("runs/quickstart")


def add_quickstart(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "quickstart",
        help="pretrain, find the window, score, change the data, train again, report",
        description=(
            "Pretrain a small GPT-NeoX on the Python library's own text and generated records, "
            "find the critical window of the induction head that forms, score the window's "
            "samples, train again from the window's start without or with more of the top ones, "
            "against random controls, and write a report. Interrupted, it goes on where it was "
            "when called again."
        ),
    )
    parser.add_argument(
        "--output", type=Path, default=_DEFAULT_FOLDER, help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="seeds 0..N-1 (default: 1)"
    )
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="K", help="seeds K..K+N-1 (default: 0)"
    )
    parser.add_argument(
        "--jobs", type=positive, default=2, metavar="N", help="processes at a time (default: 2)"
    )
    parser.add_argument(
        "--wandb",
        choices=("auto", "online", "offline", "off"),
        default="auto",
        help="auto: online with a W&B key, offline without (default)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="remove an earlier study in the folder first"
    )
    parser.add_argument("--quiet", action="store_true", help="print the result only")
    parser.set_defaults(run=_quickstart)


def add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "data",
        help="make a corpus of token rows to train on",
        description="Make a corpus folder, which TokenDataModule and `fit` take as `rows`.",
    )
    parser.add_argument("source", choices=("embedded", "text", "jsonl"), help="what to read")
    parser.add_argument("folder", type=Path, help="the corpus folder to write")
    parser.add_argument("--input", type=Path, help="folder of text files, or the .jsonl file")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; without, a BPE is trained")
    parser.add_argument("--vocab-size", type=positive, default=None, help="of the trained BPE")
    parser.add_argument(
        "--sequence-length", type=positive, default=128, help="tokens (default: %(default)s)"
    )
    parser.set_defaults(run=_data)


def add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("report", help="build the report of a study folder again")
    parser.add_argument("folder", type=Path)
    parser.set_defaults(run=_report)


def _quickstart(options: argparse.Namespace) -> int:
    from rich.console import Console

    from mda_lightning.recipes.display import StudyDisplay
    from mda_lightning.recipes.studies.quickstart import run_quickstart, wandb_mode

    console = Console()
    folder: Path = options.output
    if options.fresh and folder.exists():
        remove_study(folder)
    seeds = tuple(range(options.first_seed, options.first_seed + options.seeds))
    with StudyDisplay(console, quiet=options.quiet) as display:
        result = run_quickstart(
            folder,
            seeds=seeds,
            max_parallel=options.jobs,
            wandb=wandb_mode() if options.wandb == "auto" else options.wandb,
            watch=display.watch,
            preparing=display.preparing,
        )
    from mda_lightning.analysis.comparison import compare_study
    from mda_lightning.recipes.summary import summary_lines

    for line in summary_lines(folder, compare_study(folder)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nreport: {result.report}\nin {result.seconds:.0f} s", highlight=False)
    return EXIT_OK


def _data(options: argparse.Namespace) -> int:
    from rich.console import Console

    from mda_lightning.recipes.corpus import make_corpus
    from mda_lightning.recipes.display import StudyDisplay

    console = Console()
    with StudyDisplay(console) as display:
        rows = make_corpus(
            options.source,
            options.folder,
            source_path=options.input,
            tokenizer=options.tokenizer,
            vocab_size=options.vocab_size,
            sequence_length=options.sequence_length,
            progress=display.preparing,
        )
    console.print(
        f"{len(rows)} rows of {rows.row_length} tokens, vocabulary {rows.vocab_size}: "
        f"{rows.folder}",
        highlight=False,
    )
    return EXIT_OK


def _report(options: argparse.Namespace) -> int:
    from mda_lightning.analysis.report import build_report

    print(build_report(options.folder))
    return EXIT_OK
