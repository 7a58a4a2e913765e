"""What the scores of a study say beyond its arms.

Do heads of one mechanism want the same data (figure 3b)? Do ways to select samples agree? Does
influence come evenly over training (figures 3c and 8)? Do scores predict what training on random
subsets gives (linear datamodeling score)? Each is computed for every seed that has what it needs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mda_lightning import __version__
from mda_lightning.analysis.analysis_sections import (
    AnalysisSection,
    datamodeling_section,
    heads_section,
    selections_section,
    time_section,
)
from mda_lightning.analysis.datamodeling import (
    DatamodelingTable,
    datamodeling_table,
    rank_correlation,
)
from mda_lightning.analysis.distributions import (
    fit_tail,
    net_drive,
    normal_top_share,
    top_share,
)
from mda_lightning.analysis.overlap import OverlapMatrix, block_contrast, overlap_matrix
from mda_lightning.analysis.report_figures import ReportFigure
from mda_lightning.analysis.study import SeedRun, Study
from mda_lightning.analysis.study_findings import (
    HeadOverlap,
    SeedTail,
    SeedTime,
    SelectionOverlap,
)
from mda_lightning.analysis.study_rankings import (
    PREFERRED,
    open_rankings,
    own_table,
    primary_of,
    ranking_values,
    read_subsets,
    score_rows,
    seed_scores,
    window_of,
)
from mda_lightning.analysis.tail_alternatives import tail_alternatives
from mda_lightning.analysis.tail_section import tail_section
from mda_lightning.analysis.time_bins import (
    WIDTH,
    influence_slope,
    time_bins,
    uniformity,
    widths_for,
)
from mda_lightning.store import ScoreTable
from mda_lightning.store.rankings import Rankings

Floats = NDArray[np.float64]

SCHEMA_VERSION = 1
LEAST_OTHERS = 4
"""Fewest heads beside the target that a correlation with μ is computed over."""


@dataclass(frozen=True)
class StudyAnalyses:
    """The analyses of one study, of whatever it holds.

    Attributes:
        fraction: what a top set is.
        heads: overlap between heads, one a seed that scored several.
        selections: overlap between ways to rank, one a seed with several.
        times: influence over steps, one a seed with scores.
        tails: how those scores are spread.
        datamodeling: linear datamodeling scores; None where no seed trained on subsets.
        notes: what is absent, and why, in sentences.
        provenance: of which study, and by which version.
    """

    fraction: float
    heads: tuple[HeadOverlap, ...] = ()
    selections: tuple[SelectionOverlap, ...] = ()
    times: tuple[SeedTime, ...] = ()
    tails: tuple[SeedTail, ...] = ()
    datamodeling: DatamodelingTable | None = None
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def sections(self) -> list[AnalysisSection]:
        """What there is, as the report shows it; drawn when first asked for."""
        found = [
            heads_section(self.heads, self.fraction),
            selections_section(self.selections, self.fraction),
            tail_section(self.tails, self.fraction),
            time_section(self.times, self.fraction),
            datamodeling_section(self.datamodeling),
        ]
        return [one for one in found if one is not None]

    @property
    def figures(self) -> list[ReportFigure]:
        """Every figure, in the order they are shown."""
        return [figure for one in self.sections for figure in (*one.figures, *one.folded)]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON values; NaN and infinity are None."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "study_analyses",
            "provenance": _json(self.provenance),
            "fraction": self.fraction,
            "head_overlap": [_json(one) for one in self.heads],
            "selection_overlap": [_json(one) for one in self.selections],
            "tail": [_json(one) for one in self.tails],
            "time": [_json(one) for one in self.times],
            "datamodeling": _json(self.datamodeling),
            "notes": list(self.notes),
        }


def study_analyses(
    study: Study, *, width: int = WIDTH, progress: Callable[[str], None] | None = None
) -> StudyAnalyses:
    """Analyse a study; what is missing costs its own part and leaves a note.

    Args:
        width: steps in a time bin.
        progress: told what is worked on.
    """
    say = progress or (lambda _: None)
    notes: list[str] = []
    heads: list[HeadOverlap | None] = []
    selections: list[SelectionOverlap | None] = []
    times: list[SeedTime | None] = []
    opened: dict[int, Rankings] = {}
    for seed in study.seeds:
        say(f"analysing seed {seed.seed}")
        rankings, table = open_rankings(seed, notes), own_table(seed, notes)
        if rankings is not None:
            opened[seed.seed] = rankings
        heads.append(_heads(study, seed, rankings, table, notes))
        selections.append(_selections(study, seed, rankings, notes))
        times.append(_time(study, seed, rankings, table, width))
    say("linear datamodeling scores")
    datamodeling = _datamodeling(study, opened, notes)
    analyses = StudyAnalyses(
        fraction=study.treated_fraction,
        heads=tuple(one for one in heads if one is not None),
        selections=tuple(one for one in selections if one is not None),
        times=tuple(one for one in times if one is not None),
        tails=tuple(_tail(one, study.treated_fraction) for one in times if one is not None),
        datamodeling=datamodeling,
        provenance={
            "mda_lightning": __version__,
            "title": study.title,
            "created": study.created,
            "settings_hash": study.settings_hash,
        },
    )
    if not analyses.times and not analyses.heads:
        notes.append("No seed has scores yet, so there is nothing to analyse.")
    elif not analyses.heads:
        notes.append("No seed has scores of several heads, which overlap between heads needs.")
    return dataclasses.replace(analyses, notes=tuple(notes))


def _heads(
    study: Study,
    seed: SeedRun,
    rankings: Rankings | None,
    table: ScoreTable | None,
    notes: list[str],
) -> HeadOverlap | None:
    scores = seed_scores(study, seed, rankings, table)
    if scores is None or len(scores.heads) < 2:
        return None
    try:
        matrix = overlap_matrix(scores.heads, fraction=study.treated_fraction)
    except ValueError as error:
        notes.append(f"Seed {seed.seed}: heads could not be compared: {error}.")
        return None
    order = scores.by_mu
    matrix = matrix.ordered(order)
    leading = scores.leading(study.chance)
    jaccard_blocks = rbo_blocks = None
    if 2 <= len(leading) < len(order):
        jaccard_blocks = block_contrast(matrix.jaccard, order, leading)
        rbo_blocks = block_contrast(matrix.rbo, order, leading)
    else:
        why = "no head has formed" if not leading else f"{len(leading)} of {len(order)} heads lead"
        notes.append(f"Seed {seed.seed}: {why}, so there is no block of heads to hold apart.")
    return HeadOverlap(
        seed=seed.seed,
        target=scores.target,
        ranking=scores.ranking,
        matrix=matrix,
        mu=tuple(scores.mu.get(head, math.nan) for head in order),
        leading=leading,
        jaccard_blocks=jaccard_blocks,
        rbo_blocks=rbo_blocks,
        kinship=_kinship(matrix, scores.target, scores.mu),
    )


def _kinship(matrix: OverlapMatrix, target: str, mu: Mapping[str, float]) -> float:
    others = [
        head
        for head in matrix.names
        if head != target and math.isfinite(mu.get(head, math.nan)) and target in matrix.names
    ]
    if len(others) < LEAST_OTHERS:
        return math.nan
    shared = [matrix.of(target, head).jaccard for head in others]
    return rank_correlation([mu[head] for head in others], shared)


def _selections(
    study: Study, seed: SeedRun, rankings: Rankings | None, notes: list[str]
) -> SelectionOverlap | None:
    target = seed.target
    if rankings is None or target is None:
        return None
    _, values = ranking_values(rankings, target, steps=window_of(seed))
    known, aliases = _without_twins(values, seed.seed, notes)
    if len(known) < 2:
        return None
    try:
        matrix = overlap_matrix(known, fraction=study.treated_fraction)
    except ValueError as error:
        notes.append(f"Seed {seed.seed}: rankings could not be compared: {error}.")
        return None
    return SelectionOverlap(seed.seed, target, matrix, aliases)


def _without_twins(
    values: Mapping[str, Floats], seed: int, notes: list[str]
) -> tuple[dict[str, Floats], dict[str, str]]:
    """Rankings with values, each once: one equal to an earlier one is named as its alias."""
    known: dict[str, Floats] = {}
    aliases: dict[str, str] = {}
    for name, row in values.items():
        if not np.isfinite(row).any():
            notes.append(f"Seed {seed}: ranking {name} has no value for any sample.")
            continue
        twin = next((k for k, one in known.items() if np.array_equal(one, row, True)), None)
        if twin is None:
            known[name] = row
        else:
            aliases[name] = twin
    return known, aliases


def _time(
    study: Study, seed: SeedRun, rankings: Rankings | None, table: ScoreTable | None, width: int
) -> SeedTime | None:
    unit = seed.score_unit or seed.target
    tables = [] if table is None else [table]
    if rankings is not None and (name := primary_of(rankings)) is not None:
        tables.append(rankings.table(name))
    table = next((one for one in tables if unit in one.units), None)
    if table is None or unit is None:
        return None
    steps, scores = score_rows(table, unit, steps=window_of(seed))
    if scores.size < 2:
        return None
    span = int(steps.max() - steps.min()) + 1
    widths = widths_for(span, width)
    shown = width if width in widths else widths[-1]
    options: dict[str, Any] = {"fraction": study.treated_fraction}
    return SeedTime(
        seed=seed.seed,
        unit=unit,
        estimator=str(table.estimator),
        steps=steps,
        scores=scores,
        width=shown,
        bins=tuple(time_bins(steps, scores, width=shown, **options)),
        sliding=tuple(time_bins(steps, scores, width=shown, stride=max(1, shown // 10), **options)),
        uniformities=tuple(uniformity(steps, scores, width=one, **options) for one in widths),
        slope=influence_slope(steps, scores),
    )


def _tail(time: SeedTime, fraction: float) -> SeedTail:
    scores, steps = time.scores, time.steps
    fit, spread = fit_tail(scores), float(scores.std())
    bins = [scores[(steps >= one.start) & (steps < one.stop)] for one in time.bins if one.n]
    fits = [fit_tail(one, n_bootstrap=0) for one in bins]
    return SeedTail(
        seed=time.seed,
        unit=time.unit,
        n=scores.size,
        share=top_share(scores, fraction),
        noise_share=normal_top_share(fraction, mean=float(scores.mean()), sd=spread)
        if spread > 0
        else math.nan,
        drive=net_drive(scores),
        fit=fit,
        alternatives=() if fit is None else tail_alternatives(scores, fit),
        bin_exponents=tuple(one.exponent for one in fits if one is not None),
    )


def _datamodeling(
    study: Study, opened: Mapping[int, Rankings], notes: list[str]
) -> DatamodelingTable | None:
    subsets = []
    values: dict[str, dict[int, Floats]] = {}
    for seed in study.seeds:
        if seed.subsets is None or not seed.subsets.exists():
            continue
        if seed.seed not in opened:
            notes.append(f"Seed {seed.seed}: its subsets have no rankings to be judged by.")
            continue
        try:
            one = dataclasses.replace(read_subsets(seed.subsets), seed=seed.seed)
        except (ValueError, OSError) as error:
            notes.append(f"Seed {seed.seed}: {error}.")
            continue
        unit = str(one.about.get("unit") or seed.target)
        ids, found = ranking_values(opened[seed.seed], unit, steps=None)
        for name, row in found.items():
            values.setdefault(name, {})[seed.seed] = one.aligned(ids, row)
        subsets.append(one)
    if not subsets or not values:
        return None
    names = [name for name in values if not _has_twin(name, values)]
    reference = next((name for name in (*PREFERRED[::-1], *names) if name in names), None)
    return datamodeling_table(subsets, {name: values[name] for name in names}, reference=reference)


def _has_twin(name: str, values: Mapping[str, Mapping[int, Floats]]) -> bool:
    """Whether a ranking equals one of a preferred name, or an earlier one, in every seed."""
    first = PREFERRED[::-1]
    order = sorted(values, key=lambda one: first.index(one) if one in first else len(first))
    own = values[name]
    return any(
        own.keys() == values[other].keys()
        and all(np.array_equal(own[seed], values[other][seed], True) for seed in own)
        for other in order[: order.index(name)]
    )


def _json(value: Any) -> Any:
    """Dataclasses, arrays and tuples as JSON values; samples' own steps and scores left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _json(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.metadata.get("stored", True)
        }
    if isinstance(value, Mapping):
        return {str(key): _json(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return _json(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_json(inner) for inner in value]
    if isinstance(value, np.generic):
        return _json(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
