"""Plans made from scores in one call, with their matched random controls."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mda_lightning.base_order import BaseOrder
from mda_lightning.interventions.operations import (
    Insert,
    Mode,
    Placement,
    Replace,
    Steps,
    as_ids,
)
from mda_lightning.interventions.plan import Plan
from mda_lightning.interventions.selection import (
    Exclusion,
    Which,
    open_scores,
    samples_of,
    select,
)
from mda_lightning.interventions.sources import Source
from mda_lightning.shuffling import key_of, keyed_order
from mda_lightning.store import ScoreTable
from mda_lightning.store.domains import Domains

Action: TypeAlias = Literal["mask", "insert", "replace"]
Side: TypeAlias = Literal["in", "out"]

_NAMED = 3  # units that a plan's name lists


@overload
def plan_from_scores(
    scores: ScoreTable | str | os.PathLike[str],
    units: str | Sequence[str],
    *,
    action: Action = ...,
    control_seed: None = ...,
    **settings: Any,
) -> Plan: ...


@overload
def plan_from_scores(
    scores: ScoreTable | str | os.PathLike[str],
    units: str | Sequence[str],
    *,
    action: Action = ...,
    control_seed: int | Sequence[int],
    **settings: Any,
) -> tuple[Plan, ...]: ...


def plan_from_scores(  # type: ignore[misc]  # the two above tell what comes back, no more
    scores: ScoreTable | str | os.PathLike[str],
    units: str | Sequence[str],
    *,
    action: Action = "mask",
    control_seed: int | Sequence[int] | None = None,
    fraction: float | None = None,
    count: int | None = None,
    which: Which = "top",
    block: str | None = None,
    window: Steps | None = None,
    steps: Steps | None = None,
    mode: Mode = "dispersed",
    placement: Placement = "shift",
    copies: int = 1,
    weight: float = 0.0,
    by: ArrayLike | None = None,
    order: BaseOrder | None = None,
    corpus_hash: str | None = None,
    seed: int | None = None,
    domains: Sequence[str] = (),
    exclude_domains: Sequence[str] = (),
    domain_of: Domains | None = None,
    exclude: Exclusion | None = None,
    sources: Sequence[Source] = (),
    rows_of: Source | None = None,
    mechanism: str | None = None,
    name: str | None = None,
) -> Plan | tuple[Plan, ...]:
    """A plan that treats the top or bottom samples of a score table.

    ``plan_from_scores("runs/base/scores", "L1H2", fraction=0.1, window=(900, 1400))`` masks the top
    tenth of the samples that the run trained on in these steps.

    Args:
        scores: a table, its folder, or the folder of a run's tables.
        units: one unit, or several, whose top sets are united.
        action: ``"mask"``, ``"insert"``, or ``"replace"``: the chosen samples go out of the stream
            and others come in.
        control_seed: one seed or several, of the random controls that come back as well.
        steps: where the action takes place; None is ``window``, and without one, for a mask, the
            whole run.
        mode, placement, copies: of an insertion.
        weight: of masked samples.
        by: for ``"replace"``, the samples that come in, as many as are chosen; None draws others of
            the candidates.
        order: the base order, to which the plan is tied; also says which samples a window holds.
        corpus_hash: of the corpus to which the plan is tied; None takes the one that the table
            names, if it does.
        seed: of the places that are drawn.
        sources: further corpora whose samples may be chosen or come in.
        rows_of: the corpus that was scored, where that is another one than the run's; for
            ``"insert"``. Ids, domains and exclusions are then of its rows.
        mechanism: which table of a folder of several.
        name: of the plan.
        fraction, count, which, block, window, domains, exclude_domains, domain_of, exclude: which
            samples, see :func:`~mda_lightning.interventions.selection.select`.

    Returns:
        The plan; with ``control_seed`` a tuple of the plan and its controls, which treat as many
        random candidates each, disjoint from the treated ones.

    Raises:
        FileNotFoundError: no table there.
        ValueError: what :func:`select`, the operation or the control refuses; or a table of
            another corpus or order than those given.
    """
    table = open_scores(scores, mechanism)
    if rows_of is None:
        corpus_hash = agreeing_corpus(table, corpus_hash, order)
    else:
        _check_elsewhere(table, rows_of, action, window)
        sources = (*sources, rows_of)
    if not table.complete:
        warnings.warn(
            f"{table.folder} is not complete: the run that writes it goes on or was interrupted",
            stacklevel=2,
        )
    chosen = select(
        table,
        units,
        fraction=fraction,
        count=count,
        which=which,
        block=block,
        window=window,
        order=order,
        domains=domains,
        exclude_domains=exclude_domains,
        domain_of=domain_of,
        exclude=exclude,
        sources=sources,
    )
    if chosen.n_not_finite:
        warnings.warn(
            f"{chosen.n_not_finite} of {chosen.source['candidates']} samples have no finite score "
            f"in {table.folder} and are left out",
            stacklevel=2,
        )
    steps = window if steps is None else steps
    if rows_of is not None:
        chosen = chosen.rows_of(rows_of)
    plan = treat(
        chosen.ids,
        action=action,
        steps=steps,
        mode=mode,
        placement=placement,
        copies=copies,
        weight=weight,
        by=by,
        pool=chosen.pool,
        seed=seed,
    ).bound(
        corpus_hash=corpus_hash,
        order=order,
        seed=seed,
        source={**chosen.source, **({"treated": "out"} if action == "replace" else {})},
        name=name or _name(action, which, chosen.source["units"]),
    )
    plan = dataclasses.replace(plan, sources=tuple(sources))
    if order is not None and action != "insert" and steps is not None and steps != window:
        n_away = int((~np.isin(chosen.ids, samples_of(order, steps))).sum())
        if n_away:
            warnings.warn(
                f"{n_away} of the {len(chosen.ids)} chosen samples are not in steps "
                f"{steps[0]}:{steps[1]}, where the plan leaves them as they are; choose within "
                f"window=({steps[0]}, {steps[1]})",
                stacklevel=2,
            )
    if control_seed is None:
        return plan
    seeds = [control_seed] if isinstance(control_seed, int) else list(control_seed)
    plan, controls = with_random_controls(plan, chosen.pool, seeds)
    return (plan, *controls)


def treat(
    ids: NDArray[np.int64],
    *,
    action: Action,
    steps: Steps | None,
    mode: Mode = "dispersed",
    placement: Placement = "shift",
    copies: int = 1,
    weight: float = 0.0,
    by: ArrayLike | None = None,
    pool: NDArray[np.int64],
    seed: int | None = None,
) -> Plan:
    """A plan that does ``action`` with samples; see :func:`plan_from_scores`.

    Args:
        pool: what the samples that come in are drawn from, where ``by`` is None.
    """
    if action == "mask":
        return Plan.mask(ids, steps, weight=weight)
    if action not in ("insert", "replace"):
        raise ValueError(f"action {action!r} is not one of 'mask', 'insert', 'replace'")
    if steps is None:
        raise ValueError(f"to {action} samples takes a window: steps=(start, end)")
    if action == "insert":
        return Plan.insert(ids, steps=steps, mode=mode, placement=placement, copies=copies)
    if by is None:
        coming = _drawn(pool, ids, len(ids), key_of("replacing", seed or 0), "the replacement")
    else:
        coming = as_ids(by)
        if len(coming) != len(ids):
            raise ValueError(
                f"{len(ids)} samples go out and {len(coming)} come in; give as many with by, or "
                "choose as many by count"
            )
    return Plan.replace(steps=steps, sample_ids=ids, by=coming)


def with_random_controls(
    plan: Plan,
    pool_ids: ArrayLike,
    seeds: Sequence[int],
    *,
    exclude: ArrayLike | None = None,
    treated: Side | None = None,
    order: BaseOrder | None = None,
) -> tuple[Plan, tuple[Plan, ...]]:
    """A plan and several random controls, each named for its draw.

    Where the plan inserts with ``placement="replace"``, the plan and every control spare what the
    others treat, so that all take the same places (see :meth:`Plan.with_random_control`); the plan
    is then another one than before.

    Args:
        pool_ids, exclude: see :meth:`Plan.random_control`.
        seeds: one for each control.
        treated: which side of a replacement one for one is the treated one, and random in a
            control: the samples that go ``"out"``, or those that come ``"in"``. None is what the
            plan's ``source`` says, or ``"in"``.
        order: that says which samples a window holds, for a plan that is tied to none.

    Raises:
        ValueError: the pool without the treated and excluded samples is too small, or it takes an
            order and there is none.
    """
    side: str = treated or plan.source.get("treated", "in")
    if side not in ("in", "out"):
        raise ValueError(
            f"plan {plan.name!r} is composed of replacements of which some have what goes out as "
            "the treated side and some what comes in: say which with treated='in' or 'out' "
            "(--treated), or draw controls of the parts"
        )
    pool = as_ids(pool_ids)
    tied = plan if plan.order is not None else plan.bound(order=order)
    controls = [
        _out_control(tied, pool, seed, exclude)
        if side == "out"
        else tied.random_control(pool, seed, exclude=exclude)
        for seed in seeds
    ]
    controls = [dataclasses.replace(control, order=plan.order) for control in controls]
    if any(isinstance(op, Insert) and op.placement == "replace" for op in plan.operations):
        named = [plan.treated_ids, *(control.treated_ids for control in controls)]
        spared = np.unique(np.concatenate([plan.spared, *named]))
        plan = dataclasses.replace(plan, spared=spared)
        controls = [dataclasses.replace(one, spared=spared) for one in controls]
    about = {"control_of": plan.content_hash}
    return plan, tuple(
        one.bound(
            source={**one.source, **about},
            name=f"{plan.name}-random" + (f"-{number}" if len(controls) > 1 else ""),
        )
        for number, one in enumerate(controls, start=1)
    )


def _out_control(plan: Plan, pool: NDArray[np.int64], seed: int, exclude: ArrayLike | None) -> Plan:
    """Random samples go out by the plan's replacements; what comes in stays."""
    replacements = [op for op in plan.operations if isinstance(op, Replace)]
    out = [op.sample_ids for op in replacements if op.sample_ids is not None]
    if not out or len(out) < len(plan.operations):
        raise ValueError(
            f"plan {plan.name!r} does not only replace samples one for one, so that no control "
            "can be drawn for what goes out; draw one for what comes in"
        )
    going = np.unique(np.concatenate(out))
    named = plan.treated_ids if exclude is None else np.union1d(plan.treated_ids, as_ids(exclude))
    drawn = _drawn(pool, named, len(going), key_of("random control", seed), "the random control")
    operations = tuple(
        dataclasses.replace(op, sample_ids=drawn[np.searchsorted(going, ids)])
        for op, ids in zip(replacements, out, strict=True)
    )
    return dataclasses.replace(
        plan,
        operations=operations,
        source={"control_of": plan.content_hash, "draw_seed": seed, "treated": "out"},
    )


def _drawn(
    pool: NDArray[np.int64], without: NDArray[np.int64], count: int, key: np.uint64, what: str
) -> NDArray[np.int64]:
    """``count`` of the pool's samples that are not in ``without``, in random order."""
    rest = np.setdiff1d(pool, without)
    if len(rest) < count:
        raise ValueError(
            f"{what} needs {count} samples besides the treated and excluded ones, there are "
            f"{len(rest)}; treat a smaller fraction or widen the window"
        )
    return rest[keyed_order(key, len(rest))[:count]]


def agreeing_corpus(
    table: ScoreTable, corpus_hash: str | None, order: BaseOrder | None
) -> str | None:
    """Hash of the corpus that a plan from these scores is for: the one given, or theirs.

    Raises:
        ValueError: the scores are of another corpus or order.
    """
    data = table.provenance.get("data") or {}
    theirs: str | None = data.get("corpus_hash")
    if theirs is not None and corpus_hash is not None and theirs != corpus_hash:
        raise ValueError(
            f"the scores in {table.folder} are of corpus {theirs[:12]}, the one given is "
            f"{corpus_hash[:12]}: their sample ids mean other text there; give the corpus "
            "that was scored, or score this one"
        )
    of_order = data.get("order_hash")
    if order is not None and of_order not in (None, order.content_hash):
        raise ValueError(
            f"the scores in {table.folder} are of a run with base order {of_order[:12]}, the one "
            f"given is {order.content_hash[:12]} ({order.n_rows} rows, batch {order.batch_size}, "
            f"seed {order.seed}, shuffle {order.shuffle}): their steps hold other samples; give "
            "that run's"
        )
    return corpus_hash or theirs


def _check_elsewhere(table: ScoreTable, rows_of: Source, action: str, window: Steps | None) -> None:
    agreeing_corpus(table, rows_of.content_hash, None)
    if action != "insert" or window is not None:
        raise ValueError(
            f"the samples of {table.folder} are rows of {rows_of.name!r}, which the run does not "
            "have: they can be inserted, in steps=(start, end), and have no window"
        )


def _name(action: str, which: str, units: Sequence[str]) -> str:
    of = "+".join(units) if len(units) <= _NAMED else f"{len(units)}-units"
    return f"{action}-{which}-{of}"
