"""The analyses of a study in words, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mda_lightning.analysis.analysis_words import (
    block_sentence,
    difference_sentence,
    kinship_sentence,
    number,
    p_text,
    significant,
    span,
    strongest_pair,
)
from mda_lightning.analysis.datamodeling import DatamodelingTable, seed_interval
from mda_lightning.analysis.effects import signed
from mda_lightning.analysis.figures.datamodeling import datamodeling_scores
from mda_lightning.analysis.figures.overlap import overlap_heatmap
from mda_lightning.analysis.figures.time_bins import influence_over_steps
from mda_lightning.analysis.overlap import BlockContrast
from mda_lightning.analysis.report_figures import ReportFigure, report_figure
from mda_lightning.analysis.study_findings import HeadOverlap, SeedTime, SelectionOverlap

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class AnalysisTable:
    """Cells as text; the first of a row is its name."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class AnalysisSection:
    """One question: what was found, in sentences first.

    Attributes:
        folded: figures shown on demand, those of further seeds.
    """

    title: str
    sentences: tuple[str, ...]
    tables: tuple[AnalysisTable, ...] = ()
    figures: tuple[ReportFigure, ...] = ()
    folded: tuple[ReportFigure, ...] = ()


def heads_section(found: Sequence[HeadOverlap], fraction: float) -> AnalysisSection | None:
    """Do heads of one mechanism want the same data? (Figure 3b.)"""
    if not found:
        return None
    sentences = []
    for name, blocks, expected in (
        ("Jaccard index", [one.jaccard_blocks for one in found], _expected(found, "jaccard")),
        ("Rank-biased overlap", [one.rbo_blocks for one in found], _expected(found, "rbo")),
    ):
        known = [one for one in blocks if one is not None]
        if known:
            sentences.append(block_sentence(name, known, expected))
    kinships = [one.kinship for one in found if math.isfinite(one.kinship)]
    if kinships:
        sentences.append(kinship_sentence(kinships))
    rows: list[tuple[str, ...]] = [
        (
            str(one.seed),
            ", ".join(one.leading) if len(one.leading) <= 6 else f"{len(one.leading)} heads",
            *(_three(one.jaccard_blocks)),
            p_text(one.jaccard_blocks.p_value) if one.jaccard_blocks else "–",
            *(_three(one.rbo_blocks)),
            number(one.kinship, 2),
            number(one.matrix.expected_jaccard),
            f"{one.matrix.depth:,} of {one.matrix.pool:,}",
        )
        for one in found
    ]
    if len(found) > 1:
        rows.append(_mean_row(found))
    table = AnalysisTable(
        caption=(
            "Mean overlap of pairs of heads: among the leading ones (μ at least halfway from "
            "chance to the highest), between them and the others, among the others. p: share of "
            "the ways to name as many leading heads that set them as far apart. Kinship: rank "
            "correlation, over the other heads, of μ with the Jaccard index with the target"
        ),
        columns=(
            "seed", "leading heads", "Jaccard: among", "between", "others", "p",
            "RBO: among", "between", "others", "kinship", "Jaccard of random sets", "top set",
        ),
        rows=tuple(rows),
    )  # fmt: skip
    figures = tuple(_heads_figure(one, fraction) for one in found)
    return AnalysisSection(
        "Do heads want the same data?", tuple(sentences), (table,), figures[:1], figures[1:]
    )


def selections_section(
    found: Sequence[SelectionOverlap], fraction: float
) -> AnalysisSection | None:
    """Do ways to rank samples choose the same ones?"""
    if not found:
        return None
    names = _common([one.matrix.names for one in found])
    if len(names) < 2:
        return None
    matrices = [one.matrix.ordered(names) for one in found]
    jaccard = _mean([one.jaccard for one in matrices])
    rbo = _mean([one.rbo for one in matrices])
    spearman = _mean([one.spearman for one in matrices])
    seeds = f"mean over {len(found)} seeds" if len(found) > 1 else "one seed"
    aliases = {alias: twin for one in found for alias, twin in one.aliases.items()}
    sentences = [f"{alias} is the same ranking as {twin}." for alias, twin in aliases.items()]
    pairs = [
        f"{names[0]} and {name}: {jaccard[0, i]:.2f} (rank correlation {signed(spearman[0, i], 2)})"
        for i, name in enumerate(names)
        if i
    ]
    chance = float(np.mean([one.expected_jaccard for one in matrices]))
    words = (
        f"Jaccard index of the top {fraction:.0%}, {seeds}: {'; '.join(pairs)}. Random sets of "
        f"that size share {chance:.2f}."
    )
    figure = report_figure(
        "selection-overlap",
        lambda theme: overlap_heatmap(
            jaccard,
            rbo,
            names=names,
            below_name=f"Jaccard index of the top {fraction:.0%}",
            above_name="rank-biased overlap",
            theme=theme,
        ),
        title="Overlap of ways to select samples",
        alt="Heatmap of the overlap between rankings of the samples.",
        caption=f"For the target head, {seeds}. Random sets: Jaccard {chance:.2f}.",
        words=words,
    )
    table = AnalysisTable(
        caption=f"Spearman's rank correlation over all samples of the window, {seeds}",
        columns=("ranking", *names),
        rows=tuple(
            (name, *(number(value, 2) if i != j else "" for j, value in enumerate(spearman[i])))
            for i, name in enumerate(names)
        ),
    )
    return AnalysisSection(
        "Do ways to select samples agree?", tuple(sentences), (table,), (figure,)
    )


def time_section(found: Sequence[SeedTime], fraction: float) -> AnalysisSection | None:
    """Does influence come evenly over training? (Figures 3c and 8, appendix I.2.)"""
    if not found:
        return None
    sentences = []
    if any(one.estimator == "replay" for one in found):
        sentences.append(
            "These scores are by replay, at fixed weights: over shuffled data they can only be "
            "even, up to chance, whatever the head goes through. Scores taken during training "
            "(in-run) can show more."
        )
    widths = sorted({test.width for one in found for test in one.uniformities})
    tests = [test for one in found for test in one.uniformities if math.isfinite(test.p_value)]
    if tests:
        below = sum(test.p_value < 0.05 for test in tests)
        sentences.append(
            f"At bin widths of {', '.join(map(str, widths))} steps, {below} of {len(tests)} tests "
            f"find the top {fraction:.0%} spread unevenly (p < 0.05; chance alone gives about "
            f"{0.05 * len(tests):.1g}). Net drive is positive in "
            f"{np.mean([t.positive_bins for t in tests]):.0%} of the bins."
        )
    rows = [
        (
            str(one.seed), one.unit, str(test.width), str(test.n_bins),
            f"{test.lowest:.1%} to {test.highest:.1%}", number(test.dispersion, 2),
            p_text(test.p_value) + ("*" if test.drawn else ""), f"{test.positive_bins:.0%}",
        )
        for one in found
        for test in one.uniformities
    ]  # fmt: skip
    tables = (
        AnalysisTable(
            caption=(
                f"The top {fraction:.0%} over bins: the least and the most of a bin's samples in "
                "it; index of dispersion (1 for a random set); p of the chi-square test (* drawn "
                "at random, where bins are small); bins with positive net drive"
            ),
            columns=("seed", "head", "bin", "bins", "top share", "dispersion", "p", "positive"),
            rows=tuple(rows),
        ),
        AnalysisTable(
            caption=(
                "Mean influence over steps: least-squares slope per 100 steps with its 95% "
                "interval, and the change over the window in standard deviations of the scores"
            ),
            columns=("seed", "slope", "95% interval", "change"),
            rows=tuple(
                (
                    str(one.seed),
                    significant(one.slope.per_100_steps),
                    f"{significant(one.slope.low)} to {significant(one.slope.high)}",
                    signed(one.slope.drift, 2) if math.isfinite(one.slope.drift) else "–",
                )
                for one in found
            ),
        ),
    )
    figures = tuple(_time_figure(one, fraction) for one in found)
    return AnalysisSection(
        "Does influence come evenly over training?",
        tuple(sentences),
        tables,
        figures[:1],
        figures[1:],
    )


def datamodeling_section(table: DatamodelingTable | None) -> AnalysisSection | None:
    """Do scores predict what training on random subsets gives?"""
    if table is None or not any(one.per_seed for one in table.rankings):
        return None
    judged = [one for one in table.rankings if one.per_seed]
    counts = sorted({row.n_subsets for one in judged for row in one.per_seed})
    n_seeds = len({row.seed for one in judged for row in one.per_seed})
    sentences = [difference_sentence(one) for one in table.differences]
    sentences += list(table.notes)
    several = n_seeds > 1
    rows = tuple(
        (
            one.ranking,
            number(one.mean, 2),
            span(one.low, one.high) if several else span(one.per_seed[0].low, one.per_seed[0].high),
            p_text(one.p_value),
            "; ".join(
                f"{number(row.value, 2)}" + (f" ({span(row.low, row.high)})" if several else "")
                for row in one.per_seed
            ),
        )
        for one in judged
    )
    over = f"{n_seeds} seeds" if several else "one seed"
    subsets = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    main = AnalysisTable(
        caption=(
            f"Linear datamodeling score: Spearman's correlation over {subsets} random subsets of "
            f"μ after training on the subset with the sum of its scores, {over}. Interval: "
            + ("Student's t over seeds" if several else "bootstrap over subsets (BCa)")
            + "; p: random pairings, one-sided"
        ),
        columns=("ranking", "mean" if several else "LDS", "95% interval", "p", "each seed"),
        rows=rows,
    )
    words = "; ".join(f"{row[0]} {row[1]} ({row[2]}, p {row[3]})" for row in rows)
    figure = report_figure(
        "datamodeling",
        lambda theme: datamodeling_scores(table, theme=theme),
        title="Linear datamodeling score",
        alt="Dot plot of the linear datamodeling score of each ranking.",
        caption=(
            "Dots: seeds, with their intervals over subsets. Diamond: their mean"
            + (", with its interval over seeds." if several else ".")
        ),
        words=f"{words}.",
    )
    return AnalysisSection(
        "Do scores predict the outcome of training on subsets?",
        tuple(sentences),
        (main,),
        (figure,),
    )


# -- figures ---------------------------------------------------------------------------------


def _heads_figure(one: HeadOverlap, fraction: float) -> ReportFigure:
    matrix, leading = one.matrix, len(one.leading)
    highest = ", ".join(
        f"{head} {mu:.2f}" for head, mu in list(zip(matrix.names, one.mu, strict=True))[:3]
    )
    words = f"Highest μ: {highest}. {strongest_pair(matrix)}"
    if one.jaccard_blocks is not None:
        words += " " + block_sentence("Jaccard index", [one.jaccard_blocks], None)
    line = " The line divides the leading heads from the others." if one.jaccard_blocks else ""
    return report_figure(
        f"head-overlap-seed-{one.seed}",
        lambda theme: overlap_heatmap(
            matrix.jaccard,
            matrix.rbo,
            names=matrix.names,
            below_name=f"Jaccard index of the top {fraction:.0%}",
            above_name="rank-biased overlap",
            leading=leading if one.jaccard_blocks else 0,
            order="heads, highest μ first",
            theme=theme,
        ),
        title=f"Overlap of the heads' top samples, seed {one.seed}",
        alt="Heatmap of the overlap between the top samples of all pairs of heads.",
        caption=(
            f"Heads by μ at the window's end.{line} Random sets: Jaccard "
            f"{matrix.expected_jaccard:.2f}, rank-biased overlap {matrix.expected_rbo:.2f}."
        ),
        words=words,
    )


def _time_figure(one: SeedTime, fraction: float) -> ReportFigure:
    shares = ", ".join(f"{b.top_share:.1%}" for b in one.bins if b.n)
    test = next(test for test in one.uniformities if test.width == one.width)
    return report_figure(
        f"time-seed-{one.seed}",
        lambda theme: influence_over_steps(
            one.bins,
            steps=one.steps,
            scores=one.scores,
            sliding=one.sliding,
            unit=one.unit,
            fraction=fraction,
            theme=theme,
        ),
        title=f"Influence over training steps, seed {one.seed}",
        alt="Three plots over steps: share of top samples, mean influence, quantiles of influence.",
        caption=(
            f"Bins of {one.width} steps; the thin line is a sliding window of that width. Above: "
            f"share of each bin's samples in the top {fraction:.0%}, with what a random set would "
            "show. Middle: mean influence. Below: quantiles of the scores, symmetric log scale."
        ),
        words=(
            f"Share of the top {fraction:.0%} in each bin: {shares}; chi-square p "
            f"{p_text(test.p_value)}, dispersion {number(test.dispersion, 2)}."
        ),
    )


# -- values ----------------------------------------------------------------------------------


def _expected(found: Sequence[HeadOverlap], what: str) -> float:
    return float(np.mean([getattr(one.matrix, f"expected_{what}") for one in found]))


def _mean_row(found: Sequence[HeadOverlap]) -> tuple[str, ...]:
    def mean(blocks: Sequence[BlockContrast | None]) -> list[str]:
        known = [one for one in blocks if one is not None]
        parts = [[one.within, one.between, one.outside] for one in known]
        return [number(value) for value in np.mean(parts, axis=0)] if parts else ["–"] * 3

    return (
        "mean",
        "",
        *mean([one.jaccard_blocks for one in found]),
        "",
        *mean([one.rbo_blocks for one in found]),
        number(seed_interval([k.kinship for k in found if math.isfinite(k.kinship)])[0], 2),
        number(_expected(found, "jaccard")),
        "",
    )


def _three(blocks: BlockContrast | None) -> tuple[str, str, str]:
    if blocks is None:
        return "–", "–", "–"
    return number(blocks.within), number(blocks.between), number(blocks.outside)


def _common(names: Sequence[Sequence[str]]) -> list[str]:
    return [name for name in names[0] if all(name in other for other in names)]


def _mean(matrices: Sequence[Floats]) -> Floats:
    mean: Floats = np.mean(np.stack(matrices), axis=0)
    return mean
