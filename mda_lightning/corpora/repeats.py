"""How much a sample repeats itself: n-grams that occurred in it before.

The simplest guess at what makes an induction head, and so a baseline for influence scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK_TOKENS = 2**20
"""Tokens worked on at a time."""


def repeated_ngrams(tokens: NDArray[Any], n: int) -> NDArray[np.int64]:
    """Places of each row at which an n-gram begins that began in the same row before.

    A row of W n-grams of which D are different has W - D of them; occurrences may overlap. Exact:
    n-grams are compared, not hashes of them.

    >>> repeated_ngrams(np.array([[5, 6, 7, 5, 6, 7], [1, 1, 1, 1, 1, 1]]), 3)
    array([1, 3])

    Args:
        tokens: ids, integers at least 0, [N, T + 1]; a memory map is read piece by piece.
        n: tokens in an n-gram.

    Returns:
        int64 [N], each from 0 to T + 1 - n.

    Raises:
        ValueError: not two-dimensional, not integers at least 0, or ``n`` is outside 1..T + 1.
    """
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens have shape {tokens.shape} and dtype {tokens.dtype}; integers [N, T + 1] needed"
        )
    width = tokens.shape[1]
    if not 1 <= n <= width:
        raise ValueError(f"n {n} is out of range: rows of {width} tokens have 1- to {width}-grams")
    counts = np.zeros(len(tokens), dtype=np.int64)
    rows = max(1, CHUNK_TOKENS // width)
    for first in range(0, len(tokens), rows):
        ids = np.asarray(tokens[first : first + rows], dtype=np.int64)
        if ids.min() < 0:
            raise ValueError(f"token id {ids.min()} is below 0")
        codes = np.sort(_codes(ids, n), axis=1)
        counts[first : first + rows] = (codes[:, 1:] == codes[:, :-1]).sum(axis=1)
    return counts


def repeated_ngram_share(tokens: NDArray[Any], n: int) -> NDArray[np.float64]:
    """:func:`repeated_ngrams` as a share of a row's n-grams, [N], in [0, 1).

    Raises:
        ValueError: as there.
    """
    share: NDArray[np.float64] = repeated_ngrams(tokens, n) / (tokens.shape[1] + 1 - n)
    return share


def _codes(ids: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """A number for every n-gram, equal within a row just where the n-grams are, [N, W]."""
    base = int(ids.max()) + 1
    codes, below = ids, base
    for k in range(1, n):
        if below * base > np.iinfo(np.int64).max:
            codes, below = _ranks(codes), codes.shape[1]
        codes = codes[:, :-1] * base + ids[:, k:]
        below *= base
    return codes


def _ranks(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each row's numbers replaced by their place among its different ones, from 0."""
    order = np.argsort(codes, axis=1)
    ascending = np.take_along_axis(codes, order, axis=1)
    new = np.zeros_like(codes)
    new[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
    ranks = np.empty_like(codes)
    np.put_along_axis(ranks, order, np.cumsum(new, axis=1), axis=1)
    return ranks
