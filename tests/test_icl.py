"""The in-context-learning score: its losses, positions, sign, names and refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import random_neox

from mda_lightning.measures import measure
from mda_lightning.metrics import ICLScore, icl_per_sequence, position_losses
from mda_lightning.metrics.icl import icl_positions


def rows(n: int, length: int, *, seed: int = 0, vocab: int = 40) -> torch.Tensor:
    return torch.randint(vocab, (n, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plain_losses(model, tokens: torch.Tensor) -> torch.Tensor:
    """Row by row, position by position, each from a forward over its own context alone."""
    found = torch.empty(len(tokens), tokens.shape[1] - 1)
    for i, row in enumerate(tokens):
        for t in range(len(row) - 1):
            logits = model(row[None, : t + 1]).logits[0, -1]
            found[i, t] = F.cross_entropy(logits[None], row[t + 1 : t + 2])
    return found


def test_losses_are_cross_entropy_position_by_position() -> None:
    model, tokens = random_neox(), rows(3, 26)
    torch.testing.assert_close(
        position_losses(model, tokens), plain_losses(model, tokens), atol=1e-5, rtol=1e-5
    )


def test_neither_chunks_nor_batches_change_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = random_neox(), rows(5, 26)
    whole = position_losses(model, tokens)
    monkeypatch.setattr("mda_lightning.metrics.icl._BATCH_TOKENS", 60)
    monkeypatch.setattr("mda_lightning.sequence_loss._CHUNK_NUMBERS", 40 * 7)
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.numel())
    )
    torch.testing.assert_close(position_losses(model, tokens), whole, atol=1e-6, rtol=1e-6)
    handle.remove()
    assert max(seen) <= 40 * 7 and len(seen) > 5


def test_losses_compute_no_gradient_and_leave_the_model_alone() -> None:
    model = random_neox().train()
    modes = [module.training for module in model.modules()]
    assert not position_losses(model, rows(2, 26)).requires_grad
    metric = ICLScore(rows(2, 26))
    metric.update(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert modes == [module.training for module in model.modules()]


def test_both_scores_of_hand_made_losses() -> None:
    """A model that predicts later tokens better has a positive gain and a negative Olsson score."""
    better = torch.linspace(5.0, 2.0, 512).expand(3, -1)
    gain, olsson = icl_per_sequence(better)
    expected = sum(float(better[0, t]) for t in range(50)) / 50 - float(better[0, 500])
    assert gain.tolist() == pytest.approx([expected] * 3, abs=1e-5) and expected > 0
    assert olsson.tolist() == pytest.approx([float(better[0, 500] - better[0, 50])] * 3, abs=1e-5)
    assert olsson.max() < 0
    losses = torch.zeros(1, 512)
    losses[0, 500], losses[0, 49] = 7.0, 50.0
    assert icl_per_sequence(losses)[:, 0].tolist() == [1.0 - 7.0, 7.0]
    losses[0, 501:] = 1e6
    losses[0, 51:500] = 1e6
    assert icl_per_sequence(losses)[:, 0].tolist() == [1.0 - 7.0, 7.0]


@pytest.mark.parametrize(
    ("context", "early", "late", "suffix"),
    [(2048, 50, 500, ""), (501, 50, 500, ""), (500, 50, 499, "@499"), (128, 13, 127, "@127"),
     (20, 2, 19, "@19")],
)  # fmt: skip
def test_short_contexts_move_the_positions_and_say_so(
    context: int, early: int, late: int, suffix: str
) -> None:
    positions = icl_positions(context)
    assert (positions.early, positions.late, positions.suffix) == (early, late, suffix)


def test_metric_is_mean_and_standard_error_over_sequences() -> None:
    model, tokens = random_neox(), rows(6, 26)
    metric = ICLScore(tokens)
    metric.update(model)
    scores = metric.compute()
    assert list(scores) == ["icl/gain@24", "icl/olsson@24"]
    losses = plain_losses(model, tokens)
    gain = losses[:, :2].mean(1) - losses[:, 24]
    olsson = losses[:, 24] - losses[:, 2]
    for key, each in (("icl/gain@24", gain), ("icl/olsson@24", olsson)):
        assert scores[key].mean.shape == ()
        torch.testing.assert_close(scores[key].mean, each.mean(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scores[key].se, each.std() / 6**0.5, atol=1e-5, rtol=1e-4)


def test_metric_states_add_up_over_ranks() -> None:
    model, tokens = random_neox(), rows(7, 26)
    parts = [ICLScore(context=25) for _ in range(2)]
    parts[0].update(model, tokens[:3])
    parts[1].update(model, tokens[3:])
    whole = ICLScore(tokens)
    whole.update(model)
    merged = ICLScore(context=25)
    for name in ("total", "total_squares", "count"):
        assert merged._reductions[name].__name__ == "dim_zero_sum"
        setattr(merged, name, getattr(parts[0], name) + getattr(parts[1], name))
    merged._update_count = 1
    for key, scores in merged.compute().items():
        torch.testing.assert_close(scores.mean, whole.compute()[key].mean)
        torch.testing.assert_close(scores.se, whole.compute()[key].se)


def test_nan_is_passed_on() -> None:
    model = random_neox()
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = torch.nan
    metric = ICLScore(rows(2, 26))
    metric.update(model)
    assert all(scores.mean.isnan() for scores in metric.compute().values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ICLScore(rows(2, 20)), "context of 19 tokens is too short"),
        (lambda: ICLScore(), "give the token rows, or the context"),
        (lambda: ICLScore(rows(2, 26)).update(random_neox(), rows(2, 30)), "rows of 30 tokens"),
        (lambda: ICLScore(context=25).update(random_neox()), "without token rows"),
        (lambda: position_losses(random_neox(), rows(2, 66)), "65 tokens is longer .* 64"),
        (lambda: position_losses(random_neox(), rows(2, 26, vocab=999)), "not in the .* 0..39"),
        (lambda: position_losses(random_neox(), rows(2, 26) - 40), "not in the .* 0..39"),
        (lambda: position_losses(random_neox(), rows(1, 26)[0]), r"got \(26,\)"),
        (
            lambda: measure("icl", text=rows(3, 90), context=80).check(random_neox()),
            "context of 80 tokens is longer than the model's 64",
        ),
        (
            lambda: measure("icl", text=rows(3, 12)).check(random_neox()),
            "context of 11 tokens is too short",
        ),
        (
            lambda: measure("icl", text=rows(3, 66, vocab=500)).check(random_neox()),
            r"token ids \d+..\d+, the model has 0..39",
        ),
    ],
)
def test_bad_input_names_the_value_and_the_limit(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_measure_takes_the_models_context_and_names_it() -> None:
    model, tokens = random_neox(), rows(4, 101)
    icl = measure("icl", text=tokens)
    before = icl.settings()
    assert before["rows_sha256"] is None
    icl.check(model)
    found = icl.measure(model)
    metric = ICLScore(tokens[:, :65])
    metric.update(model)
    assert list(found) == ["icl/gain@63", "icl/olsson@63"]
    for key, scores in metric.compute().items():
        assert torch.equal(found[key].mean, scores.mean)
    other = measure("icl", text=rows(4, 101, seed=1))
    other.check(model)
    assert len(icl.settings()["rows_sha256"]) == 64
    assert icl.settings()["rows_sha256"] != other.settings()["rows_sha256"]
