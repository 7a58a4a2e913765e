"""Which samples to treat, by their scores: the top or bottom of those that are left to choose from.

A *candidate* is a sample with a row in the score table that lies in the window, is of the domains
asked for and is not excluded. Fractions are of the candidates with a finite score.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mda_lightning.base_order import BaseOrder
from mda_lightning.interventions.id_files import read_ids
from mda_lightning.interventions.operations import Steps, as_ids
from mda_lightning.interventions.plan import Plan
from mda_lightning.interventions.sources import Source
from mda_lightning.sample_ids import split_ids
from mda_lightning.store import ScoreTable
from mda_lightning.store.domains import Domains, names_of
from mda_lightning.store.ranking import Means, by_best_place, extreme

Which: TypeAlias = Literal["top", "bottom"]
_Excluded: TypeAlias = Plan | str | os.PathLike[str]
Exclusion: TypeAlias = _Excluded | Sequence[_Excluded] | ArrayLike
"""Sample ids, a plan (all that it names), or a file of either; or a list of these."""

_NAMED = 8  # names that an error message lists


@dataclass(frozen=True, eq=False)
class Selected:
    """Samples chosen by their scores.

    Attributes:
        ids: int64 [n], best first (the worst first for ``which="bottom"``).
        pool: int64, ascending: the candidates with a finite score, those chosen included; what a
            random control is drawn from.
        source: how they were chosen, JSON values, for :attr:`Plan.source`.
        n_not_finite: candidates left out for want of a finite score of any of the units.
        n_foreign: samples left out since they are rows of a source that was not named.
    """

    ids: NDArray[np.int64]
    pool: NDArray[np.int64]
    source: dict[str, Any] = field(repr=False)
    n_not_finite: int = 0
    n_foreign: int = 0

    def rows_of(self, source: Source) -> Selected:
        """The same, as rows of another corpus than the base corpus.

        Raises:
            ValueError: the source has no such row.
        """
        try:
            ids, pool = source.ids(self.ids), source.ids(self.pool)
        except IndexError as error:
            raise ValueError(
                f"{error}; were these scores of another corpus? give the one that was scored"
            ) from error
        about = {**self.source, "rows_of": source.describe()}
        return dataclasses.replace(self, ids=ids, pool=pool, source=about)


def select(
    table: ScoreTable,
    units: str | Sequence[str],
    *,
    fraction: float | None = None,
    count: int | None = None,
    which: Which = "top",
    block: str | None = None,
    window: Steps | None = None,
    order: BaseOrder | None = None,
    domains: Sequence[str] = (),
    exclude_domains: Sequence[str] = (),
    domain_of: Domains | None = None,
    exclude: Exclusion | None = None,
    sources: Sequence[Source] = (),
) -> Selected:
    """The candidates that promote a unit most (or least), best first.

    A sample with several rows in the window counts once, with their mean; ties go by id. Of several
    units it is the union of their top sets, as :meth:`ScoreTable.top` has it.

    Args:
        table: the scores; positive means that training on the sample promotes the unit.
        units: for example ``"L1H2"``, or several.
        fraction: share of the candidates with a finite score, in (0, 1], of each unit; at least
            one sample.
        count: how many of each unit, instead of a fraction.
        which: the highest scores or the lowest.
        block: rank by this block alone.
        window: steps [start, end) in which a candidate was trained on: by the table's own steps,
            or, where it has none (-1), by the base order.
        order: needed for a window of a table without steps.
        domains: candidates are of one of these; none given takes all.
        exclude_domains: and of none of these.
        domain_of: names of samples, such as ``rows.domains``; None takes the table's own column.
        exclude: samples that are no candidates.
        sources: further corpora whose samples may be chosen. Scored samples of others, which a run
            with insertions leaves, are left out.

    Raises:
        ValueError: an unknown unit, block or domain; not exactly one of fraction and count, or out
            of range; a window without a scored sample, or one that needs the order; no candidate.
    """
    names = _checked_units(table, units, block)
    _checked_share(fraction, count, which)
    rows = table.columns("sample_id", "step")
    kept = np.ones(len(rows["sample_id"]), bool)
    if window is not None:
        kept = _in_window(table, rows["sample_id"], rows["step"], window, order)
    means = Means(rows["sample_id"], None if kept.all() else kept)
    candidates, foreign = _known(means.ids, sources)
    if domains or exclude_domains:
        own = _domains_of(table, means, domain_of, candidates)
        candidates &= _of_domains(own, domains, exclude_domains, candidates)
    excluded = excluded_ids(exclude)
    out = np.isin(means.ids, excluded, assume_unique=True)
    n_excluded = int((candidates & out).sum())
    candidates &= ~out
    if not candidates.any():
        raise ValueError(
            f"no sample of {table.folder} is left{_within(window)}: {len(means.ids)} are scored "
            f"there, {n_excluded} of them excluded, the others of other domains or sources; "
            "exclude fewer or widen the window"
        )
    ids = means.ids[candidates]
    rankings, finite, places = [], np.zeros(len(ids), bool), np.arange(len(ids))
    for unit in names:
        scores = means.of(table.row_scores(unit, block))[candidates]
        own_finite = np.isfinite(scores)
        finite |= own_finite
        _enough(unit, table, window, count, int(own_finite.sum()))
        keys = -scores if which == "top" else scores
        rankings.append(extreme(places, keys, fraction=fraction, count=count, of=unit))
    chosen = ids[by_best_place(rankings, len(ids))]
    source = {
        "scores": str(table.folder),
        "mechanism": table.provenance.get("mechanism", table.folder.name),
        "estimator": table.estimator,
        "complete": table.complete,
        "units": list(names),
        "which": which,
        **({"count": count} if fraction is None else {"fraction": fraction}),
        "block": block,
        "window": None if window is None else list(window),
        "domains": list(domains),
        "exclude_domains": list(exclude_domains),
        "excluded": n_excluded,
        "candidates": len(ids),
        "chosen": len(chosen),
    }
    n_not_finite = int((~finite).sum())
    return Selected(chosen, ids[finite], source, n_not_finite, foreign)


def samples_of(order: BaseOrder, window: Steps) -> NDArray[np.int64]:
    """The samples that the base order has in steps [start, end); int64, unique, ascending.

    Raises:
        ValueError: not a window of the run.
    """
    start, end = window
    if not 0 <= start < end <= order.n_steps:
        raise ValueError(
            f"steps {start}:{end} are no window of a run of {order.n_steps} steps; choose "
            f"0 <= start < end <= {order.n_steps}"
        )
    size = order.batch_size
    return np.unique(order.at(np.arange(start * size, end * size, dtype=np.int64)))


def excluded_ids(exclude: Exclusion | None) -> NDArray[np.int64]:
    """The ids that an exclusion names; int64, unique, ascending."""
    if exclude is None:
        return np.empty(0, np.int64)
    if isinstance(exclude, Plan):
        return exclude.treated_ids
    if isinstance(exclude, str | os.PathLike):
        return np.unique(read_ids(cast("str", exclude)))
    if isinstance(exclude, Sequence) and any(
        isinstance(one, Plan | str | os.PathLike) for one in exclude
    ):
        return np.unique(np.concatenate([excluded_ids(cast("Plan", one)) for one in exclude]))
    return np.unique(as_ids(cast("ArrayLike", exclude)))


def open_scores(
    scores: ScoreTable | str | os.PathLike[str], mechanism: str | None = None
) -> ScoreTable:
    """A table that is open already, or the one in a folder (see :meth:`ScoreTable.open`)."""
    if isinstance(scores, ScoreTable):
        return scores
    return ScoreTable.open(Path(scores), mechanism=mechanism)


def _checked_units(
    table: ScoreTable, units: str | Sequence[str], block: str | None
) -> tuple[str, ...]:
    names = (units,) if isinstance(units, str) else tuple(dict.fromkeys(units))
    if not names:
        raise ValueError(f"no unit was named; {table.folder} has {_some(table.units)}")
    for name in names:
        if name not in table.units:
            raise ValueError(
                f"unit {name!r} is not in {table.folder}: it has {_some(table.units)}; name one of "
                "these, or score the other"
            )
    if block is not None and block not in table.blocks:
        raise ValueError(
            f"block {block!r} is not in {table.folder}: it has {', '.join(table.blocks)}"
        )
    return names


def _checked_share(fraction: float | None, count: int | None, which: str) -> None:
    if which not in ("top", "bottom"):
        raise ValueError(f"which is {which!r}; it is 'top' or 'bottom'")
    if (fraction is None) == (count is None):
        raise ValueError(
            f"give a fraction or a count, one of the two: fraction={fraction}, count={count}"
        )
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it is a share of the samples, in (0, 1]")
    if count is not None and count < 1:
        raise ValueError(f"count is {count}; choose at least one sample")


def _in_window(
    table: ScoreTable,
    ids: NDArray[np.int64],
    steps: NDArray[Any],
    window: Steps,
    order: BaseOrder | None,
) -> NDArray[np.bool_]:
    start, end = window
    if not 0 <= start < end:
        raise ValueError(
            f"window {start}:{end} is none: it is half-open and 0-based, 0 <= start < end"
        )
    known = steps >= 0
    kept: NDArray[np.bool_] = known & (steps >= start) & (steps < end)
    if not known.all():
        if order is None:
            raise ValueError(
                f"{int((~known).sum())} of the {len(ids)} rows of {table.folder} have no step, so "
                f"which of them were trained on in steps {start}:{end} depends on the base order; "
                "give order=BaseOrder(...) (--run, or --corpus with --batch-size and --n-steps)"
            )
        kept |= ~known & np.isin(ids, samples_of(order, window))
    if not kept.any():
        told = f"its rows have steps {steps.min()} to {steps.max()}" if known.any() else "none is"
        raise ValueError(
            f"{table.folder} has no sample of steps {start}:{end}: {told}; choose another window"
        )
    return kept


def _known(ids: NDArray[np.int64], sources: Sequence[Source]) -> tuple[NDArray[np.bool_], int]:
    """Which samples are of the base corpus or of a source that is known, and how many are not."""
    namespaces, _ = split_ids(ids)
    known = np.isin(namespaces, [0, *(source.namespace for source in sources)])
    return known, int((~known).sum())


def _domains_of(
    table: ScoreTable,
    means: Means,
    domain_of: Domains | None,
    candidates: NDArray[np.bool_],
) -> NDArray[Any]:
    """The domain of each sample, "" where it is no candidate."""
    names = np.full(len(means.ids), "", object)
    if domain_of is not None:
        names[candidates] = names_of(means.ids[candidates], domain_of)
    elif table.domains:
        names[:] = table.columns("domain")["domain"][means.first_rows]
    else:
        raise ValueError(
            f"{table.folder} has no column of domains; give those of the samples, such as "
            "domain_of=rows.domains (--corpus FOLDER, of a corpus that has them)"
        )
    return names


def _of_domains(
    own: NDArray[Any],
    wanted: Sequence[str],
    unwanted: Sequence[str],
    candidates: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    there, codes = np.unique(own.astype(str), return_inverse=True)
    for name in (*wanted, *unwanted):
        if name not in there:
            listed = sorted(set(there[np.unique(codes[candidates])]))
            raise ValueError(f"no sample is of domain {name!r}; there are {_some(listed)}")
    kept = np.isin(there, list(wanted)) if wanted else np.ones(len(there), bool)
    kept &= ~np.isin(there, list(unwanted))
    found: NDArray[np.bool_] = kept[codes]
    return found


def _enough(unit: str, table: ScoreTable, window: Steps | None, count: int | None, n: int) -> None:
    if not n:
        raise ValueError(f"{unit} has no finite score{_within(window)} in {table.folder}")
    if count is not None and count > n:
        raise ValueError(
            f"{count} samples were asked for of {unit}, {n} with a finite score are left"
            f"{_within(window)} in {table.folder}; ask for fewer, exclude fewer or widen the window"
        )


def _within(window: Steps | None) -> str:
    return "" if window is None else f" in steps {window[0]}:{window[1]}"


def _some(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
