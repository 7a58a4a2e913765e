"""Per-head changes between two runs: by hand, from arrays and from run folders."""

from __future__ import annotations

import doctest
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mda_lightning.analysis import score_deltas as module
from mda_lightning.analysis.run_curves import HeadCurves
from mda_lightning.analysis.score_deltas import head_deltas, head_deltas_of, run_deltas


def curves(values: list[list[float]], steps: list[int], units: tuple[str, ...]) -> HeadCurves:
    table = np.array(values)
    return HeadCurves(units, np.array(steps), table, np.full(table.shape, 0.03))


FIRST = curves([[0.1, 0.1, 0.1], [0.5, 0.2, 0.1], [0.6, 0.2, 0.1]], [0, 10, 20], ("a", "b", "c"))
SECOND = curves([[0.1, 0.5, 0.2], [0.0, 0.4, 0.3]], [10, 30], ("b", "a", "d"))


def test_example() -> None:
    assert doctest.testmod(module).failed == 0 < doctest.testmod(module).attempted


def test_runs_meet_at_common_steps_and_heads() -> None:
    deltas = head_deltas(FIRST, SECOND)
    assert deltas.units == ("a", "b") and deltas.steps == (10,)
    assert deltas.changes == pytest.approx([0.0, -0.1])
    assert deltas.errors == pytest.approx([math.hypot(0.03, 0.03)] * 2)
    assert (deltas.fell, deltas.rose, deltas.handed_off) == (("b",), (), False)
    assert deltas.compensation == 0.0


def test_several_steps_are_averaged() -> None:
    deltas = head_deltas(FIRST, FIRST, steps=[20, 0])
    assert deltas.first == pytest.approx([0.35, 0.15, 0.1])
    assert deltas.steps == (0, 20)
    assert math.isnan(deltas.compensation)  # nothing moved


def test_a_handover_is_told_from_a_common_move() -> None:
    handed = head_deltas_of(["a", "b", "c"], [0.5, 0.1, 0.1], [0.24, 0.31, 0.13])
    assert handed.handed_off and handed.fell == ("a",) and handed.rose == ("b",)
    assert handed.compensation == pytest.approx((0.21 + 0.03) / 0.26)
    common = head_deltas_of(["a", "b", "c"], [0.5, 0.4, 0.1], [0.3, 0.25, 0.1])
    assert not common.handed_off and common.compensation == 0.0
    assert common.fell == ("a", "b")
    table = handed.table()
    assert table["unit"].tolist() == ["a", "b", "c"]
    assert table["change"].tolist() == pytest.approx([-0.26, 0.21, 0.03])


def test_heads_without_a_value_are_neither_fallen_nor_risen() -> None:
    deltas = head_deltas_of(["a", "b"], [math.nan, 0.2], [0.1, 0.1])
    assert (deltas.fell, deltas.rose) == (("b",), ())
    assert deltas.compensation == 0.0
    assert deltas.table()["unit"].tolist() == ["b", "a"]


def write(folder: Path, values: dict[tuple[int, int], float]) -> Path:
    folder.mkdir()
    rows = [
        {"step": step, "layer": 0, "head": head, "metric": "induction", "value": value, "se": 0.01}
        for (step, head), value in values.items()
    ]
    rows.append({"step": 5, "layer": None, "head": None, "metric": "loss", "value": 3.0, "se": 0.1})
    pd.DataFrame(rows).to_parquet(folder / "unit_metrics.parquet")
    return folder


def test_run_folders(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {(5, 0): 0.1, (5, 1): 0.4})
    second = write(tmp_path / "b", {(5, 0): 0.3, (5, 1): 0.2})
    deltas = run_deltas(first, second)
    assert deltas.units == ("L0H0", "L0H1")
    assert deltas.changes == pytest.approx([0.2, -0.2])
    assert deltas.handed_off and deltas.compensation == pytest.approx(1.0)
    with pytest.raises(FileNotFoundError, match="unit_metrics"):
        run_deltas(first, tmp_path / "absent")
    with pytest.raises(ValueError, match="previous_token"):
        run_deltas(first, second, metric="previous_token")


def test_runs_that_do_not_meet_are_refused() -> None:
    later = curves([[0.1]], [99], ("a",))
    with pytest.raises(ValueError, match="0 evaluation steps"):
        head_deltas(FIRST, later)
    with pytest.raises(ValueError, match=r"step 20 is not .* common ones are 10"):
        head_deltas(FIRST, SECOND, steps=[20])
    with pytest.raises(ValueError, match="2 heads, 1 and 2"):
        head_deltas_of(["a", "b"], [0.1], [0.1, 0.2])
