"""The sequences that curvature is estimated on while a run scores its own samples."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mda_lightning.corpora import TokenRows

Held = tuple[Tensor, Tensor | None]

CurvatureSet: TypeAlias = str | os.PathLike[str] | TokenRows | Tensor
"""A corpus folder, its rows, or token ids [N, T+1]."""


def fixed_sequences(given: CurvatureSet, *, count: int, batch_size: int) -> list[Tensor]:
    """``count`` sequences evenly spread over a fixed set, in batches int64 [b, T+1].

    Raises:
        ValueError: tokens of another shape, or no sequence.
    """
    if isinstance(given, Tensor):
        if given.dim() != 2 or not len(given) or given.shape[1] < 2:
            raise ValueError(
                f"curvature_set is of shape {tuple(given.shape)}; give token ids [N, T+1], N >= 1, "
                "T >= 1"
            )
        place = _spread(len(given), count)
        return list(torch.split(given[torch.from_numpy(place)].to(torch.int64), batch_size))
    rows = given if isinstance(given, TokenRows) else TokenRows.open(given)
    tokens = torch.from_numpy(np.asarray(rows.get(_spread(len(rows), count)), np.int64))
    return list(torch.split(tokens, batch_size))


def _spread(n: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.linspace(0, n - 1, min(n, count)).round().astype(np.int64)


class RecentSequences:
    """The last ``size`` training sequences that counted, from which the curvature is estimated."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._batches: deque[Held] = deque()
        self.n_held = 0

    def add(self, tokens: Tensor, weights: Tensor | None) -> None:
        """Take up a batch [B, T+1]. A sequence of another length than before starts over."""
        if self._batches and self._batches[-1][0].shape[1] != tokens.shape[1]:
            self._batches.clear()
            self.n_held = 0
        # Kept where it is, unread: this runs every step, also when nothing is scored.
        self._batches.append((tokens.clone(), None if weights is None else weights.clone()))
        self.n_held += len(tokens)
        while self.n_held - len(self._batches[0][0]) >= self.size:
            self.n_held -= len(self._batches.popleft()[0])

    @property
    def full(self) -> bool:
        return self.n_held >= self.size

    def is_due(self, step: int, *, last: Mapping[str, int] | None, every: int) -> bool:
        """Whether the curvature is to be estimated anew at ``step``.

        Args:
            last: the last refresh: its ``step``, and ``n_held`` sequences held then; None before.
            every: steps between refreshes. The first one with a full set does not wait so long.
        """
        if last is None:
            return True
        if last["n_held"] < self.size and self.full:
            return step > last["step"]
        return step - last["step"] >= every

    def batches(self) -> list[Tensor]:
        """The newest ``size`` sequences, less those of weight 0: nothing is trained on them."""
        held, surplus = list(self._batches), max(self.n_held - self.size, 0)
        kept = [
            (tokens if weights is None else tokens[weights > 0])
            for tokens, weights in [_without_first(held[0], surplus), *held[1:]]
        ]
        return [tokens for tokens in kept if len(tokens)]

    def state(self) -> Tensor | None:
        """All of it as one tensor on the CPU; None where nothing counted."""
        kept = self.batches() if self._batches else []
        return torch.cat(kept).cpu().to(torch.int32) if kept else None

    def restore(self, tokens: Tensor | None) -> None:
        self._batches.clear()
        self.n_held = 0
        if tokens is not None:
            self.add(tokens.to(torch.int64), None)

    def exact_state(self) -> list[list[Tensor | None]]:
        """Tokens and weights of every batch held, masked ones too, on the CPU.

        What :meth:`state` leaves out (how sequences came in batches, which did not count) does not
        change what the curvature is estimated on, only its last bits and when it is full.
        """
        return [
            [tokens.cpu().to(torch.int32), None if weights is None else weights.cpu()]
            for tokens, weights in self._batches
        ]

    def restore_exactly(self, batches: Sequence[Sequence[Tensor | None]]) -> None:
        """Take up what :meth:`exact_state` gave."""
        self._batches.clear()
        self.n_held = 0
        for tokens, weights in batches:
            assert tokens is not None
            self.add(tokens.to(torch.int64), weights)


def _without_first(held: Held, count: int) -> Held:
    tokens, weights = held
    return tokens[count:], None if weights is None else weights[count:]
