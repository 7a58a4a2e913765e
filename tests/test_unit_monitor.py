"""UnitMonitor: the right rows at the right steps, in every logger and file, resumable."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from training import Clock, CurveMechanism, Rows, StrangersModule, fit, jump

from mda_lightning.callbacks import CriticalWindow, InfluenceScoring, UnitMonitor
from mda_lightning.mechanisms import mechanism


def small(**settings) -> UnitMonitor:
    mechanisms = [
        mechanism("induction", n_sequences=4, n_probe_sequences=4),
        mechanism("previous_token", n_sequences=4, n_probe_sequences=4, length=(8, 12)),
    ]
    return UnitMonitor(mechanisms, **({"every_n_steps": 3} | settings))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_rows_carry_the_step_of_the_weights_they_measured(tmp_path: Path) -> None:
    """Row k equals the metric computed by hand on a copy of the weights after k updates."""
    monitor = small()
    weights: dict[int, dict] = {}
    monitor.subscribe(lambda one: weights.setdefault(one.step, _copy(module)))
    module = StrangersModule()
    fit(module, [monitor], tmp_path)
    steps, values = monitor.table.curves("induction")
    assert steps.tolist() == [0, 3, 6, 9, 12]
    induction = monitor.mechanism("induction")
    for step, value in zip(steps, values, strict=True):
        module.load_state_dict(weights[int(step)])
        expected = induction.scores(module.net["lm"]).mean.numpy()
        np.testing.assert_array_equal(value, expected)
    assert not np.array_equal(values[0], values[-1])


def _copy(module: StrangersModule) -> dict:
    return {k: v.clone() for k, v in module.state_dict().items()}


def test_measures_once_per_optimizer_step_under_accumulation(tmp_path: Path) -> None:
    monitor = small(every_n_steps=2)
    seen = []
    monitor.subscribe(lambda one: seen.append((one.metric, one.step)))
    fit(StrangersModule(), [monitor], tmp_path, max_steps=6, accumulate_grad_batches=3)
    assert seen == [(m, s) for s in (0, 2, 4, 6) for m in ("induction", "previous_token")]


def test_every_logger_gets_exact_rows(tmp_path: Path) -> None:
    loggers = [
        CSVLogger(tmp_path, name="csv"),
        TensorBoardLogger(tmp_path, name="tb"),
    ]
    monitor = small(top_k=2)
    fit(StrangersModule(), [monitor], tmp_path, logger=loggers, log_every_n_steps=5)
    logged = [r for r in rows(Path(loggers[0].log_dir) / "metrics.csv") if r["induction/max"]]
    steps, values = monitor.table.curves("induction")
    assert [int(r["step"]) for r in logged] == steps.tolist()
    np.testing.assert_allclose(
        [float(r["induction/max"]) for r in logged], values.max(axis=(1, 2)), rtol=1e-6
    )
    heads = [k for k in logged[-1] if k.startswith("induction/L") and logged[-1][k]]
    assert len(heads) == 2
    assert monitor.folder == Path(loggers[0].log_dir) / "mda"


def test_the_long_table_and_the_picture_are_in_the_folder(tmp_path: Path) -> None:
    fit(StrangersModule(), [small(folder=str(tmp_path / "run"))], tmp_path)
    table = pq.read_table(tmp_path / "run" / "unit_metrics.parquet")
    assert table.schema.names == ["step", "layer", "head", "metric", "value", "se"]
    assert [str(t) for t in table.schema.types] == [
        "int32",
        "int16",
        "int16",
        "string",
        "float",
        "float",
    ]
    frame = table.to_pandas()
    assert len(frame) == 5 * 2 * 2 * 2
    note = json.loads(table.schema.metadata[b"mda_lightning"])
    assert note["schema_version"] == 1
    assert note["provenance"]["mechanisms"]["induction"]["n_sequences"] == 4
    assert (tmp_path / "run" / "induction.png").read_bytes()[:4] == b"\x89PNG"
    assert not list((tmp_path / "run").glob(".*"))


def test_scores_can_be_monitored_by_other_callbacks(tmp_path: Path) -> None:
    clock = Clock()
    monitor = UnitMonitor([CurveMechanism(clock, jump(4))], every_n_steps=1)
    best = ModelCheckpoint(
        tmp_path / "best", monitor="curve/L1H1", mode="max", every_n_train_steps=1, save_top_k=1
    )
    trainer = fit(
        StrangersModule(), [clock, monitor, best], tmp_path, enable_checkpointing=True, max_steps=9
    )
    assert "step=9" in best.best_model_path
    assert float(trainer.callback_metrics["curve/max"]) == pytest.approx(float(jump(4)(9).max()))
    EarlyStopping("curve/max")._validate_condition_metric(trainer.callback_metrics)


def test_resumed_the_table_goes_on_without_a_gap_or_a_repeat(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "at", every_n_train_steps=6, save_top_k=-1)
    whole = small(folder=str(tmp_path / "whole"))
    fit(StrangersModule(), [whole, saver], tmp_path, enable_checkpointing=True)
    again = small(folder=str(tmp_path / "again"))
    checkpoint = next((tmp_path / "at").glob("*step=6.ckpt"))
    torch.load(checkpoint, weights_only=True)
    # The stranger's loader begins again from row 0, so only rows up to step 6 can be equal.
    fit(StrangersModule(), [again], tmp_path, ckpt_path=checkpoint)
    steps, values = again.table.curves("induction")
    assert steps.tolist() == [0, 3, 6, 9, 12]
    np.testing.assert_array_equal(values[:3], whole.table.curves("induction")[1][:3])


def test_a_monitor_used_for_a_second_run_begins_again(tmp_path: Path) -> None:
    monitor = small()
    for _ in range(2):
        fit(StrangersModule(), [monitor], tmp_path, max_steps=3)
        assert monitor.table.curves("induction")[0].tolist() == [0, 3]


def test_values_that_are_not_finite_are_reported_and_training_goes_on(tmp_path: Path) -> None:
    clock = Clock()

    def curve(step: int) -> np.ndarray:
        values = np.full((2, 2), 0.1)
        values[1] = np.nan if step >= 2 else 0.1
        return values

    monitor = UnitMonitor([CurveMechanism(clock, curve)], every_n_steps=1)
    with pytest.warns(UserWarning, match="not finite at step 2 in layer 1"):
        trainer = fit(StrangersModule(), [clock, monitor], tmp_path, max_steps=4)
    assert trainer.global_step == 4
    assert np.isnan(monitor.latest("curve").value[1]).all()


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_n_steps=0"):
        UnitMonitor(every_n_steps=0)
    with pytest.raises(ValueError, match="'indiction' is not a mechanism; there are: induction"):
        UnitMonitor(["indiction"])
    with pytest.raises(ValueError, match="each of another name"):
        UnitMonitor(["induction", "induction"])
    with pytest.raises(ValueError, match="has no submodule 'lm'"):
        fit(StrangersModule(), [small(model="lm")], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="choose another output folder"):
        fit(StrangersModule(), [small(folder=str(tmp_path / "file" / "x"))], tmp_path)


def test_wandb_offline_gets_rows_table_and_image_without_an_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, project="test", offline=True)
    logged: list[dict] = []
    real = logger.experiment.log
    monkeypatch.setattr(
        logger.experiment, "log", lambda row, **kw: (logged.append((row, kw)), real(row, **kw))
    )
    fit(StrangersModule(), [small(write_every_n_steps=6)], tmp_path, logger=logger, data=Rows(64))
    wandb.finish()
    ours = [row for row, _ in logged if "induction/max" in row]
    assert [row["trainer/global_step"] for row in ours] == [0, 3, 6, 9, 12]
    assert all("step" not in keywords for _, keywords in logged)
    assert any("induction/heads" in row for row, _ in logged)
    tables = [row["unit_metrics"] for row, _ in logged if "unit_metrics" in row]
    assert tables and tables[0] is tables[-1]
    assert len(tables[-1].data) == 5 * 2 * 2 * 2


def test_every_logged_key_is_documented(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "logged-keys.md").read_text()
    clock = Clock()
    run = [
        clock,
        UnitMonitor([CurveMechanism(clock, jump(2, ramp=2)), "induction"], every_n_steps=1),
        CriticalWindow("curve"),
        InfluenceScoring("induction", active="always"),
    ]
    logger = CSVLogger(tmp_path)
    fit(StrangersModule(), run, tmp_path, logger=logger)
    keys = set(rows(Path(logger.log_dir) / "metrics.csv")[0]) - {"step", "epoch"}
    general = {
        re.sub(r"L\d+H\d+", "L<l>H<h>", re.sub(r"^(curve|induction)", "<mechanism>", k))
        for k in keys
    }
    assert {"<mechanism>/max", "<mechanism>/ema_max", "<mechanism>/scored"} <= general
    missing = {key for key in general if f"`{key}`" not in page}
    assert not missing
