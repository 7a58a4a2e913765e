"""Repeated spans inside one sample: what an induction head could copy.

A *maximal repeat* is an n-gram that occurs at least twice and loses an occurrence when it is
extended by one token to the left or to the right. They are found on a suffix array: the intervals
of its longest-common-prefix array are the right-maximal n-grams, and those whose occurrences are
preceded by different tokens are maximal. Cost: O(T log^2 T) in numpy for a sample of T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class RepeatedSpan:
    """A maximal repeated n-gram.

    Attributes:
        length: in tokens.
        positions: ascending start of every occurrence (occurrences may overlap).
    """

    length: int
    positions: tuple[int, ...]


@dataclass(frozen=True, order=True)
class Highlight:
    """Tokens ``[start, stop)`` show the repeat number ``group``; highlights never overlap."""

    start: int
    stop: int
    group: int


def suffix_array(tokens: ArrayLike) -> Ints:
    """Start positions of all suffixes in lexicographic order (prefix doubling), [T]."""
    ids = np.asarray(tokens, dtype=np.int64).ravel()
    n = ids.size
    _, ranks = np.unique(ids, return_inverse=True)
    ranks = ranks.astype(np.int64)
    order = np.argsort(ranks, kind="stable")
    width = 1
    while width < n and (n == 0 or ranks.max() < n - 1):
        after = np.full(n, -1, dtype=np.int64)
        after[: n - width] = ranks[width:]
        order = np.lexsort((after, ranks))
        changed = (np.diff(ranks[order]) != 0) | (np.diff(after[order]) != 0)
        fresh = np.empty(n, dtype=np.int64)
        fresh[order] = np.concatenate([[0], np.cumsum(changed)])
        ranks, width = fresh, width * 2
    return order.astype(np.int64)


def common_prefixes(tokens: ArrayLike, order: Ints) -> Ints:
    """Longest common prefix of each suffix with its predecessor in ``order``, [T] (Kasai)."""
    ids = np.asarray(tokens, dtype=np.int64).ravel().tolist()
    n = len(ids)
    rank = np.empty(n, dtype=np.int64)
    rank[order] = np.arange(n)
    places, ranks = order.tolist(), rank.tolist()
    common = [0] * n
    length = 0
    for start in range(n):
        if ranks[start] == 0:
            length = 0
            continue
        other = places[ranks[start] - 1]
        longest = n - max(start, other)
        while length < longest and ids[start + length] == ids[other + length]:
            length += 1
        common[ranks[start]] = length
        length = max(0, length - 1)
    return np.asarray(common, dtype=np.int64)


def repeated_spans(tokens: ArrayLike, *, min_tokens: int = 3) -> list[RepeatedSpan]:
    """All maximal repeats of at least ``min_tokens`` tokens, longest first, then by position.

    Args:
        tokens: token ids of one sample, [T].
        min_tokens: shortest n-gram counted.

    Raises:
        ValueError: ``min_tokens`` is below 1.
    """
    if min_tokens < 1:
        raise ValueError(f"min_tokens {min_tokens} is out of range: it must be at least 1")
    ids = np.asarray(tokens, dtype=np.int64).ravel()
    order = suffix_array(ids)
    common = common_prefixes(ids, order)
    before = np.where(order > 0, ids[order - 1], -1) if ids.size else order
    # The start of the sample differs from every token, and from itself: it occurs once.
    found = []
    for low, high, length in _intervals(common.tolist(), min_tokens):
        left = before[low:high]
        if (left != left[0]).any() or (left[0] == -1):
            positions = tuple(np.sort(order[low:high]).tolist())
            found.append(RepeatedSpan(length, positions))
    return sorted(found, key=lambda span: (-span.length, span.positions))


def _intervals(common: list[int], least: int) -> list[tuple[int, int, int]]:
    """LCP intervals ``[low, high)`` with their common length, for lengths >= ``least``."""
    found: list[tuple[int, int, int]] = []
    stack: list[tuple[int, int]] = []
    for index, length in enumerate([*common[1:], 0], start=1):
        low = index - 1
        while stack and stack[-1][1] > length:
            low, deep = stack.pop()
            if deep >= least:
                found.append((low, index, deep))
        if length > 0 and (not stack or stack[-1][1] < length):
            stack.append((low, length))
    return found


def highlights(
    tokens: ArrayLike,
    *,
    texts: Sequence[str] | None = None,
    min_tokens: int = 3,
    min_chars: int = 12,
) -> list[Highlight]:
    """Non-overlapping marks of the repeats, the longest taking its tokens first.

    A repeat counts when it is at least ``min_tokens`` long, or (with ``texts``) at least two tokens
    and ``min_chars`` characters. With ``texts``, repeats of nothing but white space are left out.
    A repeat is marked where at least two of its occurrences are still free and do not overlap.

    Args:
        tokens: token ids of one sample, [T].
        texts: the text of every token, [T].

    Returns:
        Marks by position; groups are numbered from 0 by first appearance in the sample.
    """
    ids = np.asarray(tokens, dtype=np.int64).ravel()
    if texts is not None and len(texts) != ids.size:
        raise ValueError(f"{len(texts)} texts for {ids.size} tokens: give one per token")
    taken = np.zeros(ids.size, dtype=bool)
    claims: list[list[tuple[int, int]]] = []
    for span in repeated_spans(ids, min_tokens=min_tokens if texts is None else 2):
        if texts is not None and not _worth(
            texts[span.positions[0] : span.positions[0] + span.length], min_tokens, min_chars
        ):
            continue
        used = np.concatenate([[0], np.cumsum(taken)])
        starts = np.asarray(span.positions)
        free = starts[used[starts + span.length] == used[starts]]
        chosen: list[tuple[int, int]] = []
        for start in free.tolist():
            if not chosen or start >= chosen[-1][1]:
                chosen.append((start, start + span.length))
        if len(chosen) < 2:
            continue
        for start, stop in chosen:
            taken[start:stop] = True
        claims.append(chosen)
    claims.sort(key=lambda chosen: chosen[0])
    return sorted(
        Highlight(start, stop, group)
        for group, chosen in enumerate(claims)
        for start, stop in chosen
    )


def _worth(pieces: Sequence[str], min_tokens: int, min_chars: int) -> bool:
    text = "".join(pieces)
    return bool(text.strip()) and (len(pieces) >= min_tokens or len(text.strip()) >= min_chars)
