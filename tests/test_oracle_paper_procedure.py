"""One pass over batches for all heads against the paper's procedure: one sequence, one head at a
time, three passes, gradients cut out of those of the whole model."""

from __future__ import annotations

import pytest
import torch
from models import random_neox

from benchmarks.paper_procedure import PaperProcedure
from mda_lightning.influence import fit_and_score
from mda_lightning.mechanisms import InductionHead
from mda_lightning.units import Head


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_scores_of_all_heads(parallel) -> None:
    model = random_neox(parallel=parallel)
    mechanism = InductionHead(probe_function="copy_logprob", token_ids=tuple(range(1, 40)))
    tokens = torch.randint(1, 40, (10, 17), generator=torch.Generator().manual_seed(3))
    units = [Head(layer, head) for layer in range(2) for head in range(2)]
    _, found = fit_and_score(
        model, {"": mechanism}, units, tokens.split(4), fisher="empirical", damping=0.1
    )
    for u, unit in enumerate(units):
        passes: list[None] = []
        expected = PaperProcedure(model, unit, mechanism, fisher="empirical").scores(
            tokens, after_pass=lambda passes=passes: passes.append(None)
        )
        assert len(passes) == 4  # moments, correction, probe, scores
        for k, block in enumerate(found[""].blocks):
            own = expected[block]
            assert own.std() > 0.05 * own.abs().max()
            torch.testing.assert_close(
                found[""].values[:, u, k] / own.abs().max(),
                own / own.abs().max(),
                atol=1e-4,
                rtol=0,
            )
