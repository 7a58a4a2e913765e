"""``mda-lightning plan``: commands on plans, and on what runs did with them."""

from __future__ import annotations

import argparse
import json
import math
import warnings
from pathlib import Path

from mda_lightning.cli.options import EXIT_ERROR, EXIT_OK, positive
from mda_lightning.cli.plan_making import (
    Commands,
    add_duplicate,
    add_insert,
    add_mask,
    add_prune,
    add_replace,
)
from mda_lightning.cli.plan_options import (
    add_force,
    add_json,
    add_stream,
    output_of,
    span,
    stream_of,
)
from mda_lightning.cli.plan_output import add_command, print_written, told

_DESCRIPTION = """\
Plans of what to change in a training stream: which samples to mask, insert or replace, in which
steps. A plan is a file; `TokenDataModule(rows, ..., plan=FILE)` trains with it, and
`mda-lightning fit ... --data.plan FILE`.

an AMOUNT is a share (0.1 or 10%) or a number of samples (500); shares are of the samples that are
left after --window, --domain and --exclude. Steps are those of the base order, A:B without B.
"""

_EPILOG = """\
examples:
  mda-lightning plan mask --run runs/base --scores runs/base/scores --unit L1H2 --top 10% \\
      --window 900:1400 --with-control 3
  mda-lightning plan insert --run runs/base --scores runs/base/scores --unit L1H2,L1H3 --top 500 \\
      --window 900:1400 --placement replace --copies 2 --output plans/more.json
  mda-lightning plan insert --run runs/base --generator repeated_tokens --rows 400 \\
      --steps 900:1400
  mda-lightning plan replace --run runs/base --steps 900:1400 --by-steps 100:600
  mda-lightning plan prune --run runs/base --fraction 95% --steps 900:1400
  mda-lightning plan duplicate --corpus corpora/mine --ids names.txt --times 10 --steps 0:2000
  mda-lightning plan control plans/more.json --draws 3
  mda-lightning plan compose plans/a.json plans/b.json --output plans/both.json
  mda-lightning plan show plans/more.json --figure strip.png
  mda-lightning plan verify runs/more
"""


def add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command, its own commands and their options."""
    parser = commands.add_parser(
        "plan",
        help="plans of what to change in the data: make, compose, show and verify them",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plans = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="plan_command", required=True
    )
    add_mask(plans)
    add_insert(plans)
    add_duplicate(plans)
    add_replace(plans)
    add_prune(plans)
    _add_control(plans)
    _add_compose(plans)
    _add_show(plans)
    _add_verify(plans)


def _add_control(plans: Commands) -> None:
    parser = add_command(
        plans,
        "control",
        _control,
        "random controls of a plan: as many random samples, treated alike, in PLAN-random.json or "
        "PLAN-random-1.json ... Where the plan inserts in the places of base samples, it is "
        "written again as PLAN-matched.json: it and its controls then take the same places",
        "plans/insert-top.json --draws 3",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN")
    parser.add_argument(
        "--draws", type=positive, default=1, metavar="N", help="default: %(default)s"
    )
    pool = parser.add_mutually_exclusive_group()
    pool.add_argument(
        "--window",
        type=span,
        metavar="A:B",
        help="draw from the base samples of these steps (default: the plan's own windows)",
    )
    pool.add_argument("--pool", type=Path, metavar="FILE", help="draw from these sample ids")
    parser.add_argument(
        "--exclude",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="draw none that a plan names, or a file of sample ids; repeatable",
    )
    parser.add_argument(
        "--treated",
        choices=("in", "out"),
        help="of a replacement one for one: which side is random in a control (default: as the "
        "plan says, else what comes in)",
    )
    parser.add_argument(
        "--draw", type=int, default=0, metavar="N", help="draws count from N+1 (default: 0)"
    )
    add_force(parser)
    add_stream(parser)
    add_json(parser)


def _add_compose(plans: Commands) -> None:
    parser = add_command(
        plans,
        "compose",
        _compose,
        "several plans in one, in this order",
        "plans/a.json plans/b.json --output plans/both.json",
    )
    parser.add_argument("plans", type=Path, nargs="+", metavar="PLAN")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--name", help="of the plan (default: of the file)")
    add_force(parser)
    add_stream(parser)
    add_json(parser)


def _control(options: argparse.Namespace) -> int:
    from mda_lightning.interventions import Plan
    from mda_lightning.interventions.id_files import read_ids
    from mda_lightning.interventions.selection import excluded_ids
    from mda_lightning.recipes import plan_files, plan_make
    from mda_lightning.recipes.plan_stream import of_plan

    with told():
        plan = Plan.load(options.plan)
        stream = of_plan(plan, stream_of(options))
        pool = None if options.pool is None else read_ids(options.pool)
        if options.window is not None:
            pool = plan_make.pool_of(plan, stream, options.window)
        if pool is None and (conditions := plan_make.forgotten(plan, options.exclude)):
            warnings.warn(conditions, stacklevel=1)
        matched, controls = plan_make.with_controls(
            plan,
            options.draws,
            pool=pool,
            stream=stream,
            draw=options.draw,
            exclude=excluded_ids(options.exclude),
            treated=options.treated,
        )
        written = None
        paths = plan_files.control_paths(options.plan, options.draws)
        changed = matched.content_hash != plan.content_hash
        path = options.plan.with_name(f"{options.plan.stem}-matched.json")
        matched = matched.bound(name=path.stem)
        outputs = [*([(matched, path)] if changed else []), *zip(controls, paths, strict=True)]
        plan_files.refuse_overwriting(outputs, force=options.force)
        if changed:
            about = [f"train this one instead of {options.plan}: it takes the controls' places"]
            written = plan_make.write(matched, path, stream=stream, about=about)
        of_controls = [
            plan_make.write(control, path, stream=stream)
            for control, path in zip(controls, paths, strict=True)
        ]
        places = plan_make.places_of(plan, stream) if written is None else None
        print_written(written, of_controls, as_json=options.json, places=places)
    return EXIT_OK


def _compose(options: argparse.Namespace) -> int:
    from functools import reduce
    from operator import or_

    from mda_lightning.interventions import Plan
    from mda_lightning.recipes import plan_files, plan_make

    with told():
        output = output_of(options, "")
        parts = [Plan.load(path) for path in options.plans]
        seed = next((part.seed for part in parts if part.seed is not None), None)
        whole = reduce(or_, (part.bound(seed=seed) for part in parts))
        source: dict[str, object] = {"composed_of": [part.content_hash for part in parts]}
        if sides := plan_make.sides_of(parts):
            source["treated"] = sides[0] if len(sides) == 1 else "in and out"
        whole = whole.bound(source=source, name=options.name or output.stem)
        about = [
            f"composed of {', '.join(map(str, options.plans))}; places are drawn anew for the "
            f"whole, with seed {seed or 0}"
        ]
        plan_files.refuse_overwriting([(whole, output)], force=options.force)
        written = plan_make.write(whole, output, stream=stream_of(options), about=about)
        print_written(written, as_json=options.json)
    return EXIT_OK


# -- looking at plans -----------------------------------------------------------------------------


def _add_show(plans: Commands) -> None:
    parser = add_command(
        plans,
        "show",
        _show,
        "what a plan does: a strip of the stream, counts an operation and a step, and what becomes "
        "of the steps and of the learning rate. Of a run, its plan as it was run",
        "plans/insert-top.json --figure strip.png",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help="a plan file, or a run's folder")
    parser.add_argument(
        "--width", type=positive, metavar="N", help="characters (default: the terminal's)"
    )
    parser.add_argument("--figure", type=Path, metavar="FILE", help="the strip as a .png as well")
    add_stream(parser)
    rate = parser.add_argument_group("the learning rate before and after")
    rate.add_argument("--schedule", choices=("pythia", "pythia_v1", "wsd", "constant"))
    rate.add_argument(
        "--total-steps",
        type=positive,
        metavar="N",
        help="where the schedule ends (default: with the run, as of PythiaModule)",
    )
    rate.add_argument(
        "--learning-rate", type=float, metavar="X", help="the peak (default: 1, a multiple of it)"
    )
    rate.add_argument(
        "--warmup-steps",
        type=int,
        metavar="N",
        help="default: 1%% of the total, as of PythiaModule",
    )
    add_json(parser)


def _add_verify(plans: Commands) -> None:
    parser = add_command(
        plans,
        "verify",
        _verify,
        "whether a run was trained on what its plan says: its ledger, step by step, against the "
        "plan",
        "runs/mine",
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN")
    parser.add_argument(
        "--corpus", type=Path, metavar="FOLDER", help="where it lies now (default: as the run said)"
    )
    add_json(parser)


def _show(options: argparse.Namespace) -> int:
    from rich.console import Console

    from mda_lightning.recipes.plan_show import Rates, show

    rates = None
    if options.schedule is not None:
        rates = Rates(
            options.schedule, options.total_steps, options.learning_rate, options.warmup_steps
        )
    elif any(
        one is not None
        for one in (options.total_steps, options.learning_rate, options.warmup_steps)
    ):
        options.usage("--total-steps, --learning-rate and --warmup-steps are of a --schedule")
    if options.learning_rate is not None and not 0 < options.learning_rate < math.inf:
        options.usage(f"--learning-rate {options.learning_rate}: above 0")
    if options.figure is not None and options.figure.suffix != ".png":
        options.usage(f"--figure {options.figure}: the figure is a .png file")
    console = Console(width=options.width)
    with told():
        shown = show(
            options.plan,
            stream_of(options),
            console=None if options.json else console,
            rates=rates,
            figure=options.figure,
        )
    if options.json:
        print(json.dumps(shown, indent=2))
    return EXIT_OK


def _verify(options: argparse.Namespace) -> int:
    from rich.console import Console

    from mda_lightning.recipes.plan_show import progress_bar
    from mda_lightning.recipes.plan_verify import verify_run

    with told(), progress_bar(None if options.json else Console(stderr=True)) as progress:
        report = verify_run(options.run_folder, corpus=options.corpus, progress=progress)
    if options.json:
        print(json.dumps({"ok": report.ok, "lines": report.lines()}, indent=2))
    else:
        print("\n".join(report.lines()))
    return EXIT_OK if report.ok else EXIT_ERROR
