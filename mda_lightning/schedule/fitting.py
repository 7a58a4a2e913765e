"""Whether a plan fits an order: the samples it names exist, its windows lie inside the run."""

from __future__ import annotations

import numpy as np

from mda_lightning.base_order import BaseOrder
from mda_lightning.interventions.operations import Mask
from mda_lightning.interventions.plan import Plan
from mda_lightning.sample_ids import split_ids


def check_fits(order: BaseOrder, plan: Plan) -> None:
    """Refuse a plan that cannot be carried out.

    Raises:
        ValueError: it was made for another order, names unknown samples, or has a window outside
            the run.
    """
    if plan.order_hash is not None and plan.order_hash != order.content_hash:
        raise ValueError(
            f"plan {plan.name!r} was made for base order {plan.order_hash[:12]}, this run has "
            f"{order.content_hash[:12]} ({order.n_rows} rows, batch {order.batch_size}, seed "
            f"{order.seed}, shuffle {order.shuffle}); use the order it was made for or build it "
            "again for this one"
        )
    _check_samples(order, plan)
    for op in plan.operations:
        by_run = isinstance(op, Mask) and op.clock == "run"
        if op.steps is not None and op.steps[1] > order.n_steps and not by_run:
            raise ValueError(
                f"the window {op.steps} of plan {plan.name!r} ends outside the run, which has "
                f"{order.n_steps} steps; make the run longer or the window end earlier"
            )


def _check_samples(order: BaseOrder, plan: Plan) -> None:
    namespaces, rows = split_ids(plan.treated_ids)
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
