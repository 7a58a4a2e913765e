"""Options that the ``mda-lightning plan`` commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mda_lightning.cli.options import positive

if TYPE_CHECKING:
    from mda_lightning.corpora import TokenRows
    from mda_lightning.interventions.operations import Steps
    from mda_lightning.recipes.plan_choice import Amount, Choice, Filters
    from mda_lightning.recipes.plan_stream import BaseStream

FOLDER = Path("plans")


def add_samples(parser: argparse.ArgumentParser, *, elsewhere: bool, required: bool = True) -> None:
    """Which samples: by scores, by name, at random, or (``elsewhere``) not of the corpus."""
    which = parser.add_argument_group("which samples")
    one = which.add_mutually_exclusive_group(required=required)
    one.add_argument("--scores", type=Path, metavar="FOLDER", help="by a score table")
    one.add_argument(
        "--ids",
        type=Path,
        metavar="FILE",
        help="these: .txt, .npy, .json, or .csv, .tsv, .parquet with a column sample_id",
    )
    one.add_argument(
        "--random",
        type=amount,
        metavar="AMOUNT",
        help="random ones of the window, in the base order",
    )
    if elsewhere:
        one.add_argument(
            "--texts",
            metavar="PATH",
            help="new ones: a .txt, a .jsonl or a folder of .txt, with the corpus's tokenizer",
        )
        one.add_argument(
            "--tokens",
            metavar="PATH",
            help="new ones: a .npy [n, T+1], or a Megatron .bin with its .idx",
        )
        one.add_argument(
            "--generator",
            metavar="NAME",
            help="new ones: repeated_tokens, records, or package.module:function",
        )
        which.add_argument(
            "--rows-of",
            type=Path,
            metavar="FOLDER",
            help="the corpus whose samples --scores are of, where that is not the run's",
        )
        which.add_argument(
            "--rows", type=positive, metavar="N", help="of the new ones; a generator needs it"
        )
    scores = parser.add_argument_group("by scores")
    scores.add_argument("--mechanism", metavar="NAME", help="where the folder has several tables")
    scores.add_argument(
        "--unit",
        type=names,
        action="extend",
        default=[],
        metavar="L1H2,...",
        help="repeatable; the samples chosen for each are united",
    )
    end = scores.add_mutually_exclusive_group()
    end.add_argument("--top", type=amount, metavar="AMOUNT", help="those that promote it most")
    end.add_argument("--bottom", type=amount, metavar="AMOUNT", help="those that promote it least")
    scores.add_argument("--block", metavar="NAME", help="by this block alone, such as QK")
    among = parser.add_argument_group("among which")
    among.add_argument(
        "--window",
        type=span,
        metavar="A:B",
        help="samples trained on in base steps A to B-1; also the default of --steps",
    )
    among.add_argument(
        "--domain", type=names, action="extend", default=[], metavar="A,...", help="of one of these"
    )
    among.add_argument(
        "--exclude-domain", type=names, action="extend", default=[], metavar="A,...", help="not of"
    )
    among.add_argument(
        "--exclude",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="samples that a plan names, or a file of sample ids; repeatable",
    )


def add_stream(parser: argparse.ArgumentParser) -> None:
    """The corpus and the order that the plan is for."""
    stream = parser.add_argument_group(
        "the corpus and the base order that the plan is tied to, and checked against"
    )
    stream.add_argument(
        "--run",
        dest="run_folder",
        type=Path,
        metavar="FOLDER",
        help="a run's, from what it wrote down in stream/",
    )
    stream.add_argument("--corpus", type=Path, metavar="FOLDER", help="a folder of token rows")
    stream.add_argument("--batch-size", type=positive, metavar="N", help="of an optimizer step")
    stream.add_argument("--n-steps", type=positive, metavar="N", help="of the base order")
    stream.add_argument("--seed", type=int, metavar="N", help="of the base order (default: 0)")
    stream.add_argument(
        "--no-shuffle", action="store_const", const=True, help="the rows in their own order"
    )


def add_output(parser: argparse.ArgumentParser, *, controls: bool = True) -> None:
    """Draws, controls, and where the plan goes."""
    if controls:
        parser.add_argument(
            "--with-control",
            type=positive,
            default=0,
            metavar="N",
            help="also N random controls: as many random samples of the window, treated alike",
        )
    parser.add_argument(
        "--draw",
        type=int,
        default=0,
        metavar="N",
        help="another number draws other places, samples and controls (default: %(default)s)",
    )
    parser.add_argument("--name", help="of the plan (default: what it does, to which samples)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: plans/NAME.json")
    add_force(parser)
    add_json(parser)


def add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--force", action="store_true", help="write over files that hold something else"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of words")


def amount(text: str) -> Amount:
    """``0.1``, ``10%`` or ``500``: a share, or how many."""
    from mda_lightning.recipes.plan_choice import Amount

    wrong = argparse.ArgumentTypeError(
        f"{text!r}: write a share such as 0.1 or 10%, up to 1 or 100%, or a number such as 500"
    )
    try:
        if text.isdecimal():
            count = int(text)
            if count < 1:
                raise wrong
            return Amount(count=count)
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise wrong from None
    if not 0 < share <= 1:
        raise wrong
    return Amount(fraction=share)


def share(text: str) -> float:
    """``0.95`` or ``95%``."""
    found = amount(text) if text != "1" else None
    if found is None:
        return 1.0
    if found.fraction is None:
        raise argparse.ArgumentTypeError(f"{text!r}: write a share such as 0.95 or 95%")
    return found.fraction


def span(text: str) -> tuple[int, int]:
    """``900:1400``, half-open."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"{text!r}: write A:B with 0 <= A < B, such as 900:1400")
    return int(first), int(last)


def names(text: str) -> list[str]:
    """``a,b``."""
    found = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not found:
        raise argparse.ArgumentTypeError("name at least one")
    return found


def stream_of(options: argparse.Namespace) -> BaseStream:
    """What :func:`add_stream` was told."""
    from mda_lightning.recipes.plan_stream import base_stream

    return base_stream(
        run=options.run_folder,
        corpus=options.corpus,
        batch_size=options.batch_size,
        n_steps=options.n_steps,
        seed=options.seed,
        shuffle=False if options.no_shuffle else None,
    )


def choice_of(
    options: argparse.Namespace, stream: BaseStream, action: str
) -> tuple[Choice | None, Path]:
    """What :func:`add_samples` was told, or None; and the plan's file."""
    from mda_lightning.recipes import plan_choice, plan_new_samples
    from mda_lightning.recipes.plan_files import name_of_plan, refuse

    steps = window_of(options)
    filters = _filters(options)
    _check_usage(options)
    found: Choice | None = None
    kind = next((k for k in plan_new_samples.KINDS if getattr(options, k, None)), None)
    if kind is not None:
        what = getattr(options, kind)
        name = plan_new_samples.name_of(kind, what)
        output = output_of(options, name_of_plan(action, name, steps))
        folder = output.with_suffix(plan_new_samples.SAMPLES_SUFFIX)
        if output.exists() and not folder.exists() and not options.force:
            refuse(output, None)
        found = plan_new_samples.from_elsewhere(
            kind,
            what,
            folder,
            stream=stream,
            n_rows=options.rows,
            draw=options.draw,
            force=options.force,
        )
        return found, output
    if options.scores is not None:
        found = plan_choice.by_scores(
            options.scores,
            options.unit,
            options.top or options.bottom,
            which="bottom" if options.top is None else "top",
            stream=stream,
            filters=filters,
            mechanism=options.mechanism,
            block=options.block,
            rows_of=_rows_of(options, stream),
        )
    elif options.ids is not None:
        found = plan_choice.from_file(options.ids, stream=stream, filters=filters)
    elif options.random is not None:
        found = plan_choice.at_random(
            options.random, stream=stream, filters=filters, draw=options.draw
        )
    samples = "" if found is None else found.name
    return found, output_of(options, name_of_plan(action, samples, steps, options.window))


def output_of(options: argparse.Namespace, name: str) -> Path:
    """Where the plan goes; a file named ``.json``."""
    found: Path = options.output or FOLDER / f"{options.name or name}.json"
    if found.suffix != ".json":
        options.usage(f"--output {found}: a plan is a .json file")
    return found


def window_of(options: argparse.Namespace) -> Steps | None:
    """``--steps``, or else ``--window``."""
    found: Steps | None = options.steps or options.window
    return found


def _rows_of(options: argparse.Namespace, stream: BaseStream) -> TokenRows | None:
    if getattr(options, "rows_of", None) is None:
        return None
    from mda_lightning.corpora import JoinedRows, TokenRows

    found = TokenRows.open(options.rows_of)
    if stream.rows is not None:
        JoinedRows(stream.rows, {1: found})  # refuses rows that do not go together
    return found


def _filters(options: argparse.Namespace) -> Filters:
    from mda_lightning.recipes.plan_choice import Filters

    return Filters(options.window, options.domain, options.exclude_domain, options.exclude)


def _check_usage(options: argparse.Namespace) -> None:
    """What argparse cannot: options that need or refuse each other."""
    by_scores = options.scores is not None
    if by_scores and not options.unit:
        options.usage("--scores needs --unit, such as --unit L1H2")
    if by_scores and options.top is None and options.bottom is None:
        options.usage("--scores needs --top or --bottom, such as --top 10%")
    for name in ("mechanism", "unit", "top", "bottom", "block"):
        if getattr(options, name) and not by_scores:
            options.usage(f"--{name} is for --scores")
    if getattr(options, "rows", None) and not (
        options.texts or options.tokens or options.generator
    ):
        options.usage("--rows is for --texts, --tokens and --generator")
    if getattr(options, "rows_of", None) is not None:
        if not by_scores:
            options.usage("--rows-of is for --scores")
        if options.window is not None:
            options.usage("samples of another corpus have no --window; give --steps")
    new = next((k for k in ("texts", "tokens", "generator") if getattr(options, k, None)), None)
    if new is not None:
        for name in ("domain", "exclude_domain"):
            if getattr(options, name):
                options.usage(
                    f"--{name.replace('_', '-')} chooses among samples of the corpus; --{new} "
                    "makes new ones"
                )
    named = options.ids is not None
    if named and (options.domain or options.exclude_domain):
        options.usage("--ids names the samples; --domain chooses among scored or random ones")
