"""``build_report``: a study folder becomes one HTML file that needs nothing beside it.

The report is made from whatever exists: an unfinished arm, a seed without a window or a missing
score table each cost their part of it and add a sentence that says so. Text of samples is
arbitrary and reaches the page only through the template's escaping.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mda_lightning import __version__
from mda_lightning.analysis.comparison import compare_study
from mda_lightning.analysis.comparison_files import write_tables
from mda_lightning.analysis.comparison_report import (
    arms_figure,
    coupled_figure,
    heads_figure,
    part_rows,
    selection_tables,
)
from mda_lightning.analysis.comparison_tables import columns, legend_lines, table_rows
from mda_lightning.analysis.comparison_words import metric_name
from mda_lightning.analysis.composition import DomainShare, composition
from mda_lightning.analysis.influences import SeedInfluence, seed_influence
from mda_lightning.analysis.page import page_environment
from mda_lightning.analysis.report_figures import (
    composition_figure,
    heatmap_figure,
    scores_figure,
)
from mda_lightning.analysis.samples import MOST_TOKENS, ShownSample, pieces_of
from mda_lightning.analysis.study import Study, load_study
from mda_lightning.analysis.study_analyses import study_analyses
from mda_lightning.analysis.verdicts import doubts, plural, summary
from mda_lightning.corpora import TokenRows
from mda_lightning.files import atomic_path, write_json

TOP_SHOWN = 10
BOTTOM_SHOWN = 3


def build_report(study_folder: str | Path) -> Path:
    """Write ``report.html`` and ``figures/*.png`` into a study folder.

    Each figure is written light and dark (``comparison.png``, ``comparison-dark.png``); the HTML
    holds copies of both and shows the one that suits the reader's colour scheme. The tables of
    :func:`~mda_lightning.analysis.comparison.write_comparison` and ``analyses.json`` are written
    beside it.

    Returns:
        Path of ``report.html``.

    Raises:
        StudyError: the folder is no study, or one of another version.
        PermissionError: the folder cannot be written to.
    """
    study = load_study(study_folder)
    notes = list(study.notes)
    influences = _influences(study, notes)
    rows = _corpus(study, notes)
    domains = _domains(influences, rows)
    compared = compare_study(study)
    analyses = study_analyses(study)
    whole, every_head, coupled = (
        [figure] if (figure := make(compared)) is not None else []
        for make in (arms_figure, heads_figure, coupled_figure)
    )
    heatmaps = [f for f in (heatmap_figure(study, seed) for seed in study.seeds) if f is not None]
    spreads = [scores_figure(study, one) for one in influences]
    origins = [composition_figure(study, domains, [o.seed for o in influences])] if domains else []
    figures = [*whole, *heatmaps, *every_head, *coupled, *spreads, *origins, *analyses.figures]
    with atomic_path(study.folder / "figures") as part:
        part.mkdir()
        for figure in figures:
            (part / f"{figure.name}.png").write_bytes(figure.light)
            (part / f"{figure.name}-dark.png").write_bytes(figure.dark)
    write_tables(compared)
    write_json(study.folder / "analyses.json", analyses.to_dict())
    controls = [one for one in compared.against_baseline if not study.declared[one.arm].is_treated]
    shown = influences[0] if influences and rows is not None else None
    html = (
        page_environment()
        .get_template("report.html.j2")
        .render(
            study=study,
            version=__version__,
            summary=summary(study, influences),
            compared=compared,
            controls=[one for one in controls if one.final.effect is not None],
            columns=columns(compared),
            table=table_rows(compared),
            legend=legend_lines(compared),
            selections=selection_tables(compared),
            parts=part_rows(compared),
            analyses=analyses,
            score_name=metric_name(study.metric),
            lost=[seed for seed in study.seeds if seed.without_window],
            notes=notes,
            whole=whole,
            every_head=every_head,
            coupled=coupled,
            heatmaps=heatmaps,
            spreads=spreads,
            origins=origins,
            domains=domains,
            influences=influences,
            shown=shown,
            top=_samples(shown, rows, TOP_SHOWN, best=True),
            bottom=_samples(shown, rows, BOTTOM_SHOWN, best=False),
            arms=_arm_rows(study),
            settings=dict(flattened(study.config)),
            window_rule=dict(flattened({"window": study.window_rule})) if study.window_rule else {},
            provenance=dict(flattened(study.provenance)),
            score_provenance=dict(flattened(influences[0].provenance)) if influences else {},
            doubts=doubts(study, influences, compared),
        )
    )
    path = study.folder / "report.html"
    with atomic_path(path) as part:
        part.write_text(html, "utf-8")
    return path


def _influences(study: Study, notes: list[str]) -> list[SeedInfluence]:
    found = []
    for seed in study.seeds:
        if seed.scores is None or seed.score_unit is None:
            continue
        try:
            one = seed_influence(
                seed.scores,
                seed=seed.seed,
                unit=seed.score_unit,
                fraction=study.treated_fraction,
            )
        except (ValueError, OSError) as error:
            reason = str(error).replace(f"{study.folder}/", "")
            notes.append(f"Seed {seed.seed}: its scores could not be used: {reason}.")
            continue
        found.append(one)
        if one.n_excluded:
            count = plural(one.n_excluded, "sample")
            notes.append(f"Seed {seed.seed}: {count} without a finite score left out.")
    return found


def _corpus(study: Study, notes: list[str]) -> TokenRows | None:
    if study.corpus is None:
        notes.append("The study names no corpus, so samples cannot be shown as text.")
        return None
    try:
        return TokenRows.open(study.corpus)
    except (ValueError, OSError) as error:
        reason = str(error).replace(f"{study.folder}/", "")
        notes.append(f"The corpus could not be opened, so no sample is shown as text: {reason}.")
        return None


def _domains(influences: list[SeedInfluence], rows: TokenRows | None) -> list[DomainShare]:
    """Pooled composition; empty when the corpus has no domains."""
    if rows is None or not influences:
        return []
    tops, bases = [], []
    for one in influences:
        top, base = rows.domains(one.top), rows.domains(np.unique(one.sample_ids))
        if top is None or base is None:
            return []
        tops.append(list(top))
        bases.append(list(base))
    return composition(tops, bases)


def _samples(
    one: SeedInfluence | None, rows: TokenRows | None, count: int, *, best: bool
) -> list[ShownSample]:
    if one is None or rows is None:
        return []
    ids = (one.top if best else one.bottom)[:count]
    names = rows.domains(ids)
    shown = []
    for index, (sample_id, tokens) in enumerate(zip(ids.tolist(), rows.get(ids), strict=True)):
        pieces, share = pieces_of(tokens, rows.token_strings(tokens), decode=rows.decode)
        score, step = one.of(sample_id)
        shown.append(
            ShownSample(
                sample_id=sample_id,
                domain=None if names is None else names[index],
                score=score,
                step=step,
                pieces=pieces,
                repeated_share=share,
                hidden_tokens=max(0, int(tokens.size) - MOST_TOKENS),
            )
        )
    return shown


def _arm_rows(study: Study) -> list[dict[str, Any]]:
    """One table row per arm: its value in every seed, mean and standard error."""
    rows = []
    for name in study.arm_names:
        values = [seed.arms[name].value if name in seed.arms else None for seed in study.seeds]
        known = [value for value in values if value is not None]
        rows.append(
            {
                "name": name,
                "phrase": study.declared[name].phrase,
                "values": values,
                "mean": float(np.mean(known)) if known else None,
                "error": float(np.std(known, ddof=1)) / math.sqrt(len(known))
                if len(known) > 1
                else None,
            }
        )
    return rows


def flattened(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted name, text) pairs, in their own order."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flattened(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(v, (Mapping, list)) for v in value):
        for index, inner in enumerate(value):
            yield from flattened(inner, f"{prefix}.{index}")
    elif isinstance(value, (list, tuple)):
        yield prefix, ", ".join(map(str, value))
    else:
        yield prefix, "none" if value is None else str(value)
