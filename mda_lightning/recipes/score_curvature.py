"""What samples are scored against at one checkpoint: (H + λ)⁻¹∇f, the factors kept on disk."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.curvature import (
    CurvatureError,
    FactorKey,
    SubspaceEKFAC,
    fit_converged,
    load_factors,
    save_factors,
    tokens_hash,
)
from mda_lightning.gradients import BlockVector
from mda_lightning.influence import probe_gradients, zero_probes
from mda_lightning.mechanisms import Mechanism
from mda_lightning.recipes.score_settings import ScoreSettings
from mda_lightning.units import Head

Say = Callable[[str], None]


def solved_probes(
    model: PreTrainedModel,
    weights: str,
    mechanisms: Sequence[Mechanism],
    units: Sequence[Head],
    batches: Sequence[Tensor],
    *,
    settings: ScoreSettings,
    folder: Path,
    memory: int | None,
    say: Say,
    progress: Callable[[int], None],
) -> tuple[dict[str, BlockVector], dict[str, Any]]:
    """IHVPs by mechanism, and the curvature's provenance.

    Args:
        model: at the weights that ``weights`` is the hash of.
        batches: the sequences offered to the curvature, int64 [B, T+1].
        folder: where factors are kept and looked for.
        memory: bytes for per-sequence gradients.
        progress: told the number of curvature sequences after each batch.
        say: told of units without a score, and of curvature that is short of sequences.
        mechanisms, units, settings: what is scored, and how.

    Raises:
        CurvatureError: ∇f is not finite, or the curvature cannot be inverted.
    """
    probes = {m.name: probe_gradients(model, m, units) for m in mechanisms}
    for name, probe in probes.items():
        _check_probe(name, probe, say)
    if settings.curvature == "identity":
        return probes, {"curvature": "identity"}
    about = json.dumps([m.settings() | {"name": m.name} for m in mechanisms], sort_keys=True)
    rule = f"until {settings.tolerance} for {hashlib.sha256(about.encode()).hexdigest()}"
    blocks = list(dict.fromkeys(b for m in mechanisms for b in m.block_names))
    key = FactorKey(
        weights=weights,
        data=tokens_hash(batches),
        layout=FactorKey.layout_of(model, units, blocks),
        kind=settings.curvature,
        fisher=settings.fisher,
        seed=settings.seed,
        size=rule if settings.n_curvature == "auto" else "all",
    )
    own: dict[str, Any] = {"damping": settings.damping, "damping_rule": settings.damping_rule}
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with FileLock(str(folder / f".{key.name}.lock")):  # several shares need the same ones
            curvature = load_factors(folder, key, device=model.device, **own)
            if curvature is None:
                own |= {"fisher": settings.fisher, "seed": settings.seed}
                own |= {"memory": memory, "progress": progress}
                curvature = _fit(model, units, blocks, batches, probes, settings, own)
                save_factors(folder, key, curvature)
        solved = {name: curvature.solve(probe) for name, probe in probes.items()}
    for one in caught:
        say(str(one.message))
    return solved, curvature.to_provenance()


def _fit(
    model: PreTrainedModel,
    units: Sequence[Head],
    blocks: Sequence[Any],
    batches: Sequence[Tensor],
    probes: Mapping[str, BlockVector],
    settings: ScoreSettings,
    own: Mapping[str, Any],
) -> SubspaceEKFAC:
    kind: Any = settings.curvature
    if settings.n_curvature != "auto":
        return SubspaceEKFAC.fit(model, units, blocks, batches, kind=kind, **own)
    vectors = list(probes.values())
    tolerance = settings.tolerance
    return fit_converged(
        model, units, blocks, batches, vectors, tolerance=tolerance, kind=kind, **own
    )


def _check_probe(name: str, probe: BlockVector, say: Say) -> None:
    broken = [f"{unit} {block}" for (unit, block), v in probe.items() if not v.isfinite().all()]
    if broken:
        raise CurvatureError(
            f"the gradient of {name}'s f is not finite for {', '.join(broken[:5])}"
            f"{' ...' if len(broken) > 5 else ''}: the model has diverged, or its precision is too "
            "low"
        )
    zero = zero_probes(probe)
    if zero:
        say(
            f"the gradient of {name}'s f is zero in {', '.join(map(str, zero))}: nothing can be "
            "attributed to them, their scores are NaN"
        )
        for (unit, _), vector in probe.items():
            if unit in zero:
                vector.fill_(torch.nan)
