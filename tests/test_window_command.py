"""``mda-lightning window``: tables of every form against the same curves fed by hand."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lightning.pytorch.loggers import CSVLogger

from mda_lightning.callbacks import metric_table
from mda_lightning.callbacks.metric_table import MetricTable
from mda_lightning.cli import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, main
from mda_lightning.mechanisms import MECHANISMS, mechanism
from mda_lightning.recipes import monitor_files, window_table
from mda_lightning.recipes.monitor_files import MeasuredCheckpoint, write_table
from mda_lightning.recipes.window import find_windows
from mda_lightning.recipes.window_rule import read_setting
from mda_lightning.recipes.window_table import chance_values, read_table
from mda_lightning.window import MechanismWindow, WindowRule

STEPS = np.arange(0, 3000, 10)
LAYERS, HEADS = 2, 3
UNITS = [f"L{layer}H{head}" for layer in range(LAYERS) for head in range(HEADS)]
IDS = tuple(range(5, 300, 2))
CHANCE = mechanism("induction", token_ids=IDS).chance


def logistic(middle: float, width: float, height: float) -> np.ndarray:
    return height / (1.0 + np.exp(-(STEPS - middle) / width))


def heads(seed: int = 0) -> np.ndarray:
    """[S, L, H]: L1H2 rises to 0.6 at 1500, L0H1 to 0.3 at 1000; the others stay."""
    noise = np.random.default_rng(seed).normal(0.0, 0.004, (len(STEPS), LAYERS, HEADS))
    values = CHANCE + noise
    values[:, 1, 2] += logistic(1500.0, 60.0, 0.6)
    values[:, 0, 1] += logistic(1000.0, 50.0, 0.3)
    return values.astype(np.float32)


def by_hand(values: np.ndarray, **options: Any) -> MechanismWindow[str]:
    """The follower of the package, fed with arrays: what a table must give as well."""
    options = {"chance": CHANCE, "targets": 1, "rule": WindowRule()} | options
    follower = MechanismWindow(UNITS, **options)
    for step, row in zip(STEPS, values, strict=True):
        follower.update(int(step), row)
    return follower


def summary(follower: MechanismWindow[str]) -> list[tuple[str, int, int | None, str | None]]:
    windows = follower.detector.windows()
    return [(UNITS[w.unit_index], w.start, w.end, w.end_reason) for w in windows]


def found_in(report: dict[str, Any]) -> list[tuple[str, int, int | None, str | None]]:
    return [(w["unit"], w["start"], w["end"], w["end_reason"]) for w in report["windows"]]


def unit_metrics(path: Path, values: np.ndarray | None = None, **provenance: Any) -> Path:
    """A table as ``UnitMonitor`` writes it, with a number of the whole model beside."""
    table = MetricTable()
    values = heads() if values is None else values
    for step, grid in zip(STEPS, values, strict=True):
        table.append(int(step), "induction", grid, np.zeros_like(grid))
        if step % 100 == 0:
            gain = np.float32(logistic(1600.0, 60.0, 0.9)[int(step) // 10])
            table.append(int(step), "icl/gain", np.asarray(gain), np.zeros((), np.float32))
    settings = mechanism("induction", token_ids=IDS).settings()
    said = {"mechanisms": {"induction": settings}, "measures": {"icl": {}}} | provenance
    return table.write(path, provenance=said)


def long_csv(path: Path, values: np.ndarray) -> Path:
    rows = [
        f"{step},{layer},{head},induction,{value!r},0.0"
        for step, grid in zip(STEPS, values.tolist(), strict=True)
        for layer, row in enumerate(grid)
        for head, value in enumerate(row)
    ]
    path.write_text("step,layer,head,metric,value,se\n" + "\n".join(rows) + "\n")
    return path


def wide(values: np.ndarray, step: str = "step") -> pd.DataFrame:
    flat = values.reshape(len(STEPS), -1).astype(np.float64)
    frame = pd.DataFrame(flat, columns=[f"induction/{unit}" for unit in UNITS])
    return frame.assign(**{step: STEPS, "epoch": 0})


def run(*arguments: str | Path) -> int:
    return main(["window", *map(str, arguments)])


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "windows.json").read_text("utf-8"))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert run(*arguments) == EXIT_ERROR
    return capsys.readouterr().err


# -- what is found ----------------------------------------------------------------------------


def test_a_unit_monitors_table_gives_the_windows_of_its_curves(tmp_path: Path, capsys) -> None:
    path = unit_metrics(tmp_path / "unit_metrics.parquet")
    assert run(path) == EXIT_OK
    written = content(tmp_path / "windows")
    assert written["kind"] == "critical_windows" and written["schema_version"] == 1
    assert written["provenance"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert written["provenance"]["table"] == str(path)
    assert list(written["metrics"]) == ["induction"]  # icl/gain has no chance value
    report = written["metrics"]["induction"]
    assert report["floor"] == CHANCE and report["follows"] == "value"
    assert report["n_evaluations"] == len(STEPS)
    assert found_in(report) == summary(by_hand(heads()))
    # L0H1 had come to rest before L1H2 began: the mechanism's window is its own.
    assert report["target"] == "L0H1" and report["status"] == "closed"
    # Against numpy: the first of five values in a row above the threshold, and the true midpoint.
    curve = heads()[:, 0, 1]
    above = curve > report["targets"][0]["threshold"]
    starts = [i for i in range(len(STEPS) - 4) if above[i : i + 5].all()]
    assert report["targets"][0]["start"] == STEPS[starts[0]]
    low, high = report["targets"][0]["midpoint_interval"]
    assert low <= report["targets"][0]["refined_midpoint"] <= high
    assert abs(report["targets"][0]["refined_midpoint"] - 1000) <= 10
    printed = capsys.readouterr()
    assert "(nominal 95%)" in printed.out
    assert "L0H1" in printed.out and report["message"] in printed.out and printed.err == ""
    assert (tmp_path / "windows" / report["figure"]).read_bytes()[:4] == b"\x89PNG"


def monitor_tables(folder: Path, values: np.ndarray) -> Path:
    measured = [
        MeasuredCheckpoint(
            f"step{step}", int(step), "name", int(step), f"{step}",
            {"induction": (grid, np.zeros_like(grid))}, {},
        )
        for step, grid in zip(STEPS, values, strict=True)
    ]  # fmt: skip
    write_table(folder, measured, provenance={"chance": {"induction": CHANCE}})
    return folder


def csv_logger(folder: Path, values: np.ndarray) -> Path:
    """Rows with empty cells, and steps in several rows, written by Lightning itself."""
    logger = CSVLogger(folder, name="", version="")
    for i, (step, row) in enumerate(zip(STEPS, values.reshape(len(STEPS), -1), strict=True)):
        for first in (0, 3):
            part = {
                f"induction/{u}": float(v) for u, v in zip(UNITS[first:], row[first:], strict=True)
            }
            logger.log_metrics(dict(list(part.items())[:3]), step=int(step))
            logger.log_metrics({"train/loss": 5.0 - i * 0.01}, step=int(step) + first)
    logger.save()
    return folder / "metrics.csv"


def wandb_export(path: Path, values: np.ndarray) -> Path:
    frame = wide(values, "trainer/global_step").assign(
        _step=range(len(STEPS)), _runtime=1.5, _timestamp=1.7e9, note="text"
    )
    frame.to_csv(path, index=False)
    return path


def wandb_chart(path: Path, runs: dict[str, np.ndarray], axis: str = "trainer/global_step") -> Path:
    """What W&B gives for a chart: per run and metric its values and their extremes."""
    columns: dict[str, Any] = {axis: STEPS}
    for name, values in runs.items():
        # The extremes are of the points that one of the chart stands for: other numbers.
        for end, shift in (("", 0.0), ("__MIN", -0.9), ("__MAX", 0.9)):
            columns[f"{name} - _step{end}"] = np.arange(len(STEPS)) * 3
            columns[f"{name} - trainer/global_step{end}"] = STEPS
            for unit, curve in zip(UNITS, values.reshape(len(STEPS), -1).T, strict=True):
                columns[f"{name} - induction/{unit}{end}"] = curve.astype(np.float64) + shift
    pd.DataFrame(columns).to_csv(path, index=False, quoting=csv.QUOTE_ALL)
    return path


@pytest.mark.parametrize("axis", ["trainer/global_step", "Step", "tokens"])
@pytest.mark.parametrize("name", ["run1", "a - b", "Group: lr, 0.01"])
def test_a_chart_of_wandb_is_read_as_it_was_logged(tmp_path: Path, name: str, axis: str) -> None:
    values = heads()
    path = wandb_chart(tmp_path / "chart.csv", {name: values}, axis)
    wanted = axis if axis == "tokens" else None
    assert read_table(path, step_column=wanted).metrics == ("induction",)
    warned: list[str] = []
    found = find_windows(
        path, metric="induction", floor=CHANCE, step_column=wanted, warn=warned.append
    )
    assert found_in(found["metrics"]["induction"]) == summary(by_hand(values))
    assert found["provenance"]["step_column"] == (wanted or "trainer/global_step")
    assert warned == []


def test_several_runs_in_a_chart_of_wandb_keep_their_names(tmp_path: Path, capsys) -> None:
    runs = {"run1": heads(1), "run2": heads(2)[::-1]}
    path = wandb_chart(tmp_path / "chart.csv", runs)
    message = refusal(capsys, path, "--metric", "induction", "--floor", "0.05")
    assert "run1 - induction" in message and "run2 - induction" in message
    assert "__MIN" not in message
    for name, values in runs.items():
        metric = f"{name} - induction"
        report = find_windows(path, metric=metric, floor=CHANCE, warn=lambda _: None)
        assert found_in(report["metrics"][metric]) == summary(by_hand(values))


def test_names_that_only_look_like_a_chart_of_wandb_stay(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("step,a - b,c,d__MIN\n0,1,2,3\n1,1,2,3\n")
    assert read_table(path).metrics == ("a - b", "c", "d__MIN")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_separated_by_semicolons_or_tabs(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "t.csv"
    wide(heads()).to_csv(path, sep=separator, index=False, encoding="utf-8-sig")
    report = find_windows(path, metric="induction", floor=CHANCE)["metrics"]["induction"]
    assert found_in(report) == summary(by_hand(heads()))
    path.write_text('step,"a;b;c"\n0,1\n')
    assert read_table(path).metrics == ("a;b;c",)


@pytest.mark.parametrize(
    "form", ["monitor", "monitor csv", "long csv", "csv logger", "wandb", "wide parquet", "index"]
)
def test_every_form_of_a_table_gives_the_same_windows(tmp_path: Path, form: str) -> None:
    values, options = heads(), {"metric": "induction", "floor": CHANCE}
    if form.startswith("monitor"):
        monitor_tables(tmp_path, values)
        path = tmp_path / "metrics.csv" if form == "monitor csv" else tmp_path
        options = options if form == "monitor csv" else {}
    elif form == "long csv":
        path = long_csv(tmp_path / "long.csv", values)
    elif form == "csv logger":
        path = csv_logger(tmp_path, values)
    elif form == "wandb":
        path = wandb_export(tmp_path / "export.csv", values)
    else:
        path = tmp_path / "wide.parquet"
        frame = wide(values)
        (frame.set_index("step") if form == "index" else frame).to_parquet(path)
    warned: list[str] = []
    report = find_windows(path, warn=warned.append, **options)["metrics"]["induction"]
    assert found_in(report) == summary(by_hand(values))
    assert report["floor"] == CHANCE
    assert warned == []


def test_metrics_measured_at_different_steps_are_followed_at_their_own(tmp_path: Path) -> None:
    path = unit_metrics(tmp_path / "unit_metrics.parquet")
    report = find_windows(path, metric="icl/gain", floor=0.0)["metrics"]["icl/gain"]
    assert report["n_evaluations"] == len(STEPS[::10])
    assert report["target"] == "icl/gain" and report["targets"][0]["start"] % 100 == 0
    assert [w["unit"] for w in report["windows"]] == ["icl/gain"]


def test_targets_by_name_and_by_number(tmp_path: Path, capsys) -> None:
    path = unit_metrics(tmp_path / "unit_metrics.parquet")
    assert run(path, "--unit", "L0H1", "--output", tmp_path / "named") == EXIT_OK
    named = content(tmp_path / "named")["metrics"]["induction"]
    assert [one["unit"] for one in named["targets"]] == ["L0H1"]
    assert found_in(named) == summary(by_hand(heads(), targets=["L0H1"]))
    assert run(path, "--top-k", "2", "--output", tmp_path / "two") == EXIT_OK
    two = content(tmp_path / "two")["metrics"]["induction"]
    by_number = by_hand(heads(), targets=2)
    assert [one["unit"] for one in two["targets"]] == [unit for unit, _ in by_number.targets]
    capsys.readouterr()
    message = refusal(capsys, path, "--unit", "L1H2,L7H7")
    assert "'L7H7'" in message and "L0H0, L0H1, L0H2" in message
    with pytest.raises(SystemExit) as exit_:
        run(path, "--unit", "L1H2", "--top-k", "2")
    assert exit_.value.code == EXIT_USAGE


def test_thresholds_reach_the_detector(tmp_path: Path, capsys) -> None:
    path = unit_metrics(tmp_path / "unit_metrics.parquet")
    rules = ["--rule", "level=none", "--rule", "minimum_up=0.2", "--rule", "slope_span=8,30"]
    assert run(path, *rules) == EXIT_OK
    report = content(tmp_path / "windows")["metrics"]["induction"]
    rule = WindowRule(level=None, minimum_up=0.2, slope_span=(8, 30))
    assert report["rule"] == rule.settings()
    assert found_in(report) == summary(by_hand(heads(), rule=rule))
    assert report["targets"][0]["end_reason"] == "plateau"


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("minimal_up=0.2", "'minimal_up' is no threshold; there are: minimum_up, n_sigma"),
        ("patience=2.5", "must be a whole number"),
        ("minimum_up=high", "must be a finite number"),
        ("level=inf", "level=inf: it must be a finite number; level=none closes on a plateau"),
        ("n_sigma=-inf", "n_sigma=-inf: it must be a finite number"),
        ("minimum_up=1e999", "must be a finite number"),
        ("rearm=nan", "rearm=nan: it must be a finite number"),
        ("n_early=inf", "must be a whole number"),
        ("slope_span=5,2.5", "two whole numbers"),
        ("slope_span=10", "two whole numbers"),
        ("level", "write KEY=VALUE"),
        ("rearm=none", "must be a finite number"),
    ],
)
def test_a_setting_that_is_none_is_wrong_usage(tmp_path: Path, capsys, setting, told) -> None:
    path = unit_metrics(tmp_path / "unit_metrics.parquet")
    with pytest.raises(SystemExit) as exit_:
        run(path, "--rule", setting)
    assert exit_.value.code == EXIT_USAGE
    assert told in capsys.readouterr().err
    assert not (tmp_path / "windows").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("level", np.inf), ("n_sigma", np.inf), ("minimum_up", np.nan), ("patience", 2.5)],
)
def test_a_rule_in_python_is_checked_before_anything_is_followed(
    tmp_path: Path, name: str, value: float
) -> None:
    path = unit_metrics(tmp_path / "unit_metrics.parquet")
    watched: list[str] = []
    for falls in (False, True):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            find_windows(
                path,
                metric="icl/gain",
                floor=0.9 if falls else 0.0,
                falls=falls,
                rule={name: value},
                watch=lambda metric, done, total: watched.append(metric),
            )
    assert watched == [] and names_in(tmp_path) == ["unit_metrics.parquet"]


def test_settings_are_read_as_the_type_of_their_default() -> None:
    assert read_setting("patience=3") == ("patience", 3)
    assert read_setting(" level = NONE ") == ("level", None)
    assert read_setting("level=0.3") == ("level", 0.3)
    assert read_setting("slope_span=5,20") == ("slope_span", (5, 20))


# -- floors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize(
    "ids", [tuple(range(300, 700)), tuple(range(7, 90)), tuple(range(0, 1200, 3)), None]
)
def test_the_chance_value_follows_from_the_settings_in_the_table(
    tmp_path: Path, name: str, ids: tuple[int, ...] | None
) -> None:
    one = mechanism(name, token_ids=ids, n_sequences=20, bos=0)
    table = MetricTable()
    table.append(0, name, np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32))
    path = table.write(tmp_path / "t.parquet", provenance={"mechanisms": {name: one.settings()}})
    assert chance_values(read_table(path)) == {name: one.chance}


def test_a_mechanism_that_is_not_ours_needs_its_floor(tmp_path: Path, capsys) -> None:
    path = unit_metrics(tmp_path / "unit_metrics.parquet", mechanisms={"induction": {"new": 1}})
    message = refusal(capsys, path)
    assert "--floor" in message and "induction" in message
    assert "--floor" in refusal(capsys, path, "--metric", "induction")
    assert run(path, "--metric", "induction", "--floor", "0.05", "--quiet") == EXIT_OK
    assert capsys.readouterr().out == ""


def test_a_floor_is_of_one_metric(tmp_path: Path, capsys) -> None:
    path = unit_metrics(tmp_path / "unit_metrics.parquet")
    assert "name it with --metric" in refusal(capsys, path, "--floor", "0.1")
    assert "not finite" in refusal(capsys, path, "--metric", "induction", "--floor", "nan")
    monitor_tables(tmp_path / "both", heads())
    message = refusal(capsys, tmp_path / "both" / "metrics.csv", "--metric", "induction")
    assert str(tmp_path / "both" / "metrics.parquet") in message


# -- metrics that are no score between 0 and 1 ------------------------------------------------


def loss_csv(path: Path) -> tuple[Path, np.ndarray]:
    noise = np.random.default_rng(1).normal(0.0, 0.02, len(STEPS))
    loss = 6.0 - logistic(1200.0, 80.0, 4.0) + noise
    pd.DataFrame({"step": STEPS, "val/loss": loss}).to_csv(path, index=False)
    return path, loss


def test_a_metric_that_falls_is_followed_by_how_far_it_fell(tmp_path: Path, capsys) -> None:
    path, loss = loss_csv(tmp_path / "metrics.csv")
    options = [path, "--metric", "val/loss", "--falls", "--floor", "6"]
    message = refusal(capsys, *options)
    assert "--rule minimum_up=" in message and not (tmp_path / "windows").exists()
    assert run(*options, "--rule", "minimum_up=0.5") == EXIT_OK
    report = content(tmp_path / "windows")["metrics"]["val/loss"]
    rule = WindowRule(minimum_up=0.5, minimum_rise=0.5, level=None)
    follower = MechanismWindow(["val/loss"], chance=0.0, targets=1, rule=rule)
    for step, value in zip(STEPS, 6.0 - loss, strict=True):
        follower.update(int(step), [value])
    window = follower.targets[0][1]
    assert (window.start, window.end) == (report["window"]["start"], report["window"]["end"])
    assert report["rule"]["level"] is None and report["follows"] == "floor - value"
    first = next(i for i in range(len(STEPS)) if (loss[i : i + 5] < 5.5).all())
    assert report["window"]["start"] == STEPS[first]
    assert abs(report["window"]["refined_midpoint"] - 1200) <= 20
    assert "below its floor 6" in capsys.readouterr().err
    assert "a number above 0" in refusal(capsys, *options, "--rule", "minimum_up=-4")


def test_a_floor_below_zero_moves_nothing_but_the_zero(tmp_path: Path) -> None:
    _, loss = loss_csv(tmp_path / "unused.csv")
    rule = {"minimum_up": 0.5}
    found = {}
    for name, values, floor in (("logprob", -loss, -6.0), ("gain", 6.0 - loss, 0.0)):
        path = tmp_path / f"{name}.csv"
        pd.DataFrame({"step": STEPS, name: values}).to_csv(path, index=False)
        own = rule if floor < 0.0 else rule | {"level": None, "minimum_rise": 0.5}
        report = find_windows(path, metric=name, floor=floor, rule=own, warn=lambda _: None)
        found[name] = report["metrics"][name]
    assert found["logprob"]["follows"] == "value - floor" and found["gain"]["follows"] == "value"
    for edge in ("start", "midpoint", "end", "end_reason", "refined_start", "refined_end"):
        assert found["logprob"]["window"][edge] == found["gain"]["window"][edge]


def test_a_fall_of_a_share_has_the_thresholds_of_a_score(tmp_path: Path) -> None:
    error_rate = 0.9 - logistic(1500.0, 60.0, 0.6)
    path = tmp_path / "metrics.csv"
    pd.DataFrame({"step": STEPS, "error": error_rate}).to_csv(path, index=False)
    report = find_windows(path, metric="error", floor=0.9, falls=True, warn=lambda _: None)
    assert report["metrics"]["error"]["status"] == "closed"


def test_thresholds_that_contradict_each_other_or_the_floor(tmp_path: Path, capsys) -> None:
    path = unit_metrics(tmp_path / "unit_metrics.parquet")
    assert "level=0.1 is not above" in refusal(
        capsys, path, "--rule", "level=0.1", "--rule", "minimum_up=0.3"
    )
    assert "rearm=1.5" in refusal(capsys, path, "--rule", "rearm=1.5")
    high = ["--metric", "induction", "--floor", "0.5"]
    assert "level=none" in refusal(capsys, path, *high)
    assert run(path, *high, "--rule", "level=none", "--quiet") == EXIT_OK
    assert "above 0" in refusal(capsys, path, "--rule", "minimum_up=0", "--rule", "level=0.4")


def test_values_beyond_one_are_remarked_on(tmp_path: Path, capsys) -> None:
    path = tmp_path / "metrics.csv"
    pd.DataFrame({"step": STEPS, "gain": logistic(1500.0, 60.0, 30.0)}).to_csv(path, index=False)
    assert run(path, "--floor", "0") == EXIT_OK
    assert "values reach 30, and the thresholds" in capsys.readouterr().err
    given = ["--rule", "minimum_up=2", "--rule", "level=15"]
    assert run(path, "--floor", "0", *given) == EXIT_OK
    assert capsys.readouterr().err == ""


# -- tables that are not what they should be --------------------------------------------------


def test_a_run_and_its_resumption_in_one_table(tmp_path: Path, capsys) -> None:
    """The later row of a step counts, wherever it stands."""
    values = heads()
    whole = pd.read_csv(long_csv(tmp_path / "whole.csv", values))
    # Abandoned at 2000, taken up at 1200: what the first had from there on was otherwise.
    former = whole[whole["step"] <= 2000].copy()
    former.loc[former["step"] >= 1200, "value"] = CHANCE
    both = pd.concat([former, whole[whole["step"] >= 1200]])
    both.to_csv(tmp_path / "both.csv", index=False)
    options = ["--metric", "induction", "--floor", str(CHANCE)]
    assert run(tmp_path / "both.csv", *options) == EXIT_OK
    report = content(tmp_path / "windows")["metrics"]["induction"]
    assert found_in(report) == summary(by_hand(values))
    n = len(range(1200, 2001, 10))
    assert report["notes"] == [f"{n} steps occurred in more than one row: the later one counts"]
    assert f"{n} steps occurred" in capsys.readouterr().err


def test_rows_out_of_order_are_sorted(tmp_path: Path) -> None:
    shuffled = wide(heads()).sample(frac=1.0, random_state=0)
    shuffled.to_csv(tmp_path / "metrics.csv", index=False)
    found = find_windows(tmp_path, metric="induction", floor=CHANCE, warn=lambda _: None)
    report = found["metrics"]["induction"]
    assert found_in(report) == summary(by_hand(heads()))
    assert report["notes"] == ["the rows were not in the order of their steps: sorted"]


def test_values_that_are_missing_or_not_finite_change_nothing(tmp_path: Path) -> None:
    values = heads()
    values[40:44, 1, 2] = np.nan
    values[100, 0, 0] = np.inf
    path = unit_metrics(tmp_path / "unit_metrics.parquet", values)
    report = find_windows(path, warn=lambda _: None)["metrics"]["induction"]
    assert found_in(report) == summary(by_hand(values))
    assert len(report["notes"]) == 1
    assert report["notes"][0].startswith("5 values missing or not finite (L0H0, L1H2)")


@pytest.mark.parametrize("written", ["inf", "-inf", "Infinity", "-Infinity", "1e999"])
def test_infinite_values_count_as_missing(tmp_path: Path, written: str) -> None:
    frame = wide(heads()).astype(object)
    frame.loc[148:151, "induction/L1H2"] = written  # in the rise, where it would open or lapse
    frame.to_csv(tmp_path / "metrics.csv", index=False)
    found = find_windows(tmp_path, metric="induction", floor=CHANCE, warn=lambda _: None)
    report = found["metrics"]["induction"]
    assert [note[:41] for note in report["notes"]] == ["4 values missing or not finite (L1H2): su"]
    changed = heads()
    changed[148:152, 1, 2] = np.nan
    assert found_in(report) == summary(by_hand(changed))
    json.loads((tmp_path / "windows" / "windows.json").read_text(), parse_constant=pytest.fail)


def test_a_nan_that_was_written_is_told_from_an_empty_cell(tmp_path: Path) -> None:
    """Empty cells of a wide table say that something else was logged in that row."""
    frame = wide(heads()).astype(object)
    frame.loc[50, "induction/L1H2"] = "NaN"
    empty = pd.DataFrame({"step": STEPS, "lr": 0.1})
    pd.concat([frame, empty]).sort_values("step").to_csv(tmp_path / "metrics.csv", index=False)
    found = find_windows(tmp_path, metric="induction", floor=CHANCE, warn=lambda _: None)
    assert found["metrics"]["induction"]["notes"] == [
        "1 value missing or not finite (L1H2): such an evaluation leaves its unit as it was"
    ]
    changed = heads()
    changed[50, 1, 2] = np.nan
    assert found_in(found["metrics"]["induction"]) == summary(by_hand(changed))


def test_gaps_are_said_and_a_monitors_own_rates_are_not(tmp_path: Path) -> None:
    frame = wide(heads())
    kept = (frame["step"] <= 600) | (frame["step"] >= 900)
    frame[kept].to_csv(tmp_path / "metrics.csv", index=False)
    found = find_windows(tmp_path, metric="induction", floor=CHANCE, warn=lambda _: None)
    (note,) = found["metrics"]["induction"]["notes"]
    assert note.startswith("1 gap between evaluations, the widest from step 600 to 900")
    assert found["metrics"]["induction"]["target"] == "L0H1"
    table = MetricTable()
    for step in [*range(0, 500, 50), *range(500, 600, 10), 640, *range(650, 700, 10)]:
        table.append(step, "induction", np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32))
    path = table.write(tmp_path / "rates.parquet", provenance={"quiet_every_n_steps": 50})
    assert read_table(path).curves("induction").notes == ()
    path = table.write(tmp_path / "rates.parquet", provenance={})
    assert "step 590 to 640" in read_table(path).curves("induction").notes[0]
    spaced = pd.DataFrame({"step": [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000], "a": 0.0})
    spaced.to_csv(tmp_path / "log.csv", index=False)
    assert read_table(tmp_path / "log.csv").curves("a").notes == ()


@pytest.mark.parametrize("n", [1, 4])
def test_too_few_evaluations(tmp_path: Path, capsys, n: int) -> None:
    wide(heads())[:n].assign(**{"induction/L0H0": 0.9}).to_csv(tmp_path / "t.csv", index=False)
    options = ["--metric", "induction", "--floor", "0.05"]
    assert run(tmp_path / "t.csv", *options) == EXIT_OK
    report = content(tmp_path / "windows")["metrics"]["induction"]
    assert report["status"] == "none" and report["target"] is None
    assert f"too few evaluations, {n}:" in capsys.readouterr().err
    assert (tmp_path / "windows" / "windows-induction.png").is_file()


def test_why_there_is_no_window_although_a_value_is_high(tmp_path: Path, capsys) -> None:
    values = np.full(len(STEPS), 0.05)
    values[30:34] = 0.5
    pd.DataFrame({"step": STEPS, "a": values}).to_csv(tmp_path / "t.csv", index=False)
    assert run(tmp_path / "t.csv", "--floor", "0.05") == EXIT_OK
    assert "not for 5 evaluations in a row" in capsys.readouterr().err


def test_nothing_finite_at_all(tmp_path: Path, capsys) -> None:
    (tmp_path / "t.csv").write_text("step,a\n0,nan\n10,nan\n20,inf\n")
    assert run(tmp_path / "t.csv", "--floor", "0.05") == EXIT_OK
    assert "no finite score was measured" in capsys.readouterr().out
    assert content(tmp_path / "windows")["metrics"]["a"]["highest"] is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("step,induction\n", "holds no rows"),
        ("step,epoch\n1,0\n", "no column of a metric"),
        ("step,a\n0,0.1\n10,high\n", "'a' is not numeric: it holds 'high' in row 2"),
        ("step,a\n0,0.1\nten,0.2\n", "step column 'step' is not numeric: it holds 'ten'"),
        ("step,a\n0,0.1\n1.5,0.2\n", "1.5 in 'step' is not a whole number"),
        ("when,a\n0,0.1\n", "no column of steps"),
        ("step,a\n0,\n1,\n", "holds no value of 'a'"),
        ("step,a\n0,1\n0,1,2,3\n", "neither a Parquet nor a CSV table"),
        ("step,layer,head,metric,value\n0,x,0,a,1\n", "'layer' is not numeric"),
    ],
)
def test_what_is_no_table_of_metrics_is_named(tmp_path: Path, capsys, text: str, told: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    message = refusal(capsys, tmp_path / "t.csv", "--metric", "a", "--floor", "0")
    assert told in message and "t.csv" in message


def test_a_metric_that_is_not_there_is_answered_by_those_that_are(tmp_path: Path, capsys) -> None:
    path = unit_metrics(tmp_path / "unit_metrics.parquet")
    for more in ([], ["--floor", "0.1"]):
        message = refusal(capsys, path, "--metric", "inductoin", *more)
        assert "'inductoin'" in message and "induction, icl/gain" in message
    assert "'value'" in refusal(capsys, path, "--metric", "value", "--floor", "0")


def test_a_step_column_by_name(tmp_path: Path, capsys) -> None:
    path = tmp_path / "t.csv"
    wide(heads(), "updates").assign(step=1).to_csv(path, index=False)
    options = ["--metric", "induction", "--floor", str(CHANCE), "--step-column", "updates"]
    assert run(path, *options) == EXIT_OK
    report = content(tmp_path / "windows")["metrics"]["induction"]
    assert found_in(report) == summary(by_hand(heads()))
    assert content(tmp_path / "windows")["provenance"]["step_column"] == "updates"
    assert "no column 'when'; there are: induction/L0H0" in refusal(
        capsys, path, "--step-column", "when"
    )


def test_rows_without_a_step_are_left_out_and_counted(tmp_path: Path) -> None:
    frame = wandb_export(tmp_path / "t.csv", heads())
    rows = pd.read_csv(frame)
    rows["trainer/global_step"] = rows["trainer/global_step"].mask(rows.index < 3)
    rows.to_csv(frame, index=False)
    curves = read_table(frame).curves("induction")
    assert curves.steps[0] == 30 and "18 values left out" in curves.notes[0]


def test_one_heads_column_by_its_full_name(tmp_path: Path) -> None:
    wide(heads()).to_csv(tmp_path / "t.csv", index=False)
    found = find_windows(tmp_path / "t.csv", metric="induction/L1H2", floor=CHANCE)
    report = found["metrics"]["induction/L1H2"]
    assert report["target"] == "L1H2" and report["figure"] == "windows-induction-L1H2.png"
    alone = [w for w in summary(by_hand(heads())) if w[0] == "L1H2"]
    assert found_in(report) == alone


def test_files_of_newer_versions_and_of_other_kinds(tmp_path: Path, capsys) -> None:
    assert window_table.SCHEMA_VERSION == metric_table.SCHEMA_VERSION
    assert window_table.SCHEMA_VERSION == monitor_files.SCHEMA_VERSION
    table = pa.table({"step": [0], "metric": ["a"], "value": [0.1]})
    for note, told in (
        ({"schema_version": 99}, "schema_version 99"),
        ({"schema_version": 1, "kind": "scores"}, "a table of scores"),
    ):
        marked = table.replace_schema_metadata({b"mda_lightning": json.dumps(note).encode()})
        pq.write_table(marked, tmp_path / "t.parquet")
        assert told in refusal(capsys, tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 cut short")
    assert "neither a Parquet" in refusal(capsys, tmp_path / "t.parquet")


def test_a_folder_with_one_table_stands_for_it(tmp_path: Path, capsys) -> None:
    assert "does not exist" in refusal(capsys, tmp_path / "nowhere")
    assert "holds no unit_metrics.parquet" in refusal(capsys, tmp_path)
    deep = tmp_path / "lightning_logs" / "version_0"
    deep.mkdir(parents=True)
    wide(heads()).to_csv(deep / "metrics.csv", index=False)
    options = ["--metric", "induction", "--floor", "0.05", "--quiet"]
    assert run(tmp_path, *options) == EXIT_OK
    assert (deep / "windows" / "windows.json").is_file()
    unit_metrics(tmp_path / "unit_metrics.parquet")  # nearer than the logger's
    assert run(tmp_path, "--quiet") == EXIT_OK
    assert (tmp_path / "windows" / "windows.json").is_file()
    wide(heads()).to_csv(tmp_path / "metrics.csv", index=False)
    message = refusal(capsys, tmp_path)
    assert "several tables" in message and "unit_metrics.parquet" in message


def test_another_call_leaves_no_picture_of_the_former(tmp_path: Path) -> None:
    path = unit_metrics(tmp_path / "unit_metrics.parquet")
    out = tmp_path / "out"
    find_windows(path, output=out)
    assert names_in(out) == ["windows-induction.png", "windows.json"]
    find_windows(path, metric="icl/gain", floor=0.0, output=out)
    assert names_in(out) == ["windows-icl-gain.png", "windows.json"]


def test_files_of_others_stay_in_the_folder(tmp_path: Path) -> None:
    path = unit_metrics(tmp_path / "unit_metrics.parquet")
    out = tmp_path / "out"
    out.mkdir()
    (out / "windows-of-my-house.png").write_bytes(b"mine")
    find_windows(path, output=out)
    former = content(out)
    find_windows(path, metric="icl/gain", floor=0.0, output=out)
    mine = ["windows-icl-gain.png", "windows-of-my-house.png", "windows.json"]
    assert names_in(out) == mine
    # Names that no call wrote: another folder's file, and a name of another pattern.
    (tmp_path / "windows-far.png").write_bytes(b"mine")
    (out / "holiday.png").write_bytes(b"mine")
    for figure in ("../windows-far.png", "holiday.png", None, ["windows-of-my-house.png"]):
        former["metrics"]["induction"]["figure"] = figure
        (out / "windows.json").write_text(json.dumps(former), "utf-8")
        find_windows(path, metric="icl/gain", floor=0.0, output=out)
    for text in ("", "[]", '{"kind": "other", "metrics": {"a": {"figure": "windows-a.png"}}}'):
        (out / "windows-a.png").write_bytes(b"mine")
        (out / "windows.json").write_text(text, "utf-8")
        find_windows(path, metric="icl/gain", floor=0.0, output=out)
    assert names_in(out) == sorted(["holiday.png", "windows-a.png", *mine])
    assert (tmp_path / "windows-far.png").is_file()


def test_an_interrupted_call_has_written_nothing_and_says_so(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    path = unit_metrics(tmp_path / "unit_metrics.parquet")

    def interrupted(self, step, values):
        raise KeyboardInterrupt

    monkeypatch.setattr(MechanismWindow, "update", interrupted)
    assert run(path) == EXIT_INTERRUPTED
    assert "interrupted; nothing is kept" in capsys.readouterr().err
    assert names_in(tmp_path) == ["unit_metrics.parquet"]


@pytest.mark.parametrize(
    ("arguments", "stopped", "told"),
    [
        (["report", "x"], "mda_lightning.analysis.report.build_report", "builds it anew"),
        (["data", "embedded", "x"], "mda_lightning.recipes.corpus.make_corpus", "no corpus"),
        (["fit"], "mda_lightning.recipes.fit.fit", "--ckpt_path"),
        (
            ["quickstart"],
            "mda_lightning.recipes.studies.quickstart.run_quickstart",
            "goes on from there",
        ),
    ],
)
def test_an_interruption_says_what_it_leaves(
    capsys, monkeypatch, arguments: list[str], stopped: str, told: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stopped, interrupted)
    assert main(arguments) == EXIT_INTERRUPTED
    assert told in capsys.readouterr().err


def test_hand_overs_and_lapses_are_written(tmp_path: Path) -> None:
    values = heads()
    values[:, 0, 1] -= logistic(1500.0, 40.0, 0.3)
    path = unit_metrics(tmp_path / "unit_metrics.parquet", values)
    report = find_windows(path)["metrics"]["induction"]
    lapses = [event for event in report["events"] if event["kind"] == "lapsed"]
    assert [event["unit"] for event in lapses] == ["L0H1"]
    # Under the threshold from 1570 on; the EMA follows, and five evaluations make it sure.
    assert 1570 < lapses[0]["step"] <= 1700
    handed = [(event["unit"], event["to"]) for event in report["events"] if event["to"]]
    assert handed == [("L0H1", "L1H2")]
