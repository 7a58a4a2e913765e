"""Factors on disk: one safetensors file, named by everything that determines its content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import BlockName, describe
from mda_lightning.curvature.ekfac import SubspaceEKFAC
from mda_lightning.curvature.factors import BlockFactors, DampingRule
from mda_lightning.files import atomic_path
from mda_lightning.units import Head, parse_unit

SCHEMA_VERSION = 1
#: Of the estimate itself: raised whenever a change of the code changes its numbers.
ESTIMATE_VERSION = 1


def tokens_hash(batches: Iterable[Tensor]) -> str:
    """SHA-256 over token sequences, however they are cut into batches."""
    digest = hashlib.sha256()
    for tokens in batches:
        for row in tokens.cpu().numpy().astype("<i8"):
            digest.update(f"{len(row)}:".encode() + row.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class FactorKey:
    """All that determines factors. The damping does not: it is added when they are used.

    Attributes:
        weights: :func:`mda_lightning.influence.weights_hash` of the model.
        config: :func:`mda_lightning.influence.config_hash` of it.
        data: :func:`tokens_hash` of the curvature sequences offered.
        layout: model type, dtype and the blocks' places in the weights.
        kind, fisher, seed, loss: how they are estimated.
        size: of the subset: "all" of the data, or the rule by which it was chosen.
    """

    weights: str
    config: str
    data: str
    layout: str
    kind: str
    fisher: str
    seed: int
    size: str = "all"
    loss: str = "next-token cross-entropy, summed over positions"

    @classmethod
    def layout_of(
        cls, model: PreTrainedModel, units: Sequence[Head], blocks: Sequence[BlockName]
    ) -> str:
        """The part of the key that a model's family, dtype and the chosen blocks make."""
        layout = describe(model)
        places = [
            f"{b.unit} {b.name} {b.input_key} {b.output_key}" for b in layout.blocks(units, blocks)
        ]
        return "; ".join([layout.model_type, str(model.dtype), *places])

    @property
    def name(self) -> str:
        """File name."""
        versions = {"schema_version": SCHEMA_VERSION, "estimate_version": ESTIMATE_VERSION}
        text = json.dumps(asdict(self) | versions, sort_keys=True)
        return f"factors-{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"


def save_factors(folder: str | os.PathLike[str], key: FactorKey, factors: SubspaceEKFAC) -> Path:
    """Write factors under their key; bases that blocks share are written once."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    blocks: list[dict[str, str]] = []
    for (unit, block), own in factors.factors.items():
        entry = {"unit": str(unit), "block": block}
        for part in ("basis_a", "basis_s", "eigenvalues"):
            tensor: Tensor = getattr(own, part)
            name = names.setdefault(id(tensor), f"{unit}.{block}.{part}")
            tensors.setdefault(name, tensor.cpu().contiguous())
            entry[part] = name
        blocks.append(entry)
    metadata = {
        "kind": "curvature_factors",
        "schema_version": SCHEMA_VERSION,
        "key": asdict(key),
        "blocks": blocks,
        "n_sequences": factors.n_sequences,
        "n_positions": factors.n_positions,
        "n_not_finite": factors.n_not_finite,
        "convergence": [list(one) for one in factors.convergence],
    }
    path = Path(folder) / key.name
    with atomic_path(path) as part_path:
        save_file(tensors, part_path, {"mda_lightning": json.dumps(metadata)})
        os.chmod(part_path, 0o666 & ~_umask())  # safetensors keeps them to the user alone
    return path


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def load_factors(
    folder: str | os.PathLike[str],
    key: FactorKey,
    *,
    damping: float,
    damping_rule: DampingRule = "relative",
    device: torch.device | str = "cpu",
) -> SubspaceEKFAC | None:
    """Factors saved under ``key``, or None where there are none or the file is damaged."""
    path = Path(folder) / key.name
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata: dict[str, Any] = json.loads((file.metadata() or {})["mda_lightning"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError):
        return None
    if metadata["key"] != asdict(key):
        return None
    found = {
        (parse_unit(e["unit"]), cast(BlockName, e["block"])): BlockFactors(
            tensors[e["basis_a"]], tensors[e["basis_s"]], tensors[e["eigenvalues"]]
        )
        for e in metadata["blocks"]
    }
    return SubspaceEKFAC(
        found,
        metadata["n_sequences"],
        metadata["n_positions"],
        kind=metadata["key"]["kind"],
        fisher=metadata["key"]["fisher"],
        damping=damping,
        damping_rule=damping_rule,
        seed=metadata["key"]["seed"],
        n_not_finite=metadata["n_not_finite"],
        convergence=tuple((int(n), float(value)) for n, value in metadata["convergence"]),
    )
