"""Scores that are not finite are named, a few of them, and counted."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from mda_lightning.callbacks.scoring.batch_fields import HeldBatch
from mda_lightning.units import Head

_TOLD = 3
_LISTED = 4


class NotFinite:
    """Samples of a mechanism that were trained on and have no finite score, in this process."""

    def __init__(self) -> None:
        self.n_samples = 0
        self._n_told = 0

    def look(
        self,
        mechanism: str,
        step: int,
        batch: HeldBatch,
        values: Tensor,
        units: Sequence[Head],
        scored: Collection[Head],
    ) -> None:
        """Count, and warn of the first steps that have any.

        Args:
            batch: its samples of weight 0 have no score and are not meant.
            values: [B, U, K].
            units: U.
            scored: those of them that samples have a score of.
        """
        broken = values.isnan().any(2) & torch.tensor([unit in scored for unit in units])
        if batch.weights is not None:
            broken &= (batch.weights.cpu() > 0)[:, None]
        samples = broken.any(1).nonzero()[:, 0]
        if not len(samples):
            return
        self.n_samples += len(samples)
        if self._n_told == _TOLD:
            return
        self._n_told += 1
        ids = batch.ids[samples].tolist()
        own = [units[i] for i in broken.any(0).nonzero()[:, 0].tolist()]
        more = " (further steps are counted, not told)" if self._n_told == _TOLD else ""
        warnings.warn(
            f"{mechanism}: at step {step} the gradients of {len(samples)} samples are not finite, "
            f"or did not come, in the weights of {_listed(own)}: {_listed(ids)}; "
            f"their scores are NaN{more}",
            stacklevel=2,
        )


def _listed(values: Sequence[object]) -> str:
    text = ", ".join(map(str, values[:_LISTED]))
    return text if len(values) <= _LISTED else f"{text} and {len(values) - _LISTED} more"
