"""What a study says in words: comparisons of arms, the summary, and what to doubt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mda_lightning.analysis.comparison import StudyComparison
from mda_lightning.analysis.comparison_words import metric_name
from mda_lightning.analysis.influences import SeedInfluence
from mda_lightning.analysis.study import BASELINE, Study


def span_of(values: Sequence[float], *, digits: int = 0) -> str:
    """``1,930`` or ``1,930 to 2,010``: one number, or the range of several."""
    low, high = min(values), max(values)
    text = f"{low:,.{digits}f}"
    return text if low == high else f"{text} to {high:,.{digits}f}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def summary(study: Study, influences: Sequence[SeedInfluence]) -> str:
    """One paragraph: what was done, with the numbers that exist."""
    found = [seed for seed in study.seeds if seed.window.start is not None]
    bases = [seed.base for seed in study.seeds if seed.base is not None]
    if not study.seeds:
        return "No run is recorded."
    several = len(study.seeds) > 1
    times = f"{len(study.seeds)} times, with as many seeds" if several else "once"
    text = f"A model was pretrained {times}"
    if bases:
        text += (
            f", measuring the {metric_name(study.metric)} of all {len(bases[0].units)} heads at "
            f"{plural(len(bases[0].steps), 'step')} of each run"
        )
    text += ". "
    if not found:
        return text + "No critical window was found, so no sample was scored and no data changed."
    heads = ", ".join(dict.fromkeys(seed.target or "unknown" for seed in found))
    starts = [float(seed.window.start) for seed in found if seed.window.start is not None]
    ends = [float(seed.window.end) for seed in found if seed.window.end is not None]
    text += f"In {len(found)} of {len(study.seeds)} seeds a" if several else "A"
    text += " head left the chance floor"
    text += f" ({study.chance:.3f})" if study.chance is not None else ""
    text += f": {heads}, from step {span_of(starts)}"
    text += f" until step {span_of(ends)}. " if ends else ", with no end before the run stopped. "
    if influences:
        sizes = [float(len(one.scores)) for one in influences]
        tops = [float(len(one.top)) for one in influences]
        text += (
            f"The {span_of(sizes)} samples trained on inside that window were scored for it. "
            f"The top {study.treated_fraction:.0%} ({span_of(tops)} samples) hold "
            f"{span_of([100 * one.share for one in influences])}% of the positive influence. "
        )
    ran = [name for name in study.arm_names if name != BASELINE]
    if ran:
        text += (
            "Training was then repeated from the window's start, same data order, with the data "
            f"changed ({', '.join(ran)}). "
        )
    values = [seed.arms[BASELINE].value for seed in found if BASELINE in seed.arms]
    untouched = [value for value in values if value is not None]
    if untouched:
        text += f"Untouched, the target head reached {span_of(untouched, digits=3)}."
    return text.strip()


def doubts(
    study: Study, influences: Sequence[SeedInfluence], compared: StudyComparison
) -> list[str]:
    """What a careful reader should hold against this study, in its own numbers."""
    found: list[str] = []
    main = [one.final.effect for one in compared.arms if one.final.effect is not None]
    fewest = min((effect.n for effect in main), default=0)
    if main and fewest == 1:
        found.append(
            "One seed: the differences have no interval. Another seed may turn them around; run "
            "several before believing any of them."
        )
    elif main and fewest < 5:
        found.append(
            f"Only {fewest} seeds: the t interval assumes normally distributed differences, which "
            "so few seeds cannot show."
        )
    if len(main) > 1:
        found.append(
            f"{len(main)} comparisons, each with its own 95% interval and no correction for there "
            "being several."
        )
    if compared.heads:
        found.append(
            "The maps of all heads test every head: one mark in twenty is expected by chance."
        )
    if any(seed.window.censored for seed in study.seeds):
        found.append("A window marked as censored was still open when its run stopped.")
    shares = [
        (o.share, o.noise_share) for o in influences if np.isfinite([o.share, o.noise_share]).all()
    ]
    if shares:
        found.append(
            f"Concentration needs a yardstick: normal noise with the same mean and spread would "
            f"put {span_of([100 * noise for _, noise in shares])}% of the positive influence in "
            f"the top {study.treated_fraction:.0%}; these scores put "
            f"{span_of([100 * share for share, _ in shares])}% there."
        )
    tails = [one.tail for one in influences if one.tail is not None]
    if any(tail.plausible is False for tail in tails):
        rejected = sum(tail.plausible is False for tail in tails)
        found.append(
            f"The power law is rejected by its own goodness-of-fit in {rejected} of "
            f"{plural(len(tails), 'fit')} (p at or below 0.1): its exponent is a slope, not a law."
        )
    found.append(
        f"The {metric_name(study.metric)} is an attention pattern on random sequences. That the "
        "head does its work needs an independent measure (ablation, in-context learning)."
    )
    found.append(
        "Scores are first-order and use a damped approximation of curvature in the head's own "
        "weights. Effects through other heads and through later training are not in them; the "
        "retrained arms include both."
    )
    return found
