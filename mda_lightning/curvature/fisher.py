"""Whose labels the curvature's gradients are of."""

from __future__ import annotations

from hashlib import blake2b
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

#: "sampled": labels drawn from the model, seeded. "empirical": the data's own.
Fisher: TypeAlias = Literal["sampled", "empirical"]


def sampled_uniform(seed: int, tokens: Tensor) -> Tensor:
    """Uniform draws in [0, 1), float32 [B, T], for sampling labels.

    They depend on the seed and the sequence's own tokens alone: not on the batch, the rank or the
    order in which sequences come.

    Args:
        seed: at least 0.
        tokens: int64 [B, T+1].
    """
    rows = []
    for row in tokens.cpu().numpy().astype("<i8"):
        digest = blake2b(row[row >= 0].tobytes(), digest_size=8).digest()
        rng = np.random.default_rng([seed, int.from_bytes(digest, "little")])
        rows.append(rng.random(len(row) - 1, dtype=np.float32))
    return torch.from_numpy(np.stack(rows))
