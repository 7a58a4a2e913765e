"""``mda-lightning score`` in processes of its own: killed outright, and from a hub on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from hub_server import Hub, serve
from models import random_neox

from mda_lightning.influence import weights_hash
from mda_lightning.store import ScoreTable

N = 400

# Every batch is written at once, and takes long enough to be killed in the middle.
_DRIVER = """
import json, sys, time
from mda_lightning.cli import main
from mda_lightning.influence import ReplayScorer
from mda_lightning.store.chunks import ChunkFolder
arguments, pause = json.loads(sys.argv[1])
ChunkFolder.__init__.__kwdefaults__["seconds"] = 0.0
score = ReplayScorer.score
def slow(self, tokens):
    time.sleep(pause)
    print("scored", len(tokens), flush=True)
    return score(self, tokens)
ReplayScorer.score = slow
sys.exit(main(["score", *arguments]))
"""


def _start(arguments: list[str], *, pause: float = 0.0, **variables: str) -> subprocess.Popen:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.Popen(
        [sys.executable, "-c", _DRIVER, json.dumps([arguments, pause])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=kept | variables,
    )


def _values(folder: Path) -> np.ndarray:
    table = ScoreTable.open(folder)
    assert table.complete and len(table) == N
    return np.stack([table.scores(unit)[1] for unit in table.units])


def test_killed_outright_it_loses_a_batch_at_most(tmp_path: Path) -> None:
    random_neox(vocab_size=60).save_pretrained(tmp_path / "model")
    tokens = np.random.default_rng(0).integers(1, 60, (N, 13)).astype(np.uint16)
    np.save(tmp_path / "rows.npy", tokens)

    def arguments(output: str) -> list[str]:
        places = [str(tmp_path / "model"), "--data", str(tmp_path / "rows.npy")]
        return [*places, "--output", str(tmp_path / output), "--batch-size", "10", "--quiet"]

    whole = _start(arguments("whole"))
    assert whole.wait(120) == 0, whole.stderr.read()
    n_scored = []
    for number in range(3):
        process = _start(arguments("killed"), pause=0.05 if number < 2 else 0.0)
        seen = 0
        for line in process.stdout:
            seen += int(line.split()[1])
            if number < 2 and seen >= 100:
                process.send_signal(signal.SIGKILL)
                break
        process.wait(120)
        process.stdout.close()
        n_scored.append(seen)
        if number < 2:
            assert process.returncode == -signal.SIGKILL
            assert not (tmp_path / "killed" / "induction").exists()
    assert process.returncode == 0
    assert n_scored[2] <= N - 2 * 100 + 2 * 10 + 20 < N
    np.testing.assert_array_equal(_values(tmp_path / "killed"), _values(tmp_path / "whole"))


def test_revisions_of_the_hub_are_scored_and_named(tmp_path: Path) -> None:
    models = {f"step{step}": random_neox(seed=step, vocab_size=60) for step in (128, 256)}
    folders = {}
    for revision, model in models.items():
        folders[revision] = tmp_path / "hub" / revision
        model.save_pretrained(folders[revision])
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(1, 60, (N, 9)))
    with serve(Hub("someone/tiny", folders)) as hub:
        places = ["--data", str(tmp_path / "rows.npy"), "--output", str(tmp_path / "out")]
        process = _start(
            ["someone/tiny@step128,step256", *places, "--curvature", "identity", "--quiet"],
            HF_ENDPOINT=hub.address,
            HF_HOME=str(tmp_path / "home"),
        )
        _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    table = ScoreTable.open(tmp_path / "out")
    kept = table.provenance["checkpoints"]
    assert [one["step"] for one in kept] == [128, 256]
    assert [one["weights_hash"] for one in kept] == [weights_hash(m) for m in models.values()]
    assert len(table) == N
