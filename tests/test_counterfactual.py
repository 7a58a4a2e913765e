"""The whole experiment at the smallest size, through real processes, callbacks and files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock

from mda_lightning.cli import EXIT_ERROR, main
from mda_lightning.corpora import TokenRows
from mda_lightning.interventions import Plan
from mda_lightning.recipes.studies.quickstart import quickstart_corpus, wandb_mode
from mda_lightning.recipes.studies.settings import (
    CorpusSettings,
    ModelSettings,
    MonitorSettings,
    ScoringSettings,
    StudySettings,
    TrainingSettings,
)
from mda_lightning.recipes.studies.study import Study, StudyFolderError
from mda_lightning.schedule import BASE, BaseOrder, Schedule
from mda_lightning.store import ScoreTable, ScoreWriter

# A previous-token head forms within some hundred steps, which an induction head does not.
SMALL = StudySettings(
    mechanism="previous_token",
    corpus=CorpusSettings(n_rows=6000, sequence_length=64, records_share=0.3),
    model=ModelSettings(n_layers=2, n_heads=2, d_model=32, d_mlp=32, rotary_fraction=1.0),
    training=TrainingSettings(max_steps=2500, learning_rate=1e-2),
    scoring=ScoringSettings(n_curvature=32),
    monitor=MonitorSettings(n_sequences=50, averaged_evaluations=3),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> TokenRows:
    return quickstart_corpus(tmp_path_factory.mktemp("corpora"), SMALL)


@pytest.fixture(scope="module")
def study(corpus: TokenRows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "small"
    Study(folder, SMALL, (0,), corpus.folder).run()
    return folder


def _seed(folder: Path) -> dict:
    return json.loads((folder / "study.json").read_text())["seeds"][0]


def test_every_arm_is_run_from_the_windows_start_to_its_end(study: Path) -> None:
    seed = _seed(study)
    assert seed["status"] == "complete", seed["message"]
    start, end = seed["window"]["start"], seed["window"]["end"]
    base = pd.read_parquet(study / seed["base"] / "unit_metrics.parquet")
    for name, where in seed["arms"].items():
        curves = pd.read_parquet(study / where / "unit_metrics.parquet")
        assert curves["step"].max() >= seed["measured_at"][-1], name
        # Before the branch every arm has the base run's history, measured once.
        columns = ["step", "layer", "head", "value"]
        before = curves[curves["step"] <= start - 100][columns].reset_index(drop=True)
        expected = base[base["step"] <= start - 100][columns].reset_index(drop=True)
        pd.testing.assert_frame_equal(before, expected)
    assert 0 < start < end <= SMALL.training.max_steps
    assert seed["measured_at"][-1] <= end


def test_an_arm_without_a_plan_repeats_the_base_run_bit_for_bit(
    study: Path, corpus: TokenRows, tmp_path: Path
) -> None:
    """What makes the base run its own baseline arm: branching changes nothing by itself."""
    from mda_lightning.recipes.studies.runs import run_arm

    seed = _seed(study)
    job = json.loads((study / seed["arms"]["mask-top"] / "job.json").read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_arm(job["spec"] | {"plan": None, "wandb": "off"}, tmp_path)
    finally:
        torch.set_num_threads(threads)
    again = pd.read_parquet(tmp_path / "unit_metrics.parquet")
    base = pd.read_parquet(study / seed["base"] / "unit_metrics.parquet")
    shared = base[base["step"] <= seed["window"]["end"]].reset_index(drop=True)
    pd.testing.assert_frame_equal(again.reset_index(drop=True), shared, check_exact=True)
    arm = pd.read_parquet(study / seed["arms"]["mask-top"] / "unit_metrics.parquet")
    assert not arm["value"].equals(shared["value"])


def test_plans_treat_the_top_share_and_controls_match(study: Path) -> None:
    seed = _seed(study)
    table = ScoreTable.open(study / seed["scores"])
    ids, scores = table.scores(seed["target"])
    plans = {p.stem: Plan.load(p) for p in (study / "seed-0" / "plans").iterdir()}
    assert set(plans) == {"mask-top", "mask-random", "insert-top", "insert-random"}
    for operation in ("mask", "insert"):
        top, control = plans[f"{operation}-top"], plans[f"{operation}-random"]
        assert len(top.treated_ids) == len(control.treated_ids)
        assert len(top.treated_ids) == pytest.approx(0.10 * len(np.unique(ids)), abs=1)
        assert not np.intersect1d(top.treated_ids, control.treated_ids).size
        assert np.isin(control.treated_ids, ids).all()
        threshold = scores[np.isin(ids, top.treated_ids)].min()
        assert (scores[~np.isin(ids, top.treated_ids)] <= threshold + 1e-6).all()


def test_insertion_and_its_control_take_the_same_places(study: Path, corpus: TokenRows) -> None:
    """Else the control would take out some of the top samples, and be a mask besides."""
    seed = _seed(study)
    order = BaseOrder(len(corpus), SMALL.training.batch_size, SMALL.training.max_steps, 0)
    kept = {}
    for name in ("insert-top", "insert-random"):
        schedule = Schedule(order, Plan.load(study / "seed-0" / "plans" / f"{name}.json"))
        kept[name] = []
        for step in range(seed["window"]["start"], seed["window"]["end"]):
            batch = schedule.batch(step)
            base = batch.provenance == BASE
            kept[name].append(np.where(base, batch.sample_ids, -1))
    np.testing.assert_array_equal(kept["insert-top"], kept["insert-random"])
    assert (np.array(kept["insert-top"]) == -1).any()


def test_two_processes_cannot_work_in_one_folder(study: Path, corpus: TokenRows) -> None:
    with FileLock(study / ".lock"), pytest.raises(StudyFolderError, match="another process"):
        Study(study, SMALL, (0,), corpus.folder).run()


def test_another_way_of_logging_keeps_what_is_finished(study: Path, corpus: TokenRows) -> None:
    states = []
    again = Study(
        study.parent / "." / study.name,
        SMALL,
        (0,),
        corpus.folder,
        wandb="offline",
        watch=lambda job, _, s: states.append(s),
    )
    again.run()
    assert states == ["kept"] * 5
    assert _seed(study)["status"] == "complete"


def test_scores_cover_every_sample_of_the_window(study: Path) -> None:
    seed = _seed(study)
    table = ScoreTable.open(study / seed["scores"])
    frame = table.frame(seed["target"])
    window = seed["window"]
    assert frame["step"].min() == window["start"] and frame["step"].max() == window["end"] - 1
    assert len(frame) == (window["end"] - window["start"]) * SMALL.training.batch_size


def test_a_finished_study_is_kept_and_another_is_refused(study: Path, corpus: TokenRows) -> None:
    states = []
    Study(study, SMALL, (0,), corpus.folder, watch=lambda job, _, s: states.append(s)).run()
    assert states == ["kept"] * 5
    other = replace(SMALL, training=replace(SMALL.training, learning_rate=2e-3))
    with pytest.raises(StudyFolderError, match="holds a study of other settings"):
        Study(study, other, (0,), corpus.folder).run()


def test_no_plan_is_made_of_scores_that_are_not_complete(
    study: Path, corpus: TokenRows, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(study, folder)
    seed = _seed(folder)
    table = ScoreTable.open(folder / seed["scores"])
    ScoreWriter(
        table.folder, units=table.units, blocks=table.blocks, estimator=table.estimator
    ).discard_from(seed["window"]["end"] - 1)
    with pytest.raises(StudyFolderError, match="not complete, so no plan"):
        Study(folder, SMALL, (0,), corpus.folder).run()


def test_the_report_command_builds_the_report(study: Path, capsys) -> None:
    assert main(["report", str(study)]) == 0
    assert (study / "report.html").stat().st_size > 10_000
    assert "report.html" in capsys.readouterr().out


def test_without_a_window_the_study_says_so_and_still_reports(
    corpus: TokenRows, tmp_path: Path
) -> None:
    short = replace(SMALL, mechanism="induction", training=replace(SMALL.training, max_steps=60))
    Study(tmp_path / "none", short, (0,), corpus.folder).run()
    seed = _seed(tmp_path / "none")
    assert seed["status"] == "no_window"
    assert "step 60" in seed["message"]
    assert main(["report", str(tmp_path / "none")]) == 0
    assert "no window" in (tmp_path / "none" / "report.html").read_text().lower()


def test_settings_round_trip_and_unknown_ones_are_named() -> None:
    assert StudySettings.from_dict(json.loads(json.dumps(SMALL.to_dict()))) == SMALL
    with pytest.raises(ValueError, match=r"no setting training\.lr; there are: .*learning_rate"):
        StudySettings.from_dict({"training": {"lr": 1}})
    with pytest.raises(ValueError, match="no setting train;"):
        StudySettings.from_dict({"train": {}})


def test_wandb_mode_follows_the_environment(monkeypatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert wandb_mode() == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "off"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "study.json"),
        (["data", "text", "out"], "--input"),
        (["quickstart", "--output", "file/below", "--wandb", "off", "--quiet"], "file"),
    ],
)
def test_errors_are_one_line_that_names_the_way_out(
    arguments, message, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(arguments) == EXIT_ERROR
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
