"""The closed form of the unembedding's loss and gradient against autograd and plain sampling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mda_lightning import sequence_loss
from mda_lightning.sequence_loss import inverse_cdf, loss_at_hidden


class _Scaled(torch.nn.Linear):
    """Not a plain linear layer: its forward is its own."""

    def forward(self, hidden):
        return torch.tanh(super().forward(hidden))


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layer", [torch.nn.Linear, _Scaled])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [2**23, 40 * 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_equal_autograd(hidden, layer, bias, chunk, dtype, monkeypatch) -> None:
    monkeypatch.setattr(sequence_loss, "_CHUNK_NUMBERS", chunk)
    torch.manual_seed(0)
    head = layer(8, 40, bias=bias).to(dtype)
    labels = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    leaf = hidden.to(dtype).requires_grad_(True)
    expected = F.cross_entropy(head(leaf).flatten(0, 1), labels.flatten(), reduction="none")
    gradient = torch.autograd.grad(expected.sum(), leaf)[0]
    uniform = torch.rand(3, 7, generator=torch.Generator().manual_seed(2))
    found = loss_at_hidden(head, hidden.to(dtype), labels, uniform=uniform)
    torch.testing.assert_close(found.loss.flatten(), expected.detach().float())
    torch.testing.assert_close(found.gradient, gradient, atol=1e-6, rtol=1e-5)
    # The sampled labels' gradient is that of the labels that plain inverse-CDF sampling gives.
    p = torch.softmax(head(hidden.to(dtype)), -1).double()
    drawn = (p.cumsum(-1) <= uniform.double()[..., None]).sum(-1).clamp_max(39)
    leaf = hidden.to(dtype).requires_grad_(True)
    each = F.cross_entropy(head(leaf).flatten(0, 1), drawn.flatten(), reduction="sum")
    torch.testing.assert_close(
        found.sampled, torch.autograd.grad(each, leaf)[0], atol=1e-6, rtol=1e-5
    )
    assert head.weight.grad is None


def test_the_loss_of_a_token_of_no_probability_is_finite() -> None:
    """exp(−200) is 0 in float32; the loss is 200 all the same."""
    head = torch.nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [-200.0], [-1.0]]))
    found = loss_at_hidden(head, torch.ones(1, 1, 1), torch.tensor([[1]]))
    expected = 200 + torch.log(torch.tensor(1 + torch.e**-1.0))
    assert float(found.loss) == pytest.approx(float(expected))


def test_positions_that_are_not_real_count_for_nothing(hidden) -> None:
    head = torch.nn.Linear(8, 40, bias=False)
    labels = torch.randint(0, 40, (3, 7))
    real = torch.ones(3, 7, dtype=torch.bool)
    real[1, 3:] = False
    found = loss_at_hidden(head, hidden, torch.where(real, labels, -1), real=real)
    whole = loss_at_hidden(head, hidden, labels)
    assert not found.loss[1, 3:].any() and not found.gradient[1, 3:].any()
    torch.testing.assert_close(found.loss[real], whole.loss[real])
    with pytest.raises(ValueError, match="give labels, uniform"):
        loss_at_hidden(head, hidden, None)


@pytest.mark.parametrize("size", [5, 256, 257, 1000])
def test_sampling_in_bins_equals_a_plain_cumulative_sum(size) -> None:
    generator = torch.Generator().manual_seed(size)
    p = torch.softmax(3 * torch.randn(200, size, generator=generator), -1)
    uniform = torch.rand(200, generator=generator)
    found = inverse_cdf(p, uniform)
    cumulative = p.double().cumsum(-1)
    expected = (cumulative / cumulative[:, -1:] <= uniform.double()[:, None]).sum(-1)
    # Rounding may move a draw over an edge to the neighbouring token, and only then.
    off = found != expected
    edge = (cumulative - uniform.double()[:, None] * cumulative[:, -1:]).abs().min(1).values
    assert int(off.sum()) <= 2 and bool((edge[off] < 1e-6).all())
    assert int(inverse_cdf(p[:1], torch.tensor([0.0]))) == int((p[0] > 0).nonzero()[0])
    assert int(found.min()) >= 0 and int(found.max()) < size
