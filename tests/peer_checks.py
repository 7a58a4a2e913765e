"""What every peer is held to: the same scores of a split-out head, by each kind of curvature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import random_neox
from torch import Tensor

from benchmarks.split_head import copy_probe
from mda_lightning.curvature import SubspaceEKFAC
from mda_lightning.gradients import probe_gradients
from mda_lightning.influence import fit_and_score, replay_scores
from mda_lightning.mechanisms import InductionHead
from mda_lightning.units import Head

MECHANISM = InductionHead(
    probe_function="copy_logprob", token_ids=range(1, 40), length=(6, 6), n_probe_sequences=12
)
TOKENS = torch.randint(1, 40, (10, 17), generator=torch.Generator().manual_seed(3))

#: Scores by block of a model's unit, from a peer: (model, unit, probe, tokens, batch size, ...).
Peer = Callable[..., dict[str, Tensor]]


def assert_close_to_peer(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-4 of the largest score of the block; and the scores are not all alike."""
    scale = theirs.abs().max()
    assert scale > 0 and theirs.std() > 0.05 * scale
    torch.testing.assert_close(ours / scale, theirs / scale, atol=1e-4, rtol=0)


def check_ekfac(peer: Peer, unit: Head, *, parallel: bool) -> None:
    """All heads at once: what is shared between them must not change one head's scores."""
    model = random_neox(parallel=parallel)
    theirs = peer(model, unit, copy_probe(MECHANISM), TOKENS, 4)
    units = [Head(layer, head) for layer in range(2) for head in range(2)]
    batches = list(TOKENS.split(3))
    curvature = SubspaceEKFAC.fit(
        model, units, MECHANISM.block_names, batches, fisher="empirical", damping=0.1
    )
    probe = probe_gradients(model, MECHANISM, units)
    found = replay_scores(model, curvature.solve(probe), batches)
    for k, block in enumerate(found.blocks):
        assert_close_to_peer(found.values[:, units.index(unit), k], theirs[block])


def check_identity(peer: Peer) -> None:
    """The plain dot product."""
    model, unit = random_neox(), Head(1, 0)
    theirs = peer(model, unit, copy_probe(MECHANISM), TOKENS, 4, strategy="identity")
    found = replay_scores(model, probe_gradients(model, MECHANISM, [unit]), TOKENS.split(3))
    for k, block in enumerate(found.blocks):
        assert_close_to_peer(found.values[:, 0, k], theirs[block])


def check_one_pass(peer: Peer, kind: Any) -> None:
    """Curvature and scores in one pass, EK-FAC or K-FAC."""
    model, unit = random_neox(), Head(1, 0)
    theirs = peer(model, unit, copy_probe(MECHANISM), TOKENS, 4, strategy=kind)
    _, found = fit_and_score(
        model, {"": MECHANISM}, [unit], list(TOKENS.split(3)), kind=kind, fisher="empirical"
    )
    for k, block in enumerate(found[""].blocks):
        assert_close_to_peer(found[""].values[:, 0, k], theirs[block])
