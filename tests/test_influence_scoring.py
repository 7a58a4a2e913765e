"""InfluenceScoring: in-run equals replay where weights stand still; rows are the window's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from in_run_fits import (
    INDUCTION,
    UNITS,
    StillModule,
    assert_close,
    expected_scores,
    ihvp_of,
    scoring,
    values_of,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from models import random_neox
from torch.utils.data import DataLoader
from training import MODEL_VOCABULARY, Clock, CurveMechanism, Rows, StrangersModule, fit, jump

from mda_lightning.callbacks import CriticalWindow, InfluenceScoring, UnitMonitor
from mda_lightning.callbacks.attachment import UnsupportedTrainerError
from mda_lightning.callbacks.scoring.batch_fields import MissingFieldError
from mda_lightning.callbacks.scoring.curvature_data import RecentSequences
from mda_lightning.corpora import TokenRows
from mda_lightning.datamodules import TokenDataModule
from mda_lightning.influence import replay_scores
from mda_lightning.store import ScoreTable
from mda_lightning.units import Head


@pytest.mark.parametrize(
    ("module", "trainer"),
    [
        ({}, {}),
        ({}, {"accumulate_grad_batches": 2}),
        ({"reduction": "sum"}, {}),
        ({"reduction": "sum"}, {"accumulate_grad_batches": 3}),
    ],
)
def test_in_run_equals_replay_where_the_weights_stand_still(
    tmp_path: Path, module: dict[str, Any], trainer: dict[str, Any]
) -> None:
    one = scoring(loss_reduction=module.get("reduction", "mean"))
    accumulate = trainer.get("accumulate_grad_batches", 1)
    fit(StillModule(**module), [one], tmp_path, max_steps=6 // accumulate, **trainer)
    table = ScoreTable.open(tmp_path / "mda" / "scores")
    assert (table.estimator, table.units, table.blocks) == (
        "in_run",
        ("L0H0", "L1H1"),
        ("QK", "V", "O"),
    )
    frame = table.frame("L0H0")
    assert frame["sample_id"].tolist() == list(range(1000, 1024))
    assert frame["step"].tolist() == [i // (4 * accumulate) for i in range(24)]
    tokens = Rows(256).tokens[:24]
    values, loss = expected_scores(tokens, tokens[:4])
    assert_close(values_of(table), values)
    np.testing.assert_allclose(frame["loss"], loss, rtol=1e-5)


def corpus(folder: Path) -> TokenRows:
    tokens = np.random.default_rng(0).integers(1, 40, (300, 17))
    return TokenRows.write(folder / "rows", tokens, provenance={})


class ScoredCurve(CurveMechanism):
    """A given curve to watch, with the induction probe to score by."""

    name = "curve"
    block_names = INDUCTION.block_names

    def probe(self, model: Any) -> torch.Tensor:
        return INDUCTION.probe(model)


def watched(folder: Path, *, to: float = 0.6, **settings: Any) -> list[pl.Callback]:
    clock = Clock()
    curve = ScoredCurve(clock, jump(21, to=to, ramp=12))
    return [
        clock,
        UnitMonitor([curve], every_n_steps=1, folder=str(folder)),
        CriticalWindow("curve"),
        InfluenceScoring(curve, **({"n_curvature": 8, "units": UNITS} | settings)),
    ]


def test_in_run_scores_exactly_the_samples_of_the_window(tmp_path: Path) -> None:
    """From its back-dated start on: a warning starts the scoring before the window is known."""
    data = TokenDataModule(corpus(tmp_path), batch_size=4, n_steps=48, seed=2)
    run = watched(tmp_path)
    fit(StrangersModule(), run, tmp_path, data=data, max_steps=48)
    _, window = run[2].window
    table = ScoreTable.open(tmp_path / "scores")
    frame = table.frame("L1H1")
    expected = [(s, i) for s in range(window.start, window.end) for i in data.schedule.batch(s)[0]]
    assert sorted(zip(frame["step"], frame["sample_id"], strict=True)) == sorted(expected)
    assert table.provenance["window"] == {
        "unit": "L1H1",
        "start": window.start,
        "end": window.end,
    }
    assert table.provenance["data"]["plan_hash"] == data.plan.content_hash
    assert table.complete


@pytest.mark.parametrize("stop_at", [10, 26])
def test_resumed_every_sample_is_scored_once(tmp_path: Path, stop_at: int) -> None:
    rows = corpus(tmp_path)

    def run(folder: Path, max_steps: int, *extra: Any, ckpt_path: Any = None) -> ScoreTable | None:
        fit(
            StrangersModule(),
            [*watched(folder, active=(5, 40)), *extra],
            folder,
            data=TokenDataModule(rows, batch_size=4, n_steps=48),
            max_steps=max_steps,
            enable_checkpointing=bool(extra),
            ckpt_path=ckpt_path,
        )
        return ScoreTable.open(folder / "scores")

    whole = run(tmp_path / "whole", 48)
    saver = ModelCheckpoint(tmp_path / "at", filename="last", every_n_train_steps=stop_at)
    run(tmp_path / "cut", stop_at + 5, saver)
    cut = run(tmp_path / "cut", 48, ckpt_path=tmp_path / "at" / "last.ckpt")
    a, b = whole.frame("L1H1"), cut.frame("L1H1")
    assert a["sample_id"].tolist() == b["sample_id"].tolist()
    assert a["step"].tolist() == b["step"].tolist() and set(a["step"]) == set(range(5, 40))
    before = a["step"] < stop_at
    np.testing.assert_array_equal(a["score"][before], b["score"][before])


@pytest.mark.parametrize("edges", [["mid"], ["start", "mid", "end"]])
def test_replay_scores_the_window_at_its_checkpoints(tmp_path: Path, edges: list[str]) -> None:
    data = TokenDataModule(corpus(tmp_path), batch_size=4, n_steps=48, seed=2)
    run = watched(tmp_path, estimator="replay", replay_at=edges)
    module = StrangersModule()
    fit(module, run, tmp_path, data=data, max_steps=48)
    _, window = run[2].window
    table = ScoreTable.open(tmp_path / "scores")
    frame = table.frame("L1H1")
    assert table.estimator == "replay" and len(frame) == 4 * (window.end - window.start)
    used = table.provenance["checkpoints"]
    assert [one["edge"] for one in used] == edges
    # By hand, from the kept checkpoints.
    ids = np.concatenate([data.schedule.batch(s)[0] for s in range(window.start, window.end)])
    spread = np.linspace(0, len(ids) - 1, 8).round().astype(int)
    totals = []
    for edge in edges:
        model = random_neox(seed=0, vocab_size=MODEL_VOCABULARY)
        saved = torch.load(run[2].checkpoints[edge][1], weights_only=True)["state_dict"]
        model.load_state_dict({k.removeprefix("net.lm."): v for k, v in saved.items()})
        curve = [torch.from_numpy(data.rows.get(ids[spread]))]
        ihvp = ihvp_of(model, [Head(1, 1)], curve)
        tokens = torch.from_numpy(data.rows.get(ids))
        totals.append(replay_scores(model, ihvp, [tokens]).values.sum((1, 2)).numpy())
    expected = dict(zip(ids, np.mean(totals, 0), strict=True))
    got = dict(zip(frame["sample_id"], frame["score"], strict=True))
    assert got.keys() == expected.keys()
    scale = float(np.abs(totals).max())
    for sample, value in expected.items():
        assert got[sample] == pytest.approx(value, rel=1e-3, abs=1e-4 * scale)


def test_replay_takes_as_many_curvature_sequences_as_it_takes(tmp_path: Path) -> None:
    data = TokenDataModule(corpus(tmp_path), batch_size=8, n_steps=48, seed=2)
    run = watched(tmp_path, estimator="replay", replay_at=["mid"], n_curvature="auto")
    fit(StrangersModule(), run, tmp_path, data=data, max_steps=48)
    provenance = ScoreTable.open(tmp_path / "scores").provenance
    tried = [n for n, _ in provenance["convergence"]]
    assert tried[0] == 64 and provenance["n_sequences"] >= tried[-1]


@pytest.mark.parametrize("estimator", ["in_run", "replay"])
def test_without_a_window_nothing_is_written_and_it_says_so(tmp_path: Path, estimator: str) -> None:
    data = TokenDataModule(corpus(tmp_path), batch_size=4, n_steps=30)
    run = watched(tmp_path, to=0.08, estimator=estimator)
    with pytest.warns(UserWarning, match=r"scored no sample for curve: .* window\.json"):
        fit(StrangersModule(), run, tmp_path, data=data, max_steps=30)
    assert not list((tmp_path / "scores").rglob("*.parquet"))


def test_bad_input_is_named(tmp_path: Path) -> None:
    def run(callbacks: list[Any], **settings: Any) -> None:
        fit(StrangersModule(), callbacks, tmp_path, **settings)

    with pytest.raises(MissingFieldError, match=r"no 'sample_id' .it has 'tokens'.*sample_id_key"):
        run([scoring()], data=Rows(8, with_ids=False))
    with pytest.raises(MissingFieldError, match="no 'text'"):
        run([scoring(tokens_key="text")])
    with pytest.raises(ValueError, match=r"put CriticalWindow\('induction'\) before it"):
        run([InfluenceScoring("induction")])
    with pytest.raises(ValueError, match="only a TokenDataModule"):
        run(watched(tmp_path, estimator="replay"))
    with pytest.raises(ValueError, match=r"layer 7 is out of range: .* layers 0\.\.1"):
        run([scoring(units=["L7H0"])])
    *others, last = watched(tmp_path)
    with pytest.raises(ValueError, match="stands before the CriticalWindow"):
        run([others[0], others[1], last, others[2]])
    with pytest.raises(ValueError, match="first < last"):
        InfluenceScoring(active=(9, 9))

    class Manual(StrangersModule):
        automatic_optimization = False

    with pytest.raises(UnsupportedTrainerError, match="manual optimization"):
        fit(Manual(), [scoring()], tmp_path)
    wrapped = StrangersModule()
    wrapped.net["lm"] = torch.compile(wrapped.net["lm"], backend="eager")
    with pytest.raises(UnsupportedTrainerError, match=r"net\.lm is wrapped by torch\.compile"):
        fit(wrapped, [scoring(model="net.lm._orig_mod")], tmp_path)

    class Elsewhere(StrangersModule):
        def __init__(self) -> None:
            super().__init__()
            self.other = torch.nn.Linear(1, 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.other(torch.ones(1, 1)).sum()

    with pytest.raises(UnsupportedTrainerError, match="left no gradient at the heads"):
        fit(Elsewhere(), [scoring()], tmp_path)


def test_recent_sequences_are_the_newest_that_counted() -> None:
    recent = RecentSequences(5)
    for i in range(4):
        weights = torch.tensor([1.0, 0.0, 1.0]) if i == 3 else None
        recent.add(torch.arange(3 * i, 3 * i + 3)[:, None] * torch.ones(1, 4, dtype=int), weights)
    held = torch.cat(recent.batches())[:, 0].tolist()
    assert recent.full and held == [7, 8, 9, 11]
    again = RecentSequences(5)
    again.restore(recent.state())
    assert torch.cat(again.batches())[:, 0].tolist() == held


def test_a_checkpoint_while_nothing_counts(tmp_path: Path) -> None:
    """All of the recent samples are masked; what follows is scored as if it had come first."""

    class Masked(Rows):
        def __getitem__(self, i: int) -> dict[str, Any]:
            return super().__getitem__(i) | {"weight": float(i >= 12)}

    def weighted(tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(tokens))

    recent = RecentSequences(8)
    recent.add(torch.ones(4, 5, dtype=torch.int64), weighted(torch.ones(4)))
    again = RecentSequences(8)
    again.restore(recent.state())
    assert recent.state() is None and again.n_held == 0
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    one = scoring(active=(1, 6))
    fit(
        StillModule(),
        [one, saver],
        tmp_path,
        data=Masked(64),
        max_steps=5,
        enable_checkpointing=True,
    )
    table = ScoreTable.open(tmp_path / "mda" / "scores")
    tokens = Rows(64).tokens[12:20]
    assert_close(values_of(table)[-8:], expected_scores(tokens, tokens[:4])[0])


def test_once_all_is_over_no_batch_is_kept(tmp_path: Path) -> None:
    one = scoring(active=(1, 3))
    fit(StillModule(), [one], tmp_path, data=Rows(64), max_steps=8)
    held = one.state_dict()["recent"]
    torch.testing.assert_close(held.long(), Rows(64).tokens[8:12])  # of step 2, the last scored


def test_a_stranger_needs_three_lines(tmp_path: Path) -> None:
    """The README's use: nothing but the callbacks is added to someone's own script."""
    trainer = pl.Trainer(
        callbacks=[
            UnitMonitor(every_n_steps=10),
            CriticalWindow("induction"),
            InfluenceScoring("induction", estimator="in_run", active="always"),
        ],
        max_steps=3,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(StrangersModule(), DataLoader(Rows(64), batch_size=4))
    table = ScoreTable.open(tmp_path / "mda" / "scores")
    assert table.units == ("L0H0", "L0H1", "L1H0", "L1H1")
    assert len(table.top("L1H1", count=3)) == 3
