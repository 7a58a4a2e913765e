"""The ``mda-lightning`` command."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from mda_lightning import __version__

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
_DEFAULT_FOLDER = Path("runs/quickstart")

_DESCRIPTION = """\
Watch attention heads form while a language model trains, find the data that made them, and train
again with that data changed.
"""

_EPILOG = """\
examples:
  mda-lightning quickstart                      the whole experiment, in minutes on two cores
  mda-lightning quickstart --seeds 5            five base runs and their arms, with intervals
  mda-lightning data embedded corpora/embedded  the corpus that the quickstart trains on
  mda-lightning fit --config recipes/embedded.yaml
                                                one monitored run, by a Lightning configuration
  mda-lightning report runs/quickstart          build the report again

exit codes: 0 done, 1 an error that the message names, 2 wrong usage, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["fit"]:
        # LightningCLI parses its own arguments, and has its own --help.
        return _guarded(lambda: _fit(arguments[1:]))
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.run is None:
        parser.print_help()
        return EXIT_USAGE
    run: Callable[[argparse.Namespace], int] = options.run
    return _guarded(lambda: run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mda-lightning",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mda-lightning {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_quickstart(commands)
    commands.add_parser(
        "fit",
        help="train by a Lightning configuration file (LightningCLI)",
        add_help=False,
    )
    _add_data(commands)
    _add_report(commands)
    return parser


def _add_quickstart(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
        "--seeds", type=_positive, default=1, metavar="N", help="seeds 0..N-1 (default: 1)"
    )
    parser.add_argument(
        "--first-seed", type=int, default=0, metavar="K", help="seeds K..K+N-1 (default: 0)"
    )
    parser.add_argument(
        "--jobs", type=_positive, default=2, metavar="N", help="processes at a time (default: 2)"
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


def _add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "data",
        help="make a corpus of token rows to train on",
        description="Make a corpus folder, which TokenDataModule and `fit` take as `rows`.",
    )
    parser.add_argument("source", choices=("embedded", "text", "jsonl"), help="what to read")
    parser.add_argument("folder", type=Path, help="the corpus folder to write")
    parser.add_argument("--input", type=Path, help="folder of text files, or the .jsonl file")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; without, a BPE is trained")
    parser.add_argument("--vocab-size", type=_positive, default=None, help="of the trained BPE")
    parser.add_argument(
        "--sequence-length", type=_positive, default=128, help="tokens (default: %(default)s)"
    )
    parser.set_defaults(run=_data)


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("report", help="build the report of a study folder again")
    parser.add_argument("folder", type=Path)
    parser.set_defaults(run=_report)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _quickstart(options: argparse.Namespace) -> int:
    import shutil

    from rich.console import Console

    from mda_lightning.recipes.display import StudyDisplay
    from mda_lightning.recipes.quickstart import run_quickstart, wandb_mode

    console = Console()
    folder: Path = options.output
    if options.fresh and folder.exists():
        if not (folder / "study.json").is_file() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds files but no study; --fresh will not remove it")
        shutil.rmtree(folder)
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
    from mda_lightning.recipes.summary import summary_lines

    for line in summary_lines(folder):
        console.print(line, highlight=False)
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


def _fit(arguments: list[str]) -> int:
    from mda_lightning.recipes.fit import fit

    fit(arguments)
    return EXIT_OK


def _interrupt(number: int, frame: object) -> None:
    """Being told to stop is an interruption like Ctrl-C: processes are stopped, work is kept."""
    raise KeyboardInterrupt


def _guarded(run: Callable[[], int]) -> int:
    """Turn the errors that a user can mend into one line; others keep their traceback."""
    from mda_lightning.recipes.jobs import JobError

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and threading.current_thread() is threading.main_thread():
            signal.signal(getattr(signal, name), _interrupt)
    try:
        return run()
    except KeyboardInterrupt:
        print(
            "\ninterrupted; what was finished is kept: the same command goes on from there",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    except (ValueError, OSError, JobError) as error:
        print(f"mda-lightning: {error}", file=sys.stderr)
        return EXIT_ERROR
