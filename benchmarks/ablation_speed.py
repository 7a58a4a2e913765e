"""All heads ablated in one pass of branches, against one head at a time with full logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.interleaved import interleaved, ratio
from benchmarks.models import pythia_14m, quickstart_model
from mda_lightning.architectures import describe
from mda_lightning.metrics import ablation_drops
from mda_lightning.probes import ProbeSet, ablation_sequences

Rows = Iterator[tuple[str, tuple[float, float, float]]]
_BATCH = 25


def one_head_at_a_time(model: PreTrainedModel, probes: ProbeSet) -> Tensor:
    """Drops of (logit, centred, log-probability) [3, N, L, heads] by a pre-hook per head."""
    layout = describe(model)
    clean = _values(model, probes)
    found = torch.empty(3, probes.n_sequences, layout.n_layers, layout.n_heads)
    for head in layout.heads:
        columns = layout.head_columns(head.head)

        def ablate(
            _: nn.Module, args: tuple[Tensor, ...], columns: slice = columns
        ) -> tuple[Tensor, ...]:
            z = args[0].clone()
            z[..., columns] = 0
            return (z,)

        module = model.get_submodule(layout.output_name(head.layer))
        handle = module.register_forward_pre_hook(ablate)
        found[:, :, head.layer, head.head] = clean - _values(model, probes)
        handle.remove()
    return found


@torch.no_grad()
def _values(model: PreTrainedModel, probes: ProbeSet) -> Tensor:
    parts = []
    for tokens, target in zip(
        probes.tokens.split(_BATCH), probes.target.split(_BATCH), strict=True
    ):
        logits = model(input_ids=tokens, use_cache=False).logits[:, -1].double()
        own = logits.gather(1, target[:, None])[:, 0]
        parts.append(torch.stack([own, own - logits.mean(1), own - logits.logsumexp(1)]))
    return torch.cat(parts, dim=1)


def ablation(rounds: int) -> Rows:
    """Time of the loop over time of the branches, and the largest difference of their results."""
    for name, model in (("Pythia-14M", pythia_14m()), ("quickstart", quickstart_model())):
        ids = torch.arange(2, model.config.vocab_size - 200)
        probes = ablation_sequences(ids, seed=0, n_sequences=100)
        timings = interleaved(
            {
                "loop": lambda m=model, p=probes: one_head_at_a_time(m, p),
                "branches": lambda m=model, p=probes: ablation_drops(m, p),
            },
            rounds=rounds,
        )
        yield (
            f"{name} shape, {len(describe(model).heads)} heads: loop with full logits / branches",
            ratio(timings["loop"], timings["branches"]),
        )
        apart = torch.stack(ablation_drops(model, probes)) - one_head_at_a_time(model, probes)
        of_mean, of_one = float(apart.mean(1).abs().max()), float(apart.abs().max())
        yield f"{name} shape: largest difference of a head's Δ, in 1e-6", (of_mean * 1e6,) * 3
        yield f"{name} shape: the same in one sequence, in 1e-6", (of_one * 1e6,) * 3
