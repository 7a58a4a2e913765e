"""``mda-lightning data`` and ``mda-lightning fit``: a corpus and a run from files alone."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from mda_lightning.cli import EXIT_ERROR, main
from mda_lightning.corpora import TokenRows
from mda_lightning.recipes.studies.quickstart import QUICKSTART

RECIPE = Path(__file__).parents[1] / "mda_lightning" / "recipes" / "embedded.yaml"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text(f"the name of {i} is item-{i * 7919 % 997}. " * 60)
    arguments = ["--input", str(texts), "--sequence-length", "48", "--vocab-size", "300"]
    assert main(["data", "text", str(tmp_path / "rows"), *arguments]) == 0
    return tmp_path / "rows"


def test_fit_trains_the_shipped_configuration_with_its_callbacks(
    corpus: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(RECIPE.read_text())
    config["data"]["rows"] = str(corpus)
    config["trainer"]["max_steps"] = config["data"]["n_steps"] = 52
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "run.yaml"]) == 0
    table = pd.read_parquet(tmp_path / "runs" / "embedded" / "unit_metrics.parquet")
    assert sorted(table["step"].unique()) == [0, 50]
    assert {"induction", "previous_token", "ablation/logit"} <= set(table["metric"])
    assert len(table["layer"].unique()) == 3
    assert (tmp_path / "runs" / "embedded" / "csv" / "metrics.csv").is_file()


def test_the_shipped_configuration_is_the_quickstarts_base_run() -> None:
    config = yaml.safe_load(RECIPE.read_text())
    model, training = QUICKSTART.model, QUICKSTART.training
    assert config["model"]["size"] == {
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "intermediate_size": model.d_mlp,
        "rotary_pct": model.rotary_fraction,
    }
    assert config["model"]["learning_rate"] == training.learning_rate
    assert config["model"]["schedule"] == training.schedule
    assert config["model"]["warmup_steps"] == training.warmup_steps
    assert config["data"]["batch_size"] == training.batch_size
    assert config["trainer"]["max_steps"] == config["data"]["n_steps"] == training.max_steps
    watching = config["trainer"]["callbacks"][0]["init_args"]
    assert watching["every_n_steps"] == QUICKSTART.monitor.every_n_steps
    assert watching["quiet_every_n_steps"] == QUICKSTART.monitor.quiet_every_n_steps
    scoring = config["trainer"]["callbacks"][-1]["init_args"]
    assert scoring["estimator"] == QUICKSTART.scoring.estimator
    assert tuple(scoring["replay_at"]) == QUICKSTART.scoring.replay_at
    assert scoring["n_curvature"] == QUICKSTART.scoring.n_curvature


def test_a_second_file_appends_callbacks(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(RECIPE.read_text())
    config["data"] |= {"rows": str(corpus), "n_steps": 3}
    config["trainer"]["max_steps"] = 3
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    timer = "class_path: lightning.pytorch.callbacks.ModelCheckpoint"
    checkpoint = f"init_args: {{dirpath: {tmp_path / 'kept'}, every_n_train_steps: 3}}"
    more = f"trainer:\n  callbacks+:\n    - {timer}\n      {checkpoint}\n"
    (tmp_path / "more.yaml").write_text(more)
    arguments = ["--config", "run.yaml", "--config", "more.yaml"]
    assert main(["fit", *arguments, "--trainer.enable_checkpointing=true"]) == 0
    assert list((tmp_path / "kept").glob("*.ckpt"))
    assert (tmp_path / "runs" / "embedded" / "unit_metrics.parquet").is_file()


def test_bad_configurations_are_named(corpus: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(RECIPE.read_text())
    config["data"]["rows"] = "nowhere"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "run.yaml"]) == EXIT_ERROR
    assert "nowhere" in capsys.readouterr().err
    config["data"]["rows"] = str(corpus)
    config["model"]["size"] = "15m"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "run.yaml"]) == EXIT_ERROR
    error = capsys.readouterr().err
    assert "15m" in error and "14m" in error


def test_data_refuses_to_write_over_a_folder(corpus: Path, tmp_path: Path, capsys) -> None:
    before = TokenRows.open(corpus).content_hash
    arguments = ["data", "text", str(corpus), "--input", str(tmp_path / "texts")]
    assert main(arguments) == EXIT_ERROR
    assert "not empty" in capsys.readouterr().err
    assert TokenRows.open(corpus).content_hash == before
