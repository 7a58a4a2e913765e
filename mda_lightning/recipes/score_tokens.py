"""Each position's part of chosen samples' scores, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from mda_lightning.corpora.sources import TokenSource
from mda_lightning.files import atomic_path
from mda_lightning.gradients import BlockVector
from mda_lightning.influence import token_scores
from mda_lightning.units import Head

#: By mechanism, [n, T, U, K].
TokenParts = dict[str, NDArray[np.float64]]


def token_parts(
    model: PreTrainedModel,
    ihvps: Mapping[str, BlockVector],
    source: TokenSource,
    ids: Sequence[int],
) -> TokenParts:
    """The parts at one checkpoint."""
    tokens = torch.from_numpy(source.get(ids))
    return {
        name: token_scores(model, ihvp, tokens).values.double().numpy()
        for name, ihvp in ihvps.items()
    }


def write_token_parts(
    folder: Path,
    found: Sequence[TokenParts],
    source: TokenSource,
    ids: Sequence[int],
    units: Sequence[Head],
    blocks: Mapping[str, Sequence[str]],
) -> list[Path]:
    """Write ``per-token-<mechanism>.parquet``: the mean over checkpoints, a row a position.

    Columns: ``sample_id``, ``position`` (0-based; where the head's weights are used), ``token_id``
    at it, and one per unit and block, ``L0H0.QK``. Over positions they sum to the sample's score.
    """
    tokens = source.get(ids)
    inputs, there = tokens[:, :-1], tokens[:, 1:] >= 0
    sample, position = np.nonzero(there)
    written = []
    for name in found[0]:
        mean = np.mean([one[name] for one in found], axis=0)
        columns: dict[str, NDArray[np.float64] | NDArray[np.int64]] = {
            "sample_id": np.asarray(ids, np.int64)[sample],
            "position": position.astype(np.int64),
            "token_id": inputs[there],
        }
        for i, unit in enumerate(units):
            for k, block in enumerate(blocks[name]):
                columns[f"{unit}.{block}"] = mean[sample, position, i, k]
        path = folder / f"per-token-{name}.parquet"
        with atomic_path(path) as part:
            pd.DataFrame(columns).to_parquet(part, index=False)
        written.append(path)
    return written
