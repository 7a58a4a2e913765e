"""(H + λ)⁻¹∇f of several mechanisms at a model's weights: what samples are scored against."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import BlockName
from mda_lightning.curvature import (
    FactorKey,
    Fisher,
    SubspaceEKFAC,
    fit_converged,
    load_factors,
    save_factors,
    tokens_hash,
)
from mda_lightning.gradients import BlockVector, probe_gradients, zero_probes
from mda_lightning.influence.model_hash import config_hash
from mda_lightning.mechanisms import Mechanism
from mda_lightning.units import Head


@dataclass(frozen=True)
class CurvatureSettings:
    """How the curvature is estimated; see :class:`~mda_lightning.curvature.SubspaceEKFAC`.

    Attributes:
        kind: "ekfac", "kfac", or "identity" for the plain dot product with ∇f.
        tolerance: take as many of the sequences as it takes until scores correlate so well with
            those of half as many (:func:`~mda_lightning.curvature.fit_converged`); None takes all.
        fisher, damping, damping_rule, seed: of the curvature.
    """

    kind: Literal["ekfac", "kfac", "identity"] = "ekfac"
    fisher: Fisher = "sampled"
    damping: float = 0.1
    seed: int = 0
    damping_rule: Literal["relative", "absolute"] = "relative"
    tolerance: float | None = None


class InverseProbes(NamedTuple):
    """IHVPs, and what is to be known of them.

    Attributes:
        ihvps: by mechanism, per (unit, block); NaN throughout a unit that has no score.
        provenance: of the curvature, as JSON values.
        zero: by mechanism, the units whose ∇f is zero in all blocks: nothing can be attributed.
        broken: by mechanism, the units whose ∇f is not finite.
    """

    ihvps: dict[str, BlockVector]
    provenance: dict[str, Any]
    zero: dict[str, list[Head]]
    broken: dict[str, list[Head]]


def inverse_probes(
    model: PreTrainedModel,
    mechanisms: Mapping[str, Mechanism],
    units: Sequence[Head],
    batches: Sequence[Tensor],
    settings: CurvatureSettings,
    *,
    memory: int | None = None,
    progress: Callable[[int], None] | None = None,
    kept_in: Path | None = None,
    weights: str | None = None,
) -> InverseProbes:
    """Each mechanism's probe gradient, solved with one curvature for all.

    A unit whose ∇f is zero or not finite, and one in which no sequence has a gradient, has NaN: it
    is never ranked. Who calls says so; of the curvature :class:`SubspaceEKFAC` warns.

    Args:
        model: a causal language model.
        mechanisms: whose f, by name.
        units: heads.
        batches: sequences for the curvature, int64 [B, T+1].
        settings: of the curvature.
        memory: bytes for per-sequence gradients; None for a quarter of what is free.
        progress: called with the number of sequences after each batch.
        kept_in: a folder in which factors are looked for and kept, under a key of all that
            determines them; needs ``weights``, the model's
            :func:`~mda_lightning.influence.weights_hash`.

    Raises:
        CurvatureError: no sequence with a finite gradient, or a curvature that cannot be inverted.
    """
    probes = {name: probe_gradients(model, own, units) for name, own in mechanisms.items()}
    zero = {name: zero_probes(probe) for name, probe in probes.items()}
    broken = {name: _not_finite(probe) for name, probe in probes.items()}
    for name, probe in probes.items():
        for (unit, _), vector in probe.items():
            if unit in zero[name] or unit in broken[name]:
                vector.fill_(torch.nan)
    if settings.kind == "identity":
        return InverseProbes(probes, {"curvature": "identity", "n_sequences": 0}, zero, broken)
    blocks = list(dict.fromkeys(b for own in mechanisms.values() for b in own.block_names))
    measured = [
        {key: vector for key, vector in probe.items() if not bool(vector.isnan().any())}
        for probe in probes.values()
    ]

    def fit() -> SubspaceEKFAC:
        own: dict[str, Any] = {
            "kind": settings.kind,
            "fisher": settings.fisher,
            "seed": settings.seed,
            "damping": settings.damping,
            "damping_rule": settings.damping_rule,
            "memory": memory,
            "progress": progress,
        }
        if settings.tolerance is None:
            return SubspaceEKFAC.fit(model, units, blocks, batches, **own)
        own["tolerance"] = settings.tolerance
        return fit_converged(model, units, blocks, batches, measured, **own)

    if kept_in is None:
        curvature = fit()
    else:
        assert weights is not None
        key = _key(model, mechanisms, units, blocks, batches, settings, weights)
        kept_in.mkdir(parents=True, exist_ok=True)
        with FileLock(str(kept_in / ".lock")):  # several processes need the same ones
            found = load_factors(
                kept_in,
                key,
                damping=settings.damping,
                damping_rule=settings.damping_rule,
                device=model.device,
            )
            curvature = fit() if found is None else found
            if found is None:
                save_factors(kept_in, key, curvature)
    solved = {name: curvature.solve(probe) for name, probe in probes.items()}
    return InverseProbes(solved, curvature.to_provenance(), zero, broken)


def warn_of_unscored(found: InverseProbes, *, at: str = "") -> None:
    """Warn of units whose scores are NaN because of their ∇f.

    Args:
        at: where, for example " at step 900".
    """
    for name in found.ihvps:
        for units, what in ((found.zero[name], "zero"), (found.broken[name], "not finite")):
            if units:
                warnings.warn(
                    f"the gradient of {name}'s f is {what} in {', '.join(map(str, units))}{at}: "
                    "nothing can be attributed to them, their scores are NaN",
                    stacklevel=3,
                )


def _not_finite(probe: BlockVector) -> list[Head]:
    broken = [unit for (unit, _), vector in probe.items() if not bool(vector.isfinite().all())]
    return list(dict.fromkeys(broken))


def _key(
    model: PreTrainedModel,
    mechanisms: Mapping[str, Mechanism],
    units: Sequence[Head],
    blocks: Sequence[BlockName],
    batches: Sequence[Tensor],
    settings: CurvatureSettings,
    weights: str,
) -> FactorKey:
    size = "all"
    if settings.tolerance is not None:  # which subset it takes depends on what is probed
        about = json.dumps([own.settings() | {"name": own.name} for own in mechanisms.values()])
        damping = f"{settings.damping} {settings.damping_rule}"
        digest = hashlib.sha256(about.encode()).hexdigest()
        size = f"until {settings.tolerance}, damped by {damping}, for {digest}"
    return FactorKey(
        weights=weights,
        config=config_hash(model),
        data=tokens_hash(batches),
        layout=FactorKey.layout_of(model, units, blocks),
        kind=settings.kind,
        fisher=settings.fisher,
        seed=settings.seed,
        size=size,
    )
