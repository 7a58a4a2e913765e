"""``mda-lightning monitor NAME@REVISION,...`` against a hub on loopback, in processes of its own.

The hub library reads HF_ENDPOINT and HF_HOME when it is imported, hence the processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hub_server import Hub, commit_of, serve
from models import random_neox

from mda_lightning.influence import weights_hash
from mda_lightning.metrics import InductionScore

NAME = "someone/pythia-tiny"
SEEDS = {"step0": 0, "step512": 1, "step1000": 2, "step2000": 2, "main": 3}


def model_of(revision: str):
    return random_neox(seed=SEEDS[revision], vocab_size=48)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Revisions with weights of their own, but step2000 repeats step1000's."""
    folders = {}
    for revision in SEEDS:
        folders[revision] = tmp_path / "hub" / revision
        model_of(revision).save_pretrained(folders[revision])
    with serve(Hub(NAME, folders)) as hub:
        yield hub


_DRIVER = """
import contextlib, io, json, sys
from mda_lightning.cli import main
for arguments in json.loads(sys.argv[1]):
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        code = main(["monitor", *arguments])
    print(json.dumps([code, told.getvalue()]))
"""


def monitor(hub: Hub, tmp_path: Path, *calls: list[str], **variables: str) -> list[Any]:
    """Call the command in a new process, without this machine's hub settings.

    Returns:
        For each call the exit code and what was written to standard error.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = kept | {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
        **variables,
    }
    options = ["--output", str(tmp_path / "out"), "--metrics", "induction", "--sequences", "6"]
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, json.dumps([[*call, *options] for call in calls])],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def table_of(tmp_path: Path) -> pd.DataFrame:
    return pd.read_parquet(tmp_path / "out" / "metrics.parquet")


def test_revisions_are_fetched_compared_and_measured(hub: Hub, tmp_path: Path) -> None:
    [(code, told)] = monitor(hub, tmp_path, [f"{NAME}@step2000,step512,step1000"])
    assert code == 0, told
    assert "repeated weights" in told
    assert "step1000 (step 1000)" in told and "step2000 (step 2000)" in told
    table = table_of(tmp_path)
    assert list(dict.fromkeys(table["step"])) == [512, 1000, 2000]
    for step, own in table.groupby("step"):
        model = model_of(f"step{step}")
        metric = InductionScore(model, n_sequences=6)
        metric.update(model)
        values = own.pivot(index="layer", columns="head", values="value").to_numpy(np.float32)
        np.testing.assert_array_equal(values, metric.compute().mean.numpy())
        assert set(own["weights_sha256"]) == {weights_hash(model)}
        assert set(own["checkpoint"]) == {f"{NAME}@step{step}"}
    marks = table.groupby("step")["repeats"].first()
    assert marks[1000] == f"{NAME}@step2000" and marks[2000] == f"{NAME}@step1000"
    assert marks.isna()[512]
    assert hub.downloads(f"{commit_of('step512')}/model.safetensors") == 1

    asked = len(hub.asked)
    kept, absent, listed = monitor(
        hub,
        tmp_path,
        [f"{NAME}@step512,step1000"],
        [f"{NAME}@step0"],
        [f"{NAME}@step512..step2000"],
        HF_HUB_OFFLINE="1",
    )
    assert kept[0] == 0, kept
    assert absent[0] == 1 and "HF_HUB_OFFLINE is set" in absent[1]
    assert listed[0] == 1 and "offline" in listed[1]  # a range needs the hub's list
    assert len(hub.asked) == asked


def test_a_revision_that_is_not_there_is_named_before_weights_are_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    (code, told), other = monitor(
        hub, tmp_path, [f"{NAME}@step512,step1001"], ["someone/else@step1"]
    )
    assert code == 1
    assert len(told.strip().splitlines()) == 1
    assert "no revision 'step1001'" in told and "step512, step1000, step2000" in told
    assert other[0] == 1 and "someone/else" in other[1] and hub.address in other[1]
    assert hub.downloads("model.safetensors") == 0


def test_a_range_takes_the_revisions_there_are(hub: Hub, tmp_path: Path) -> None:
    (code, told), nothing = monitor(
        hub, tmp_path, [f"{NAME}@step0..step1000"], [f"{NAME}@step3..step9"]
    )
    assert code == 0, told
    assert list(dict.fromkeys(table_of(tmp_path)["step"])) == [0, 512, 1000]
    assert nothing[0] == 1 and "no revision from step3 to step9" in nothing[1]


def test_a_misspelt_path_is_told_without_asking_the_hub(hub: Hub, tmp_path: Path) -> None:
    model_of("step0").save_pretrained(tmp_path / "cks" / "step200")
    (tmp_path / "cks" / "notes").mkdir()
    inside, word, deeper, config = monitor(
        hub,
        tmp_path,
        ["cks/stpe200"],
        ["cks/step200", "ckss"],
        [str(tmp_path / "cks" / "step20")],
        ["cks/step200", "--config", "cks/step20"],
    )
    for code, told in (inside, word, deeper, config):
        assert code == 1 and len(told.strip().splitlines()) == 1
        assert "is no file or folder here" in told
    assert "'cks/stpe200'" in inside[1] and "near it: step200" in inside[1]
    assert "'ckss'" in word[1] and "near it: cks" in word[1] and "ckss@main" in word[1]
    assert "near it: step200" in deeper[1] and "near it: step200" in config[1]
    assert hub.asked == []


def test_hub_names_are_asked_for_though_something_here_is_like_them(
    hub: Hub, tmp_path: Path
) -> None:
    """A revision, the cache, or little likeness: the hub is meant."""
    (tmp_path / "gpt2-out").mkdir()
    [far] = monitor(hub, tmp_path, ["gpt2"])
    assert far[0] == 1 and any("/gpt2/" in path for _, path in hub.asked)
    (tmp_path / "someone").mkdir()
    [refused] = monitor(hub, tmp_path, [NAME])
    assert refused[0] == 1 and f"{NAME}@main" in refused[1]
    assert not any(NAME in path for _, path in hub.asked)
    named, cached = monitor(hub, tmp_path, [f"{NAME}@main"], [NAME])
    assert named[0] == 0 and cached[0] == 0, (named, cached)


def test_a_private_model_needs_the_token_of_the_environment(hub: Hub, tmp_path: Path) -> None:
    hub.token = "hf_of_this_test"
    [(code, told)] = monitor(hub, tmp_path, [NAME])
    assert code == 1 and "HF_TOKEN" in told
    [(code, told)] = monitor(hub, tmp_path, [NAME], HF_TOKEN=hub.token)
    assert code == 0, told


def test_weights_in_other_files_are_found(hub: Hub, tmp_path: Path) -> None:
    """Shards and torch files, as older revisions have them; and a revision without any."""
    sharded, old, bare = (hub.revisions[r] for r in ("step0", "step512", "step1000"))
    for folder in (sharded, old, bare):
        (folder / "model.safetensors").unlink()
    model_of("step0").save_pretrained(sharded, max_shard_size="10KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    torch.save(model_of("step512").state_dict(), old / "pytorch_model.bin")
    none, (code, told) = monitor(hub, tmp_path, [f"{NAME}@step1000"], [f"{NAME}@step0,step512"])
    assert none[0] == 1 and "no weights" in none[1] and "step1000" in none[1]
    assert code == 0, told
    table = table_of(tmp_path)
    for step in (0, 512):
        own = table[table["step"] == step]
        assert set(own["weights_sha256"]) == {weights_hash(model_of(f"step{step}"))}


def test_a_configuration_may_come_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    state = {f"net.{k}": v for k, v in model_of("step512").state_dict().items()}
    torch.save({"state_dict": state, "global_step": 40}, tmp_path / "theirs.ckpt")
    config = ["theirs.ckpt", "--config", f"{NAME}@step512"]
    [(code, told)] = monitor(hub, tmp_path, config)
    assert code == 0, told
    table = table_of(tmp_path)
    assert set(table["weights_sha256"]) == {weights_hash(model_of("step512"))}
    assert set(table["step"]) == {40}
