"""Several mechanisms in one pass, refreshes, and what is not finite or not there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from in_run_fits import (
    INDUCTION,
    UNITS,
    MovingModule,
    StillModule,
    Weighted,
    assert_close,
    expected_scores,
    score,
    scoring,
    values_of,
)
from torch.utils.data import DataLoader, DistributedSampler
from training import Clock, CurveMechanism, Rows, StrangersModule, fit, jump

from mda_lightning.callbacks import CriticalWindow, InfluenceScoring, UnitMonitor
from mda_lightning.corpora import TokenRows
from mda_lightning.datamodules import TokenDataModule
from mda_lightning.mechanisms import mechanism
from mda_lightning.store import ScoreTable

PREVIOUS = mechanism("previous_token", n_sequences=4, n_probe_sequences=6)


def opened(folder: Path, name: str) -> ScoreTable:
    return ScoreTable.open(folder / "mda" / "scores", mechanism=name)


def test_two_mechanisms_have_the_scores_that_each_has_alone(tmp_path: Path) -> None:
    """While training, with refreshes; the curvature is one, of all blocks of either."""
    both = scoring([INDUCTION, PREVIOUS], refresh_every=2)
    fit(MovingModule(), [both], tmp_path / "both", max_steps=6)
    for one in (INDUCTION, PREVIOUS):
        alone = scoring(one, refresh_every=2)
        fit(MovingModule(), [alone], tmp_path / one.name, max_steps=6)
        found, expected = opened(tmp_path / "both", one.name), opened(tmp_path / one.name, one.name)
        assert found.blocks == one.block_names and len(found) == 24
        assert_close(values_of(found), values_of(expected))
        steps = found.frame("L0H0")[["step", "ihvp_step"]].drop_duplicates().to_numpy().tolist()
        assert steps == [[0, 0], [1, 0], [2, 2], [3, 2], [4, 4], [5, 4]]
        assert [r["step"] for r in found.provenance["refreshes"]] == [0, 2, 4]
        assert found.provenance["mechanism"] == one.name


class Early(CurveMechanism):
    """A given curve to watch, with the induction probe to score by."""

    name: ClassVar[str] = "early"
    block_names = INDUCTION.block_names

    def probe(self, model: Any) -> torch.Tensor:
        return INDUCTION.probe(model)


class Late(CurveMechanism):
    """The same, with the previous-token probe."""

    name: ClassVar[str] = "late"
    block_names = PREVIOUS.block_names

    def probe(self, model: Any) -> torch.Tensor:
        return PREVIOUS.probe(model)


def test_each_mechanism_is_scored_in_its_own_window(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(1, 40, (300, 17))
    rows = TokenRows.write(tmp_path / "rows", tokens, provenance={})
    data, clock = TokenDataModule(rows, batch_size=4, n_steps=64, seed=2), Clock()
    curves = [Early(clock, jump(9, ramp=10)), Late(clock, jump(23, ramp=12))]
    windows = [CriticalWindow("early"), CriticalWindow("late")]
    monitor = UnitMonitor(curves, measures=(), every_n_steps=1, live=False)
    last = InfluenceScoring(curves, units=UNITS, n_curvature=8)
    fit(StrangersModule(), [clock, monitor, *windows, last], tmp_path, data=data, max_steps=64)
    spans = []
    for window in windows:
        _, found = window.window
        spans.append((found.start, found.end))
        frame = opened(tmp_path, window.mechanism).frame("L1H1")
        steps = range(found.start, found.end)
        expected = [(s, i) for s in steps for i in data.schedule.batch(s)[0]]
        assert sorted(zip(frame["step"], frame["sample_id"], strict=True)) == sorted(expected)
    (first_start, first_end), (second_start, second_end) = spans
    assert first_start < second_start and first_end < second_end


@pytest.mark.parametrize("kind", ["tensor", "rows", "folder"])
def test_the_curvature_of_a_fixed_set(tmp_path: Path, kind: str) -> None:
    tokens = torch.randint(1, 40, (9, 17), generator=torch.Generator().manual_seed(5))
    rows = TokenRows.write(tmp_path / "set", tokens.numpy(), provenance={})
    given: Any = {"tensor": tokens, "rows": rows, "folder": str(tmp_path / "set")}[kind]
    table = score(tmp_path, StillModule(), scoring(curvature_set=given, n_curvature=5), max_steps=4)
    own = Rows(256).tokens[:16]
    assert_close(values_of(table), expected_scores(own, tokens[::2])[0])
    assert table.provenance["n_sequences"] == 5
    assert "a fixed set" in table.provenance["curvature_data"]


def test_refreshes_go_on_from_a_fixed_set(tmp_path: Path) -> None:
    """Each at the weights of its step, and a mask in the stream is no matter to them."""
    tokens = torch.randint(1, 40, (4, 17), generator=torch.Generator().manual_seed(5))
    callback = scoring(curvature_set=tokens, refresh_every=3, active=(2, 9))
    table = score(tmp_path, MovingModule(), callback, data=Weighted(64), max_steps=10)
    frame = table.frame("L0H0")
    assert sorted(set(zip(frame["step"], frame["ihvp_step"], strict=True))) == [
        (s, 2 + (s - 2) // 3 * 3) for s in range(2, 9)
    ]
    refreshes = table.provenance["refreshes"]
    assert len({one["weights_hash"] for one in refreshes}) == len(refreshes) == 3


# -- not finite, not there -------------------------------------------------------------------------


class BreaksDown(StillModule):
    """The gradient of one sample of step 2 is not finite; the others' are."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        broken = batch_idx == 2
        weight = torch.tensor([1.0, float("inf") if broken else 1.0, 1.0, 1.0])
        return super().training_step(batch | {"weight": weight}, batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self.parameters():
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)


def test_a_sample_that_is_not_finite_is_named_and_counted(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"at step 2 .* 1 samples .* of L0H0, L1H1: 1009;"):
        table = score(tmp_path, BreaksDown(), scoring(), max_steps=4)
    found, (values, _) = values_of(table), expected_scores(Rows(256).tokens[:16], Rows(4).tokens)
    broken = np.arange(16) == 9
    assert np.isnan(found[broken]).all() and table.n_not_finite == 1
    assert table.provenance["n_not_finite"] == 1
    assert_close(found[~broken], values[~broken])
    with pytest.warns(UserWarning):
        assert 1009 not in table.top("L1H1", count=15)


def test_what_is_not_finite_is_counted_anew_in_every_fit(tmp_path: Path) -> None:
    callback = scoring()
    with pytest.warns(UserWarning, match="at step 2"):
        score(tmp_path / "first", BreaksDown(), callback, max_steps=4)
    table = score(tmp_path / "second", StillModule(), callback, max_steps=4)
    assert table.provenance["n_not_finite"] == table.n_not_finite == 0


def test_units_without_a_probe_gradient_are_named(tmp_path: Path) -> None:
    class OneHead(type(PREVIOUS)):
        """f does not depend on L0H0."""

        def probe(self, model: Any) -> torch.Tensor:
            return super().probe(model) * torch.tensor([[0.0, 1.0], [1.0, 1.0]])

    blind = OneHead(**{k: v for k, v in vars(PREVIOUS).items() if k != "_built"})
    with pytest.warns(UserWarning, match=r"f is zero in L0H0 at step 0: nothing") as told:
        table = score(tmp_path, StillModule(), scoring(blind), max_steps=2)
    values = values_of(table)
    assert np.isnan(values[:, 0]).all() and (values[:, 1] != 0).all()
    assert np.isfinite(values[:, 1]).all() and table.provenance["n_not_finite"] == 0
    assert not [one for one in told if "are not finite" in str(one.message)]


def test_a_loss_that_is_scaled_otherwise_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"16 times as much as loss_reduction='mean'"):
        score(tmp_path, StillModule(reduction="sum"), scoring(), batch_size=1, max_steps=2)


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="each name once"):
        InfluenceScoring([INDUCTION, replace(INDUCTION, n_sequences=5)])
    with pytest.raises(ValueError, match="each name once"):
        InfluenceScoring([])
    with pytest.raises(ValueError, match="two InfluenceScoring write the scores of induction"):
        fit(StillModule(), [scoring(), scoring([PREVIOUS, INDUCTION], seed=1)], tmp_path)
    with pytest.raises(ValueError, match=r"curvature_set is of shape \(7,\)"):
        fit(StillModule(), [scoring(curvature_set=torch.ones(7))], tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder of token rows"):
        fit(StillModule(), [scoring(curvature_set=str(tmp_path / "none"))], tmp_path)
    score(tmp_path, StillModule(), scoring(), max_steps=1)
    with pytest.raises(ValueError, match="holds a score table and cannot take up units"):
        fit(StillModule(), [scoring(units=["L0H1"])], tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"damping": -1.0}, "damping -1.0"),
        ({"damping": float("nan")}, "damping nan"),
        ({"seed": -1}, "seed=-1"),
        ({"units": []}, "names no head"),
        ({"units": ["L0H0", "L1H1", "L0H0"]}, "names L0H0 more than once"),
        ({"units": "L0H0"}, r"units='L0H0'.*\['L0H0'\]"),
        ({"units": "target"}, "known only afterwards"),
        ({"estimator": "inrun"}, "one of 'in_run', 'replay'"),
        ({"loss_reduction": "none"}, "one of 'mean', 'sum'"),
        ({"curvature": "diagonal"}, "one of 'ekfac', 'kfac', 'identity'"),
        ({"fisher": "true"}, "one of 'sampled', 'empirical'"),
        ({"active": "never"}, "'window', 'always'"),
        ({"refresh_every": 0}, "refresh_every=0"),
        ({"n_curvature": "auto"}, "n_curvature='auto'.* in replay"),
        ({"estimator": "replay", "active": "always"}, "active='always' is for estimator='in_run'"),
        (
            {"estimator": "replay", "active": "window", "curvature_set": "corpus"},
            "curvature_set is for estimator='in_run'",
        ),
    ],
)
def test_arguments_that_mean_nothing_are_refused_at_once(
    settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        scoring(**settings)


@pytest.mark.parametrize(
    ("mechanisms", "settings", "said"),
    [
        (replace(INDUCTION, token_ids=tuple(range(1, 500))), {}, "not in the model's vocabulary"),
        (replace(INDUCTION, token_ids=tuple(range(1, 9))), {}, "too few"),
        (
            replace(INDUCTION, length=(40, 45), repeats=50, token_ids=tuple(range(1, 48))),
            {},
            "longer than the model's context",
        ),
        (INDUCTION, {"curvature_set": torch.full((8, 17), 900)}, "curvature_set: token id 900"),
        (INDUCTION, {"curvature_set": torch.tensor([[1, 2, -1, 4]] * 8)}, "before real ones"),
    ],
)
def test_what_a_model_cannot_read_is_refused_before_the_first_step(
    tmp_path: Path, mechanisms: Any, settings: dict[str, Any], said: str
) -> None:
    """Long before it is needed."""

    class Untrained(StillModule):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
            raise AssertionError("a step was taken")

    with pytest.raises(ValueError, match=said):
        fit(Untrained(), [scoring(mechanisms, active=(50, 60), **settings)], tmp_path)


# -- two processes ---------------------------------------------------------------------------------


class Tells(pl.Callback):
    """What a rank refreshed on, in a file of its own."""

    def __init__(self, callback: InfluenceScoring, folder: Path) -> None:
        self.callback, self.folder = callback, folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        scorer = self.callback._training._scorer
        told = {
            name: [[str(u), b, v.double().flatten().tolist()] for (u, b), v in ihvp.items()]
            for name, ihvp in scorer._ihvps.items()
        }
        (self.folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(told))


class Apart(pl.LightningDataModule):
    """Rows in turn: rank 0 has the even ones."""

    def train_dataloader(self) -> Any:
        data = Weighted(32)
        return DataLoader(data, batch_size=4, sampler=DistributedSampler(data, shuffle=False))


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_score_their_own_samples_by_one_curvature(
    tmp_path: Path, accumulate: int
) -> None:
    callback = scoring([INDUCTION, PREVIOUS])
    fit(
        StillModule(),
        [callback, Tells(callback, tmp_path)],
        tmp_path,
        data=Apart(),
        max_steps=4 // accumulate,
        devices=2,
        strategy="ddp_spawn",
        accumulate_grad_batches=accumulate,
    )
    ranks = [json.loads((tmp_path / f"rank-{r}.json").read_text()) for r in range(2)]
    assert ranks[0] == ranks[1] and ranks[0]
    data = Weighted(32)
    weight = np.array([data[i]["weight"] for i in range(32)])
    for one in (INDUCTION, PREVIOUS):
        table = opened(tmp_path, one.name)
        ids = table.frame("L0H0")["sample_id"].to_numpy() - 1000
        assert sorted(ids) == list(range(32))
        # The first batch of rank 0, less its masked sample.
        first = [i for i in (0, 2, 4, 6) if weight[i] > 0]
        values, loss = expected_scores(data.tokens, data.tokens[first], one)
        found = values_of(table)
        kept = weight[ids] > 0
        assert np.isnan(found[~kept]).all()
        assert_close(found[kept], values[ids][kept])
        np.testing.assert_allclose(table.frame("L0H0")["loss"], loss[ids], rtol=1e-5)
