"""Probe sequences: the random inputs on which units are measured and probed (App. A.3, App. C).

A probe set is drawn once from a seed and stays fixed for a run, so that steps compare. The set that
measures (μ) and the set whose gradient is taken (f) must come from different seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class LengthBucket(NamedTuple):
    """Some sequences of a probe set: tokens [n, T], entries within them, and which those are."""

    tokens: Tensor
    sequence: Tensor
    query: Tensor
    key: Tensor
    entries: Tensor


@dataclass(frozen=True)
class ProbeSet:
    """Sequences, and the entries (query -> key, and next token) that a score reads in them.

    Attributes:
        tokens: int64 [N, T], padded on the right, where causal attention never looks.
        sequence, query, key: int64 [E], the attention entries, 0-based.
        target: int64 [E], the token that follows ``query`` if the sequence goes on as before:
            **the logits at position** ``query`` **predict it**.
        weight: float32 [E]: mean over a sequence's queries, then over sequences; a query's entries,
            where it has several keys, weigh alike and so add up. Sums to 1 with one key a query.
    """

    tokens: Tensor
    sequence: Tensor
    query: Tensor
    key: Tensor
    target: Tensor
    weight: Tensor
    _buckets: dict[int, tuple[LengthBucket, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def n_sequences(self) -> int:
        return self.tokens.shape[0]

    @property
    def needed_lengths(self) -> Tensor:
        """Tokens of each sequence up to its last query, int64 [N]; later ones change nothing."""
        lengths = torch.zeros(self.n_sequences, dtype=torch.int64)
        return lengths.scatter_reduce_(0, self.sequence, self.query + 1, "amax")

    @property
    def chance(self) -> float:
        """The score of uniform attention: the mean of keys / (number of visible positions)."""
        return float((self.weight.double() / (self.query.double() + 1)).sum())

    def by_length(self, n: int) -> tuple[LengthBucket, ...]:
        """The sequences in up to ``n`` groups of about one length, cut to what their entries need.

        Computed once: a probe set is measured many times.
        """
        if n not in self._buckets:
            needed, parts = self.needed_lengths, []
            for rows in torch.chunk(needed.argsort(stable=True), n):
                entries = torch.isin(self.sequence, rows).nonzero()[:, 0]
                place = torch.empty(self.n_sequences, dtype=torch.int64)
                place[rows] = torch.arange(len(rows))
                parts.append(
                    LengthBucket(
                        self.tokens[rows, : int(needed[rows].max())],
                        place[self.sequence[entries]],
                        self.query[entries],
                        self.key[entries],
                        entries,
                    )
                )
            self._buckets[n] = tuple(parts)
        return self._buckets[n]

    def per_sequence(self, values: Tensor) -> Tensor:
        """``values`` [E, ...] added up per query, mean over each sequence's queries: [N, ...]."""
        weight = (self.weight * self.n_sequences).to(values.device, values.dtype)
        weighted = values * weight.view(-1, *[1] * (values.dim() - 1))
        out = torch.zeros(
            self.n_sequences, *values.shape[1:], dtype=values.dtype, device=values.device
        )
        return out.index_add(0, self.sequence.to(values.device), weighted)


def _assemble(
    rows: list[np.ndarray], entries: list[list[tuple[int, int, int]]], pad: int
) -> ProbeSet:
    width = max(len(row) for row in rows)
    tokens = np.full((len(rows), width), pad, dtype=np.int64)
    columns: list[tuple[int, int, int, int, float]] = []
    for i, (row, own) in enumerate(zip(rows, entries, strict=True)):
        tokens[i, : len(row)] = row
        share = 1.0 / (len(rows) * len({q for q, _, _ in own}))
        columns += [(i, q, k, target, share) for q, k, target in own]
    sequence, query, key, target, weight = zip(*columns, strict=True)
    return ProbeSet(
        torch.from_numpy(tokens),
        torch.tensor(sequence),
        torch.tensor(query),
        torch.tensor(key),
        torch.tensor(target),
        torch.tensor(weight, dtype=torch.float32),
    )


def _check_ids(token_ids: Sequence[int] | np.ndarray | Tensor, longest: int) -> np.ndarray:
    ids = np.unique(np.asarray(token_ids, dtype=np.int64))
    if len(ids) < longest:
        raise ValueError(
            f"{len(ids)} distinct token ids are too few: sequences of {longest} tokens are drawn "
            f"without replacement; give at least {longest} ids or shorter sequences"
        )
    return ids


def repeated_sequences(
    token_ids: Sequence[int] | np.ndarray | Tensor,
    *,
    seed: int,
    n_sequences: int = 100,
    length: tuple[int, int] = (8, 20),
    repeats: int = 2,
    bos: int | None = None,
) -> ProbeSet:
    """Random sequences repeated, with the induction stripe as entries (App. C; SPEC §2).

    A base sequence of L tokens, L uniform in ``length`` (both ends included), drawn without
    replacement from ``token_ids``, is repeated ``repeats`` times. The entries of repeat r = 2..R
    are the queries i = 1..L−1 (1-based) of that repeat and the key that follows the query token's
    former occurrence, i+1 of the repeat before; the target is the token at that key.

    Raises:
        ValueError: too few ids, a length below 2, or fewer than 2 repeats.
    """
    low, high = length
    if low < 2 or high < low:
        raise ValueError(f"length {length} must be (low, high) with 2 <= low <= high")
    if repeats < 2:
        raise ValueError(f"{repeats} repeats hold nothing to copy from; give at least 2")
    ids = _check_ids(token_ids, high)
    rng = np.random.default_rng(seed)
    offset = 0 if bos is None else 1
    rows, entries = [], []
    for _ in range(n_sequences):
        size = int(rng.integers(low, high + 1))
        base = rng.choice(ids, size=size, replace=False)
        row = np.tile(base, repeats)
        rows.append(row if bos is None else np.concatenate([[bos], row]))
        entries.append(
            [
                (offset + r * size + i, offset + (r - 1) * size + i + 1, int(base[i + 1]))
                for r in range(1, repeats)
                for i in range(size - 1)
            ]
        )
    return _assemble(rows, entries, int(ids[0]))


def random_sequences(
    token_ids: Sequence[int] | np.ndarray | Tensor,
    *,
    seed: int,
    n_sequences: int = 100,
    length: tuple[int, int] = (16, 40),
    bos: int | None = None,
) -> ProbeSet:
    """Random sequences with every attention entry t -> t−1, t >= 2 (1-based), as entries (Eq. 15).

    Tokens are drawn without replacement within a sequence, so that no repetition stands in for
    position. ``target`` is the token at the key.

    Raises:
        ValueError: too few ids or a length below 2.
    """
    low, high = length
    if low < 2 or high < low:
        raise ValueError(f"length {length} must be (low, high) with 2 <= low <= high")
    ids = _check_ids(token_ids, high)
    rng = np.random.default_rng(seed)
    offset = 0 if bos is None else 1
    rows, entries = [], []
    for _ in range(n_sequences):
        row = rng.choice(ids, size=int(rng.integers(low, high + 1)), replace=False)
        rows.append(row if bos is None else np.concatenate([[bos], row]))
        entries.append([(offset + t, offset + t - 1, int(row[t - 1])) for t in range(1, len(row))])
    return _assemble(rows, entries, int(ids[0]))


def single_target_sequences(
    token_ids: Sequence[int] | np.ndarray | Tensor,
    *,
    seed: int,
    n_sequences: int = 100,
    length: tuple[int, int] = (16, 40),
    bos: int | None = None,
) -> ProbeSet:
    """The layout of Eq. 18, ``[I, A, B, ..., A]`` with one target: B after the last A.

    All tokens but the repeated A are drawn without replacement; A B stands at a uniformly random
    place with at least one token between B and the last A.

    Raises:
        ValueError: too few ids or a length below 5.
    """
    low, high = length
    if low < 5 or high < low:
        raise ValueError(f"length {length} must be (low, high) with 5 <= low <= high")
    ids = _check_ids(token_ids, high)
    rng = np.random.default_rng(seed)
    offset = 0 if bos is None else 1
    rows, entries = [], []
    for _ in range(n_sequences):
        size = int(rng.integers(low, high + 1))
        row = rng.choice(ids, size=size, replace=False)
        place = int(rng.integers(1, size - 3))
        row[-1] = row[place]
        rows.append(row if bos is None else np.concatenate([[bos], row]))
        entries.append([(offset + size - 1, offset + place + 1, int(row[place + 1]))])
    return _assemble(rows, entries, int(ids[0]))


def ablation_sequences(
    token_ids: Sequence[int] | np.ndarray | Tensor,
    *,
    seed: int,
    n_sequences: int = 100,
    length: int = 64,
) -> ProbeSet:
    """The induction task of App. H: ``[prefix] A B C [gap] A B``, whose next token is C.

    All tokens but the repeated A B are drawn without replacement; the pattern stands at a uniformly
    random place with at least one token before it and one in the gap. One entry a sequence: the
    last position, the place of C, and C.

    Raises:
        ValueError: too few ids or a length below 7.
    """
    if length < 7:
        raise ValueError(f"length {length} cannot hold [prefix] A B C [gap] A B; give at least 7")
    ids = _check_ids(token_ids, length)
    rng = np.random.default_rng(seed)
    rows, entries = [], []
    for _ in range(n_sequences):
        row = rng.choice(ids, size=length, replace=False)
        place = int(rng.integers(1, length - 5))
        row[-2:] = row[place : place + 2]
        rows.append(row)
        entries.append([(length - 1, place + 2, int(row[place + 2]))])
    return _assemble(rows, entries, int(ids[0]))


def prefix_matching_sequences(rows: Tensor) -> ProbeSet:
    """Prefix matching on text: attention to what followed the present token before.

    The queries are the positions of a row whose token has occurred earlier in it; the keys of one
    are the positions right after those earlier occurrences, whose attention is added up. On
    repeated random tokens this is the induction stripe (Olsson et al. 2022, "Prefix matching").
    Where a token follows itself the later one is a key of its own. Rows without a repeated token
    are left out; ``target`` is the token at the key.

    Args:
        rows: int64 [N, T], rows of text.

    Raises:
        ValueError: no row repeats a token.
    """
    rows = _check_text(rows)
    kept, entries = [], []
    for row in rows.numpy():
        same = np.tril(row[:, None] == row[None, :], k=-1)
        own = [(int(q), int(k) + 1, int(row[k + 1])) for q, k in np.argwhere(same)]
        if own:
            kept.append(row)
            entries.append(own)
    if not kept:
        raise ValueError(
            f"no token occurs twice in any of the {len(rows)} rows of {rows.shape[1]} tokens, so "
            "there is no prefix to match; give longer rows of text"
        )
    return _assemble(kept, entries, int(kept[0][0]))


def previous_token_sequences(rows: Tensor) -> ProbeSet:
    """Rows of text with every attention entry t -> t−1, t >= 2 (1-based), as entries (Eq. 15).

    Args:
        rows: int64 [N, T], rows of text.

    Raises:
        ValueError: no rows, or rows of one token.
    """
    rows = _check_text(rows)
    entries = [[(t, t - 1, int(row[t - 1])) for t in range(1, len(row))] for row in rows.numpy()]
    return _assemble(list(rows.numpy()), entries, int(rows[0, 0]))


def _check_text(rows: Tensor) -> Tensor:
    if rows.dim() != 2 or not len(rows) or rows.shape[1] < 2:
        raise ValueError(
            f"rows of text are [N, T] with at least 1 row of 2 tokens, got {tuple(rows.shape)}"
        )
    return rows.cpu().to(torch.int64)
