"""``mda-lightning monitor``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mda_lightning.cli.options import A_CHECKPOINT, EXIT_OK, add_device, add_files, positive

_FOLDER = Path("runs/monitor")

_DESCRIPTION = f"""\
Measure every head of a language model at saved checkpoints, or at revisions on the Hugging Face
hub: one table and one heatmap a metric. One checkpoint is in memory at a time, and what is measured
is kept as it comes: interrupted, the same command goes on from there.

{A_CHECKPOINT}"""

_EPILOG = """\
examples:
  mda-lightning monitor EleutherAI/pythia-70m@step512,step1000,step2000
  mda-lightning monitor runs/mine/checkpoints --output runs/mine/monitor
  mda-lightning monitor theirs.ckpt --config EleutherAI/pythia-14m --prefix net.lm
  mda-lightning monitor EleutherAI/pythia-70m@step0..step4000 --metrics induction,ablation

HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are the hub library's and are followed.
Steps come from the revision, from a .ckpt's global_step, or from a folder's name (step512,
checkpoint-500); where one has none, all are numbered by their place in the list.
"""


def add_monitor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "monitor",
        help="measure every head at saved or hub checkpoints",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="see above")
    parser.add_argument(
        "--metrics",
        type=_metrics,
        default=None,
        metavar="A,B,...",
        help="metrics by name (default: induction,previous_token,ablation)",
    )
    parser.add_argument(
        "--output", type=Path, default=_FOLDER, help="folder to write (default: %(default)s)"
    )
    add_files(parser)
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument(
        "--text",
        metavar="NAME_OR_PATH",
        help=(
            "for metrics on text: wikitext-2, which is fetched from the hub (extra data), a file "
            "or a folder (default: wikitext-2)"
        ),
    )
    measuring.add_argument(
        "--tokenizer",
        metavar="NAME_OR_PATH",
        help=(
            "of the text, and of the ids that random sequences are drawn from; default: for text "
            "the first checkpoint's own, for random sequences all but the model's special ids"
        ),
    )
    measuring.add_argument(
        "--seed", type=int, help="of the probe sequences (default: each metric's own)"
    )
    measuring.add_argument(
        "--sequences",
        type=positive,
        metavar="N",
        help=(
            "probe sequences (default: each metric's own, 100; 50 for copying); metrics on text "
            "have none"
        ),
    )
    add_device(measuring)
    parser.add_argument(
        "--strict",
        action="store_true",
        help="fail where steps have equal weights; else they are marked",
    )
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    parser.set_defaults(run=_monitor)


def _metrics(text: str) -> list[str]:
    from mda_lightning.recipes.monitor_metrics import metric_names

    wanted = [name.strip() for name in text.split(",") if name.strip()]
    known = metric_names()
    for name in wanted:
        if name not in known:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no metric; there are: {', '.join(known)}"
            )
    return list(dict.fromkeys(wanted))


def _monitor(options: argparse.Namespace) -> int:
    from rich.console import Console

    from mda_lightning.recipes.checkpoint_display import CheckpointDisplay
    from mda_lightning.recipes.monitor import monitor_checkpoints
    from mda_lightning.recipes.monitor_display import summary
    from mda_lightning.recipes.monitor_metrics import DEFAULT_METRICS

    console = Console()
    if options.quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    with CheckpointDisplay(console, quiet=options.quiet) as display:
        monitor_checkpoints(
            options.checkpoints,
            metrics=options.metrics or DEFAULT_METRICS,
            output=options.output,
            config=options.config,
            prefix=options.prefix,
            text=options.text,
            tokenizer=options.tokenizer,
            seed=options.seed,
            n_sequences=options.sequences,
            device=options.device,
            dtype=options.dtype,
            strict=options.strict,
            trust=options.trust,
            warn=lambda message: print(f"mda-lightning: {message}", file=sys.stderr),
            watch=display.watch,
        )
    if not options.quiet:
        from mda_lightning.recipes.monitor_files import CSV, TABLE

        console.print(summary(options.output))
        figures = ", ".join(sorted(path.name for path in options.output.glob("heatmap-*.png")))
        console.print(
            f"{options.output}: {TABLE}, {CSV}, {figures}", highlight=False, soft_wrap=True
        )
    return EXIT_OK
