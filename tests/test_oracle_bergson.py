"""Subspace curvature and scores against bergson, on a copy whose head is split out.

Needs bergson (``pip install bergson``) beside the pinned torch.
"""

from __future__ import annotations

import pytest
import torch
from peer_checks import check_ekfac, check_identity, check_one_pass

from mda_lightning.units import Head

pytest.importorskip("bergson")

from benchmarks.peer_bergson import BergsonRun, as_ours


def scores(*args, **kwargs) -> dict[str, torch.Tensor]:
    peer = BergsonRun(*args, **kwargs)
    return as_ours(peer, peer.run())


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
@pytest.mark.parametrize("unit", [Head(0, 0), Head(1, 1)], ids=str)
def test_ekfac_scores(unit, parallel) -> None:
    check_ekfac(scores, unit, parallel=parallel)


def test_plain_dot_product() -> None:
    check_identity(scores)


@pytest.mark.parametrize("kind", ["ekfac", "kfac"])
def test_fit_and_score_in_one_pass(kind) -> None:
    check_one_pass(scores, kind)
