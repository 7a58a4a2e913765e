"""What a plan does to a run, as numbers and in plain words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mda_lightning.base_order import BaseOrder
from mda_lightning.interventions import Insert, Mask, Operation, Plan, Prune, Replace
from mda_lightning.schedule import Schedule
from mda_lightning.schedule.strip import KINDS, OperationCount, Strip, strip_of

_NAMED = 10
_SHOWN = 10  # operations
_LISTED = 3  # samples, within a sentence

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
            _operation(op, count, order) for op, count in zip(plan.operations, counts, strict=True)
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


def n_places(numbers: Mapping[str, Any]) -> int | None:
    """Places that all operations treat, where they were counted."""
    counts = [operation.get("places") for operation in numbers["operations"]]
    return None if None in counts else sum(counts)


def words_of(numbers: Mapping[str, Any]) -> list[str]:
    """The numbers as sentences, a line each: what is done, then what comes of it."""
    operations, decided = [], dict[tuple[str, ...], list[Any]]()
    for operation in numbers["operations"]:
        if operation.get("online"):  # of which a run that was steered has one for each decision
            decided.setdefault(_alike(operation), []).append(operation)
        else:
            operations.append(operation)
    lines = [operation["words"] for operation in operations[:_SHOWN]]
    if len(operations) > _SHOWN:
        more = Counter(operation["operation"] for operation in operations[_SHOWN:])
        lines.append("and " + ", ".join(f"{counted(n, kind)} more" for kind, n in more.items()))
    lines += [_decided(alike, numbers) for alike in decided.values()]
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
    decided = list[Any]()
    for operation in numbers["operations"]:
        unmet = operation.get("unmet", 0)
        if unmet and operation.get("online"):
            decided.append(operation)
        elif unmet and len(found) < _SHOWN:
            named = ", ".join(map(str, operation["unmet_ids"]))
            more = ", ..." if unmet > len(operation["unmet_ids"]) else ""
            where = _steps(operation["steps"])
            found.append(
                f"{unmet:,} of the {counted(operation['samples'], 'sample')} of the "
                f"{operation['operation']} {'is' if unmet == 1 else 'are'} not in {where}, where "
                f"it has no effect on {'it' if unmet == 1 else 'them'}: {named}{more}"
            )
    if decided:
        unmet = sum(operation["unmet"] for operation in decided)
        found.append(
            f"{counted(unmet, 'sample')} of {counted(len(decided), 'mask')} decided while the run "
            f"went on {'is' if unmet == 1 else 'are'} not in the steps that they are about, the "
            f"first of them in {_steps(decided[0]['steps'])}: {decided[0]['unmet_ids'][0]}"
        )
    empty = numbers.get("fully_masked", {"steps": 0})
    if empty["steps"]:
        named = ", ".join(map(str, empty["first"]))
        more = ", ..." if empty["steps"] > len(empty["first"]) else ""
        found.append(
            f"every sample of {counted(empty['steps'], 'step')} has weight 0, so the gradient is "
            f"zero there (weight decay and momentum still act): {named}{more}"
        )
    return found


def _alike(operation: Mapping[str, Any]) -> tuple[str, ...]:
    """What decisions have in common that are told together."""
    fields = ("operation", "weight", "clock", "mode", "placement", "copies")
    return tuple(str(operation.get(field)) for field in fields)


def _decided(alike: Sequence[Mapping[str, Any]], numbers: Mapping[str, Any]) -> str:
    """Decisions of one kind in a line."""
    one = alike[0]
    if len(alike) == 1:
        return str(one["words"])
    first = min(operation["steps"][0] for operation in alike)
    last = max(operation["steps"][1] for operation in alike)
    what = f"{counted(len(alike), 'decision')} while the run went on, in steps {first}:{last}"
    n_samples = sum(operation["samples"] for operation in alike)
    order = numbers["order"]
    share = ""
    if "places" in one and order is not None:
        n_places = (last - first) * order["batch_size"]
        places = sum(operation["places"] for operation in alike)
        share = f": {places:,} of {n_places:,} places ({places / n_places:.2%})"
    if one["operation"] == "mask":
        clock = " (the run's own steps)" if one["clock"] == "run" else ""
        each = f"{n_samples:,} times a sample with weight {one['weight']:g}"
        return f"mask: {what}{clock}, {each}{share}"
    times = "" if one["copies"] == 1 else f" {one['copies']} times each"
    then = ", later data moves back"
    if one["placement"] == "replace":
        then = f", in the places of random base samples{share}"
    return f"insert: {what}, {counted(n_samples, 'sample')}{times}, {one['mode']}{then}"


def _operation(
    op: Operation, count: OperationCount | None, order: BaseOrder | None
) -> dict[str, Any]:
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
    told["words"] = _words(op, count, order)
    return told


def _words(op: Operation, count: OperationCount | None, order: BaseOrder | None) -> str:
    where, share = _steps(op.steps), ""
    if count is not None and order is not None:
        first, last = op.steps or (0, order.n_steps)
        n_places = (last - first) * order.batch_size
        share = f": {count.places:,} of {n_places:,} places ({count.places / n_places:.2%})"
        if isinstance(op, Mask) and op.occurrences == "all":
            share = f": {counted(count.places, 'place')}"
    online = ", decided while the run went on" if getattr(op, "online", False) else ""
    if isinstance(op, Mask):
        also = ", where they were inserted too" if op.occurrences == "all" else ""
        clock = " (the run's own steps)" if op.clock == "run" else ""
        return (
            f"mask: {counted(len(op.sample_ids), 'sample')} with weight {op.weight:g} in "
            f"{where}{clock}{also}{share}{online}; "
            + ("they stay in their batches" if len(op.sample_ids) > 1 else "it stays in its batch")
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
        return (
            f"insert: {counted(len(op.sample_ids), 'sample')}{times}, {how}, {then}{share}{online}"
        )
    if isinstance(op, Prune):
        return (
            f"prune: a random {100 * op.fraction:.4g}% of {where} with weight {op.weight:g}{share}"
        )
    if op.sample_ids is not None:
        assert op.by is not None
        others = f"by {some(op.by)}, one for one" if len(op.by) > 1 else f"by {op.by[0]}"
        return f"replace: {counted(len(op.sample_ids), 'sample')} in {where} {others}{share}"
    if op.by is not None:
        own = np.unique(op.by)
        coming = f"{counted(len(own), 'sample')} ({some(own)}), again and again"
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
        f"run: {run['base_steps']:,} -> {run['steps']:,} steps: {counted(by_shift, 'insertion')} "
        f"by shift / batch {run['batch_size']}"
    ]


def some(ids: NDArray[np.int64]) -> str:
    """The first few of them."""
    return ", ".join(map(str, ids[:_LISTED].tolist())) + (", ..." if len(ids) > _LISTED else "")


def _steps(window: Any) -> str:
    return "the whole run" if window is None else f"steps {window[0]}:{window[1]}"


def counted(count: int, what: str) -> str:
    """``"1 sample"``, ``"1,234 samples"``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
