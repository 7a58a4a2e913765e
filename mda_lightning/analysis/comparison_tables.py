"""The one table of a comparison, as text for a terminal, for Markdown and for a page."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from mda_lightning.analysis.comparison_controls import control_footnotes
from mda_lightning.analysis.comparison_values import (
    ArmComparison,
    ComparisonValues,
    PairedQuantity,
)
from mda_lightning.analysis.comparison_words import (
    against_phrase,
    interval,
    metric_name,
    shortened,
    target_heads,
)
from mda_lightning.analysis.effects import signed
from mda_lightning.analysis.study import BASELINE

COLUMNS = 110
NONE = "–"
CLEAR = "*"
_IN_FULL = 8

_COMPANIONS = (
    ("area", "area"),
    ("icl_gain", "ICL gain"),
    ("held_out_loss", "held-out"),
    ("ablation", "ablation"),
)


@dataclass(frozen=True)
class Row:
    """One arm of the table.

    Attributes:
        other: what it is held against.
        is_control: a random control, held against the untouched run.
        cells: by column, those of :func:`columns`.
        clear: whether the interval of final μ excludes 0.
    """

    arm: str
    other: str
    is_control: bool
    cells: dict[str, str]
    clear: bool


def columns(comparison: ComparisonValues) -> dict[str, str]:
    """Key and heading of the columns that hold something in this study."""
    rows = _compared(comparison)
    found = {"final": "difference", "interval": "95% interval", "n": "n"}
    threshold = table_threshold(comparison)
    if threshold is not None:
        found["crossing"] = f"to {threshold:g}, steps"
    for key, heading in _COMPANIONS:
        if any(row.quantities[key].effect is not None for row in rows):
            found[key] = heading
    return found


def table_rows(comparison: ComparisonValues) -> list[Row]:
    """Every arm against its control, grouped by control, each group followed by that control."""
    threshold = table_threshold(comparison)
    keys = columns(comparison)
    rows = []
    for one in _compared(comparison):
        rows.append(
            Row(
                arm=one.arm,
                other=against_phrase(one),
                is_control=not comparison.study.declared[one.arm].is_treated,
                cells={key: _cell(one, key, threshold) for key in keys},
                clear=one.final.direction in ("higher", "lower"),
            )
        )
    return rows


def table_threshold(comparison: ComparisonValues) -> float | None:
    """The one threshold of the table: crossed by both in most seeds, the highest of those."""
    counts: dict[float, int] = {}
    for one in comparison.arms:
        for crossing in one.crossings:
            known = max(0, len(crossing.shift.seeds) - crossing.at_branch)
            counts[crossing.threshold] = counts.get(crossing.threshold, 0) + known
    return max(counts, key=lambda threshold: (counts[threshold], threshold), default=None)


def legend_lines(comparison: ComparisonValues) -> list[str]:
    """What the columns are, in sentences."""
    score = metric_name(comparison.study.metric)
    keys = columns(comparison)
    lines = [
        f"Head: {target_heads(comparison.study)}. difference: mean over seeds of the {score}, arm "
        f"minus what it is held against; {CLEAR} where the 95% interval excludes 0; n: seeds.",
    ]
    about = []
    if "crossing" in keys:
        about.append(
            f"{keys['crossing']}: shift of the crossing, positive is later, over the seeds where "
            "both crossed (how many, where not all did)"
        )
    if "area" in keys:
        about.append(f"area: mean difference of the {score}s from the branch to the window's end")
    if "icl_gain" in keys:
        about.append("ICL gain: in nats, positive is more in-context learning")
    if "held_out_loss" in keys:
        about.append("held-out: loss in nats")
    if "ablation" in keys:
        about.append("ablation: nats that the copied token loses without the head")
    if about:
        lines.append(f"{'; '.join(about)}.")
    return lines + control_footnotes(comparison.study, comparison.arms)


def console_lines(comparison: ComparisonValues) -> list[str]:
    """The table, its legend, the verdicts and the notes, at most 110 columns wide."""
    keys = columns(comparison)
    rows = table_rows(comparison)
    lines: list[str] = []
    if rows:
        widths = {k: max(len(h), *(len(r.cells[k]) for r in rows)) for k, h in keys.items()}
        room = COLUMNS - sum(width + 2 for width in widths.values())
        longest = min(room, max(len(row.arm) for row in rows) + 2)
        lines.append(" " * longest + "".join(f"  {h:>{widths[k]}}" for k, h in keys.items()))
        group = None
        for row in rows:
            heading = f"{'controls ' if row.is_control else ''}against {row.other}"
            if heading != group:
                group = heading
                lines.append(shortened(heading, COLUMNS))
            cells = "".join(f"  {row.cells[key]:>{widths[key]}}" for key in keys)
            name = f"  {row.arm}"
            if len(name) > longest:
                # Names cut short may be the same; a line of its own keeps them apart.
                lines.append(shortened(name, COLUMNS))
                name = ""
            lines.append(f"{name:<{longest}}{cells}")
        lines.append("")
        for line in legend_lines(comparison):
            lines += textwrap.wrap(line, COLUMNS)
    said = comparison.verdicts
    if len(comparison.arms) > _IN_FULL:
        lines += ["", "In short; comparison.md says more."]
        short = [one.final.effect.verdict for one in comparison.arms if one.final.effect]
        said = [*short, *said[len(comparison.arms) :]]
    for title, texts in (("", said), ("Notes", comparison.notes)):
        if texts:
            lines.append("")
            lines += [title] if title else []
        for text in texts:
            lines += textwrap.wrap(
                text, COLUMNS, initial_indent="- ", subsequent_indent="  ", break_long_words=True
            )
    return lines


def markdown(comparison: ComparisonValues) -> str:
    """The table as GitHub Markdown, its legend, and the verdicts as a list."""
    keys = columns(comparison)
    rows = table_rows(comparison)
    parts = [f"# {_escaped(comparison.study.title)}", ""]
    if rows:
        parts += [
            "| arm | against | " + " | ".join(keys.values()) + " |",
            "|---|---|" + "---:|" * len(keys),
            *(
                f"| {_escaped(row.arm)} | {_escaped(row.other)} | "
                + " | ".join(row.cells[key].replace(CLEAR, f"\\{CLEAR}") for key in keys)
                + " |"
                for row in rows
            ),
            "",
            *(_escaped(line) for line in legend_lines(comparison)),
            "",
        ]
    parts += [f"- {_escaped(text)}" for text in comparison.verdicts]
    if comparison.notes:
        parts += ["", "Notes:", "", *(f"- {_escaped(text)}" for text in comparison.notes)]
    return "\n".join(parts) + "\n"


def _compared(comparison: ComparisonValues) -> list[ArmComparison]:
    """Arms by what they are held against; behind them the controls, against the untouched run."""
    order: dict[str, list[ArmComparison]] = {}
    for one in comparison.arms:
        order.setdefault(one.other, []).append(one)
    bare = order.pop(BASELINE, [])
    controls = [
        one
        for one in comparison.against_baseline
        if not comparison.study.declared[one.arm].is_treated
    ]
    return [*(one for group in order.values() for one in group), *bare, *controls]


def _cell(one: ArmComparison, key: str, threshold: float | None) -> str:
    if key == "n":
        return str(0 if one.final.effect is None else one.final.effect.n)
    if key == "interval":
        effect = one.final.effect
        return NONE if effect is None or effect.n < 2 else interval(effect)
    if key == "crossing":
        crossing = next((c for c in one.crossings if c.threshold == threshold), None)
        if crossing is None or crossing.shift.effect is None:
            return NONE
        among = len(crossing.shift.seeds)
        return number(crossing.shift) + ("" if among == crossing.n else f" ({among})")
    return number(one.quantities[key])


def number(paired: PairedQuantity) -> str:
    """``−0.081*``: the mean, starred where its interval excludes 0."""
    if paired.effect is None:
        return NONE
    star = CLEAR if paired.direction in ("higher", "lower") else ""
    return signed(paired.effect.mean, paired.quantity.digits) + star


def _escaped(text: str) -> str:
    """Text that Markdown takes as text."""
    for sign in "\\`*_|<>[]#":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
