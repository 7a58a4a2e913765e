"""(H + λ)⁻¹∇f at a model's present weights: what samples are scored against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.curvature import CurvatureError, Fisher, SubspaceEKFAC
from mda_lightning.gradients import BlockVector, probe_gradients
from mda_lightning.mechanisms import Mechanism
from mda_lightning.units import Head


@dataclass(frozen=True)
class CurvatureSettings:
    """How the curvature is estimated.

    Attributes:
        kind: "ekfac", or "identity" for the plain dot product with ∇f.
        fisher, damping, seed: see :class:`~mda_lightning.curvature.SubspaceEKFAC`.
    """

    kind: Literal["ekfac", "kfac", "identity"] = "ekfac"
    fisher: Fisher = "sampled"
    damping: float = 0.1
    seed: int = 0


def inverse_probe(
    model: PreTrainedModel,
    mechanism: Mechanism,
    units: Sequence[Head],
    batches: Sequence[Tensor],
    settings: CurvatureSettings,
) -> tuple[BlockVector, dict[str, Any]]:
    """(H + λ)⁻¹∇f per (unit, block), and the provenance of its curvature.

    Raises:
        CurvatureError: it is not finite, or the curvature cannot be inverted.
    """
    found = probe_gradients(model, mechanism, units)
    provenance: dict[str, Any] = {"curvature": "identity"}
    if settings.kind != "identity":
        factors = SubspaceEKFAC.fit(
            model,
            units,
            mechanism.block_names,
            batches,
            kind=settings.kind,
            fisher=settings.fisher,
            seed=settings.seed,
            damping=settings.damping,
        )
        found, provenance = factors.solve(found), factors.to_provenance()
    broken = [f"{u} {b}" for (u, b), v in found.items() if not bool(torch.isfinite(v).all())]
    if broken:
        raise CurvatureError(
            f"the inverse curvature times the probe gradient is not finite for {', '.join(broken)}"
        )
    return found, provenance
