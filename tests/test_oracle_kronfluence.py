"""Subspace curvature and scores against kronfluence, on a copy whose head is split out.

Needs kronfluence (``pip install kronfluence``) beside the pinned torch.
"""

from __future__ import annotations

import pytest
import torch
from models import random_neox
from peer_checks import (
    MECHANISM,
    TOKENS,
    assert_close_to_peer,
    check_ekfac,
    check_identity,
    check_one_pass,
)

from mda_lightning.curvature import SubspaceEKFAC
from mda_lightning.gradients import probe_gradients
from mda_lightning.influence import token_scores
from mda_lightning.units import Head

pytest.importorskip("kronfluence")

from benchmarks.peer_kronfluence import KronfluenceRun, as_ours
from benchmarks.split_head import copy_probe, split_head, split_names

UNITS = [Head(0, 0), Head(1, 1)]


def scores(*args, **kwargs) -> dict[str, torch.Tensor]:
    peer = KronfluenceRun(*args, **kwargs)
    return as_ours(peer, peer.run())


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_the_split_copy_computes_the_same(unit, parallel) -> None:
    model = random_neox(parallel=parallel)
    split = split_head(model, unit)
    with torch.no_grad():
        torch.testing.assert_close(split(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=1e-5)
        # The named layers are the head's: without them the output is another.
        for name in split_names(unit).values():
            changed = split_head(model, unit)
            changed.get_submodule(name).weight.zero_()
            assert not torch.allclose(changed(TOKENS).logits, model(TOKENS).logits, atol=1e-3)


def test_the_probe_is_the_mechanisms() -> None:
    model, probe = random_neox(), copy_probe(MECHANISM)
    with torch.no_grad():
        logprob = model(probe.tokens).logits.log_softmax(-1)[:, :-1]
        own = logprob.gather(2, probe.tokens[:, 1:, None])[..., 0]
        expected = probe.weight * own[probe.is_target[:, 1:]].sum()
        torch.testing.assert_close(MECHANISM.probe(model), expected)


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_ekfac_scores(unit, parallel) -> None:
    check_ekfac(scores, unit, parallel=parallel)


def test_plain_dot_product() -> None:
    check_identity(scores)


@pytest.mark.parametrize("kind", ["ekfac", "kfac"])
def test_fit_and_score_in_one_pass(kind) -> None:
    check_one_pass(scores, kind)


def test_token_scores() -> None:
    model, unit = random_neox(), Head(0, 1)
    peer = KronfluenceRun(model, unit, copy_probe(MECHANISM), TOKENS, 4, per_token=True)
    theirs = as_ours(peer, peer.run())
    curvature = SubspaceEKFAC.fit(
        model, [unit], MECHANISM.block_names, [TOKENS], fisher="empirical"
    )
    ihvp = curvature.solve(probe_gradients(model, MECHANISM, [unit]))
    found = token_scores(model, ihvp, TOKENS)
    assert found.values.shape == (10, 16, 1, 3)
    for k, block in enumerate(found.blocks):
        assert_close_to_peer(found.values[:, :, 0, k], theirs[block])
