"""Pseudo-random numbers and permutations addressed by position, with no state and no memory.

A training order must be readable at any position without walking to it, be the same on every
platform and library version, and cost no memory for a corpus of 10^8 rows. numpy's generators
promise neither random access nor a stable stream across versions, so the order is computed:
a finaliser of SplitMix64 (Steele, Lea & Flood 2014) as the keyed function, and a generalised
Feistel network with cycle walking (Black & Rogaway 2002) as the permutation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mda_lightning.files import sha256_of

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ROUNDS = 8
_FEW = 4096
_SALTS = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _MIX_1


def key_of(*parts: str | int) -> np.uint64:
    """A 64-bit key that depends on every part and on their order."""
    return np.uint64(int(sha256_of(*(f"{type(p).__name__}:{p}" for p in parts))[:16], 16))


def keyed_numbers(
    key: np.uint64 | NDArray[np.uint64], index: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """One 64-bit number per index (any shape), a pure function of key and index."""
    x = (index.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    x = _finalise(x ^ key)
    return _finalise(x + _GOLDEN)


def keyed_order(key: np.uint64, count: int) -> NDArray[np.int64]:
    """A permutation of ``range(count)``, held in memory (for windows and sample lists)."""
    numbers = keyed_numbers(key, np.arange(count, dtype=np.int64))
    return np.argsort(numbers, kind="stable").astype(np.int64, copy=False)


def permute(
    offsets: NDArray[np.int64], size: int, *, keys: NDArray[np.uint64] | np.uint64
) -> NDArray[np.int64]:
    """Images of ``offsets``, each in ``[0, size)``, under a keyed permutation of ``range(size)``.

    Args:
        offsets: [n] positions.
        keys: one key, or [n] keys, one for each offset.
    """
    rows = int(np.ceil(np.sqrt(size)))
    columns = -(-size // rows)
    key_array = np.broadcast_to(np.asarray(keys, dtype=np.uint64), offsets.shape)
    image = _feistel(offsets, rows, columns, key_array)
    # rows * columns exceeds size by less than one row; walking the cycle of a permutation of the
    # larger set until it re-enters the smaller one is itself a permutation of the smaller one.
    outside = np.flatnonzero(image >= size)
    while outside.size:
        image[outside] = _feistel(image[outside], rows, columns, key_array[outside])
        outside = outside[image[outside] >= size]
    return image


def shuffled(offsets: NDArray[np.int64], size: int, *, key: np.uint64) -> NDArray[np.int64]:
    """As :func:`permute`, of one key, and uniform over all permutations of few elements too.

    A Feistel network of a dozen elements reaches only some of their permutations.
    """
    if size <= _FEW:
        return keyed_order(key, size)[offsets]
    return permute(offsets, size, keys=key)


def _feistel(
    values: NDArray[np.int64], rows: int, columns: int, keys: NDArray[np.uint64]
) -> NDArray[np.int64]:
    left, right = values // columns, values % columns
    for round_number in range(0, _ROUNDS, 2):
        left = (left + _share(keys, round_number, right, rows)) % rows
        right = (right + _share(keys, round_number + 1, left, columns)) % columns
    return left * columns + right


def _share(
    keys: NDArray[np.uint64], round_number: int, values: NDArray[np.int64], modulus: int
) -> NDArray[np.int64]:
    numbers = keyed_numbers(keys + _SALTS[round_number], values)
    return (numbers % np.uint64(modulus)).astype(np.int64)


def _finalise(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
