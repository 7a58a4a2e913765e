"""What the README shows is what runs."""

from __future__ import annotations

import re
import shlex
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from models import random_neox
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from training import Rows, StrangersModule
from transformers import AutoModelForCausalLM

from mda_lightning.cli import EXIT_OK, _parser, main
from mda_lightning.corpora import TokenRows

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")


def test_the_three_lines_run_in_a_strangers_script(tmp_path: Path, monkeypatch) -> None:
    """The README's own code block, with a short run in place of a long one."""
    block = re.search(r"## Three lines in your own script\s+```python\n(.*?)```", README, re.S)
    assert block is not None
    code = block.group(1).replace("max_steps=20_000", "max_steps=12")
    assert "max_steps=12" in code
    quiet = partial(
        L.Trainer,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    monkeypatch.setattr(L, "Trainer", quiet)
    names: dict[str, object] = {}
    exec(code, names)
    with pytest.warns(UserWarning, match="no window opened"):
        names["trainer"].fit(StrangersModule(), DataLoader(Rows(64), batch_size=4))
    table = pd.read_parquet(next(tmp_path.rglob("unit_metrics.parquet")))
    assert set(table["metric"]) >= {"induction", "previous_token", "ablation/logit"}
    assert table["step"].max() == 10
    assert next(tmp_path.rglob("window.json")).is_file()


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text("utf-8")
    for command in ("quickstart", "test"):
        assert f"make {command}" in README
        assert re.search(rf"^{command}:", makefile, re.M)


def test_links_lead_somewhere() -> None:
    root = Path(__file__).parents[1]
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (root / link).exists()] == []


def test_the_examples_of_the_influence_page_run(tmp_path: Path, monkeypatch) -> None:
    """One after another, on a small random model and a small corpus in place of the hub's."""
    page = (Path(__file__).parents[1] / "docs" / "influence.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert "replay_scores(model" in blocks[0] and len(blocks) >= 8
    rows = np.random.default_rng(0).integers(1, 60, (512, 13))
    TokenRows.write(
        tmp_path / "corpora" / "mine", rows, vocab_size=60, special_ids=(0,), provenance={}
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *_, **__: random_neox(vocab_size=60, n_layers=4),
    )
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    first = names["scores"].values.clone()
    assert first.shape == (512, 2, 1) and bool((first.std(dim=0) > 0).all())
    for block in blocks[1:]:
        exec(block, names)
    ids = names["table"].top("L3H0", count=5).tolist()
    assert ids == first[:, 0, 0].topk(5).indices.tolist()
    together = names["found"]["induction"].values
    torch.testing.assert_close(together, first, rtol=0, atol=1e-4 * float(first.abs().max()))
    sums = names["parts"].values.sum(1)
    torch.testing.assert_close(sums, together[[3, 17]], rtol=1e-3, atol=1e-6)
    assert names["curvature"] is not None


COMMAND_PAGE = (Path(__file__).parents[1] / "docs" / "score-command.md").read_text("utf-8")


def test_the_commands_of_the_score_page_are_understood_and_all_options_explained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = re.findall(r"^mda-lightning (score .*)$", COMMAND_PAGE, re.M)
    assert len(lines) >= 8
    for line in lines:
        options = _parser().parse_args(shlex.split(line))
        assert options.command == "score"
        assert options.checkpoints and options.data
    with pytest.raises(SystemExit):
        _parser().parse_args(["score", "--help"])
    named = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert len(named) > 20
    assert {name for name in named if name not in COMMAND_PAGE} == set()


def test_the_python_of_the_score_page_runs(tmp_path: Path, monkeypatch) -> None:
    """Scores of a small random model, and every way to read them that is shown."""
    rows = np.random.default_rng(0).integers(1, 60, (40, 13))
    vocabulary = {f"w{i}": i for i in range(60)}
    corpus = tmp_path / "corpora" / "mine"
    domains = ["text", "code"] * 20
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0")).to_str()
    TokenRows.write(
        corpus,
        rows,
        domains=domains,
        vocab_size=60,
        special_ids=(0,),
        tokenizer_json=tokenizer,
        provenance={},
    )
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "runs" / "mine" / "checkpoints" / "step-1000.ckpt"
    random_neox(vocab_size=60, n_layers=3, n_heads=4).save_pretrained(checkpoint)
    shutil.copytree(checkpoint, tmp_path / "runs" / "mine" / "window" / "mid-step1000")
    command = next(line for line in COMMAND_PAGE.splitlines() if "--mechanism induction," in line)
    more = " --output runs/mine/scores-window --per-token 3,17 --curvature-samples 32 --quiet"
    assert main(shlex.split(command.removeprefix("mda-lightning ") + more)) == EXIT_OK
    blocks = re.findall(r"```python\n(.*?)```", COMMAND_PAGE, re.S)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks:
        with warnings.catch_warnings():  # 40 samples are few for a curvature
            warnings.filterwarnings("ignore", "the curvature is estimated on")
            exec(block, names)
    assert len(names["tables"]["induction"]) == 40
    total = names["one"].sum()
    assert total == pytest.approx(names["table"].sample(3, "L2H2")["score"].item(), rel=1e-3)


PLANS_PAGE = (Path(__file__).parents[1] / "docs" / "plans.md").read_text("utf-8")


def test_the_commands_of_the_plans_page_are_understood_and_all_options_explained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = re.findall(r"^mda-lightning (plan .*)$", PLANS_PAGE, re.M)
    for line in lines:
        assert _parser().parse_args(shlex.split(line)).command == "plan"
    commands = {shlex.split(line)[1] for line in lines}
    assert commands >= {"mask", "insert", "duplicate", "replace", "prune", "compose", "show"}
    for command in [*commands, "control"]:
        with pytest.raises(SystemExit):
            _parser().parse_args(["plan", command, "--help"])
    named = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert len(named) > 40
    page = set(re.findall(r"--[a-z][a-z-]+", PLANS_PAGE))
    assert named - page == set()


def test_the_steered_run_of_its_page_trains_again_as_a_plan(tmp_path: Path, monkeypatch) -> None:
    """The page's script in 12 steps, its audit table, and the replay that it shows."""
    page = (Path(__file__).parents[1] / "docs" / "steering.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    script = blocks[0]
    for shown, short in (
        ("_steps=100", "_steps=12"),
        ("warmup_steps=50", "warmup_steps=2"),
        ("until_step=80", "until_step=8"),
        ("n_curvature=32", "n_curvature=8"),
    ):
        assert shown in script
        script = script.replace(shown, short)
    rows = np.random.default_rng(0).integers(1, 512, (400, 17))
    TokenRows.write(
        tmp_path / "corpora" / "mine", rows, vocab_size=512, special_ids=(0,), provenance={}
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(script, names)
    steered = names["module"].state_dict()
    audit, replay = (next(b for b in blocks if word in b) for word in ("Decisions", "plan.json"))
    exec(audit, names)
    assert len(names["decisions"]) == 8
    frame = names["decisions"].frame
    assert len(frame) == 8 * 4 and set(frame["weight"]) == {0.0}
    module = re.search(r"module = .*?^\)$", script, re.S | re.M)
    assert module is not None
    exec(module.group(), names)
    exec(replay.replace("_steps=100", "_steps=12"), names)
    names["trainer"].fit(names["module"], datamodule=names["data"])
    again = names["module"].state_dict()
    assert all(torch.equal(steered[name], again[name]) for name in steered)
