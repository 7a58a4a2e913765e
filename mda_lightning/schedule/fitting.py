"""Whether a plan fits an order: the samples it names exist, its windows lie inside the run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mda_lightning.base_order import BaseOrder
from mda_lightning.interventions.operations import Mask, Operation, Prune
from mda_lightning.interventions.plan import Plan
from mda_lightning.sample_ids import split_ids


def check_order(order: BaseOrder, plan: Plan) -> None:
    """Refuse a plan that was made for another order.

    Raises:
        ValueError: it was.
    """
    if plan.order_hash is not None and plan.order_hash != order.content_hash:
        raise ValueError(
            f"plan {plan.name!r} was made for base order {plan.order_hash[:12]}, this run has "
            f"{order.content_hash[:12]} ({order.n_rows} rows, batch {order.batch_size}, seed "
            f"{order.seed}, shuffle {order.shuffle}); use the order it was made for or build it "
            "again for this one"
        )


def check_fits(order: BaseOrder, plan: Plan, operations: Sequence[Operation]) -> None:
    """Refuse operations of a plan that cannot be carried out.

    Raises:
        ValueError: they name unknown samples, or have a window outside the run.
    """
    _check_samples(order, plan, operations)
    for op in operations:
        if isinstance(op, Prune):
            start, end = (0, order.n_rows) if op.steps is None else order.places(op.steps)
            if round(op.fraction * (end - start)) == 0:
                raise ValueError(
                    f"a share of {op.fraction} of {end - start} places is none; prune a larger "
                    "share, or in more steps"
                )
        by_run = isinstance(op, Mask) and op.clock == "run"
        if op.steps is not None and op.steps[1] > order.n_steps and not by_run:
            raise ValueError(
                f"the window {op.steps} of plan {plan.name!r} ends outside the run, which has "
                f"{order.n_steps} steps; make the run longer or the window end earlier"
            )


def _check_samples(order: BaseOrder, plan: Plan, operations: Sequence[Operation]) -> None:
    ids = [np.empty(0, np.int64), *(op.named_ids for op in operations)]
    namespaces, rows = split_ids(np.concatenate(ids))
    n_rows = {0: order.n_rows} | {source.namespace: source.n_rows for source in plan.sources}
    for namespace in np.unique(namespaces):
        largest = int(rows[namespaces == namespace].max())
        if int(namespace) not in n_rows:
            raise ValueError(
                f"plan {plan.name!r} names sample {largest} of a source that it does not list; "
                "give Plan.insert(..., sources=[...]) those that its ids are from"
            )
        if largest >= n_rows[int(namespace)]:
            where = "corpus has" if not namespace else "source of inserted samples has"
            raise ValueError(
                f"plan {plan.name!r} names sample {largest}, the {where} rows "
                f"0..{n_rows[int(namespace)] - 1}; was the plan made for another corpus?"
            )


def check_run_clock(operations: Sequence[Operation], n_steps: int) -> None:
    """Raise ValueError where a window that counts in the run's steps ends outside the run."""
    for op in operations:
        by_run = isinstance(op, Mask) and op.clock == "run"
        if by_run and op.steps is not None and op.steps[1] > n_steps:
            raise ValueError(
                f"the window {op.steps} ends outside the run, which has {n_steps} steps; make it "
                "end earlier"
            )
