"""The weighted loss: a masked sample is in its batch and teaches nothing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mda_lightning.corpora import TokenRows
from mda_lightning.datamodules import TokenDataModule
from mda_lightning.interventions import Plan
from mda_lightning.pretraining import PythiaModule
from mda_lightning.pretraining.loss import sequence_losses, weighted_loss

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
TOKENS = torch.randint(32, (8, 9), generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.5, 1.0])


def by_hand(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of one sequence [T+1], a term at a time."""
    logits = model(input_ids=tokens[None, :-1]).logits[0]
    terms = [logits[t].logsumexp(0) - logits[t, tokens[t + 1]] for t in range(len(tokens) - 1)]
    return torch.stack(terms).mean()


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert any(g.abs().max() > 1e-3 for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=0, msg=name)


def test_loss_equals_a_plain_loop() -> None:
    model = PythiaModule(TINY).model
    losses = sequence_losses(model(input_ids=TOKENS[:, :-1]).logits, TOKENS[:, 1:])
    looped = torch.stack([by_hand(model, row) for row in TOKENS])
    torch.testing.assert_close(losses, looped)
    batch = weighted_loss(losses, WEIGHTS, normalize="batch")
    kept = weighted_loss(losses, WEIGHTS, normalize="kept")
    torch.testing.assert_close(batch, (looped * WEIGHTS).sum() / 8)
    torch.testing.assert_close(kept, (looped * WEIGHTS).sum() / 4.5)


def test_gradient_is_that_of_the_kept_samples_over_the_original_batch() -> None:
    model = PythiaModule(TINY).model
    losses = sequence_losses(model(input_ids=TOKENS[:, :-1]).logits, TOKENS[:, 1:])
    actual = gradients(model, weighted_loss(losses, WEIGHTS, normalize="batch"))
    kept = [i for i in range(8) if WEIGHTS[i] > 0]
    alone = sum(WEIGHTS[i] * by_hand(model, TOKENS[i]) for i in kept)
    assert_same(actual, gradients(model, alone / 8))


def test_weights_of_one_are_no_weights() -> None:
    losses = torch.rand(8, generator=torch.Generator().manual_seed(1))
    plain = weighted_loss(losses, None, normalize="batch")
    for normalize in ("batch", "kept"):
        torch.testing.assert_close(weighted_loss(losses, torch.ones(8), normalize=normalize), plain)


@pytest.mark.parametrize("normalize", ["batch", "kept"])
def test_a_batch_masked_whole_has_no_gradient_and_no_nan(normalize: str) -> None:
    model = PythiaModule(TINY).model
    losses = sequence_losses(model(input_ids=TOKENS[:, :-1]).logits, TOKENS[:, 1:])
    loss = weighted_loss(losses, torch.zeros(8), normalize=normalize)  # type: ignore[arg-type]
    assert loss == 0
    assert all((g == 0).all() for g in gradients(model, loss).values())


def test_cross_entropy_is_float32_whatever_the_logits_are() -> None:
    logits = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    labels = torch.zeros(2, 3, dtype=torch.int64)
    losses = sequence_losses(logits, labels)
    assert losses.dtype == torch.float32
    exact = -logits.double().log_softmax(-1)[..., 0].mean(1)
    torch.testing.assert_close(losses.double(), exact, atol=1e-6, rtol=0)


class Gradients(L.Callback):
    """Writes the gradient the last update was made with: `.grad` stays until the next backward."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer, pl_module) -> None:
        if trainer.is_global_zero:
            torch.save({n: p.grad for n, p in pl_module.model.named_parameters()}, self.path)


def one_update(module: PythiaModule, folder: Path, **settings) -> dict[str, Tensor]:
    """The gradient of one optimizer step on the 8 samples, as a Trainer makes it."""
    batch_size = settings.pop("batch_size")
    rows = [
        {"tokens": tokens, "weight": weight} for tokens, weight in zip(TOKENS, WEIGHTS, strict=True)
    ]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[Gradients(folder / "gradients.pt")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **settings,
    )
    trainer.fit(module, DataLoader(rows, batch_size=batch_size))
    return torch.load(folder / "gradients.pt")


def expected_gradient(module: PythiaModule) -> dict[str, Tensor]:
    total = sum(w * by_hand(module.model, row) for w, row in zip(WEIGHTS, TOKENS, strict=True))
    over = 8 if module.normalize == "batch" else WEIGHTS.sum()
    return gradients(module.model, total / over)


@pytest.mark.parametrize("normalize", ["batch", "kept"])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_an_update_is_the_same_however_the_batch_is_cut(
    tmp_path: Path, normalize: str, accumulate: int
) -> None:
    """With micro-batches of 2 one is masked whole, and the kept weights of the others differ."""
    module = PythiaModule(TINY, normalize=normalize, gradient_clip=None)  # type: ignore[arg-type]
    expected = expected_gradient(module)
    actual = one_update(
        module, tmp_path, batch_size=8 // accumulate, accumulate_grad_batches=accumulate
    )
    assert_same(actual, expected)


@pytest.mark.parametrize("normalize", [pytest.param("batch", marks=pytest.mark.slow), "kept"])
def test_an_update_is_the_same_on_two_ranks(tmp_path: Path, normalize: str) -> None:
    module = PythiaModule(TINY, normalize=normalize, gradient_clip=None)  # type: ignore[arg-type]
    expected = expected_gradient(module)
    actual = one_update(
        module,
        tmp_path,
        batch_size=2,
        accumulate_grad_batches=2,
        strategy="ddp_spawn",
        devices=2,
    )
    assert_same(actual, expected)


@pytest.mark.parametrize(
    ("ranks", "accumulate"), [(1, 1), (1, 4), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_a_plans_mask_is_the_gradient_of_the_kept_samples(
    tmp_path: Path, ranks: int, accumulate: int
) -> None:
    """From the plan to the update: masked ids, over the original batch, however it is cut."""
    rows = TokenRows.write(tmp_path / "rows", TOKENS.numpy(), vocab_size=32, provenance={})
    plan = Plan.mask([1, 4, 5], steps=(0, 1)) | Plan.mask([6], weight=0.5)
    data = TokenDataModule(rows, batch_size=8, n_steps=1, shuffle=True, plan=plan)
    module = PythiaModule(TINY, gradient_clip=None)
    expected = expected_gradient(module)
    trainer = L.Trainer(
        accelerator="cpu",
        strategy="auto" if ranks == 1 else "ddp_spawn",
        devices=ranks,
        accumulate_grad_batches=accumulate,
        max_steps=1,
        limit_val_batches=0,  # a validation would clear the gradient
        callbacks=[Gradients(tmp_path / "gradients.pt")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=data)
    assert_same(torch.load(tmp_path / "gradients.pt"), expected)


def test_masked_whole_steps_leave_only_decay(tmp_path: Path) -> None:
    """A step without any weight moves no parameter that does not decay, under "kept" as well."""
    module = PythiaModule(TINY, normalize="kept", warmup_steps=0, total_steps=5)
    before = copy.deepcopy(module.model.state_dict())
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    rows = [{"tokens": tokens, "weight": torch.tensor(0.0)} for tokens in TOKENS]
    trainer.fit(module, DataLoader(rows, batch_size=4))
    after = module.model.state_dict()
    for name, value in before.items():
        shrink = (1 - 1e-3 * 0.1) ** 2 if value.ndim >= 2 else 1.0
        # The second update is made at a slightly lower rate than the peak.
        torch.testing.assert_close(after[name], value * shrink, atol=0, rtol=1e-4, msg=name)
        assert after[name].isfinite().all()
