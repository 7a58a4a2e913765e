"""AdamW's groups and the learning rate of each update."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mda_lightning.pretraining import PythiaModule
from mda_lightning.pretraining.optimization import learning_rate_schedule, parameter_groups

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}


def test_matrices_decay_and_biases_and_norms_do_not() -> None:
    module = PythiaModule(TINY)
    names = {id(p): name for name, p in module.model.named_parameters()}
    groups = parameter_groups(module, weight_decay=0.1)
    decayed = {names[id(p)] for p in groups[0]["params"]}
    spared = {names[id(p)] for p in groups[1]["params"]}
    assert (groups[0]["weight_decay"], groups[1]["weight_decay"]) == (0.1, 0.0)
    assert decayed | spared == set(names.values()) and not decayed & spared
    assert all(n.endswith("bias") or "norm" in n for n in spared)
    assert {"gpt_neox.embed_in.weight", "lm_head.weight"} <= decayed
    assert not any(n.endswith("bias") or "norm" in n for n in decayed)


def test_frozen_parameters_are_left_out() -> None:
    module = PythiaModule(TINY)
    module.model.get_input_embeddings().weight.requires_grad_(False)
    listed = [p for group in parameter_groups(module, weight_decay=0.1) for p in group["params"]]
    assert all(p is not module.model.get_input_embeddings().weight for p in listed)
    assert len(listed) == len(list(module.parameters())) - 1


@pytest.mark.parametrize(
    ("name", "step", "rate"),
    [
        # Published values of the two formulas at peak 1e-3, warmup 1,430, end 143,000.
        ("pythia", 512, 3.580e-4),
        ("pythia_v1", 512, 3.580e-4),
        ("pythia", 5_000, 9.986e-4),
        ("pythia_v1", 5_000, 9.985e-4),
        ("pythia", 20_000, 9.623e-4),
        ("pythia_v1", 20_000, 9.590e-4),
        ("pythia", 72_000, 5.521e-4),
        ("pythia_v1", 72_000, 5.102e-4),
        ("pythia", 143_000, 1e-4),
        ("pythia_v1", 115_139, 1e-4),
    ],
)
def test_pythia_schedules_at_known_steps(name: str, step: int, rate: float) -> None:
    schedule = learning_rate_schedule(name, total_steps=143_000, warmup_steps=1_430)  # type: ignore[arg-type]
    assert 1e-3 * schedule(step) == pytest.approx(rate, abs=5.1e-8)


def test_first_update_moves_the_weights_except_in_the_original_code() -> None:
    rates = {
        name: learning_rate_schedule(name, total_steps=100, warmup_steps=10)(0)
        for name in ("pythia", "pythia_v1", "wsd", "constant")
    }
    assert rates == {"pythia": 0.1, "pythia_v1": 0.0, "wsd": 0.1, "constant": 0.1}


def test_wsd_is_flat_then_falls_in_a_line_to_its_floor() -> None:
    schedule = learning_rate_schedule(
        "wsd", total_steps=100, warmup_steps=10, decay_steps=20, min_lr_ratio=0.2
    )
    assert [schedule(s) for s in (9, 50, 80)] == [1.0, 1.0, 1.0]
    assert schedule(90) == pytest.approx(0.6)
    assert schedule(100) == schedule(500) == pytest.approx(0.2)


@given(
    name=st.sampled_from(["pythia", "pythia_v1", "wsd", "constant"]),
    warmup=st.integers(0, 40),
    decay=st.integers(0, 40),
    total=st.integers(80, 200),
    floor=st.floats(0, 1),
)
def test_schedules_rise_then_never_rise_again(
    name: str, warmup: int, decay: int, total: int, floor: float
) -> None:
    schedule = learning_rate_schedule(
        name,  # type: ignore[arg-type]
        total_steps=total,
        warmup_steps=warmup,
        decay_steps=decay,
        min_lr_ratio=floor,
    )
    rates = [schedule(s) for s in range(total + 5)]
    assert all(0 <= r <= 1 for r in rates)
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1.0, abs=0.01) and peak <= warmup
    assert all(b <= a + 1e-12 for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False))
    assert math.isclose(rates[-1], rates[-2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "linear"}, "unknown schedule 'linear': there are pythia, pythia_v1, wsd"),
        ({"warmup_steps": 20}, r"warmup_steps=20 .* total_steps=10"),
        ({"schedule": "wsd", "warmup_steps": 6, "decay_steps": 6}, "do not fit"),
    ],
)
def test_schedules_that_cannot_be_are_refused_at_once(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PythiaModule(TINY, total_steps=10, **settings)


class _Rates(L.Callback):
    """The learning rate each update was made at."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_update_after_s_steps_is_made_at_the_rate_of_s(tmp_path) -> None:
    """Through a real Trainer, with accumulation, and again after a resume from a checkpoint."""
    rows = torch.arange(24 * 5).view(24, 5) % 32

    def trainer(steps: int, recorder: _Rates) -> L.Trainer:
        return L.Trainer(
            max_steps=steps,
            accumulate_grad_batches=2,
            callbacks=[recorder],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )

    def module() -> PythiaModule:
        return PythiaModule(TINY, learning_rate=0.5, warmup_steps=2, total_steps=6)

    schedule = learning_rate_schedule("pythia", total_steps=6, warmup_steps=2)
    first, second = _Rates(), _Rates()
    stopped = trainer(3, first)
    stopped.fit(module(), DataLoader(rows, batch_size=2))
    stopped.save_checkpoint(tmp_path / "three.ckpt")
    trainer(6, second).fit(
        module(), DataLoader(rows, batch_size=2), ckpt_path=tmp_path / "three.ckpt"
    )
    assert first.rates + second.rates == pytest.approx([0.5 * schedule(s) for s in range(6)])


def test_length_is_taken_from_the_trainer_when_not_given(tmp_path) -> None:
    rows = torch.arange(8 * 5).view(8, 5) % 32
    recorder = _Rates()
    trainer = L.Trainer(
        max_epochs=3,
        callbacks=[recorder],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(
        PythiaModule(TINY, learning_rate=1.0, warmup_steps=0), DataLoader(rows, batch_size=2)
    )
    schedule = learning_rate_schedule("pythia", total_steps=12, warmup_steps=0)
    assert recorder.rates == pytest.approx([schedule(s) for s in range(12)])
