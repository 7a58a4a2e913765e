"""What the ``mda-lightning plan`` commands print, and how each is added."""

from __future__ import annotations

import argparse
import io
import json
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mda_lightning.recipes.plan_make import Written


def add_command(
    plans: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    what: str,
    example: str,
) -> argparse.ArgumentParser:
    """One of the commands; ``run`` is given its options."""
    parser = plans.add_parser(
        name,
        help=what.partition(":")[0],
        description=textwrap.fill(f"{what[0].upper()}{what[1:]}.", 96),
        epilog=f"example:\n  mda-lightning plan {name} {example}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, usage=parser.error)
    return parser


@contextmanager
def told() -> Iterator[None]:
    """Warnings in one line each, and no character that cannot be printed."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"mda-lightning: {message}", file=sys.stderr)

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may not have every character
            stream.reconfigure(errors="replace")
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show  # put back by catch_warnings
        yield


def print_written(
    plan: Written | None,
    controls: Sequence[Written] = (),
    *,
    as_json: bool,
    places: int | None = None,
) -> None:
    """What was made: the plan in full, its controls in a line each.

    Args:
        places: that the plan treats, where it was not written.
    """
    from mda_lightning.recipes.plan_numbers import counted, n_places

    wanted = places if plan is None else n_places(plan.numbers)
    for one in controls:
        own = n_places(one.numbers)
        if wanted is not None and own is not None and own != wanted:
            one.warnings.append(
                f"this control treats {counted(own, 'place')} of the stream, the plan {wanted:,}: "
                "part of a difference between the two is of that; widen the pool"
            )
    written = [*([] if plan is None else [plan]), *controls]
    for one in written:
        for message in one.warnings:
            print(f"mda-lightning: {one.path}: {message}", file=sys.stderr)
    if as_json:
        stored = {} if plan is None else plan.stored()
        print(json.dumps(stored | {"controls": [one.stored() for one in controls]}, indent=2))
        return
    if plan is not None:
        print(f"{plan.path}: plan {plan.plan.name!r}, content {plan.plan.content_hash[:12]}")
        for line in plan.words:
            print(f"  {line}")
    for one in controls:
        own = n_places(one.numbers)
        treats = "" if own is None else f", treats {counted(own, 'place')}"
        print(f"{one.path}: random control, content {one.plan.content_hash[:12]}{treats}")
        if plan is None:
            for line in one.words:
                print(f"  {line}")
    print(f"use: {written[0].use}")
    print(f"     mda-lightning fit --config run.yaml --data.plan {written[0].path}")
