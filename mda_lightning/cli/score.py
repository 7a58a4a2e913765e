"""``mda-lightning score``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mda_lightning.cli.options import A_CHECKPOINT, EXIT_OK, add_device, add_files, positive

_FOLDER = Path("runs/score")
_TOP = 3

_DESCRIPTION = f"""\
Which samples promote which heads: influence scores at saved checkpoints, or at revisions on the
Hugging Face hub. A positive score: training on the sample promotes the head. All heads and
mechanisms are scored in one pass over the samples; with several checkpoints the mean is taken.
Interrupted, the same command goes on with the sample that comes next.

{A_CHECKPOINT}
DATA is
  a corpus folder, as `mda-lightning data` makes it
  a .npy file of token rows [N, T + 1]
  a Megatron .bin with its .idx, its sequences equally long (the preshuffled Pile)
  a .jsonl file, a .txt file, or a folder of .txt files: one sample a document
"""

_EPILOG = """\
examples:
  mda-lightning score EleutherAI/pythia-70m@step1000 --data corpora/mine
  mda-lightning score runs/mine/checkpoints --data corpora/mine --units L3H0,L3H1 \\
      --mechanism induction,previous_token --output runs/mine/scores
  mda-lightning score EleutherAI/pythia-14m@step900,step1400 --data pile/document \\
      --steps 900:1400 --samples-per-step 1024
  mda-lightning score NAME --data corpora/big --share 0/4       one of four processes

Then, in Python:
  from mda_lightning.store import ScoreTable
  ScoreTable.open("runs/score/induction").top("L3H0", fraction=0.10)
"""


def add_score(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "score",
        help="which samples promote which heads, at saved or hub checkpoints",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="see above")
    parser.add_argument("--data", required=True, metavar="PATH", help="the samples; see above")
    parser.add_argument(
        "--output", type=Path, default=_FOLDER, help="folder to write (default: %(default)s)"
    )
    what = parser.add_argument_group("what is scored")
    what.add_argument(
        "--mechanism",
        type=_names,
        default=["induction"],
        metavar="A,B,...",
        help="by name; several share each sample's backward (default: induction)",
    )
    what.add_argument(
        "--probe",
        choices=("attention", "log_attention", "copy_logprob"),
        help="the induction mechanism's f (default: attention, which scores QK alone)",
    )
    what.add_argument(
        "--bias",
        action="store_true",
        help="count the biases of a head's query, key and value rows among its weights",
    )
    what.add_argument(
        "--units", default="all", metavar="L1H2,...", help="heads (default: %(default)s)"
    )
    what.add_argument(
        "--samples", type=_span, metavar="A:B", help="samples A to B-1 (default: all of them)"
    )
    what.add_argument(
        "--samples-per-step",
        type=positive,
        metavar="N",
        help="where samples lie in the order of training: a step's; the table then has their step",
    )
    what.add_argument(
        "--steps", type=_span, metavar="A:B", help="the samples of steps A to B-1 instead"
    )
    what.add_argument(
        "--per-token",
        type=_ids,
        default=[],
        metavar="ID,...",
        help="also write each position's part of these samples' scores",
    )
    curvature = parser.add_argument_group("curvature")
    curvature.add_argument(
        "--curvature",
        choices=("ekfac", "kfac", "identity"),
        default="ekfac",
        help="identity is the plain dot product with the gradient of f (default: %(default)s)",
    )
    curvature.add_argument(
        "--curvature-samples",
        type=_count,
        default="auto",
        metavar="N",
        help="drawn from the samples; auto: twice as many until the scores stay (default: auto)",
    )
    curvature.add_argument(
        "--fisher",
        choices=("sampled", "empirical"),
        default="sampled",
        help="labels drawn from the model, or the data's (default: %(default)s)",
    )
    curvature.add_argument(
        "--damping", type=float, default=0.1, help="times mean(Λ) of a block (default: 0.1)"
    )
    curvature.add_argument(
        "--absolute-damping", action="store_true", help="--damping is the value itself"
    )
    curvature.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    texts = parser.add_argument_group("texts and tokens")
    texts.add_argument(
        "--tokenizer",
        metavar="NAME_OR_PATH",
        help="of texts, and of the ids that probe sequences are drawn from (default: the first "
        "checkpoint's own for texts)",
    )
    texts.add_argument(
        "--length", type=positive, metavar="T", help="texts are cut here (default: the context)"
    )
    cost = parser.add_argument_group("time and memory")
    cost.add_argument(
        "--memory",
        metavar="4GiB",
        help="beside the model (default: half of what is free)",
    )
    cost.add_argument(
        "--batch-size", type=positive, metavar="N", help="sequences at once, instead of finding it"
    )
    cost.add_argument(
        "--share",
        type=_share,
        metavar="I/N",
        default=(0, 1),
        help="score share I of N, counted from 0",
    )
    add_device(cost)
    add_files(parser)
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    parser.set_defaults(run=_score, usage=parser.error)


def _span(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    try:
        found = (int(first), int(last))
    except ValueError:
        found = (0, 0)
    if not colon or not 0 <= found[0] < found[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: write A:B with 0 <= A < B")
    return found


def _share(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: write I/N with I from 0 to N-1, such as 0/4")
    return int(index), int(count)


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write sample ids such as 3,17") from error


def _count(text: str) -> int | str:
    return "auto" if text == "auto" else positive(text)


def _score(options: argparse.Namespace) -> int:
    first, last = _samples(options)
    if options.probe and "induction" not in options.mechanism:
        options.usage("--probe is of the induction mechanism, which is not scored")
    from rich.console import Console

    from mda_lightning.mechanisms import mechanism
    from mda_lightning.micro_batch import parse_bytes
    from mda_lightning.recipes.checkpoint_display import CheckpointDisplay
    from mda_lightning.recipes.score import score_checkpoints
    from mda_lightning.recipes.score_display import top_samples
    from mda_lightning.recipes.score_settings import ScoreSettings, Share
    from mda_lightning.recipes.score_source import open_source

    probe = {"probe_function": options.probe} if options.probe else {}
    bias = {"bias": True} if options.bias else {}
    settings = ScoreSettings(
        curvature=options.curvature,
        n_curvature=options.curvature_samples,
        fisher=options.fisher,
        damping=options.damping,
        damping_rule="absolute" if options.absolute_damping else "relative",
        seed=options.seed,
    )
    memory = None if options.memory is None else parse_bytes(options.memory)
    console = Console()
    if options.quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    source = open_source(
        options.data,
        options.checkpoints[0],
        tokenizer=options.tokenizer,
        length=options.length,
        config=options.config,
    )
    with CheckpointDisplay(console, quiet=options.quiet) as display:
        tables = score_checkpoints(
            options.checkpoints,
            source,
            [
                mechanism(name, **bias, **(probe if name == "induction" else {}))
                for name in options.mechanism
            ],
            units=options.units,
            output=options.output,
            settings=settings,
            first=first,
            last=last,
            samples_per_step=options.samples_per_step,
            batch_size=options.batch_size,
            memory=memory,
            share=Share(*options.share),
            per_token=options.per_token,
            config=options.config,
            prefix=options.prefix,
            tokenizer=options.tokenizer,
            device=options.device,
            dtype=options.dtype,
            trust=options.trust,
            warn=lambda message: print(f"mda-lightning: {message}", file=sys.stderr),
            watch=display.watch,
        )
    if not options.quiet:
        for name, table in tables.items():
            console.print(
                top_samples(name, table, source, count=_TOP, width=console.width),
                soft_wrap=True,
            )
            console.print(f"{options.output / name}: {table}", highlight=False, soft_wrap=True)
    return EXIT_OK


def _samples(options: argparse.Namespace) -> tuple[int, int | None]:
    if options.steps is None:
        found: tuple[int, int | None] = options.samples or (0, None)
        return found
    if options.samples is not None:
        options.usage("give --samples or --steps, not both")
    if options.samples_per_step is None:
        options.usage("--steps needs --samples-per-step")
    first, last = options.steps
    return first * options.samples_per_step, last * options.samples_per_step
