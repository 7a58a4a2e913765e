"""What a plan does to a run, as numbers and in plain words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mda_lightning.interventions import Insert, Mask, Operation, Plan, Prune, Replace
from mda_lightning.schedule import Schedule
from mda_lightning.schedule.strip import KINDS, OperationCount, Strip, strip_of

_NAMED = 10
_SHOWN = 10  # operations

_WHAT = {
    "masked": "masked",
    "reweighted": "given another weight",
    "pruned": "pruned",
    "inserted": "inserted",
    "replaced": "replaced",
}


def numbers_of(
    plan: Plan,
    schedule: Schedule | None = None,
    *,
    n_spans: int = 60,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], Strip | None]:
    """All there is to say of a plan, JSON values; and its strip, where the order is known.

    Args:
        plan: what it is about.
        schedule: the plan on its base order.
        n_spans, progress: of the strip.
    """
    strip = None if schedule is None else strip_of(schedule, n_spans=n_spans, progress=progress)
    counts = [None] * len(plan.operations) if strip is None else strip.operations
    order = schedule.order if schedule is not None else plan.order
    numbers: dict[str, Any] = {
        "name": plan.name,
        "content_hash": plan.content_hash,
        "corpus_hash": plan.corpus_hash,
        "order_hash": plan.order_hash,
        "order": None if order is None else order.describe(),
        "seed": plan.seed,
        "samples": len(plan.treated_ids),
        "spared": len(plan.spared),
        "source": json.loads(json.dumps(dict(plan.source), default=str)),
        "sources": [source.describe() for source in plan.sources],
        "operations": [
            _operation(op, count, None if order is None else order.batch_size)
            for op, count in zip(plan.operations, counts, strict=True)
        ],
        "by_shift": sum(
            op.count for op in plan.operations if isinstance(op, Insert) and op.placement == "shift"
        ),
    }
    if schedule is None or strip is None:
        return numbers, None
    base = schedule.order.n_steps
    numbers["run"] = {
        "base_steps": base,
        "steps": len(schedule),
        "added_steps": len(schedule) - base,
        "batch_size": schedule.order.batch_size,
    }
    numbers["touched"] = None if strip.touched is None else list(strip.touched)
    numbers["a_step"] = {
        kind: {
            "places": tally.total,
            "steps": [tally.first, tally.last],
            "least": tally.least,
            "mean": tally.mean,
            "most": tally.most,
        }
        for kind in KINDS
        if (tally := strip.tallies[kind]).total
    }
    numbers["fully_masked"] = {"steps": strip.n_fully_masked, "first": list(strip.fully_masked)}
    return numbers, strip


def spans_of(strip: Strip) -> dict[str, Any]:
    """The strip as JSON values."""
    return {
        "first_steps": strip.edges[:-1].tolist(),
        "end": int(strip.edges[-1]),
        "places": strip.places.tolist(),
        **{kind: strip.counts[kind].tolist() for kind in KINDS},
        "mean_weight": strip.weight.tolist(),
    }


def words_of(numbers: Mapping[str, Any]) -> list[str]:
    """The numbers as sentences, a line each: what is done, then what comes of it."""
    operations = numbers["operations"]
    lines = [operation["words"] for operation in operations[:_SHOWN]]
    if len(operations) > _SHOWN:  # a run that was steered has one for each decision
        more = Counter(operation["operation"] for operation in operations[_SHOWN:])
        lines.append("and " + ", ".join(f"{_n(n, kind)} more" for kind, n in more.items()))
    lines += _of_the_run(numbers)
    for kind, told in numbers.get("a_step", {}).items():
        first, last = told["steps"]
        lines.append(
            f"{_WHAT[kind]} a step, in steps {first}:{last}: least {told['least']}, mean "
            f"{told['mean']:.3g}, most {told['most']} of {numbers['run']['batch_size']}"
        )
    return lines


def warnings_of(numbers: Mapping[str, Any]) -> list[str]:
    """What is probably not meant."""
    found: list[str] = []
    for operation in numbers["operations"]:
        unmet = operation.get("unmet", 0)
        if unmet and len(found) < _SHOWN:
            named = ", ".join(map(str, operation["unmet_ids"]))
            more = ", ..." if unmet > len(operation["unmet_ids"]) else ""
            where = _steps(operation["steps"])
            found.append(
                f"{unmet:,} of the {operation['samples']:,} samples of the "
                f"{operation['operation']} are not in {where}, where it has no effect on them: "
                f"{named}{more}"
            )
    empty = numbers.get("fully_masked", {"steps": 0})
    if empty["steps"]:
        named = ", ".join(map(str, empty["first"]))
        more = ", ..." if empty["steps"] > len(empty["first"]) else ""
        found.append(
            f"every sample of {_n(empty['steps'], 'step')} has weight 0, so the gradient is zero "
            f"there (weight decay and momentum still act): {named}{more}"
        )
    return found


def _operation(op: Operation, count: OperationCount | None, batch: int | None) -> dict[str, Any]:
    told = {key: value for key, value in op.describe().items() if key not in ("sample_ids", "by")}
    told["samples"] = len(op.named_ids)
    ids: Any = getattr(op, "sample_ids", None)
    if ids is not None:
        told["samples"] = len(ids)
        told["first_ids"] = ids[:_NAMED].tolist()
    if isinstance(op, Replace) and op.by is not None:
        told["coming_in"] = len(np.unique(op.by))
        told["first_coming_in"] = op.by[:_NAMED].tolist()
    if count is not None:
        told["places"] = count.places
        if count.met.size:
            unmet = count.unmet
            told |= {"unmet": len(unmet), "unmet_ids": unmet[:_NAMED].tolist()}
    told["words"] = _words(op, count, batch)
    return told


def _words(op: Operation, count: OperationCount | None, batch: int | None) -> str:
    where, share = _steps(op.steps), ""
    if count is not None and batch is not None and op.steps is not None:
        n_places = (op.steps[1] - op.steps[0]) * batch
        if not (isinstance(op, Mask) and op.occurrences == "all"):
            share = f": {count.places:,} of {n_places:,} places ({count.places / n_places:.2%})"
    online = ", decided while the run went on" if getattr(op, "online", False) else ""
    if isinstance(op, Mask):
        also = ", where they were inserted too" if op.occurrences == "all" else ""
        clock = " (the run's own steps)" if op.clock == "run" else ""
        return (
            f"mask: {_n(len(op.sample_ids), 'sample')} with weight {op.weight:g} in "
            f"{where}{clock}{also}{share}{online}; they stay in their batches"
        )
    if isinstance(op, Insert):
        times = "" if op.copies == 1 else f" {op.copies} times each"
        how = f"dispersed over {where}" if op.mode == "dispersed" else f"from step {op.steps[0]} on"
        then = (
            "later data moves back"
            if op.placement == "shift"
            else "in the places of random base samples"
        )
        if op.placement == "shift":
            share = ""
        return f"insert: {_n(len(op.sample_ids), 'sample')}{times}, {how}, {then}{share}{online}"
    if isinstance(op, Prune):
        return (
            f"prune: a random {100 * op.fraction:.4g}% of {where} with weight {op.weight:g}{share}"
        )
    if op.sample_ids is not None:
        return f"replace: {_n(len(op.sample_ids), 'sample')} in {where} by as many others{share}"
    if op.by is not None:
        coming = f"{_n(len(np.unique(op.by)), 'sample')}, again and again"
    else:
        coming = f"those of {_steps(op.by_steps)}"
    return f"replace: all samples of {where} by {coming}{share}"


def _of_the_run(numbers: Mapping[str, Any]) -> list[str]:
    by_shift, run = numbers["by_shift"], numbers.get("run")
    if run is None:
        if not by_shift:
            return ["run: as long as without the plan"]
        return [f"run: longer by {by_shift:,} samples, ⌈{by_shift}/batch size⌉ steps"]
    if not by_shift:
        return [f"run: {run['steps']:,} steps, as without the plan; data keeps its steps"]
    return [
        f"run: {run['base_steps']:,} -> {run['steps']:,} steps: {_n(by_shift, 'insertion')} by "
        f"shift / batch {run['batch_size']}"
    ]


def _steps(window: Any) -> str:
    return "the whole run" if window is None else f"steps {window[0]}:{window[1]}"


def _n(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
