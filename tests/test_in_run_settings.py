"""In-run scores under every way of training: those of replay, and training as without them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from in_run_fits import (
    INDUCTION,
    MovingModule,
    StillModule,
    Weighted,
    assert_close,
    expected_scores,
    score,
    scoring,
    values_of,
)
from lightning.pytorch.plugins import MixedPrecision
from training import Rows, assert_bit_identical, fit, training_state

from mda_lightning.callbacks.attachment import UnsupportedTrainerError
from mda_lightning.influence import probe_gradients
from mda_lightning.store import ScoreTable
from mda_lightning.units import Head


class Scaled(MixedPrecision):
    """Loss scaling as under fp16, and nothing else of it: float32 throughout."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        yield


def settings_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the module and of the trainer."""
    module: dict[str, Any] = {}
    trainer: dict[str, Any] = {}
    for part in name.split(", "):
        kind, _, value = part.partition(" ")
        if kind == "checkpointing":
            module["checkpoint"] = value == "reentrant"
        elif kind == "compiled":
            module["backend"] = value
        elif kind == "accumulation":
            trainer["accumulate_grad_batches"] = int(value)
        elif kind == "scaled":
            trainer["plugins"] = [Scaled()]
    return module, trainer


EXACT = [
    "plain",
    "accumulation 4",
    "scaled",
    "checkpointing reentrant",
    "checkpointing non-reentrant",
    "compiled eager",
    "compiled aot_eager",
    "compiled aot_eager, checkpointing non-reentrant, accumulation 2, scaled",
    pytest.param("compiled inductor", marks=pytest.mark.slow),
    pytest.param("compiled inductor, checkpointing non-reentrant", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def fresh_code(one_thread: None) -> Iterator[None]:
    """Code compiled for one test, without hooks, is not taken again by the next."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", EXACT)
def test_scores_are_replays_at_the_same_weights(tmp_path: Path, name: str) -> None:
    """Weighted samples, too; the masked one has no score, but its loss."""
    module, trainer = settings_of(name)
    data = Weighted(16)
    steps = 4 // trainer.get("accumulate_grad_batches", 1)
    table = score(tmp_path, StillModule(**module), scoring(), data=data, max_steps=steps, **trainer)
    values, loss = expected_scores(data.tokens, data.tokens[:4])
    masked = np.isin(np.arange(16), [4, 8, 12])
    found = values_of(table)
    assert np.isnan(found[masked]).all() and table.n_not_finite == 3
    assert_close(found[~masked], values[~masked])
    np.testing.assert_allclose(table.frame("L0H0")["loss"], loss, rtol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_scores_in_bf16_are_close_to_replays(tmp_path: Path, precision: str) -> None:
    """Of the float32 weights under autocast, else of the weights in bf16."""
    table = score(tmp_path, StillModule(), scoring(), max_steps=10, precision=precision)
    tokens = Rows(256).tokens[:40]
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    values, loss = expected_scores(tokens, tokens[:4], dtype=dtype)
    found, expected = values_of(table).sum(2), values.sum(2)
    for unit in range(2):
        assert np.corrcoef(found[:, unit], expected[:, unit])[0, 1] > 0.99
        assert np.polyfit(expected[:, unit], found[:, unit], 1)[0] == pytest.approx(1, abs=0.05)
    np.testing.assert_allclose(table.frame("L0H0")["loss"], loss, rtol=1e-2)


@pytest.mark.parametrize("name", [*EXACT[2:], "dropout"])
def test_training_is_bit_identical(tmp_path: Path, name: str) -> None:
    """Scored in the middle of the run, so that it is switched on and off; one case is random."""

    def train(folder: Path, callbacks: list[pl.Callback]) -> pl.Trainer:
        torch.compiler.reset()
        torch.manual_seed(3)
        module, trainer = settings_of(name)
        made = MovingModule(**module)
        if name == "dropout":
            set_dropout(made)
        return fit(made, callbacks, folder, max_steps=6, **trainer)

    without = train(tmp_path / "without", [])
    with_scores = train(tmp_path / "with", [scoring(active=(2, 4), refresh_every=1)])
    assert_bit_identical(training_state(with_scores), training_state(without))
    table = ScoreTable.open(tmp_path / "with" / "mda" / "scores")
    assert sorted(set(table.frame("L0H0")["step"])) == [2, 3] and table.n_not_finite == 0


def set_dropout(module: StillModule) -> None:
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.2


def test_scores_are_of_the_forward_that_was_trained_on(tmp_path: Path) -> None:
    """With dropout: against the parameters' own gradients, one sample a step."""

    class Gradients(pl.Callback):
        def __init__(self) -> None:
            self.found: list[torch.Tensor] = []

        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            layer = pl_module.net["lm"].gpt_neox.layers[1].attention
            self.found.append(layer.dense.weight.grad[:, 8:].clone())

    module, gradients = StillModule(), Gradients()
    set_dropout(module)
    callback = scoring(curvature="identity")
    probe = probe_gradients(module.net["lm"], INDUCTION, [Head(1, 1)])[Head(1, 1), "O"]
    torch.manual_seed(0)
    fit(module, [callback, gradients], tmp_path, max_steps=5, batch_size=1)
    expected = [-16 * float((g * probe).sum()) for g in gradients.found]  # summed over positions
    frame = ScoreTable.open(tmp_path / "mda" / "scores").frame("L1H1")
    assert_close(frame["O"].to_numpy(), np.array(expected))


def test_code_that_was_compiled_before_is_told_of_in_the_first_step(tmp_path: Path) -> None:
    module = StillModule(backend="eager")
    fit(module, [], tmp_path, max_steps=1)
    with pytest.raises(UnsupportedTrainerError, match=r"step 0 .* torch\.compiler\.reset\(\)"):
        fit(module, [scoring(active=(3, 5))], tmp_path)
    torch.compiler.reset()
    fit(module, [scoring(active=(3, 5))], tmp_path, max_steps=6)
    assert len(ScoreTable.open(tmp_path / "mda" / "scores")) == 8


def test_a_model_that_scored_before_scores_again(tmp_path: Path) -> None:
    """Compiled code of the first fit listens for that fit's callback, not for the second's."""
    module = StillModule(backend="eager")
    for run in ("first", "second"):
        fit(module, [scoring()], tmp_path / run, max_steps=2)
    first, second = (
        values_of(ScoreTable.open(tmp_path / run / "mda" / "scores")) for run in ("first", "second")
    )
    np.testing.assert_array_equal(first, second)
