"""The figures of one study, each with its caption and the same content in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from mda_lightning.analysis.composition import DomainShare
from mda_lightning.analysis.effects import signed
from mda_lightning.analysis.figures import (
    DARK,
    LIGHT,
    ArmCurve,
    Comparison,
    Theme,
    arm_curves,
    domain_composition,
    effect_dots,
    heads_heatmap,
    png_bytes,
    score_distribution,
)
from mda_lightning.analysis.influences import SeedInfluence
from mda_lightning.analysis.study import SeedRun, Study
from mda_lightning.analysis.verdicts import comparisons


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


def _figure(
    name: str, draw: Callable[[Theme], Figure], *, title: str, alt: str, caption: str, words: str
) -> ReportFigure:
    light, dark = (png_bytes(draw(theme)) for theme in (LIGHT, DARK))
    return ReportFigure(name, title, alt, caption, words, light, dark)


def arms_figure(study: Study) -> ReportFigure | None:
    """The target head in every arm, steps counted from the window's start with several seeds."""
    seeds = [seed for seed in study.seeds if seed.target is not None and seed.arms]
    several = len(seeds) > 1
    curves: list[ArmCurve] = []
    windows: list[tuple[float, float | None]] = []
    measured: list[float] = []
    for seed in seeds:
        origin = float(seed.window.start or 0) if several else 0.0
        for arm in (seed.arms[name] for name in study.arm_names if name in seed.arms):
            if arm.curves is not None and seed.target in arm.curves.units:
                steps, values = arm.curves.of(str(seed.target))
                if steps.size:
                    curves.append(ArmCurve(arm.name, steps - origin, values))
        if seed.window.start is not None:
            end = seed.window.end
            windows.append((seed.window.start - origin, None if end is None else end - origin))
        if seed.measured_at:
            measured.append(float(np.mean(seed.measured_at)) - origin)
    if not curves:
        return None
    means = {
        name: [s.arms[name].value for s in seeds if name in s.arms] for name in study.arm_names
    }
    parts = []
    for name, at_end in means.items():
        known = [value for value in at_end if value is not None]
        if known:
            spread = f" (from {min(known):.3f} to {max(known):.3f})" if len(known) > 1 else ""
            parts.append(f"{name} {np.mean(known):.3f}{spread}")
    words = f"Where the arms are compared, the target head's {study.metric} score is: "
    words += "; ".join(parts) + "." if parts else "not known: no arm got there."
    spread_note = (
        "Thin lines are seeds, thick lines their mean, bands the standard error over seeds; steps "
        "count from each seed's window start."
        if several
        else "One seed, so the lines carry no band."
    )
    return _figure(
        "arms",
        lambda theme: arm_curves(
            curves,
            metric=study.metric,
            chance=study.chance,
            windows=windows,
            measured_at=measured,
            relative=several,
            theme=theme,
        ),
        title="The target head in every arm",
        alt=f"Line plot of the target head's {study.metric} score over steps, one line per arm.",
        caption=(
            f"Treated arms solid, random controls dashed, the untouched run thin. {spread_note} "
            "Shaded: the critical window, its end dotted. Horizontal dashes: the chance floor. "
            "Triangle: where the arms are compared."
        ),
        words=words,
    )


def effects_figure(study: Study) -> ReportFigure | None:
    """Differences per seed, treated against control and control against baseline."""
    main, controls = comparisons(study)
    every: Sequence[Comparison] = [*main, *controls]
    if not every:
        return None
    return _figure(
        "effects",
        lambda theme: effect_dots(every, metric=study.metric, theme=theme),
        title="Differences between arms",
        alt="Dot plot of the difference between each arm and its control, one dot per seed.",
        caption=(
            "One dot per seed; hollow where a random control is held against the untouched run. "
            "Diamond and bar: mean and 95% interval over seeds. An interval that reaches the "
            "vertical line shows no clear difference."
        ),
        words=" ".join(
            f"{c.arm} minus {c.control}: "
            + ", ".join(signed(d) for d in c.effect.differences)
            + (
                f"; mean {signed(c.effect.mean)}, interval {signed(c.effect.low)} to "
                f"{signed(c.effect.high)}."
                if c.effect.n > 1
                else "; one seed, no interval."
            )
            for c in every
        ),
    )


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
    return _figure(
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
    return _figure(
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
    return _figure(
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
