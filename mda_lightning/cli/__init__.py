"""The ``mda-lightning`` command."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from mda_lightning import __version__
from mda_lightning.cli.compare import add_compare
from mda_lightning.cli.monitor import add_monitor
from mda_lightning.cli.options import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from mda_lightning.cli.plan import add_plan
from mda_lightning.cli.score import add_score
from mda_lightning.cli.studies import add_data, add_quickstart, add_report
from mda_lightning.cli.window import add_window

__all__ = ["EXIT_ERROR", "EXIT_INTERRUPTED", "EXIT_OK", "EXIT_USAGE", "main"]

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
  mda-lightning monitor EleutherAI/pythia-70m@step512,step1000,step2000
                                                every head at saved or hub checkpoints
  mda-lightning window runs/mine/unit_metrics.parquet
                                                when each head formed, from a recorded table
  mda-lightning score runs/mine/checkpoints --data corpora/mine
                                                which samples promote which heads
  mda-lightning plan mask --run runs/mine --scores runs/mine/scores --unit L1H2 --top 10% \\
      --window 900:1400                         a plan: train without these samples
  mda-lightning plan show plans/mask-top-10-percent-L1H2-900-1400.json
                                                what a plan does to the stream
  mda-lightning compare induction-small         arms against matched controls, over seeds

exit codes: 0 done, 1 an error that the message names, 2 wrong usage, 130 interrupted
"""

_GOES_ON = "what was finished is kept: the same command goes on from there"
_INTERRUPTED = {
    "quickstart": _GOES_ON,
    "compare": _GOES_ON,
    "monitor": _GOES_ON,
    "score": "what was scored is kept: the same command goes on with the sample that comes next",
    "fit": "to go on from a checkpoint of the run, add --ckpt_path FILE",
    "data": "no corpus is kept, as it is written whole: the same command begins anew",
    "report": "the study is as it was, its report may not be: the same command builds it anew",
    "plan": "a plan file that is there is whole: the same command begins anew",
    "window": "nothing is kept, as files are written at the end: the same command begins anew",
}
"""Command -> what its interruption leaves."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["fit"]:
        # LightningCLI parses its own arguments, and has its own --help.
        return _guarded("fit", lambda: _fit(arguments[1:]))
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.run is None:
        parser.print_help()
        return EXIT_USAGE
    run: Callable[[argparse.Namespace], int] = options.run
    return _guarded(options.command, lambda: run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mda-lightning",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mda-lightning {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    add_quickstart(commands)
    commands.add_parser(
        "fit",
        help="train by a Lightning configuration file (LightningCLI)",
        add_help=False,
    )
    add_data(commands)
    add_report(commands)
    add_monitor(commands)
    add_window(commands)
    add_score(commands)
    add_plan(commands)
    add_compare(commands)
    return parser


def _fit(arguments: list[str]) -> int:
    from mda_lightning.recipes.fit import fit

    fit(arguments)
    return EXIT_OK


def _interrupt(number: int, frame: object) -> None:
    """Being told to stop is an interruption like Ctrl-C: what follows it is the same."""
    raise KeyboardInterrupt


def _guarded(command: str, run: Callable[[], int]) -> int:
    """Turn the errors that a user can mend into one line; others keep their traceback."""
    from mda_lightning.recipes.studies.jobs import JobError

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and threading.current_thread() is threading.main_thread():
            signal.signal(getattr(signal, name), _interrupt)
    try:
        return run()
    except KeyboardInterrupt:
        print(f"\ninterrupted; {_INTERRUPTED[command]}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, JobError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            raise  # not one of this package's own messages on a missing extra
        print(f"mda-lightning: {error}", file=sys.stderr)
        return EXIT_ERROR
