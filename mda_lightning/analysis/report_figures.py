"""The figures of one study, each with its caption and the same content in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from mda_lightning.analysis.composition import DomainShare
from mda_lightning.analysis.figures import (
    DARK,
    LIGHT,
    Theme,
    domain_composition,
    heads_heatmap,
    png_bytes,
    score_distribution,
)
from mda_lightning.analysis.influences import SeedInfluence
from mda_lightning.analysis.study import SeedRun, Study


@dataclass(frozen=True)
class ReportFigure:
    """A figure in both themes.

    Attributes:
        name: file stem under ``figures/``.
        alt: one line for a screen reader.
        caption: how to read it.
        words: what it shows, with its numbers, as plain text.
    """

    name: str
    title: str
    alt: str
    caption: str
    words: str
    light: bytes
    dark: bytes


def report_figure(
    name: str, draw: Callable[[Theme], Figure], *, title: str, alt: str, caption: str, words: str
) -> ReportFigure:
    """A figure drawn in both themes."""
    light, dark = (png_bytes(draw(theme)) for theme in (LIGHT, DARK))
    return ReportFigure(name, title, alt, caption, words, light, dark)


def heatmap_figure(study: Study, seed: SeedRun) -> ReportFigure | None:
    """All heads of one seed's base run."""
    base = seed.base
    if base is None or not base.steps.size:
        return None
    window = (seed.window.start, seed.window.midpoint, seed.window.end)
    last = base.values[-1]
    ranked = sorted(
        ((float(v), unit) for v, unit in zip(last, base.units, strict=True) if np.isfinite(v)),
        key=lambda pair: (-pair[0], pair[1]),
    )
    leaders = ", ".join(f"{unit} {value:.3f}" for value, unit in ranked[:3])
    words = (
        f"At step {base.steps[-1]:,}, the last one measured, the highest of {len(base.units)} "
        f"heads are {leaders}."
    )
    marked = ""
    if seed.window.start is not None:
        end = "not reached" if seed.window.end is None else f"step {seed.window.end:,}"
        words += (
            f" The window of {seed.target} starts at step {seed.window.start:,}; its end: {end}."
        )
        marked = " The frame is the target head; vertical lines are its window."
    else:
        words += " No window was found, so none is marked."
    return report_figure(
        f"heads-seed-{seed.seed}",
        lambda theme: heads_heatmap(
            base.steps,
            base.values,
            units=base.units,
            metric=f"{study.metric} score",
            chance=study.chance,
            window=window,
            target=seed.target if seed.window.start is not None else None,
            theme=theme,
        ),
        title=f"Every head of the untouched run, seed {seed.seed}",
        alt=f"Heatmap of the {study.metric} score of every head over training steps.",
        caption=f"Brighter is higher; the line in the colour bar is the chance floor.{marked}",
        words=words,
    )


def scores_figure(study: Study, one: SeedInfluence) -> ReportFigure:
    """How one seed's scores are spread."""
    positive = float((one.scores > 0).mean())
    tail = (
        "Too few positive scores for a tail fit."
        if one.tail is None
        else f"Tail exponent {one.tail.exponent:.2f} ± {one.tail.error:.2f} from score "
        f"{one.tail.cutoff:.3g} up ({one.tail.n_tail:,} samples), goodness-of-fit p = "
        f"{one.tail.p_value:.2f}."
    )
    return report_figure(
        f"scores-seed-{one.seed}",
        lambda theme: score_distribution(
            one.scores, unit=one.unit, fraction=study.treated_fraction, tail=one.tail, theme=theme
        ),
        title=f"How influence is spread, seed {one.seed}",
        alt="Histogram of influence scores, and the positive ones against their rank.",
        caption=(
            f"Above: every scored sample. Below: the positive scores by rank. Shaded: the top "
            f"{study.treated_fraction:.0%}, which were masked or inserted."
        ),
        words=(
            f"{positive:.0%} of {len(one.scores):,} samples promote {one.unit}. The top "
            f"{study.treated_fraction:.0%} hold {one.share:.0%} of the positive influence; normal "
            f"noise of the same mean and spread would show {one.noise_share:.0%}. {tail}"
        ),
    )


def composition_figure(
    study: Study, rows: Sequence[DomainShare], seeds: Sequence[int]
) -> ReportFigure:
    """Domains of the top sets against all scored samples."""
    pooled = f"Counts of {len(seeds)} seeds added up; dots are the seeds." if len(seeds) > 1 else ""
    return report_figure(
        "domains",
        lambda theme: domain_composition(rows, fraction=study.treated_fraction, theme=theme),
        title="Where the top samples come from",
        alt="Bars of each domain's share among the top samples and among all scored samples.",
        caption=(
            "× is the lift: share in the top set over share among all scored samples. The whisker "
            f"is the 95% range of a random set of the same size. {pooled}"
        ).strip(),
        words=" ".join(
            f"{row.domain}: {row.top_share:.1%} of the top against {row.base_share:.1%} of all, "
            f"{'beyond' if row.beyond_chance else 'within'} chance."
            for row in rows
        ),
    )
