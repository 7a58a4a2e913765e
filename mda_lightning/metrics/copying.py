"""Copying: whether a head raises the logits of the tokens that it attends to.

Two views of the same OV circuit: what it does to random tokens as they reach the head
(:func:`copying_per_sequence`), and its eigenvalues (:func:`ov_eigenvalue_scores`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mda_lightning.architectures import (
    ModelLayout,
    check_token_ids,
    describe,
    real_token_ids,
    unembedding,
)
from mda_lightning.attention import capture_attention
from mda_lightning.metrics.over_sequences import MeanOverSequences, UnitScores
from mda_lightning.modes import evaluating
from mda_lightning.probes import random_sequences
from mda_lightning.taps import Taps
from mda_lightning.units import Head

_ROWS = 2**14


def copying_sequences(
    token_ids: Sequence[int] | Tensor, *, seed: int, n_sequences: int = 50, length: int = 25
) -> Tensor:
    """Random tokens, none twice in a sequence: int64 [N, length].

    Raises:
        ValueError: fewer token ids than a sequence needs.
    """
    return random_sequences(
        token_ids, seed=seed, n_sequences=n_sequences, length=(length, length)
    ).tokens


@torch.no_grad()
def copying_per_sequence(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Copying score of every head on each sequence, float32 [N, L, heads] in [−1, 1].

    A head's output is a sum over the positions k that it attends to, Σ_k A[q, k] v_k W_O. Each
    term's direct effect on the logits is c_k = U v_k W_O, minus its mean over the vocabulary; of it
    the rises count, max(c_k, 0). The share that goes to the attended token itself is::

        x = Σ_q Σ_k A[q, k] max(c_k[token_k], 0) / Σ_q Σ_k A[q, k] Σ_j max(c_k[token_j], 0)

    with j over the sequence's tokens, and the score is 2x − 1. A head without a preference among
    the T tokens has about 2/T − 1, and a head that raises none of them is given just that.

    This is the copying evaluator of Olsson et al. (2022, "Head activation evaluators"). Where its
    description leaves room: the effect is taken apart by attended position, so that "the token
    being attended to" has one meaning when attention is spread; rises are added up over positions
    before the ratio, so that a position at which the head rests without writing counts little; x is
    the share of all rises (the paper's ratio goes up to 0.5 for the same head, and is scaled to the
    same range). Tokens are not restricted to those of middling frequency.

    The final norm counts with its gain and, for a LayerNorm, its centring; its scale is left out,
    which no ratio at one position depends on. So does a norm on the attention's output (OLMo 2).
    The bias of the value projection belongs to v_k, that of the output projection to no head. With
    grouped queries v_k is the group's, A and W_O the head's own.

    Runs the model, up to its last layer's pattern, in the mode it is in.

    Args:
        model: of a family in :data:`mda_lightning.families.FAMILIES`.
        tokens: int64 [N, T], no token twice in a row.
    """
    layout = describe(model)
    check_token_ids(model, tokens)
    tokens = tokens.to(model.device, torch.int64)
    values, received = _values_and_attention(model, layout, tokens)
    read = _logit_directions(model, layout, tokens)
    own = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    scores = []
    for layer in range(layout.n_layers):
        through = _through_output(model, layout, layer, read)
        rises = torch.einsum("nkhe,njhe->nhkj", values[layer], through).clamp(min=0)
        rises = rises * received[layer][..., None]
        every = rises.sum((2, 3))
        share = rises[..., own].sum(2) / every
        scores.append(2 * torch.where(every == 0, 1 / tokens.shape[1], share) - 1)
    return torch.stack(scores, dim=1).cpu()


def _values_and_attention(
    model: PreTrainedModel, layout: ModelLayout, tokens: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Per layer the values v [N, T, heads, head_dim] and Σ_q A[q, k], [N, heads, T]; float32."""
    n, length = tokens.shape
    query, key = torch.tril_indices(length, length)
    entries = len(key)
    sequence = torch.arange(n).repeat_interleave(entries)
    blocks = [
        [layout.block(Head(layer, head), "V") for head in range(layout.n_heads)]
        for layer in range(layout.n_layers)
    ]
    names = [name for layer in blocks for block in layer for name in block.modules]
    with Taps(model, names) as taps:
        with capture_attention(
            model, sequence, query.repeat(n), key.repeat(n), last_layer=layout.n_layers - 1
        ) as capture:
            model.base_model(input_ids=tokens, use_cache=False)
        values = [
            torch.stack([block.of_output(taps.outputs) for block in layer], dim=2).float()
            for layer in blocks
        ]
    received = []
    for layer in range(layout.n_layers):
        pattern = capture.layers[layer].view(n, entries, layout.n_heads).transpose(1, 2)
        total = torch.zeros(n, layout.n_heads, length, device=pattern.device)
        received.append(total.index_add(2, key.to(pattern.device), pattern))
    return values, received


def _logit_directions(model: PreTrainedModel, layout: ModelLayout, tokens: Tensor) -> Tensor:
    """What of the residual stream raises each token's logit above the mean one, [N, T, d_model]."""
    rows = unembedding(model).weight
    assert isinstance(rows, Tensor)
    directions = rows[tokens].float() - rows.mean(0, dtype=torch.float32)
    norm = model.get_submodule(layout.family.final_norm)
    directions = _gain(norm) * directions
    if isinstance(norm, nn.LayerNorm):
        # A LayerNorm takes the mean off its input: the same as taking it off what reads it.
        directions = directions - directions.mean(-1, keepdim=True)
    return directions


def _through_output(
    model: PreTrainedModel, layout: ModelLayout, layer: int, directions: Tensor
) -> Tensor:
    """``directions`` [N, T, d_model] as each head's values see them, [N, T, heads, head_dim]."""
    if layout.family.norms == "after":
        whole = model.get_submodule(layout.layer_name(layer))
        directions = directions * _gain(whole.get_submodule(layout.family.attention_norm))
    heads = [
        directions @ layout.weight(model, layout.block(Head(layer, head), "O")).float()
        for head in range(layout.n_heads)
    ]
    return torch.stack(heads, dim=2)


def _gain(norm: nn.Module) -> Tensor | float:
    weight = getattr(norm, "weight", None)
    return weight.float() if isinstance(weight, Tensor) else 1.0


@torch.no_grad()
def ov_eigenvalue_scores(model: PreTrainedModel) -> Tensor:
    """Σ Re λ / Σ |λ| of every head's OV circuit, float32 [L, heads] in [−1, 1].

    λ are the eigenvalues of W_U W_O W_V W_Eᵀ, [V, V], from a token that is attended to, to the
    logits (Elhage et al. 2021, "Detecting copying behavior"); positive ones copy. All but head_dim
    of them are 0, and the others are those of W_V (W_Eᵀ W_U) W_O, [head_dim, head_dim], which is
    what is computed. The weights are taken raw: norms, biases and the layers between are left out.
    0 where all eigenvalues are 0, NaN where a weight is not finite. With grouped queries W_V is
    the group's, W_O the head's own.

    Args:
        model: of a family in :data:`mda_lightning.families.FAMILIES`.
    """
    layout = describe(model)
    embedding, unembed = model.get_input_embeddings().weight, unembedding(model).weight
    assert isinstance(embedding, Tensor) and isinstance(unembed, Tensor)
    through = torch.zeros(layout.d_model, layout.d_model, dtype=torch.float64)
    for start in range(0, len(embedding), _ROWS):
        e, u = (w[start : start + _ROWS] for w in (embedding, unembed))
        through += (e.float().T @ u.float()).double().cpu()
    scores = []
    for unit in layout.heads:
        v, o = (
            layout.weight(model, layout.block(unit, name)).double().cpu() for name in ("V", "O")
        )
        circuit = v @ through @ o
        if not circuit.isfinite().all():
            scores.append(torch.tensor(torch.nan, dtype=torch.float64))
            continue
        values = torch.linalg.eigvals(circuit)
        size = values.abs().sum()
        scores.append(values.real.sum() / size if size > 0 else torch.zeros_like(size))
    return torch.stack(scores).view(layout.n_layers, layout.n_heads).float()


class CopyingScore(MeanOverSequences):
    """Copying score of every head, on random tokens and by the eigenvalues of its OV circuit.

    ``update(model)`` evaluates both on a model; ``compute()`` gives :class:`UnitScores`,
    [L, heads], under ``"copying"`` (:func:`copying_per_sequence`) and ``"copying/eigenvalues"``
    (:func:`ov_eigenvalue_scores`, a function of the weights alone, with a standard error of 0).
    States are sums, so ranks may hold different sequences.

    Args:
        model: gives the shape, and the token ids where none are given.
        tokens: int64 [N, T], sequences to use instead of drawing any.
        token_ids: ids to draw from.
        seed, n_sequences: of the random sequences.
        length: tokens in each, 25 in Olsson et al.

    Raises:
        ValueError: fewer token ids than a sequence needs.
    """

    eigenvalues: Tensor
    updates: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokens: Tensor | None = None,
        token_ids: Sequence[int] | Tensor | None = None,
        seed: int = 0,
        n_sequences: int = 50,
        length: int = 25,
        **kwargs: Any,
    ) -> None:
        layout = describe(model)
        super().__init__(layout.n_layers, layout.n_heads, **kwargs)
        if tokens is None:
            tokens = copying_sequences(
                real_token_ids(model) if token_ids is None else token_ids,
                seed=seed,
                n_sequences=n_sequences,
                length=length,
            )
        self.tokens = tokens
        zeros = torch.zeros(layout.n_layers, layout.n_heads, dtype=torch.float64)
        self.add_state("eigenvalues", zeros, dist_reduce_fx="sum")
        self.add_state("updates", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, model: PreTrainedModel) -> None:
        """Add the sequences and the eigenvalues, evaluated on ``model``."""
        with evaluating(model):
            self.add(copying_per_sequence(model, self.tokens))
        self.eigenvalues += ov_eigenvalue_scores(model).double().to(self.total.device)
        self.updates += 1

    def compute(self) -> dict[str, UnitScores]:
        """Mean and standard error by key, [L, heads] each."""
        eigenvalues = (self.eigenvalues / self.updates).float()
        return {
            "copying": self.scores(),
            "copying/eigenvalues": UnitScores(eigenvalues, torch.zeros_like(eigenvalues)),
        }
