"""What a comparison leaves behind: JSON, CSV, one table, one figure, lines for a terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_study import write_made_study
from test_comparison import ARMS, SELECTIONS, arm, run

from mda_lightning.analysis.comparison import compare_study, write_comparison
from mda_lightning.analysis.comparison_tables import columns, table_rows
from mda_lightning.analysis.figures import DARK, LIGHT, png_bytes
from mda_lightning.analysis.figures.comparison import comparison_figure, families, shades
from mda_lightning.analysis.figures.comparison_coupling import coupling_figure
from mda_lightning.analysis.figures.comparison_heads import head_maps
from mda_lightning.analysis.report import build_report


def runs_of(arms: dict[str, dict[str, Any]], n: int) -> dict[int, dict[str, Any]]:
    """Masking arms lower, insertion arms higher, by their place among the arms."""
    rng = np.random.default_rng(7)
    runs: dict[int, dict[str, Any]] = {}
    for seed in range(n):
        runs[seed] = {"baseline": run(0.4, icl=0.4)}
        for place, (name, declared) in enumerate(arms.items()):
            sign = {"mask": -1, "insert": 1}.get(declared["do"], 0)
            shift = 0.0 if declared.get("control_of") else sign * (0.1 - 0.004 * place)
            level = 0.4 + shift + rng.normal(0, 0.01)
            runs[seed][name] = run(level, icl=level, loss=4.5 - level)
    return runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("study")
    write_made_study(where, SELECTIONS, runs_of(SELECTIONS, 3))
    write_comparison(where)
    return where


def test_json_holds_the_numbers_and_nothing_that_is_no_json(folder: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (folder / "comparison.json").read_text("utf-8")
    raw = json.loads(text, parse_constant=refuse)
    assert (raw["schema_version"], raw["kind"], raw["metric"]) == (1, "comparison", "induction")
    assert raw["provenance"]["study"]["settings_hash"] == "0" * 64
    compared = compare_study(folder)
    assert [one["arm"] for one in raw["arms"]] == [one.arm for one in compared.arms]
    for written, one in zip(raw["arms"], compared.arms, strict=True):
        assert one.final.effect is not None
        final = written["quantities"]["final"]
        assert (final["mean"], final["low"], final["n"]) == (
            one.final.effect.mean,
            one.final.effect.low,
            3,
        )
        assert written["verdict"] == one.verdict
        assert {c["threshold"] for c in written["crossings"]} == {0.2, 0.3}
    assert raw["selections"][0]["comparisons"] == 3
    assert set(raw["heads"][0]["heads"]) == {"L0H0", "L0H1", "L1H0", "L1H1"}
    assert {c["quantity"] for c in raw["couplings"]} == {"icl_gain", "held_out_loss"}
    assert str(folder) not in text


def test_the_long_table_gives_the_differences_back(folder: Path) -> None:
    table = pd.read_csv(folder / "comparison.csv")
    assert list(table.columns) == ["seed", "arm", "quantity", "value"]
    assert not table.duplicated(["seed", "arm", "quantity"]).any()
    final = table[table.quantity == "final"].pivot(index="seed", columns="arm", values="value")
    for one in compare_study(folder).arms:
        assert one.final.effect is not None
        assert (final[one.arm] - final[one.other]).tolist() == pytest.approx(
            one.final.effect.differences
        )
    quantities = set(table.quantity)
    assert {"icl_gain", "ablation", "area_steps", "crossing@0.3", "head@L1H0"} <= quantities
    # The value of the target's column is the same number under both names.
    heads = table[table.quantity == "head@L0H0"].pivot(index="seed", columns="arm", values="value")
    assert np.allclose(heads, final)


def test_the_table_has_a_row_for_every_arm(folder: Path) -> None:
    compared = compare_study(folder)
    rows = table_rows(compared)
    assert sorted(row.arm for row in rows) == sorted(SELECTIONS)
    assert [row.arm for row in rows if row.is_control] == ["mask-random", "insert-random"]
    assert {row.other for row in rows if row.is_control} == {"untouched run"}
    for row in rows:
        one = next(c for c in (*compared.arms, *compared.against_baseline) if c.arm == row.arm)
        assert set(row.cells) == set(columns(compared))
        assert row.cells["n"] == "3"
        assert row.cells["final"].endswith("*") == row.clear
        if not row.is_control:
            assert one.final.effect is not None
            assert float(row.cells["final"].rstrip("*").replace("−", "-")) == pytest.approx(
                one.final.effect.mean, abs=5e-4
            )
    text = (folder / "comparison.md").read_text("utf-8")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(SELECTIONS)
    assert len({line.count("|") for line in table}) == 1


def test_figures_are_the_same_bytes_twice_in_both_themes(folder: Path) -> None:
    light = (folder / "figures" / "comparison.png").read_bytes()
    assert light[:8] == b"\x89PNG\r\n\x1a\n"
    assert (folder / "figures" / "comparison-dark.png").read_bytes() != light
    figure = comparison_figure(compare_study(folder))
    assert figure is not None and png_bytes(figure) == light
    assert not list(folder.glob("**/.*"))


def test_a_row_of_the_figure_is_a_control_and_its_arms_strongest_first(folder: Path) -> None:
    compared = compare_study(folder)
    mask, insert = families(compared)
    means = [one.final.effect.mean for one in mask.arms if one.final.effect is not None]
    assert len(means) == 4 and means == sorted(means)
    assert [one.arm for one in insert.arms] == ["insert-top"]
    assert mask.other == "mask-random"
    figure = comparison_figure(compared)
    assert figure is not None and len(figure.axes) == 4
    names = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert names == [*(one.arm for one in mask.arms), "mask-random"]
    # The deepest curve belongs to the first name, and ends lowest.
    lines = {line.get_color(): line for line in figure.axes[0].get_lines()}
    drawn = [lines[colour].get_ydata()[-1] for colour in shades(LIGHT, "mask", 4)]
    assert drawn == sorted(drawn)
    for theme in (LIGHT, DARK):
        assert len(set(shades(theme, "insert", 24))) == 24


def test_insertion_is_strongest_where_it_raises_most_and_curves_share_their_seeds(
    tmp_path: Path,
) -> None:
    arms = {
        "weak": arm("insert", "c", by="loss"),
        "strong": arm("insert", "c", by="ekfac"),
        "c": arm("insert", control_of="weak"),
    }
    runs = {
        s: {"baseline": run(0.4), "weak": run(0.41), "strong": run(0.5), "c": run(0.4)}
        for s in range(2)
    }
    # Seed 1 is at another level and has one arm only: it would pull that arm's mean away.
    runs[1] = {"baseline": run(0.9), "weak": run(0.9)}
    compared = compare_study(write_made_study(tmp_path, arms, runs))
    (family,) = families(compared)
    assert [one.arm for one in family.arms] == ["strong", "weak"]
    figure = comparison_figure(compared)
    assert figure is not None
    curves = [line.get_ydata() for line in figure.axes[0].get_lines()]
    ends = [float(curve[-1]) for curve in curves if len(curve) > 2]
    assert len(ends) == 4 and max(ends) == pytest.approx(0.5)


def test_heads_are_drawn_where_they_are(folder: Path) -> None:
    compared = compare_study(folder)
    figure = head_maps(compared.heads, metric="induction")
    shown = figure.axes[0].get_images()[0].get_array()
    effects = compared.heads[0].effects
    for layer in range(2):
        for head in range(2):
            effect = effects[f"L{layer}H{head}"].effect
            assert effect is not None and shown[layer, head] == pytest.approx(effect.mean)
    frames = [(patch.get_x(), patch.get_y()) for patch in figure.axes[0].patches]
    assert set(frames) == {(-0.5, -0.5)}
    with pytest.raises(ValueError, match="no arm has heads"):
        head_maps([], metric="induction")
    with pytest.raises(ValueError, match="no number of the whole model"):
        coupling_figure([], compared.study.declared, metric="induction")


@pytest.mark.parametrize("n_arms", [1, 12])
def test_the_terminal_is_never_wider_than_110_columns(tmp_path: Path, n_arms: int) -> None:
    arms = {}
    for i in range(n_arms):
        name = f"insert-the-same-samples-dispersed-over-the-whole-window-{i:02d}"
        arms[name] = arm("insert", f"{name}-random", by="ekfac")
        arms[f"{name}-random"] = arm("insert", control_of=name)
    write_made_study(tmp_path, arms, runs_of(arms, 2))
    compared = write_comparison(tmp_path)
    lines = compared.lines()
    assert max(map(len, lines)) <= 110
    text = "\n".join(lines)
    assert all(name in text for name in arms)
    assert (tmp_path / "figures" / "comparison.png").is_file()


def test_unfinished_studies_are_written_too(tmp_path: Path) -> None:
    write_made_study(tmp_path, ARMS, {0: {"baseline": run(0.4)}, 1: {}})
    compared = write_comparison(tmp_path)
    raw = json.loads((tmp_path / "comparison.json").read_text())
    assert raw["arms"][0]["quantities"]["final"] == {
        "seeds": [],
        "p": None,
        "n": 0,
        "mean": None,
        "low": None,
        "high": None,
        "differences": [],
    }
    assert not (tmp_path / "figures").exists()
    assert any("nothing can be said yet" in line for line in compared.lines())
    assert build_report(tmp_path).is_file()


def test_what_a_recipe_says_is_text_on_the_page_and_in_the_table(tmp_path: Path) -> None:
    evil = "mask|<script>alert(1)</script>"
    arms = {
        evil: {**arm("mask", "c"), "phrase": "masking <img src=x onerror=alert(1)>"},
        "c": arm("mask", control_of=evil),
    }
    write_made_study(tmp_path, arms, runs_of(arms, 2))
    page = build_report(tmp_path).read_text("utf-8")
    assert "<script" not in page and "<img src=x" not in page.lower()
    assert "&lt;script&gt;" in page
    rows = [
        line
        for line in (tmp_path / "comparison.md").read_text("utf-8").splitlines()
        if line.startswith("|")
    ]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert not any(re.search(r"(?<!\\)<script", row) for row in rows)
