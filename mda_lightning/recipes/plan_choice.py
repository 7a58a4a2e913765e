"""Which samples a plan is to treat: by scores, named in a file, drawn, or from elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mda_lightning.corpora import TokenRows
from mda_lightning.interventions import Source
from mda_lightning.interventions.from_scores import agreeing_corpus
from mda_lightning.interventions.id_files import read_ids
from mda_lightning.interventions.operations import Steps
from mda_lightning.interventions.selection import (
    Which,
    excluded_ids,
    open_scores,
    samples_of,
    select,
)
from mda_lightning.recipes.plan_numbers import counted
from mda_lightning.recipes.plan_stream import BaseStream
from mda_lightning.shuffling import key_of, keyed_order


@dataclass(frozen=True)
class Amount:
    """A share of the samples, or how many."""

    fraction: float | None = None
    count: int | None = None

    @property
    def words(self) -> str:
        """``"10%"``, or ``"500"``."""
        return f"{100 * (self.fraction or 0):.4g}%" if self.count is None else f"{self.count:,}"

    @property
    def name(self) -> str:
        """``"10-percent"``, or ``"500"``: for a file."""
        return self.words.replace("%", "-percent").replace(",", "")


@dataclass(frozen=True)
class Filters:
    """Which samples may be chosen."""

    window: Steps | None = None
    domains: Sequence[str] = ()
    exclude_domains: Sequence[str] = ()
    exclude: Sequence[Path] = ()


@dataclass(frozen=True, eq=False)
class Choice:
    """Samples, and where they come from.

    Attributes:
        ids: int64 [n], the best first where there is a best.
        words: what they are, for people.
        source: the same, JSON values.
        pool: what random controls are drawn from; None where that takes the order and a window.
        sources: corpora that they are of, besides the base corpus.
        corpus_hash: of the corpus that their ids refer to, where they tell.
    """

    ids: NDArray[np.int64]
    words: str
    source: dict[str, Any]
    pool: NDArray[np.int64] | None = None
    sources: tuple[Source, ...] = ()
    corpus_hash: str | None = None
    name: str = ""
    left_out: list[str] = field(default_factory=list)
    settle: Callable[[], None] = lambda: None  #: puts new samples where the plan says they are


def by_scores(
    scores: Path,
    units: Sequence[str],
    amount: Amount,
    *,
    which: Which,
    stream: BaseStream,
    filters: Filters,
    mechanism: str | None = None,
    block: str | None = None,
    rows_of: TokenRows | None = None,
) -> Choice:
    """The samples with the highest or lowest scores, see :func:`select`.

    Args:
        rows_of: the corpus that was scored, where that is another one than the run's.
    """
    table = open_scores(scores, mechanism)
    scored = stream.rows if rows_of is None else rows_of
    if rows_of is None:
        corpus_hash = agreeing_corpus(table, stream.corpus_hash, stream.order)
    else:
        agreeing_corpus(table, rows_of.content_hash, None)
        corpus_hash = None
    if not table.complete:
        warnings.warn(
            f"{table.folder} is not complete: the run that writes it goes on or was interrupted",
            stacklevel=2,
        )
    if stream.added_steps and filters.window is not None:
        warnings.warn(
            f"the run was itself {stream.added_steps} steps longer than its base order: --window "
            "counts the steps that were scored, its own, and --steps those of the base order",
            stacklevel=2,
        )
    domain_of = None
    if scored is not None and scored.domain_names and not table.domains:
        domain_of = scored.domains
    found = select(
        table,
        units,
        fraction=amount.fraction,
        count=amount.count,
        which=which,
        block=block,
        window=filters.window,
        order=stream.order,
        domains=filters.domains,
        exclude_domains=filters.exclude_domains,
        domain_of=domain_of,
        exclude=filters.exclude,
    )
    of = f"{which} {amount.words}"
    united = " for each of them, united" if len(units) > 1 else ""
    blocks = block or " + ".join(table.blocks)
    words = (
        f"the {of} by {', '.join(units)} ({blocks}){united}: {len(found.ids):,} of the "
        f"{len(found.pool):,} samples scored{_conditions(filters)} in {table.folder}"
    )
    left_out = []
    if found.n_not_finite:
        left_out.append(f"{found.n_not_finite:,} without a finite score")
    if found.n_foreign:
        left_out.append(f"{found.n_foreign:,} that are no rows of the base corpus")
    of_units = "+".join(units) if len(units) <= 3 else f"{len(units)}-units"
    name = f"{which}-{amount.name}-{of_units}"
    if rows_of is not None:
        words += f", rows of {rows_of.folder}"
        found = found.rows_of(Source.of(rows_of))
    return Choice(
        found.ids,
        words,
        found.source,
        pool=found.pool,
        sources=() if rows_of is None else (Source.of(rows_of),),
        corpus_hash=corpus_hash,
        name=name,
        left_out=left_out,
    )


def from_file(path: Path, *, stream: BaseStream, filters: Filters) -> Choice:
    """The samples that a file names, less those excluded."""
    named, excluded = read_ids(path), excluded_ids(filters.exclude)
    ids = named[~np.isin(named, excluded)]
    if not len(ids):
        raise ValueError(f"all {len(named)} samples of {path} are excluded; exclude fewer")
    pool = None
    if stream.order is not None and filters.window is not None:
        pool = np.setdiff1d(samples_of(stream.order, filters.window), excluded)
    source = {"ids": str(path), "excluded": len(named) - len(ids), "chosen": len(ids)}
    without = _conditions(Filters(exclude=filters.exclude))
    words = f"the {counted(len(ids), 'sample')} of {path}{without}"
    return Choice(ids, words, source, pool=pool, name=path.stem)


def at_random(amount: Amount, *, stream: BaseStream, filters: Filters, draw: int) -> Choice:
    """Random samples of a window of the base order.

    Raises:
        ValueError: without an order or a window, or fewer samples than asked for.
    """
    if stream.order is None or filters.window is None:
        raise ValueError(
            "random samples are drawn from a window of the base order; give --window A:B, and "
            "--run or --corpus with --batch-size and --n-steps"
        )
    pool = samples_of(stream.order, filters.window)
    pool = pool[~np.isin(pool, excluded_ids(filters.exclude))]
    if filters.domains or filters.exclude_domains:
        pool = _of_domains(pool, stream.rows, filters)
    count = amount.count or max(1, round((amount.fraction or 0) * len(pool)))
    if not 0 < count <= len(pool):
        raise ValueError(
            f"{count:,} random samples were asked for, {len(pool):,} are left"
            f"{_conditions(filters)}; ask for fewer or widen the window"
        )
    ids = pool[keyed_order(key_of("random samples", draw), len(pool))[:count]]
    source = {
        "random": count,
        "draw": draw,
        "candidates": len(pool),
        "window": list(filters.window),
        "domains": list(filters.domains),
        "exclude_domains": list(filters.exclude_domains),
    }
    words = f"{counted(count, 'random sample')} of the {len(pool):,}{_conditions(filters)}"
    return Choice(ids, words, source, pool=pool, name=f"random-{amount.name}")


def _of_domains(
    pool: NDArray[np.int64], rows: TokenRows | None, filters: Filters
) -> NDArray[np.int64]:
    names = None if rows is None else rows.domains(pool)
    if rows is None or names is None:
        raise ValueError("the domains of samples are those of the corpus; give one that has them")
    for name in (*filters.domains, *filters.exclude_domains):
        if name not in rows.domain_names:
            there = ", ".join(rows.domain_names)
            raise ValueError(f"the corpus has no domain {name!r}; there are {there}")
    own = np.asarray(names)
    kept = np.isin(own, list(filters.domains)) if filters.domains else np.ones(len(pool), bool)
    found: NDArray[np.int64] = pool[kept & ~np.isin(own, list(filters.exclude_domains))]
    return found


def _conditions(filters: Filters) -> str:
    told = []
    if filters.window is not None:
        told.append(f"in steps {filters.window[0]}:{filters.window[1]}")
    if filters.domains:
        told.append(f"of domain {', '.join(filters.domains)}")
    if filters.exclude_domains:
        told.append(f"not of domain {', '.join(filters.exclude_domains)}")
    if filters.exclude:
        told.append(f"without those of {', '.join(map(str, filters.exclude))}")
    return "".join(f" {one}" for one in told)
