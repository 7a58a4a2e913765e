"""``mda-lightning plan mask``, ``insert``, ``duplicate``, ``replace`` and ``prune``."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from mda_lightning.cli.options import EXIT_OK, positive
from mda_lightning.cli.plan_options import (
    add_output,
    add_samples,
    add_stream,
    choice_of,
    output_of,
    share,
    span,
    stream_of,
    window_of,
)
from mda_lightning.cli.plan_output import add_command, print_written, told

if TYPE_CHECKING:
    from mda_lightning.interventions import Plan
    from mda_lightning.recipes.plan_choice import Choice
    from mda_lightning.recipes.plan_stream import BaseStream

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_mask(plans: Commands) -> None:
    parser = add_command(
        plans,
        "mask",
        _mask,
        "samples stay in their batches with weight 0",
        "--run runs/base --scores runs/base/scores --unit L1H2 --top 10% --window 900:1400",
    )
    parser.add_argument(
        "--steps", type=span, metavar="A:B", help="default: --window, else the whole run"
    )
    parser.add_argument(
        "--weight", type=float, default=0.0, metavar="X", help="default: %(default)s, removed"
    )
    parser.add_argument(
        "--inserted-too", action="store_true", help="also where the plan inserts these samples"
    )
    _add_common(parser, elsewhere=False)


def add_insert(plans: Commands) -> None:
    parser = add_command(
        plans,
        "insert",
        _insert,
        "samples are trained on in addition to the base order",
        "--corpus corpora/mine --texts new.jsonl --steps 900:1400 --copies 5",
    )
    parser.add_argument(
        "--copies", type=positive, default=1, metavar="N", help="of each (default: %(default)s)"
    )
    _add_places(parser)
    _add_common(parser, elsewhere=True)


def add_duplicate(plans: Commands) -> None:
    parser = add_command(
        plans,
        "duplicate",
        _duplicate,
        "samples that the base order has once are seen k times in all: k-1 insertions of each",
        "--run runs/base --ids names.txt --times 10 --steps 0:2000",
    )
    parser.add_argument(
        "--times", type=positive, required=True, metavar="K", help="in all, at least 2"
    )
    _add_places(parser)
    _add_common(parser, elsewhere=False)


def add_replace(plans: Commands) -> None:
    parser = add_command(
        plans,
        "replace",
        _replace,
        "samples of a window give their places to others: the chosen ones to random ones or those "
        "of --by, or, where none are chosen, all of the window to --by, --by-steps or new ones",
        "--run runs/base --steps 900:1400 --by-steps 100:600",
    )
    parser.add_argument("--steps", type=span, metavar="A:B", help="default: --window")
    coming = parser.add_mutually_exclusive_group()
    coming.add_argument(
        "--by", type=Path, metavar="FILE", help="a file of sample ids, or a plan, that come in"
    )
    coming.add_argument(
        "--by-steps", type=span, metavar="C:D", help="the base samples of these steps, in order"
    )
    _add_common(parser, elsewhere=True, required=False)


def add_prune(plans: Commands) -> None:
    parser = add_command(
        plans,
        "prune",
        _prune,
        "a random share of the places gets weight 0",
        "--run runs/base --fraction 95% --steps 900:1400",
    )
    parser.add_argument(
        "--fraction", type=share, required=True, metavar="SHARE", help="of the window's places"
    )
    parser.add_argument("--steps", type=span, metavar="A:B", help="default: the whole run")
    parser.add_argument(
        "--weight", type=float, default=0.0, metavar="X", help="default: %(default)s, removed"
    )
    add_stream(parser)
    add_output(parser, controls=False)


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=span, metavar="A:B", help="default: --window")
    parser.add_argument(
        "--mode",
        choices=("dispersed", "concentrated"),
        default="dispersed",
        help="over the window, or all at its start (default: %(default)s)",
    )
    parser.add_argument(
        "--placement",
        choices=("shift", "replace"),
        default="shift",
        help="later data moves back and the run gets longer, or random base samples give their "
        "places (default: %(default)s)",
    )


def _add_common(parser: argparse.ArgumentParser, *, elsewhere: bool, required: bool = True) -> None:
    add_samples(parser, elsewhere=elsewhere, required=required)
    add_stream(parser)
    add_output(parser)


def _mask(options: argparse.Namespace) -> int:
    from mda_lightning.interventions import Plan

    with told():
        stream = stream_of(options)
        choice, output = choice_of(options, stream, "mask")
        assert choice is not None
        plan = Plan.mask(
            choice.ids,
            window_of(options),
            weight=options.weight,
            occurrences="all" if options.inserted_too else "base",
        )
        return _write(options, plan, choice, stream, output)


def _insert(options: argparse.Namespace) -> int:
    from mda_lightning.interventions import Plan

    with told():
        stream = stream_of(options)
        steps = _needed(options, stream)
        choice, output = choice_of(options, stream, "insert")
        assert choice is not None
        plan = Plan.insert(
            choice.ids,
            steps=steps,
            mode=options.mode,
            placement=options.placement,
            copies=options.copies,
        )
        return _write(options, plan, choice, stream, output)


def _duplicate(options: argparse.Namespace) -> int:
    from mda_lightning.interventions import Plan
    from mda_lightning.recipes import plan_make

    with told():
        stream = stream_of(options)
        steps = _needed(options, stream)
        choice, output = choice_of(options, stream, f"duplicate-{options.times}")
        assert choice is not None
        plan = Plan.duplicate(
            choice.ids, options.times, steps=steps, mode=options.mode, placement=options.placement
        )
        more = f"each is seen {options.times} times where the base order has it once"
        if stream.order is not None and (away := plan_make.never_met(choice.ids, stream.order)):
            warnings.warn(away, stacklevel=1)
        return _write(options, plan, choice, stream, output, more)


def _replace(options: argparse.Namespace) -> int:
    from mda_lightning.recipes.plan_make import replacement

    with told():
        stream = stream_of(options)
        steps = _needed(options, stream)
        choice, output = choice_of(options, stream, "replace")
        if choice is None and options.by is None and options.by_steps is None:
            options.usage(
                "say what comes in: --by-steps, --by, --texts, --tokens or --generator; or choose "
                "samples that go out: --scores, --ids or --random"
            )
        if options.by_steps is not None and choice is not None:
            options.usage("--by-steps replaces a whole window; choose no samples with it")
        plan = replacement(
            choice,
            steps=steps,
            by=options.by,
            by_steps=options.by_steps,
            stream=stream,
            draw=options.draw,
        )
        drawn = choice is not None and not choice.sources and options.by is None
        more = "what comes in is drawn from the others that could have been chosen" if drawn else ""
        return _write(options, plan, choice, stream, output, more)


def _prune(options: argparse.Namespace) -> int:
    from mda_lightning.interventions import Plan
    from mda_lightning.recipes.plan_files import name_of_plan

    with told():
        stream = stream_of(options)
        plan = Plan.prune(options.fraction, options.steps, weight=options.weight, draw=options.draw)
        name = f"prune-{100 * options.fraction:.4g}-percent"
        output = output_of(options, name_of_plan(name, "", options.steps))
        return _write(options, plan, None, stream, output)


def _needed(options: argparse.Namespace, stream: BaseStream) -> tuple[int, int]:
    """The window, which is refused before samples are made for it."""
    steps = window_of(options)
    if steps is None:
        options.usage("in which steps? give --steps A:B, or --window A:B")
    assert steps is not None
    if stream.order is not None and steps[1] > stream.order.n_steps:
        raise ValueError(
            f"steps {steps[0]}:{steps[1]} end outside the run, which has {stream.order.n_steps} "
            "steps; make the run longer or the window end earlier"
        )
    return steps


def _write(
    options: argparse.Namespace,
    plan: Plan,
    choice: Choice | None,
    stream: BaseStream,
    output: Path,
    more: str = "",
) -> int:
    from mda_lightning.interventions.selection import excluded_ids
    from mda_lightning.recipes import plan_files, plan_make

    name = options.name or output.stem
    plan = plan_make.bound(plan, choice, stream, draw=options.draw, name=name)
    controls: tuple[Plan, ...] = ()
    n_controls = getattr(options, "with_control", 0)
    if n_controls:
        plan, controls = plan_make.with_controls(
            plan,
            n_controls,
            pool=None if choice is None else choice.pool,
            stream=stream,
            draw=options.draw,
            exclude=excluded_ids(options.exclude),
        )
    about = [] if choice is None else [f"samples: {choice.words}"]
    if choice is not None and choice.left_out:
        about.append(f"left out: {', '.join(choice.left_out)}")
    about += [more] if more else []
    paths = plan_files.control_paths(output, n_controls)
    outputs = [(plan, output), *zip(controls, paths, strict=True)]
    plan_files.refuse_overwriting(outputs, force=options.force)
    if choice is not None and choice.sources:
        for one, _ in outputs:
            plan_make.check(one, stream)
        choice.settle()
    written = plan_make.write(plan, output, stream=stream, about=about)
    written.warnings.extend(plan_files.controls_of_others(plan, output, paths))
    of_controls = [
        plan_make.write(control, path, stream=stream)
        for control, path in zip(controls, paths, strict=True)
    ]
    print_written(written, of_controls, as_json=options.json)
    return EXIT_OK
