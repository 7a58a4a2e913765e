"""Repeated n-grams against a plain loop over tuples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mda_lightning.corpora import repeats
from mda_lightning.corpora.repeats import repeated_ngram_share, repeated_ngrams


def by_loop(tokens: np.ndarray, n: int) -> list[int]:
    counts = []
    for row in tokens.tolist():
        seen: set[tuple[int, ...]] = set()
        repeated = 0
        for start in range(len(row) - n + 1):
            gram = tuple(row[start : start + n])
            repeated += gram in seen
            seen.add(gram)
        counts.append(repeated)
    return counts


@given(
    st.integers(1, 8),
    st.integers(8, 30),
    st.sampled_from([1, 2, 3, 50_304, 2**32 - 1]),
    st.integers(0, 2**32 - 1),
)
def test_counts_are_those_of_a_loop(n: int, width: int, vocabulary: int, seed: int) -> None:
    """Few different ids at a high offset: their codes overflow 64 bits unless they are ranked."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(max(0, vocabulary - 3), vocabulary, (5, width), dtype=np.uint32)
    counts = repeated_ngrams(tokens, n)
    assert counts.dtype == np.int64
    assert counts.tolist() == by_loop(tokens, n)
    assert repeated_ngram_share(tokens, n).tolist() == (counts / (width - n + 1)).tolist()


def test_many_rows_are_counted_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(1).integers(0, 4, (23, 12)).astype(np.uint16)
    monkeypatch.setattr(repeats, "CHUNK_TOKENS", 5 * 12)
    assert repeated_ngrams(tokens, 3).tolist() == by_loop(tokens, 3)


def test_no_rows_have_no_counts() -> None:
    assert repeated_ngrams(np.zeros((0, 4), np.uint16), 2).shape == (0,)


@pytest.mark.parametrize(
    ("tokens", "n", "message"),
    [
        (np.zeros((2, 4), np.int64), 0, "n 0 is out of range"),
        (np.zeros((2, 4), np.int64), 5, "1- to 4-grams"),
        (np.zeros(4, np.int64), 2, "shape"),
        (np.zeros((2, 4)), 2, "float64"),
        (np.full((1, 4), -1), 2, "below 0"),
    ],
)
def test_what_has_no_ngrams_is_refused(tokens: np.ndarray, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        repeated_ngrams(tokens, n)
