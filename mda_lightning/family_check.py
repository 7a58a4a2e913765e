"""Whether a family's row describes a model: by changing weights and looking at what moves."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import ModelLayout, UnsupportedModelError, describe, unembedding
from mda_lightning.attention import attention_implementation, capture_attention
from mda_lightning.metrics.ablation import ablation_drops
from mda_lightning.modes import evaluating
from mda_lightning.probes import ablation_sequences
from mda_lightning.units import Head

_TOLERANCE = 1e-4


@torch.no_grad()
def check_family(model: PreTrainedModel, *, seed: int = 0) -> None:
    """Check a model against its family's row, on a copy and a few random tokens.

    - Logits are the unembedding of the final hidden states, and nothing more.
    - The final norm's weight is its gain.
    - Attention patterns are those of eager attention.
    - Changing a head's QK block changes the pattern of that head, and of heads that share weights
      with it, and of no other in its layer.
    - Changing its V block changes its own input to the output projection, and its group's alone.
    - Ablation by branches is ablation by a hook: the sublayers are put together as the row says.

    Args:
        model: a causal language model; it is copied once.
        seed: of the tokens.

    Raises:
        UnsupportedModelError: something differs; the message says what, and where.
    """
    layout = describe(model)
    twin: PreTrainedModel = copy.deepcopy(model).to(torch.float32)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, layout.vocab_size, (2, 12), generator=generator).to(twin.device)
    with evaluating(twin):
        _check_logits(twin, layout, tokens)
        _check_gain(twin, layout)
        _check_patterns(twin, layout, tokens)
        for layer in {0, layout.n_layers - 1}:
            _check_blocks(twin, layout, tokens, layer)
        _check_ablation(twin, layout, seed)


def _check_logits(model: PreTrainedModel, layout: ModelLayout, tokens: Tensor) -> None:
    found = model.base_model(input_ids=tokens, use_cache=False, return_dict=True)
    expected = model(input_ids=tokens, use_cache=False, return_dict=True).logits
    apart = float((unembedding(model)(found.last_hidden_state) - expected).abs().max())
    if apart > 1e-5 * max(1.0, float(expected.abs().max())):
        raise UnsupportedModelError(
            f"{layout.model_type}: the model changes its logits after the unembedding, by up to "
            f"{apart:.2g} (scaled or capped logits); metrics here read them before"
        )


def _check_gain(model: PreTrainedModel, layout: ModelLayout) -> None:
    """Copying reads a norm's gain off its weight; some families keep the gain minus one there."""
    norm = copy.deepcopy(model.get_submodule(layout.family.final_norm))
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not isinstance(weight, Tensor):
        return
    for parameter in (weight, bias):
        if isinstance(parameter, Tensor):
            parameter.zero_()
    left = float(norm(torch.linspace(-1, 1, layout.d_model, device=model.device)).abs().max())
    if left > 0:
        raise UnsupportedModelError(
            f"{layout.model_type}: the final norm's weight is not its gain (with weights of 0 its "
            f"output still reaches {left:.2g}); the copying score would be wrong"
        )


def _patterns(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Last row of every pattern, [B, key, L, heads]."""
    n, length = tokens.shape
    sequence = torch.arange(n).repeat_interleave(length)
    query, key = torch.full_like(sequence, length - 1), torch.arange(length).repeat(n)
    with capture_attention(model, sequence, query, key) as capture:
        model.base_model(input_ids=tokens, use_cache=False)
    stacked = capture.stacked()
    return stacked.view(n, length, *stacked.shape[1:])


def _inputs(model: PreTrainedModel, name: str, tokens: Tensor) -> Tensor:
    found: list[Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        model.base_model(input_ids=tokens, use_cache=False)
    finally:
        handle.remove()
    return found[0]


def _check_patterns(model: PreTrainedModel, layout: ModelLayout, tokens: Tensor) -> None:
    with attention_implementation(model, "eager"):
        found = model.base_model(input_ids=tokens, use_cache=False, output_attentions=True)
    eager = torch.stack(found.attentions, dim=-1)[:, :, -1].permute(0, 2, 3, 1)
    apart = float((_patterns(model, tokens) - eager).abs().max())
    if apart > _TOLERANCE:
        raise UnsupportedModelError(
            f"{layout.model_type}: captured attention differs from eager attention by {apart:.2g}; "
            "the family's attention does more than softmax(q·k) under a causal mask"
        )


def _check_blocks(model: PreTrainedModel, layout: ModelLayout, tokens: Tensor, layer: int) -> None:
    output = layout.output_name(layer)
    for head in range(layout.n_heads):
        unit = Head(layer, head)
        group = {other.head for other in layout.group(unit)}
        tied = set(range(layout.n_heads)) if layout.family.norms_across_heads else group
        before = _patterns(model, tokens)[:, :, layer]
        with _changed(model, layout, unit, "QK"):
            moved = (_patterns(model, tokens)[:, :, layer] - before).abs().amax((0, 1))
        _compare(unit, "QK", "attention pattern", moved, tied)
        z = _inputs(model, output, tokens)
        with _changed(model, layout, unit, "V"):
            change = (_inputs(model, output, tokens) - z).abs().amax((0, 1))
        _compare(unit, "V", "output", change.view(layout.n_heads, -1).amax(1), group)


class _changed:
    """Within the block each of a head's rows is scaled by its own factor, which no norm undoes."""

    def __init__(self, model: PreTrainedModel, layout: ModelLayout, unit: Head, name: str) -> None:
        block = layout.block(unit, name)  # type: ignore[arg-type]
        self._views = [
            layout.weight(model, type(block)(unit, block.name, (part,), block.columns))
            for part in block.parts
        ]
        self._former = [view.clone() for view in self._views]

    def __enter__(self) -> None:
        for view in self._views:
            view.mul_(torch.linspace(0.5, 2.0, len(view), device=view.device)[:, None])

    def __exit__(self, *_: object) -> None:
        for view, former in zip(self._views, self._former, strict=True):
            view.copy_(former)


def _compare(unit: Head, block: str, what: str, moved: Tensor, expected: set[int]) -> None:
    heads = {i for i, size in enumerate(moved.tolist()) if size > 1e-6}
    if unit.head not in heads or not heads <= expected:
        raise UnsupportedModelError(
            f"changing the {block} block of {unit} moves the {what} of heads "
            f"{sorted(heads) or 'none'} of its layer, where the family's row lets expect "
            f"{sorted(expected)}; check q, k, v, fused and output"
        )


def _check_ablation(model: PreTrainedModel, layout: ModelLayout, seed: int) -> None:
    probes = ablation_sequences(range(layout.vocab_size), seed=seed, n_sequences=2, length=12)
    found = ablation_drops(model, probes).logit
    rows = torch.arange(2)
    target = probes.target.to(model.device)

    def logit() -> Tensor:
        tokens = probes.tokens.to(model.device)
        hidden = model.base_model(input_ids=tokens, use_cache=False, return_dict=True)
        logits: Tensor = unembedding(model)(hidden.last_hidden_state[:, -1])
        return logits[rows, target].cpu()

    clean = logit()
    for unit in layout.heads:
        weight = layout.weight(model, layout.block(unit, "O"))
        former = weight.clone()
        weight.zero_()
        expected = clean - logit()
        weight.copy_(former)
        apart = float((found[:, unit.layer, unit.head] - expected).abs().max())
        if apart > _TOLERANCE * max(1.0, float(clean.abs().max())):
            raise UnsupportedModelError(
                f"the ablation of {unit} differs by {apart:.2g} from zeroing its output weights; "
                "check attention_norm, mlp_norm, norms, parallel and final_norm"
            )
