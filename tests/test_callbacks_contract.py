"""The contract of every callback: training with them is bit for bit training without them."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from torch import nn
from training import (
    ROW,
    VOCABULARY,
    Clock,
    CurveMechanism,
    FakeMeasure,
    Rows,
    StrangersModule,
    assert_bit_identical,
    fit,
    jump,
    training_state,
)

from mda_lightning import measures
from mda_lightning.callbacks import (
    CriticalWindow,
    InfluenceScoring,
    ScheduledCheckpoints,
    UnitMonitor,
)
from mda_lightning.callbacks.probe_scope import probe_scope
from mda_lightning.corpora import TokenRows
from mda_lightning.datamodules import TokenDataModule
from mda_lightning.mechanisms import mechanism
from mda_lightning.store import ScoreTable

TEXT = torch.randint(1, VOCABULARY, (4, 41), generator=torch.Generator().manual_seed(5)).numpy()
MEASURES = (
    *("ablation", "icl", "held_out_loss", "copying", "prefix_matching", "previous_token_text"),
)


def all_measures(clock: Clock) -> list[Any]:
    """Every measure there is, small and at rates of their own, and one that is made up."""
    assert set(MEASURES) == set(measures.MEASURES), "a measure that this suite does not cover"
    return [
        measures.measure("ablation", n_sequences=4, every_n_steps=2),
        measures.measure("icl", text=TEXT, every_n_steps=3),
        measures.measure("held_out_loss", text=TEXT, every_n_steps=4),
        measures.measure("copying", every_n_steps=4),
        measures.measure("prefix_matching", text=TEXT, length=32, every_n_steps=4),
        measures.measure("previous_token_text", text=TEXT, length=32, every_n_steps=4),
        FakeMeasure(clock),
    ]


def all_callbacks(**scoring: Any) -> list[pl.Callback]:
    """Every callback at work: a curve that opens and closes a window, and real heads scored."""
    clock = Clock()
    induction = mechanism("induction", n_sequences=4, n_probe_sequences=4)
    callbacks: list[pl.Callback] = [
        clock,
        UnitMonitor(
            [CurveMechanism(clock, jump(3, ramp=2)), induction],
            measures=all_measures(clock),
            every_n_steps=1,
        ),
        CriticalWindow("curve", ring=3, ring_every=2),
    ]
    settings = {"active": "always", "refresh_every": 4, "n_curvature": 8} | scoring
    callbacks.append(InfluenceScoring(induction, **settings))
    return [*callbacks, ScheduledCheckpoints("0, log2..4, every 5, last")]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"module": {"dropout": True}},
    "accumulation": {"trainer": {"accumulate_grad_batches": 2}},
    "frozen submodule": {"module": {"freeze": True}},
    "bf16 autocast": {"trainer": {"precision": "bf16-mixed"}},
    "compiled in place": {"module": {"compile": True}},
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
    torch.compiler.reset()  # what was compiled without hooks would be taken again
    callbacks = all_callbacks(**scoring)
    with_all = _train(tmp_path / "with", case, callbacks)
    after_with = (torch.rand(3), np.random.rand(3), random.random())  # noqa: NPY002

    assert with_all.global_step == without.global_step == 12
    assert_bit_identical(training_state(with_all), training_state(without))
    assert_bit_identical(after_with[0], after_without[0])
    np.testing.assert_array_equal(after_with[1], after_without[1])
    assert after_with[2] == after_without[2]
    # Not trivially so: everything was at work.
    table = callbacks[1].table
    assert table.curves("induction")[0].tolist() == list(range(13))
    assert {metric.partition("/")[0] for metric in table.metrics} >= {*MEASURES, "fake"}
    assert table.curves("ablation/logit")[0].tolist() == list(range(0, 13, 2))
    assert callbacks[2].phase == "closed"
    assert list(callbacks[-1].checkpoints) == [0, 1, 2, 4, 5, 10, 12]
    scores = ScoreTable.open(tmp_path / "with" / "mda" / "scores")
    assert scores.complete and len(scores) and scores.n_not_finite == 0


class ScoredCurve(CurveMechanism):
    """A given curve to watch, with the induction probe to score by."""

    def probe(self, model: Any) -> torch.Tensor:
        return mechanism("induction", n_sequences=4, n_probe_sequences=4).probe(model)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_replay_scoring_leaves_training_bit_identical(tmp_path: Path, accumulate: int) -> None:
    """The window closes in the middle: its samples are scored then, and training goes on."""
    tokens = np.random.default_rng(1).integers(1, VOCABULARY, (240, ROW))
    rows = TokenRows.write(tmp_path / "rows", tokens, provenance={})

    def train(folder: Path, callbacks: list[pl.Callback]) -> pl.Trainer:
        pl.seed_everything(7, verbose=False)
        return fit(
            StrangersModule(dropout=True),
            callbacks,
            folder,
            data=TokenDataModule(rows, batch_size=4, n_steps=24, seed=1),
            max_steps=24,
            accumulate_grad_batches=accumulate,
            use_distributed_sampler=False,
        )

    without = train(tmp_path / "without", [])
    after_without = torch.rand(3)
    clock = Clock()
    curve = ScoredCurve(clock, jump(3, ramp=2))
    window = CriticalWindow("curve")
    scoring = InfluenceScoring(curve, estimator="replay", n_curvature=8)
    monitor = UnitMonitor([curve], measures=all_measures(clock), every_n_steps=1)
    with_all = train(tmp_path / "with", [clock, monitor, window, scoring])
    assert window.window is not None and window.window[1].end < 20
    assert_bit_identical(training_state(with_all), training_state(without))
    assert torch.equal(torch.rand(3), after_without)
    assert (tmp_path / "with" / "mda" / "scores").is_dir()


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


@pytest.mark.parametrize("where", ["training", "probe", "measure", "nowhere"])
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
    if where == "measure":
        model = module.net["lm"]
        # The forward of a measurement is broken off in the middle, with its hooks in place.
        ablation = callbacks[1].measures[0]

        class Breaks(type(ablation)):
            def measure(self, model: Any) -> Any:
                def stop(*_: Any) -> None:
                    raise KeyError("stop here")

                hook = model.gpt_neox.layers[1].attention.register_forward_pre_hook(stop)
                try:
                    return super().measure(model)
                finally:
                    hook.remove()

        callbacks[1].measures[0] = Breaks(n_sequences=4, every_n_steps=5)
        attention_before = model.config._attn_implementation
    run = [*callbacks, _Fails(where)]
    if where == "nowhere":
        fit(module, run, tmp_path)
    else:
        with pytest.raises(KeyError, match="stop here"):
            fit(module, run, tmp_path)
    after = _marks(module)
    assert after == before
    if where == "measure":
        assert model.config._attn_implementation == attention_before


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


@pytest.mark.parametrize("finder", ["batch size", "learning rate"])
@pytest.mark.parametrize("as_callback", [False, True], ids=["tuner", "callback"])
def test_the_finders_leave_nothing_behind_that_spoils_the_fit(
    tmp_path: Path, finder: str, as_callback: bool
) -> None:
    """What the real fit finds and leaves is what it does without a finder before it."""

    class Tunable(StrangersModule):
        def __init__(self) -> None:
            super().__init__()
            self.learning_rate = 1e-2
            self.batch_size = 2

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Rows(128), batch_size=self.batch_size)

    def train(folder: Path, tune: bool) -> tuple[pl.Trainer, list[pl.Callback]]:
        pl.seed_everything(7, verbose=False)
        callbacks, module = all_callbacks(), Tunable()
        arguments: dict[str, Any] = {"num_training": 8, "update_attr": False}
        if finder == "batch size":
            arguments = {"mode": "power", "init_val": 2, "max_trials": 2, "steps_per_trial": 2}
        found: list[pl.Callback] = []
        if tune and as_callback:
            kinds = {"batch size": BatchSizeFinder, "learning rate": LearningRateFinder}
            arguments["num_training_steps"] = arguments.pop("num_training", None)
            found = [kinds[finder](**{k: v for k, v in arguments.items() if v is not None})]
        trainer = pl.Trainer(
            max_steps=10,
            callbacks=[*found, *callbacks],
            logger=CSVLogger(folder, name="", version="csv"),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            devices=1,
            default_root_dir=folder,
        )
        if tune and not as_callback:
            tuner = Tuner(trainer)
            if finder == "batch size":
                tuner.scale_batch_size(module, **arguments)
            else:
                tuner.lr_find(module, **arguments)
            for pattern in ("*.parquet", "*.html", "*.png", "*.ckpt", "*.npz"):
                assert not list(folder.rglob(pattern)), "the rehearsal left files"
        if finder == "batch size":
            module.batch_size = 4
        else:
            module.learning_rate = 1e-2
        trainer.fit(module)
        return trainer, callbacks

    plain, expected = train(tmp_path / "plain", tune=False)
    tuned, callbacks = train(tmp_path / "tuned", tune=True)
    assert tuned.global_step == plain.global_step == 10
    assert callbacks[1].table.curves("curve")[0].tolist() == list(range(11))
    assert callbacks[2].phase == expected[2].phase == "closed"
    assert callbacks[2].window == expected[2].window
    scores = [
        pd.read_parquet(tmp_path / run / "csv" / "mda" / "scores") for run in ("plain", "tuned")
    ]
    if not as_callback:
        # The weights are the same again, so is all that is measured on them.
        assert_bit_identical(training_state(tuned)["weights"], training_state(plain)["weights"])
        for metric in callbacks[1].table.metrics:
            for one, other in zip(
                callbacks[1].table.curves(metric), expected[1].table.curves(metric), strict=True
            ):
                np.testing.assert_array_equal(one, other)
        assert len(scores[0]) == len(scores[1]) > 0
    assert scores[1]["step"].min() == 0 and scores[1]["step"].max() == 9
    names = [
        sorted(
            str(path.relative_to(tmp_path / run))
            for path in (tmp_path / run).rglob("*")
            if path.is_file()
        )
        for run in ("plain", "tuned")
    ]
    assert names[0] == names[1]


def test_activations_that_are_not_finite_are_reported_and_the_rest_goes_on(
    tmp_path: Path,
) -> None:
    """A weight of the last layer's attention becomes NaN: layer 0 is measured as before."""

    class Poisons(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                layer = module.net["lm"].gpt_neox.layers[1]
                with torch.no_grad():
                    layer.attention.query_key_value.weight.fill_(float("nan"))

    clock = Clock()
    monitor = UnitMonitor(
        [mechanism("induction", n_sequences=4)],
        measures=[measures.measure("icl", text=TEXT, every_n_steps=1), FakeMeasure(clock)],
        every_n_steps=1,
        folder=str(tmp_path / "run"),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(
            StrangersModule(),
            [clock, Poisons(), monitor, CriticalWindow("induction")],
            tmp_path,
            max_steps=11,
        )
    assert trainer.global_step == 11
    said = [str(one.message) for one in caught if "not finite" in str(one.message)]
    assert [text.partition(":")[0] for text in said] == [
        "induction is not finite at step 3 in layer 1",
        *(f"{key} is not finite at step 3" for key in monitor.table.metrics if "icl" in key),
    ]
    steps, values = monitor.table.curves("induction")
    assert steps.tolist() == list(range(12))
    assert np.isfinite(values[:3]).all()
    assert np.isfinite(values[3, 0]).all() and np.isnan(values[3, 1]).all()
    assert np.isnan(values[4:]).all()  # the optimizer has carried it everywhere
    np.testing.assert_array_equal(monitor.table.curves("fake/whole@7")[1], [10.0, 20.0])
    page = (tmp_path / "run" / "live.html").read_text()
    assert all(text.partition(":")[0] in page for text in said)


def test_callback_states_load_under_weights_only_and_go_round(tmp_path: Path) -> None:
    callbacks = all_callbacks()
    trainer = fit(StrangersModule(), callbacks, tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    ours = [c for c in callbacks if c.state_dict()]
    assert len({c.state_key for c in ours}) == len(ours) == 4
    again = all_callbacks()
    for callback in again:
        if callback.state_key in saved and callback.state_dict is not None:
            callback.load_state_dict(saved[callback.state_key])
            assert_bit_identical(callback.state_dict(), saved[callback.state_key])


def test_state_keys_tell_settings_apart() -> None:
    assert UnitMonitor().state_key == UnitMonitor(every_n_steps=3).state_key
    assert UnitMonitor().state_key != UnitMonitor(["induction"]).state_key
    assert CriticalWindow().state_key != CriticalWindow(targets="L1H1").state_key
    assert InfluenceScoring().state_key != InfluenceScoring(estimator="replay").state_key
    weights = ScheduledCheckpoints("last", weights_only=True)
    assert ScheduledCheckpoints("last").state_key != weights.state_key
    # A run may be resumed with another schedule.
    assert ScheduledCheckpoints("last").state_key == ScheduledCheckpoints("every 9").state_key


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
