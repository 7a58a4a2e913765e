"""What a W&B user sees: an offline run is trained and read back from its files."""

from __future__ import annotations

from pathlib import Path

import pytest
from training import Clock, CurveMechanism, FakeMeasure, Rows, StrangersModule, fit, jump

from mda_lightning.callbacks import CriticalWindow, UnitMonitor

wandb = pytest.importorskip("wandb")

from lightning.pytorch.loggers import WandbLogger  # noqa: E402
from wandb_run import OfflineRun  # noqa: E402


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[OfflineRun, UnitMonitor]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, project="test", offline=True)
    clock = Clock()
    monitor = UnitMonitor(
        [CurveMechanism(clock, jump(3, ramp=2)), "induction"],
        measures=[FakeMeasure(clock, every_n_steps=4)],
        every_n_steps=1,
        top_k=2,
    )
    fit(
        StrangersModule(),
        [clock, monitor, CriticalWindow("curve")],
        tmp_path,
        logger=logger,
        data=Rows(64),
        max_steps=14,
    )
    wandb.finish()
    return OfflineRun(tmp_path), monitor


def test_an_offline_run_holds_rows_table_images_alerts_and_summary(
    run: tuple[OfflineRun, UnitMonitor],
) -> None:
    read, monitor = run
    step = "trainer/global_step"

    # Rows carry their step, and their values are the table's.
    for key, metric in (("curve/max", "curve"), ("fake/heads/max", "fake/heads")):
        rows = [row for row in read.rows if key in row]
        steps, values = monitor.table.curves(metric)
        assert [row[step] for row in rows] == steps.tolist()
        assert [row[key] for row in rows] == pytest.approx(values.max(axis=(1, 2)).tolist())
    whole = [row for row in read.rows if "fake/whole@7" in row]
    assert [(row[step], row["fake/whole@7"], row["fake/whole@7_se"]) for row in whole] == [
        (0, 10.0, 0.25),
        (4, 14.0, 0.25),
        (8, 18.0, 0.25),
        (12, 22.0, 0.25),
    ]
    assert sum(key.startswith("curve/L") for key in whole[0]) == 2
    assert any("curve/ema_max" in row for row in read.rows)

    # Every family goes by the step.
    families = {"curve/*", "induction/*", "fake/*", "fake", "curve/max", "unit_metrics"}
    assert {read.step_metrics[key] for key in families} == {step}

    # All heads are in one long table, and numbers of the whole model without a head.
    rows = read.table_rows("unit_metrics")
    expected = [row for metric in monitor.table.metrics for row in monitor.table.rows(metric)]
    assert sorted(map(str, rows)) == sorted(str([*row]) for row in _as_json(expected))
    assert len(rows) == 2 * 15 * 4 + 4 * 4 + 4

    for key in ("curve/heads", "induction/heads", "fake/heads/heads", "fake/whole@7/curve"):
        assert len(read.images(key)) == 1, key

    titles = [alert["title"] for alert in read.of_type("alert")]
    assert titles == ["curve: window of L1H1 opened", "curve: window of L1H1 closed"]

    summary = read.summary
    assert summary["curve/best_head"] == "L1H1"
    assert summary["curve/best_score"] == pytest.approx(0.6)
    assert summary["curve/max"] == {"max": pytest.approx(0.6)}
    assert summary["curve/window_status"] == "closed"
    assert summary["curve/window_target"] == "L1H1"
    assert summary["curve/window_start"] == 3
    assert summary["curve/window_end"] in range(4, 15)
    assert summary["fake/heads/best_step"] == 12


def test_rows_beyond_what_wandb_takes_at_once_are_sent_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B cuts an increment at its own limit; a small one takes the same way as 200,000."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(wandb.Table, "MAX_ARTIFACT_ROWS", 20)
    logger = WandbLogger(save_dir=tmp_path, project="test", offline=True)
    clock = Clock()
    monitors = [
        UnitMonitor([CurveMechanism(clock, jump(3))], measures=(), every_n_steps=1),
        UnitMonitor("induction", measures=(), every_n_steps=5, folder=str(tmp_path / "other")),
    ]
    fit(StrangersModule(), [clock, *monitors], tmp_path, logger=logger, max_steps=12)
    wandb.finish()
    read = OfflineRun(tmp_path)
    for key, metric, monitor in zip(
        ("unit_metrics", "unit_metrics_2"), ("curve", "induction"), monitors, strict=True
    ):
        rows = read.table_rows(key)
        assert rows == _as_json(monitor.table.rows(metric))
        assert read.step_metrics[key] == "trainer/global_step"
    assert len(read.table_rows("unit_metrics")) == 13 * 4


def _as_json(rows: list) -> list[list]:
    import json

    return json.loads(json.dumps([list(row) for row in rows]))
