"""Two processes decide alike, on all samples of a step, and go on from a checkpoint alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from steered_runs import STEPS, amplify, corpus, replayed, steered, suppress

from mda_lightning.callbacks.steering import Decisions
from mda_lightning.influence import weights_hash
from mda_lightning.interventions import Plan
from mda_lightning.store import ScoreTable

TWO = {"devices": 2, "strategy": "ddp_spawn"}


class Tells(Callback):
    """Writes down what each process ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, module: Any) -> None:
        told = {
            "plan": trainer.datamodule.schedule.plan.content_hash,
            "weights": weights_hash(module.net["lm"]),
        }
        path = self.folder / f"rank-{trainer.global_rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(told))


def told_in(folder: Path) -> dict[str, str]:
    """What both processes end with."""
    first, second = (json.loads((folder / f"rank-{r}.json").read_text()) for r in range(2))
    assert first == second
    return first


def policy_of(kind: str) -> Any:
    return suppress() if kind == "suppress" else amplify()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "accumulate"), [("suppress", 1), ("suppress", 2), ("amplify", 2)])
def test_two_processes_decide_alike_resume_and_replay(
    tmp_path: Path, kind: str, accumulate: int
) -> None:
    rows = corpus(tmp_path)

    def run(folder: Path, *extra: Any, **settings: Any) -> tuple[dict[str, str], pd.DataFrame]:
        steered(
            folder,
            rows,
            policy_of(kind),
            *extra,
            Tells(folder),
            accumulate=accumulate,
            **TWO,
            **settings,
        )
        return told_in(folder), Decisions.open(folder).frame

    told, frame = run(tmp_path / "two")
    assert frame["decision"].nunique() >= 2
    if kind == "suppress":
        # What one process decides, of the whole batch and not of a rank's part.
        steered(tmp_path / "one", rows, policy_of(kind))
        alone = Decisions.open(tmp_path / "one").frame
        for name in ("decided_at", "sample_id", "run_step", "slot"):
            assert frame[name].tolist() == alone[name].tolist()
    else:
        table = ScoreTable.open(tmp_path / "two" / "scores")
        scored = table.frame("L0H0")[["step", "sample_id"]].copy()
        scored["score"] = sum(table.frame(unit)["score"] for unit in table.units)
        recent = scored[scored["step"] < 3].groupby("sample_id")["score"].mean()
        assert len(recent) == 24  # of both processes
        expected = recent.sort_values(ascending=False).index[:6]
        assert sorted(frame.query("decision == 0")["sample_id"]) == sorted(expected)
    plan = Plan.load(tmp_path / "two" / "steering" / "plan.json")
    again = Tells(tmp_path / "again")
    replayed(
        tmp_path / "again", rows, plan, accumulate_grad_batches=accumulate, extra=[again], **TWO
    )
    assert told_in(tmp_path / "again")["weights"] == told["weights"]
    saver = ModelCheckpoint(tmp_path / "at", filename="last", every_n_train_steps=6)
    run(tmp_path / "cut", saver, max_steps=9)
    path = tmp_path / "at" / "last.ckpt"
    resumed, cut = run(tmp_path / "cut", ckpt_path=path, max_steps=STEPS)
    assert resumed == told
    pd.testing.assert_frame_equal(frame, cut, check_exact=True)
