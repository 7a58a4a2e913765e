"""Subspace curvature and scores against kronfluence, on a copy whose head is split out.

Needs kronfluence (``pip install kronfluence``) beside the pinned torch.
"""

from __future__ import annotations

import pytest
import torch
from models import random_neox

from mda_lightning.curvature import SubspaceEKFAC
from mda_lightning.gradients import probe_gradients
from mda_lightning.influence import fit_and_score, replay_scores, token_scores
from mda_lightning.mechanisms import InductionHead
from mda_lightning.units import Head

pytest.importorskip("kronfluence")

from benchmarks.peer_kronfluence import KronfluenceRun, as_ours
from benchmarks.split_head import copy_probe, split_head, split_names

UNITS = [Head(0, 0), Head(1, 1)]
MECHANISM = InductionHead(
    probe_function="copy_logprob", token_ids=range(1, 40), length=(6, 6), n_probe_sequences=12
)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(1, 40, (10, 17), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_the_split_copy_computes_the_same(tokens, unit, parallel) -> None:
    model = random_neox(parallel=parallel)
    split = split_head(model, unit)
    with torch.no_grad():
        torch.testing.assert_close(split(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)
        # The named layers are the head's: without them the output is another.
        for name in split_names(unit).values():
            changed = split_head(model, unit)
            changed.get_submodule(name).weight.zero_()
            assert not torch.allclose(changed(tokens).logits, model(tokens).logits, atol=1e-3)


def test_the_probe_is_the_mechanisms() -> None:
    model, probe = random_neox(), copy_probe(MECHANISM)
    with torch.no_grad():
        logprob = model(probe.tokens).logits.log_softmax(-1)[:, :-1]
        own = logprob.gather(2, probe.tokens[:, 1:, None])[..., 0]
        expected = probe.weight * own[probe.is_target[:, 1:]].sum()
        torch.testing.assert_close(MECHANISM.probe(model), expected)


def assert_close_to_peer(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """To 1e-4 of the largest score of the block; and the scores are not all alike."""
    scale = theirs.abs().max()
    assert scale > 0 and theirs.std() > 0.05 * scale
    torch.testing.assert_close(ours / scale, theirs / scale, atol=1e-4, rtol=0)


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_ekfac_scores(tokens, unit, parallel) -> None:
    model = random_neox(parallel=parallel)
    peer = KronfluenceRun(model, unit, copy_probe(MECHANISM), tokens, batch_size=4)
    theirs = as_ours(peer, peer.run())
    # All heads at once: what is shared between them must not change one head's scores.
    units = [Head(layer, head) for layer in range(2) for head in range(2)]
    batches = list(tokens.split(3))
    curvature = SubspaceEKFAC.fit(
        model, units, MECHANISM.block_names, batches, fisher="empirical", damping=0.1
    )
    probe = probe_gradients(model, MECHANISM, units)
    found = replay_scores(model, curvature.solve(probe), batches)
    for k, block in enumerate(found.blocks):
        assert_close_to_peer(found.values[:, units.index(unit), k], theirs[block])


def test_plain_dot_product(tokens) -> None:
    model, unit = random_neox(), Head(1, 0)
    peer = KronfluenceRun(model, unit, copy_probe(MECHANISM), tokens, 4, strategy="identity")
    theirs = as_ours(peer, peer.run())
    found = replay_scores(model, probe_gradients(model, MECHANISM, [unit]), tokens.split(3))
    for k, block in enumerate(found.blocks):
        assert_close_to_peer(found.values[:, 0, k], theirs[block])


@pytest.mark.parametrize("kind", ["ekfac", "kfac"])
def test_fit_and_score_in_one_pass(tokens, kind) -> None:
    model, unit = random_neox(), Head(1, 0)
    peer = KronfluenceRun(model, unit, copy_probe(MECHANISM), tokens, 4, strategy=kind)
    theirs = as_ours(peer, peer.run())
    _, found = fit_and_score(
        model, {"": MECHANISM}, [unit], list(tokens.split(3)), kind=kind, fisher="empirical"
    )
    for k, block in enumerate(found[""].blocks):
        assert_close_to_peer(found[""].values[:, 0, k], theirs[block])


def test_token_scores(tokens) -> None:
    model, unit = random_neox(), Head(0, 1)
    peer = KronfluenceRun(model, unit, copy_probe(MECHANISM), tokens, 4, per_token=True)
    theirs = as_ours(peer, peer.run())
    curvature = SubspaceEKFAC.fit(
        model, [unit], MECHANISM.block_names, [tokens], fisher="empirical"
    )
    ihvp = curvature.solve(probe_gradients(model, MECHANISM, [unit]))
    found = token_scores(model, ihvp, tokens)
    assert found.values.shape == (10, 16, 1, 3)
    for k, block in enumerate(found.blocks):
        assert_close_to_peer(found.values[:, :, 0, k], theirs[block])
