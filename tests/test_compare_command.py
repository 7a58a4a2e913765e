"""``mda-lightning compare`` as a person calls it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mda_lightning.cli import EXIT_ERROR, EXIT_INTERRUPTED, main
from mda_lightning.recipes.studies import study as study_module
from tests.study_runs import TINY, run_here

ARMS = {"mask-top": {"do": "mask"}, "mask-random": {"control_of": "mask-top"}}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    values = TINY.to_dict()
    del values["subsets"], values["rankings"]
    values |= {"title": "Tiny", "seeds": [3], "arms": ARMS}
    path = tmp_path / "tiny.yaml"
    # By way of JSON: YAML has no tuples.
    path.write_text("# A tiny study\n" + yaml.safe_dump(json.loads(json.dumps(values))))
    return path


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def test_a_recipe_is_run_judged_and_gone_on_with(recipe: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(study_module, "run_jobs", run_here)
    assert main(["compare", str(recipe), "--quiet"]) == 0
    out = capsys.readouterr().out
    folder = Path("runs/tiny")
    for name in ("comparison.md", "comparison.csv", "comparison.json", "report.html"):
        assert (folder / name).is_file(), name
    assert (folder / "figures" / "comparison.png").is_file()
    assert "mask-top" in out and "One seed" in out and "report.html" in out
    assert main(["compare", str(recipe), "--quiet", "--seeds", "2", "--first-seed", "3"]) == 0
    assert "2 seeds" in capsys.readouterr().out
    assert main(["compare", str(folder), "--quiet"]) == 0  # as study.json has it
    assert [s["seed"] for s in json.loads((folder / "study.json").read_text())["seeds"]] == [3, 4]
    # The folder is a study of other settings then.
    changed = ["--set", "training.learning_rate=0.002"]
    assert main(["compare", str(recipe), "--quiet", *changed]) == EXIT_ERROR
    assert "other settings (training.learning_rate 0.01, here 0.002)" in capsys.readouterr().err
    assert main(["compare", str(folder), "--seeds", "9"]) == EXIT_ERROR
    assert "a study, which goes on as it is" in capsys.readouterr().err


def test_a_dry_run_says_what_would_run_and_runs_nothing(recipe: Path, capsys) -> None:
    assert main(["compare", str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "seeds 3: 3 runs" in out and "masking the top 10% by EK-FAC influence" in out
    assert not Path("runs").exists()


def test_the_recipes_that_come_with_the_package_are_listed(capsys) -> None:
    assert main(["compare", "--list"]) == 0
    out = capsys.readouterr().out
    for name in (
        "pythia-14m-induction ",
        "pythia-160m-previous-token-small ",
        "insertion-ablation ",
    ):
        assert name in out
    assert main(["compare"]) == EXIT_ERROR
    assert "name a recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing-of-that-name"], "there is no recipe 'nothing-of-that-name'"),
        (["TINY", "--set", "arms.mask-top.fraction=2"], "fraction"),
        (["TINY", "--set", "window.end=10"], "window"),
        (["TINY", "--set", "nonsense.key=1"], "nonsense"),
        (["TINY", "--first-seed", "4"], "--first-seed goes with --seeds"),
        (["elsewhere"], "holds no study.json"),
    ],
)
def test_errors_name_the_way_out(arguments, message, recipe: Path, capsys) -> None:
    Path("elsewhere").mkdir()
    given = [str(recipe) if one == "TINY" else one for one in arguments]
    assert main(["compare", *given]) == EXIT_ERROR
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_fresh_removes_a_study_and_nothing_else(recipe: Path, capsys) -> None:
    other = Path("runs/tiny")
    other.mkdir(parents=True)
    (other / "thesis.tex").write_text("")
    assert main(["compare", str(recipe), "--fresh"]) == EXIT_ERROR
    assert "no study; --fresh will not remove it" in capsys.readouterr().err
    assert (other / "thesis.tex").is_file()


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_numbers(recipe: Path, tmp_path: Path) -> None:
    """Real processes, killed outright ten times at odd moments, then left alone."""
    command = [sys.executable, "-m", "mda_lightning", "compare", str(recipe), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = subprocess.run(
        [*command, "--output", "whole"], env=environment, cwd=tmp_path, check=True, timeout=600
    )
    assert whole.returncode == 0
    for moment in (1, 4, 9, 12, 14, 17, 19, 23, 26, 31):
        process = subprocess.Popen(
            [*command, "--output", "killed"],
            env=environment,
            cwd=tmp_path,
            start_new_session=True,
        )
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    # What its jobs had begun notices within a step that nobody waits, and the folder is free.
    time.sleep(5)
    subprocess.run(
        [*command, "--output", "killed"], env=environment, cwd=tmp_path, check=True, timeout=600
    )
    numbers = [
        json.loads((tmp_path / name / "comparison.json").read_text())
        for name in ("whole", "killed")
    ]
    assert numbers[0]["arms"] == numbers[1]["arms"]


@pytest.mark.slow
def test_ctrl_c_says_that_it_can_go_on(recipe: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mda_lightning", "compare", str(recipe), "--quiet"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(20)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED
    assert "the same command goes on from there" in error
