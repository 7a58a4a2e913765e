"""The contract of every callback: training with them is bit for bit training without them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from training import (
    Clock,
    CurveMechanism,
    Rows,
    StrangersModule,
    assert_bit_identical,
    fit,
    jump,
    training_state,
)

from mda_lightning.callbacks import CriticalWindow, InfluenceScoring, UnitMonitor
from mda_lightning.callbacks.probe_scope import probe_scope
from mda_lightning.mechanisms import mechanism


def all_callbacks(*, in_run: bool = True, **scoring: Any) -> list[pl.Callback]:
    """Every callback at work: a curve that opens and closes a window, and real heads scored."""
    clock = Clock()
    induction = mechanism("induction", n_sequences=4, n_probe_sequences=4)
    callbacks: list[pl.Callback] = [
        clock,
        UnitMonitor([CurveMechanism(clock, jump(3, ramp=2)), induction], every_n_steps=1),
        CriticalWindow("curve", ring=3, ring_every=2),
    ]
    if in_run:
        settings = {"active": "always", "refresh_every": 4, "n_curvature": 8} | scoring
        callbacks.append(InfluenceScoring(induction, **settings))
    return callbacks


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"module": {"dropout": True}},
    "accumulation": {"trainer": {"accumulate_grad_batches": 2}},
    "frozen submodule": {"module": {"freeze": True}},
    "bf16 autocast": {"trainer": {"precision": "bf16-mixed"}},
    "compiled in place": {"module": {"compile": True}, "in_run": False},
}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _train(tmp_path: Path, case: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
    pl.seed_everything(7, verbose=False)
    module = StrangersModule(**case.get("module", {}))
    loader = torch.utils.data.DataLoader(Rows(128), batch_size=4, shuffle=True)
    trainer = fit(
        module, callbacks, tmp_path, data=_AsDataModule(loader), **case.get("trainer", {})
    )
    return trainer


class _AsDataModule(pl.LightningDataModule):
    def __init__(self, loader: Any) -> None:
        super().__init__()
        self._loader = loader

    def train_dataloader(self) -> Any:
        return self._loader


@pytest.mark.parametrize("name", CASES)
def test_training_is_bit_identical_with_every_callback(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    scoring = {"units": ["L1H0", "L1H1"]} if name == "frozen submodule" else {}
    without = _train(tmp_path / "without", case, [])
    after_without = (torch.rand(3), np.random.rand(3), random.random())  # noqa: NPY002
    callbacks = all_callbacks(in_run=case.get("in_run", True), **scoring)
    with_all = _train(tmp_path / "with", case, callbacks)
    after_with = (torch.rand(3), np.random.rand(3), random.random())  # noqa: NPY002

    assert with_all.global_step == without.global_step == 12
    assert_bit_identical(training_state(with_all), training_state(without))
    assert_bit_identical(after_with[0], after_without[0])
    np.testing.assert_array_equal(after_with[1], after_without[1])
    assert after_with[2] == after_without[2]
    # Not trivially so: everything was at work.
    assert callbacks[1].table.curves("induction")[0].tolist() == list(range(13))
    assert callbacks[2].phase == "closed"
    if case.get("in_run", True):
        assert (tmp_path / "with" / "mda" / "scores.parquet").exists()


def _marks(module: nn.Module) -> dict[str, Any]:
    """What a callback might leave on a user's modules: attributes, hooks, modes."""
    return {
        name: (
            sorted(part.__dict__),
            sorted(part._parameters),
            sorted(part._buffers),
            sorted(part._modules),
            type(part),
            part.training,
            [len(v) for k, v in part.__dict__.items() if k.endswith("_hooks")],
            [(k, p.requires_grad) for k, p in part._parameters.items() if p is not None],
        )
        for name, part in module.named_modules()
    }


class _Fails(pl.Callback):
    def __init__(self, where: str) -> None:
        self.where = where

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.where == "training" and trainer.global_step == 5:
            raise KeyError("stop here")


@pytest.mark.parametrize("where", ["training", "probe", "nowhere"])
def test_nothing_is_left_on_the_users_modules(tmp_path: Path, where: str) -> None:
    """Neither after a fit, nor after an exception in training, nor after one inside a probe."""
    module = StrangersModule(freeze=True)
    fit(module, [], tmp_path, max_steps=1)  # what Lightning itself leaves
    before = _marks(module)
    callbacks = all_callbacks(units=["L1H0"])
    if where == "probe":
        broken = mechanism("induction", n_sequences=4)
        scores = type(broken).scores
        calls = []

        class Breaks(type(broken)):
            def scores(self, model: Any) -> Any:
                calls.append(1)
                if len(calls) == 4:
                    raise KeyError("stop here")
                return scores(self, model)

        callbacks[1].mechanisms[1] = Breaks(n_sequences=4)
    run = [*callbacks, _Fails(where)]
    if where == "nowhere":
        fit(module, run, tmp_path)
    else:
        with pytest.raises(KeyError, match="stop here"):
            fit(module, run, tmp_path)
    after = _marks(module)
    assert after == before


@pytest.mark.parametrize(
    "arguments",
    [
        {"fast_dev_run": 3},
        {"logger": False},
        {"logger": "two"},
        {"enable_checkpointing": True, "num_sanity_val_steps": 2},
        {"max_steps": 0},
    ],
    ids=["fast_dev_run", "no logger", "two loggers", "sanity check", "no step"],
)
def test_survives(tmp_path: Path, arguments: dict[str, Any]) -> None:
    if arguments.get("logger") == "two":
        loggers = [CSVLogger(tmp_path, name="a"), TensorBoardLogger(tmp_path, name="b")]
        arguments = {"logger": loggers}

    class WithValidation(_AsDataModule):
        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Rows(8), batch_size=4)

    class Validates(StrangersModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", self.training_step(batch, batch_idx))

    loader = torch.utils.data.DataLoader(Rows(64), batch_size=4)
    fit(Validates(), all_callbacks(), tmp_path, data=WithValidation(loader), **arguments)
    if "fast_dev_run" in arguments:
        assert not list(tmp_path.rglob("*.parquet")) and not list(tmp_path.rglob("*.ckpt"))


def test_callback_states_load_under_weights_only_and_go_round(tmp_path: Path) -> None:
    callbacks = all_callbacks()
    trainer = fit(StrangersModule(), callbacks, tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    ours = [c for c in callbacks if c.state_dict()]
    assert len({c.state_key for c in ours}) == len(ours) == 3
    again = all_callbacks()
    for callback in again:
        if callback.state_key in saved and callback.state_dict is not None:
            callback.load_state_dict(saved[callback.state_key])
            assert_bit_identical(callback.state_dict(), saved[callback.state_key])


def test_state_keys_tell_settings_apart() -> None:
    assert UnitMonitor().state_key == UnitMonitor(every_n_steps=3).state_key
    assert UnitMonitor().state_key != UnitMonitor(["induction"]).state_key
    assert CriticalWindow().state_key != CriticalWindow(target="L1H1").state_key
    assert InfluenceScoring().state_key != InfluenceScoring(estimator="replay").state_key


def test_fsdp_is_refused_at_setup() -> None:
    from lightning.pytorch.strategies import FSDPStrategy

    from mda_lightning.callbacks.attachment import UnsupportedTrainerError, check_strategy

    class Sharded:
        strategy = FSDPStrategy(accelerator=None)

    with pytest.raises(UnsupportedTrainerError, match="UnitMonitor cannot work under FSDP"):
        check_strategy(Sharded(), "UnitMonitor")


def test_probe_scope_gives_back_random_states_and_modes_after_an_error() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 3))
    module[1].eval()
    pl.seed_everything(0, verbose=False)
    expected = (torch.rand(2), np.random.rand(), random.random())  # noqa: NPY002
    pl.seed_everything(0, verbose=False)
    with pytest.raises(ZeroDivisionError), probe_scope(module):
        assert not any(part.training for part in module.modules())
        torch.rand(5), np.random.rand(5), random.random()  # noqa: NPY002
        raise ZeroDivisionError
    assert [part.training for part in module.modules()] == [True, True, False, True]
    assert torch.equal(torch.rand(2), expected[0])
    assert (np.random.rand(), random.random()) == expected[1:]  # noqa: NPY002


def test_probe_scope_switches_autocast_off() -> None:
    layer = nn.Linear(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with probe_scope(layer):
            assert layer(torch.ones(1, 2)).dtype == torch.float32
        assert layer(torch.ones(1, 2)).dtype == torch.bfloat16
