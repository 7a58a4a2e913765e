"""A comparison as files: JSON with every number, a long CSV, a table and a figure."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from typing import Any

from mda_lightning import __version__
from mda_lightning.analysis.comparison_tables import markdown
from mda_lightning.analysis.comparison_values import (
    ArmComparison,
    ComparisonValues,
    Coupling,
    HeadEffects,
    PairedCrossing,
    PairedQuantity,
    SelectionGroup,
)
from mda_lightning.analysis.effects import Effect
from mda_lightning.analysis.figures.comparison import comparison_figure
from mda_lightning.analysis.figures.style import DARK, LIGHT, png_bytes
from mda_lightning.files import atomic_path, write_json

SCHEMA_VERSION = 1
KIND = "comparison"


def write_files(comparison: ComparisonValues) -> None:
    """Write everything beside ``study.json``; a figure only where there is a curve."""
    write_tables(comparison)
    for theme in (LIGHT, DARK):
        figure = comparison_figure(comparison, theme=theme)
        if figure is not None:
            name = "comparison.png" if theme is LIGHT else "comparison-dark.png"
            with atomic_path(comparison.study.folder / "figures" / name) as part:
                part.write_bytes(png_bytes(figure))


def write_tables(comparison: ComparisonValues) -> None:
    """``comparison.json``, ``comparison.csv`` and ``comparison.md``."""
    folder = comparison.study.folder
    write_json(folder / "comparison.json", to_dict(comparison))
    with (
        atomic_path(folder / "comparison.csv") as part,
        part.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seed", "arm", "quantity", "value"])
        writer.writerows(long_rows(comparison))
    with atomic_path(folder / "comparison.md") as part:
        part.write_text(markdown(comparison), "utf-8")


def long_rows(comparison: ComparisonValues) -> Iterator[tuple[int, str, str, float | str]]:
    """(seed, arm, quantity, value): the raw numbers that everything is paired from.

    A threshold that was not crossed has an empty value, and ``crossing@0.3/looked_until`` says how
    far it was looked for. ``area`` is against what the arm is compared with.
    """
    areas = {
        (seed, one.arm): value
        for one in comparison.arms
        if (effect := one.quantities["area_steps"].effect) is not None
        for seed, value in zip(one.quantities["area_steps"].seeds, effect.differences, strict=True)
    }
    for seed, arms in comparison.outcomes.items():
        for arm, one in arms.items():
            yield seed, arm, "final", "" if one.final is None else one.final
            for threshold, crossing in one.crossings.items():
                name = f"crossing@{threshold:g}"
                yield seed, arm, name, "" if crossing.step is None else crossing.step
                yield seed, arm, f"{name}/looked_until", crossing.looked_until
            if (seed, arm) in areas:
                yield seed, arm, "area_steps", areas[seed, arm]
            for companion in one.companions:
                value = one.companion(companion)
                yield seed, arm, companion, "" if value is None else value
            for head, final in one.heads.items():
                yield seed, arm, f"head@{head}", final


def to_dict(comparison: ComparisonValues) -> dict[str, Any]:
    """All numbers of a comparison as JSON values."""
    study = comparison.study
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "provenance": {
            "mda_lightning": __version__,
            "study": {"settings_hash": study.settings_hash, "created": study.created},
            "interval": "Student's t over seeds, paired, 95%, uncorrected",
        },
        "title": study.title,
        "metric": study.metric,
        "chance": study.chance,
        "targets": {str(seed.seed): seed.target for seed in study.seeds},
        "quantities": {
            one.key: {"name": one.name, "unit": one.unit} for one in comparison.quantities
        },
        "arms": [_arm(one) for one in comparison.arms],
        "against_baseline": [_arm(one) for one in comparison.against_baseline],
        "selections": [_selections(one) for one in comparison.selections],
        "heads": [_heads(one) for one in comparison.heads],
        "couplings": [_coupling(one) for one in comparison.couplings],
        "notes": list(comparison.notes),
    }


def _arm(one: ArmComparison) -> dict[str, Any]:
    return {
        "arm": one.arm,
        "other": one.other,
        "against": one.against,
        "treated": [
            {"seed": seed, "arm": mine, "other": theirs} for seed, mine, theirs in one.treated
        ],
        "quantities": _paired_by(one.quantities),
        "crossings": [_crossing(crossing) for crossing in one.crossings],
        "verdict": one.verdict,
    }


def _crossing(one: PairedCrossing) -> dict[str, Any]:
    return {
        "threshold": one.threshold,
        "shift_steps": _paired(one.shift),
        "seeds": one.n,
        "crossed": one.crossed,
        "other_crossed": one.other_crossed,
        "both_at_branch": one.at_branch,
    }


def _selections(one: SelectionGroup) -> dict[str, Any]:
    return {
        "do": one.do,
        "control": one.control,
        "reference": one.reference,
        "ranked": [{"arm": arm, **_paired(paired)} for arm, paired in one.ranked],
        "pairs": [
            {"other": p.other, "stronger": p.stronger, "holm": p.holm, **_paired(p.paired)}
            for p in one.pairs
        ],
        "comparisons": len(one.pairs),
        "verdict": one.verdict,
    }


def _heads(one: HeadEffects) -> dict[str, Any]:
    return {
        "arm": one.arm,
        "other": one.other,
        "target_in_seeds": dict(one.target_in),
        "parts": _paired_by(one.parts),
        "heads": _paired_by(one.effects),
    }


def _coupling(one: Coupling) -> dict[str, Any]:
    return {
        "quantity": one.quantity.key,
        "centred_on": one.centred_on,
        "points": [
            {"seed": seed, "arm": arm, "final": x, one.quantity.key: y}
            for seed, arm, x, y in one.points
        ],
        "correlation_by_seed": {str(seed): r for seed, r in one.correlations.items()},
        "slope_by_seed": {str(seed): slope for seed, slope in one.slopes.items()},
        "correlation": _effect(one.correlation),
        "slope": _effect(one.slope),
        "seeds_left_out": list(one.left_out),
        "verdict": one.verdict,
    }


def _paired_by(many: Mapping[str, PairedQuantity]) -> dict[str, Any]:
    return {key: _paired(one) for key, one in many.items()}


def _paired(one: PairedQuantity) -> dict[str, Any]:
    return {"seeds": list(one.seeds), "p": one.p, **_effect(one.effect)}


def _effect(effect: Effect | None) -> dict[str, Any]:
    if effect is None:
        return {"n": 0, "mean": None, "low": None, "high": None, "differences": []}
    return {
        "n": effect.n,
        "mean": effect.mean,
        "low": _known(effect.low),
        "high": _known(effect.high),
        "differences": list(effect.differences),
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
