"""PythiaModule under a Trainer: precision, clipping, compilation, checkpoints, wrong batches."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import GPTNeoXConfig

from mda_lightning.pretraining import PythiaModule

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
ROWS = torch.randint(32, (64, 9), generator=torch.Generator().manual_seed(0))


def trainer_of(folder: Path, **settings) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return L.Trainer(**(defaults | settings))


def loader() -> DataLoader:
    return DataLoader(ROWS, batch_size=4)


class Norms(L.Callback):
    """Gradient norm of every update after the module clipped it."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        grads = [p.grad for p in pl_module.parameters()]
        self.norms.append(torch.nn.utils.get_total_norm(grads).item())


def test_it_learns_its_data_and_logs_what_it_says(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    module = PythiaModule(TINY, learning_rate=1e-2)
    trainer_of(tmp_path, max_epochs=20, logger=logger, log_every_n_steps=1).fit(module, loader())
    header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    table = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    first, last = float(table[0]["train/loss"]), float(table[-1]["train/loss"])
    assert first == pytest.approx(torch.log(torch.tensor(32.0)).item(), abs=0.5)
    assert last < first - 0.5
    # A row's step is that of the update its batch makes: before row s, s updates were made.
    assert [int(row["step"]) for row in table] == list(range(320))
    assert [float(row["tokens"]) for row in table[:3]] == [32, 64, 96]
    assert float(table[0]["lr"]) == pytest.approx(1e-2 / 3)


@pytest.mark.parametrize(("setting", "limit"), [(1.0, 1.0), (None, None), (0.01, 0.01)])
def test_gradients_are_clipped_by_the_module_unless_the_trainer_says_so(
    tmp_path: Path, setting: float | None, limit: float | None
) -> None:
    large = PythiaModule(TINY, learning_rate=1e-9, gradient_clip=setting)
    with torch.no_grad():
        for parameter in large.parameters():
            parameter.mul_(30)
    norms = Norms()
    trainer_of(tmp_path, max_steps=2, callbacks=[norms]).fit(large, loader())
    if limit is None:
        assert min(norms.norms) > 1.5
    else:
        assert norms.norms == pytest.approx([limit, limit], rel=1e-3)


def test_trainer_clipping_takes_precedence(tmp_path: Path) -> None:
    norms = Norms()
    trainer = trainer_of(tmp_path, max_steps=1, gradient_clip_val=0.003, callbacks=[norms])
    trainer.fit(PythiaModule(TINY), loader())
    assert norms.norms == pytest.approx([0.003], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_stays_near_float32(tmp_path: Path, precision: str) -> None:
    losses = {}
    for used in ("32-true", precision):
        module = PythiaModule(TINY)
        trainer = trainer_of(tmp_path, max_steps=5, precision=used)
        trainer.fit(module, loader())
        losses[used] = trainer.callback_metrics["train/loss"].item()
        assert all(p.isfinite().all() for p in module.parameters())
    assert losses[precision] == pytest.approx(losses["32-true"], abs=0.05)
    assert losses[precision] != losses["32-true"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the loss scaler of float16 needs a GPU")
def test_float16_trains_with_a_loss_scaler(tmp_path: Path) -> None:
    module = PythiaModule(TINY)
    trainer = trainer_of(tmp_path, max_epochs=1, precision="16-mixed", accelerator="gpu", devices=1)
    trainer.fit(module, loader())
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_float16_gets_an_optimizer_that_can_be_clipped(tmp_path: Path) -> None:
    """Lightning refuses to clip a fused optimizer's gradients under mixed precision."""

    class Scaled:
        precision = "16-mixed"

    module = PythiaModule(TINY, total_steps=10)
    assert module.configure_optimizers()["optimizer"].defaults["fused"]
    module._trainer = Scaled()  # type: ignore[assignment]
    assert not module.configure_optimizers()["optimizer"].defaults["fused"]


def test_checkpoint_is_read_as_weights_only_and_builds_the_same_model(tmp_path: Path) -> None:
    module = PythiaModule(GPTNeoXConfig(**TINY, rotary_pct=0.5), init_seed=7, total_steps=20)
    trainer = trainer_of(tmp_path, max_steps=3)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "m.ckpt", weights_only=False)
    assert torch.load(tmp_path / "m.ckpt", weights_only=True)["tokens_seen"] == 3 * 4 * 8
    again = PythiaModule.load_from_checkpoint(tmp_path / "m.ckpt", weights_only=True)
    assert again.hparams["init_seed"] == 7
    assert again.model.config.rope_parameters["partial_rotary_factor"] == 0.5
    logits = module(ROWS[:, :-1])
    assert torch.equal(again(ROWS[:, :-1]), logits)


def test_resumed_run_ends_where_the_whole_run_does(tmp_path: Path) -> None:
    def module() -> PythiaModule:
        return PythiaModule(TINY, total_steps=32, schedule="wsd", warmup_steps=2, decay_steps=8)

    whole, half, resumed = module(), module(), module()
    trainer_of(tmp_path, max_epochs=2).fit(whole, loader())
    stopped = trainer_of(tmp_path, max_epochs=1)
    stopped.fit(half, loader())
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    trainer_of(tmp_path, max_epochs=2).fit(
        resumed, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    assert resumed._tokens_seen == whole._tokens_seen == 2 * 64 * 8


def test_compiled_in_place_keeps_its_names(tmp_path: Path) -> None:
    plain, compiled = PythiaModule(TINY), PythiaModule(TINY, compile=True)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(compiled(ROWS[:, :-1]), plain(ROWS[:, :-1]))


@pytest.mark.slow
def test_compiled_run_stays_near_the_eager_one(tmp_path: Path) -> None:
    losses = []
    for compile_model in (False, True):
        trainer = trainer_of(tmp_path, max_steps=5)
        trainer.fit(PythiaModule(TINY, compile=compile_model), loader())
        losses.append(trainer.callback_metrics["train/loss"].item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"input_ids": ROWS}, TypeError, r"'tokens' \[B, T\+1\].*input_ids"),
        ([ROWS], TypeError, "this one has list"),
        (ROWS[0], ValueError, r"shape \(9,\); they must be \[B, T\+1\]"),
        (ROWS + 90, ValueError, r"token id 121 .* 32 rows: give PythiaModule\(vocab_size="),
    ],
)
def test_wrong_batches_say_what_a_batch_is(
    tmp_path: Path, batch: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        trainer_of(tmp_path, max_steps=1).fit(
            PythiaModule(TINY), DataLoader([batch], batch_size=None)
        )


def test_a_run_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"total_steps=.* or Trainer\(max_steps="):
        trainer_of(tmp_path, max_epochs=-1).fit(PythiaModule(TINY), loader())


@pytest.mark.parametrize("value", ["mean", "sum"])
def test_unknown_normalisation_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"normalize='{value}': choose 'batch' or 'kept'"):
        PythiaModule(TINY, normalize=value)  # type: ignore[arg-type]
