"""What a comparison says in sentences, and what it cannot say."""

from __future__ import annotations

from collections.abc import Sequence

from mda_lightning.analysis.comparison_controls import control_limits, control_phrase
from mda_lightning.analysis.comparison_values import (
    FEW_SEEDS,
    ArmComparison,
    PairedCrossing,
    PairedQuantity,
    Quantity,
    SelectionPair,
)
from mda_lightning.analysis.effects import Effect, signed
from mda_lightning.analysis.study import BASELINE, Study

LEVEL = 0.05
"""Of adjusted p values: below it one selection is said to be stronger than another."""

OPERATIONS = {
    "mask": "masking",
    "insert": "insertion",
    "replace": "replacement",
    "prune": "pruning",
    "steer": "steering",
}


def metric_name(metric: str) -> str:
    """``previous-token score`` of ``previous_token``."""
    return f"{metric.replace('_', '-')} score"


def target_heads(study: Study) -> str:
    """``L1H2``, or ``the target head (L1H2 in seed 0, L2H3 in seed 1)``."""
    of_seed = {seed.seed: seed.target for seed in study.seeds if seed.target is not None}
    heads = list(dict.fromkeys(of_seed.values()))
    if len(heads) == 1:
        return str(heads[0])
    if not heads:
        return "the target head"
    seeds = {
        head: ", ".join(str(seed) for seed, one in of_seed.items() if one == head) for head in heads
    }
    named = "; ".join(
        f"{head} in seed{'s' if ',' in seeds[head] else ''} {seeds[head]}" for head in heads
    )
    return f"the target head ({named})"


def head_phrase(study: Study) -> str:
    """How the verdict of an arm calls the head: by name where all seeds have the same."""
    heads = {seed.target for seed in study.seeds if seed.target is not None}
    return f"target head {heads.pop()}" if len(heads) == 1 else "target head of each seed"


def interval(effect: Effect, digits: int = 3) -> str:
    """``−0.120 to −0.041``."""
    return f"{signed(effect.low, digits)} to {signed(effect.high, digits)}"


def amount(paired: PairedQuantity) -> str:
    """``+0.031 nats, 95% interval +0.010 to +0.052``; of one seed without the interval."""
    effect, quantity = paired.effect, paired.quantity
    if effect is None:
        return "not known"
    unit = f" {quantity.unit}" if quantity.unit else ""
    text = f"{signed(effect.mean, quantity.digits)}{unit}"
    if effect.n == 1:
        return text
    return f"{text}, 95% interval {interval(effect, quantity.digits)}"


def arm_verdict(study: Study, one: ArmComparison) -> str:
    """What an arm did, against what it is held against, in plain sentences."""
    mine = study.declared[one.arm].phrase
    other = control_phrase(study, one.against, one.treated, one.other)
    effect = one.final.effect
    if effect is None:
        known = f"no seed has a value for it and for {other}"
        return f"{_capital(mine)}: nothing can be said yet; {known}."
    parts = [
        effect.verdict,
        _crossing(one.crossing()),
        *_companions(one),
        *_limits(study, one, effect),
    ]
    return " ".join(part for part in parts if part)


def _crossing(one: PairedCrossing | None) -> str:
    if one is None or one.n == 0:
        return ""
    effect, at = one.shift.effect, f"{one.threshold:g}"
    if one.crossed == one.other_crossed == 0:
        return f"Neither reached {at} in any seed."
    parts = []
    if one.crossed < one.n or one.other_crossed < one.n:
        parts.append(
            f"{at} was reached in {one.crossed} of {one.n} seeds, against {one.other_crossed} of "
            f"{one.n}; a seed in which one of the two never reached it gives no difference in steps"
        )
    if effect is not None and one.at_branch < effect.n:
        among = "" if effect.n == one.n else f" in the {effect.n} with both"
        later = f"{abs(effect.mean):,.0f} steps {'later' if effect.mean > 0 else 'earlier'}"
        if effect.n == 1:
            parts.append(f"crossing {at} came {later}{among or ' in that seed'}")
        elif effect.direction == "no clear difference":
            parts.append(
                f"no clear difference in when {at} was crossed{among} ({amount(one.shift)})"
            )
        else:
            near, far = sorted((abs(effect.low), abs(effect.high)))
            parts.append(
                f"crossing {at} came {later}{among} (95% interval {near:,.0f} to {far:,.0f} steps)"
            )
    return f"{_capital('; '.join(parts))}." if parts else ""


def _companions(one: ArmComparison) -> list[str]:
    said, unclear = [], []
    moved = one.final.direction
    names = {
        "icl_gain": "in-context learning",
        "held_out_loss": "held-out loss",
        "ablation": "the cost of ablating the head",
    }
    for key, name in names.items():
        paired = one.quantities.get(key)
        if paired is None or paired.effect is None:
            continue
        if paired.direction not in ("higher", "lower"):
            unclear.append(f"{name} ({amount(paired)})")
            continue
        verb = "rose" if paired.direction == "higher" else "fell"
        if key != "held_out_loss" and moved in ("higher", "lower"):
            verb += " with it" if paired.direction == moved else " all the same"
        said.append(f"{name} {verb} ({amount(paired)})")
    sentences = [f"{_capital('; '.join(said))}."] if said else []
    if unclear:
        lead = (
            "In that seed the differences are:"
            if one.final.direction == "one seed"
            else ("No clear difference in")
        )
        sentences.append(f"{lead} {'; '.join(unclear)}.")
    return sentences


def _limits(study: Study, one: ArmComparison, effect: Effect) -> list[str]:
    limits = []
    if 1 < effect.n < FEW_SEEDS:
        limits.append(
            f"Only {effect.n} seeds: the interval rests on differences being normally distributed."
        )
    return limits + control_limits(study, one)


def selection_verdict(
    study: Study,
    do: str,
    control: str,
    reference: str,
    ranked: Sequence[tuple[str, PairedQuantity]],
    pairs: Sequence[SelectionPair],
    sign: int,
) -> str:
    """Which selection is strongest, and against which the reference is shown to be stronger."""
    order = ", ".join(
        f"{name} {signed(one.effect.mean)}" for name, one in ranked if one.effect is not None
    )
    what = OPERATIONS.get(do, do)
    if not order:
        return f"Selections for {what}: none has a value beside its control {control} yet."
    text = f"Selections for {what} by their effect against {control}, strongest first: {order}."
    tested = [one for one in pairs if one.holm is not None]
    if not tested:
        return f"{text} Without two seeds, which is stronger cannot be said."
    if not sign:
        text += f" {_capital(what)} has no direction of its own: ordered by size."
    beaten = [one for one in tested if one.stronger == reference]
    better = [one for one in tested if one.stronger == one.other]
    apart = [
        one
        for one in tested
        if one.stronger is None and one.paired.direction in ("higher", "lower")
    ]
    level = [one for one in tested if one.holm is not None and one.holm > LEVEL]
    apart = [one for one in tested if one not in (*beaten, *better, *level)]
    if beaten:
        text += f" {reference} is stronger than {_each(beaten)}."
    if better:
        text += f" {_each(better)} {'is' if len(better) == 1 else 'are'} stronger than {reference}."
    if apart:
        text += f" {reference} differs from {_each(apart)}."
    if level:
        text += f" No clear difference between {reference} and {_each(level)}."
    if sign and not better:
        text += f" No selection is shown to be stronger than {reference}."
    fewest = min(one.paired.effect.n for one in tested if one.paired.effect is not None)
    if fewest < FEW_SEEDS:
        text += f" Only {fewest} seeds, so a difference may be missed."
    times = "comparison" if len(tested) == 1 else "comparisons"
    return (
        f"{text} {len(tested)} {times} with {reference}: intervals are not corrected for their "
        "number; p values are (Holm), and they decide."
    )


def _each(pairs: Sequence[SelectionPair]) -> str:
    return ", ".join(f"{one.other} ({amount(one.paired)}, p {p_text(one.holm)})" for one in pairs)


def p_text(p: float | None) -> str:
    """``0.031``, ``<0.001`` or a dash."""
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def coupling_verdict(
    study: Study,
    quantity: Quantity,
    correlation: Effect | None,
    slope: Effect | None,
    left_out: int,
) -> str:
    """Whether a number of the whole model goes with μ across the arms."""
    score = metric_name(study.metric)
    name = quantity.name
    missing = f" {left_out} left out: fewer than three arms, or all alike." if left_out else ""
    if correlation is None or slope is None:
        return (
            f"Whether {name} goes with the {score} across arms cannot be said: no seed has three "
            "arms that differ in both."
        )
    seeds = "one seed" if correlation.n == 1 else f"{correlation.n} seeds"
    numbers = f"mean correlation {signed(correlation.mean, 2)}"
    if correlation.n == 1:
        return (
            f"Across the arms of one seed, {name} and the {score} have a correlation of "
            f"{signed(correlation.mean, 2)}, slope {signed(slope.mean, 2)} nats per 1; one seed "
            f"gives no interval.{missing}"
        )
    numbers += (
        f", 95% interval {signed(max(-1.0, correlation.low), 2)} to "
        f"{signed(min(1.0, correlation.high), 2)}; slope {signed(slope.mean, 2)} nats per 1, "
        f"{interval(slope, 2)}; {seeds}"
    )
    if correlation.direction == "no clear difference":
        return (
            f"Across the arms, {name} shows no clear relation to the {score} ({numbers}).{missing}"
        )
    verb = "rises" if correlation.direction == "higher" else "falls"
    few = " Few seeds for an interval." if correlation.n < FEW_SEEDS else ""
    return f"Across the arms, {name} {verb} as the {score} rises ({numbers}).{few}{missing}"


def against_phrase(one: ArmComparison) -> str:
    """What the table's column says: the control, or that there is none."""
    return "untouched run" if one.other == BASELINE else one.other


def shortened(name: str, width: int) -> str:
    """The name, its middle left out where it is longer than ``width``."""
    if len(name) <= width:
        return name
    tail = width // 2
    return f"{name[: width - 1 - tail]}…{name[-tail:]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
