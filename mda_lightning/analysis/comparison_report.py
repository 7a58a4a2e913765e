"""What a report shows of a comparison: figures with captions and words, and rows of tables."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mda_lightning.analysis.comparison_heads import PARTS
from mda_lightning.analysis.comparison_tables import number
from mda_lightning.analysis.comparison_values import ComparisonValues, PairedQuantity
from mda_lightning.analysis.comparison_words import (
    against_phrase,
    amount,
    interval,
    metric_name,
    p_text,
    target_heads,
)
from mda_lightning.analysis.effects import signed
from mda_lightning.analysis.figures.comparison import comparison_figure, families
from mda_lightning.analysis.figures.comparison_coupling import coupling_figure
from mda_lightning.analysis.figures.comparison_heads import MOST_MAPS, head_maps
from mda_lightning.analysis.figures.style import Theme
from mda_lightning.analysis.report_figures import ReportFigure, report_figure


def arms_figure(comparison: ComparisonValues) -> ReportFigure | None:
    """Mean curves of the arms beside their differences."""
    if not families(comparison):
        return None
    score = metric_name(comparison.study.metric)
    parts = []
    for name in comparison.study.arm_names:
        known = [
            one.final
            for arms in comparison.outcomes.values()
            if (one := arms.get(name)) is not None and one.final is not None
        ]
        if known:
            spread = f" (from {min(known):.3f} to {max(known):.3f})" if len(known) > 1 else ""
            parts.append(f"{name} {np.mean(known):.3f}{spread}")
    words = f"Where the arms are compared, the {score} of {target_heads(comparison.study)} is: "
    words += f"{'; '.join(parts)}. " if parts else "not known: no arm got there. "
    words += " ".join(
        f"{one.arm} minus {against_phrase(one)}: {amount(one.final)}, "
        f"{', '.join(signed(d) for d in one.final.effect.differences)}."
        for one in comparison.arms
        if one.final.effect is not None
    )

    def draw(theme: Theme) -> Figure:
        figure = comparison_figure(comparison, theme=theme)
        assert figure is not None
        return figure

    return report_figure(
        "comparison",
        draw,
        title="The target head in every arm, and what the arms came to",
        alt=f"Left, the target head's {score} over steps in every arm; right, the final "
        "differences between arms, one dot per seed, with intervals.",
        caption=(
            "One row for the arms that share a control. Left: mean over the seeds that all of them "
            "have, since the window's start (shaded; dotted, where the seeds' windows end); bands, "
            "up to four arms, are standard errors over seeds; horizontal dashes, the chance floor. "
            "Right, in the same colours: the difference where the arms are compared; an interval "
            "that reaches the vertical line shows no clear difference (those of two seeds may be "
            "cut at the edge). Hollow: the control against the untouched run."
        ),
        words=words.strip(),
    )


def heads_figure(comparison: ComparisonValues) -> ReportFigure | None:
    """The maps of all heads."""
    if not comparison.heads:
        return None
    study = comparison.study
    left = len(comparison.heads) - MOST_MAPS
    more = f" {left} more arms are in comparison.json." if left > 0 else ""
    split = any(len(one.target_in) > 1 for one in comparison.heads)
    frame = (
        "Dashed frames: the target of some seeds, whose cell shows the other seeds."
        if split
        else "Framed: the target."
    )
    words = []
    for one in comparison.heads[:MOST_MAPS]:
        clear = [
            f"{unit} {number(paired).rstrip('*')}"
            for unit, paired in one.effects.items()
            if paired.direction in ("higher", "lower")
        ]
        words.append(f"{one.arm}: {', '.join(clear) if clear else 'none'}.")
    return report_figure(
        "other-heads",
        lambda theme: head_maps(comparison.heads, metric=study.metric, theme=theme),
        title="What happened to every head",
        alt="Maps of layers by heads, one per arm, of the difference from its control.",
        caption=(
            f"Mean difference of the {metric_name(study.metric)}, arm minus control, where the "
            "arms are compared. Dots: the 95% interval excludes 0, uncorrected: one head in "
            f"twenty is marked by chance. {frame}{more}"
        ),
        words="Heads whose interval excludes 0. " + " ".join(words),
    )


def coupled_figure(comparison: ComparisonValues) -> ReportFigure | None:
    """In-context learning and held-out loss against μ."""
    if not comparison.couplings:
        return None
    study = comparison.study
    return report_figure(
        "coupling",
        lambda theme: coupling_figure(
            comparison.couplings, study.declared, metric=study.metric, theme=theme
        ),
        title="Does the model follow the head?",
        alt="Scatter of differences in in-context learning and held-out loss against differences "
        f"in the {metric_name(study.metric)}, one point per arm.",
        caption=(
            "Small points are arms of one seed, large ones means over seeds, as differences from "
            "the untouched run (without one, from the seed's mean); the dashed line has the mean "
            "slope over seeds."
        ),
        words=" ".join(one.verdict for one in comparison.couplings),
    )


def selection_tables(comparison: ComparisonValues) -> list[dict[str, Any]]:
    """One table a group of selections, the strongest first."""
    tables = []
    for group in comparison.selections:
        pairs = {pair.other: pair for pair in group.pairs}
        rows = []
        for arm, against_control in group.ranked:
            pair = pairs.get(arm)
            rows.append(
                {
                    "arm": arm,
                    "effect": number(against_control),
                    "interval": _interval(against_control),
                    "difference": "reference" if pair is None else number(pair.paired),
                    "difference_interval": "" if pair is None else _interval(pair.paired),
                    "p": "" if pair is None else p_text(pair.holm),
                }
            )
        tables.append(
            {
                "do": group.do,
                "control": group.control,
                "reference": group.reference,
                "count": len(group.pairs),
                "rows": rows,
            }
        )
    return tables


def part_rows(comparison: ComparisonValues) -> list[dict[str, Any]]:
    """Arms by the part of a head: target, second, lowest, all others."""
    parts = [
        part
        for part in PARTS
        if any(one.parts[part].effect is not None for one in comparison.heads)
    ]
    return [
        {
            "arm": one.arm,
            "other": one.other,
            "parts": {p: (number(one.parts[p]), _interval(one.parts[p])) for p in parts},
        }
        for one in comparison.heads
    ]


def _interval(paired: PairedQuantity) -> str:
    if paired.effect is None or paired.effect.n < 2:
        return "–"
    return interval(paired.effect, paired.quantity.digits)
