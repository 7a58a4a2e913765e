"""Repeated spans against a brute-force search, and the text pieces made from them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mda_lightning.analysis.samples import pieces_of, visible
from mda_lightning.analysis.spans import (
    RepeatedSpan,
    common_prefixes,
    highlights,
    repeated_spans,
    suffix_array,
)

small_samples = st.lists(st.integers(0, 3), max_size=28)


def brute_force(tokens: list[int], least: int) -> list[RepeatedSpan]:
    """All n-grams, all occurrences; kept when both extensions lose an occurrence."""
    n = len(tokens)
    found = []
    for length in range(least, n):
        places: dict[tuple[int, ...], list[int]] = {}
        for start in range(n - length + 1):
            places.setdefault(tuple(tokens[start : start + length]), []).append(start)
        for starts in places.values():
            if len(starts) < 2:
                continue
            left = {tokens[s - 1] if s else ("edge", s) for s in starts}
            right = {tokens[s + length] if s + length < n else ("edge", s) for s in starts}
            if len(left) > 1 and len(right) > 1:
                found.append(RepeatedSpan(length, tuple(starts)))
    return sorted(found, key=lambda span: (-span.length, span.positions))


@given(small_samples, st.integers(1, 4))
def test_maximal_repeats_equal_brute_force(tokens: list[int], least: int) -> None:
    assert repeated_spans(tokens, min_tokens=least) == brute_force(tokens, least)


@given(small_samples)
def test_suffix_array_sorts_the_suffixes(tokens: list[int]) -> None:
    order = suffix_array(tokens).tolist()
    assert order == sorted(range(len(tokens)), key=lambda start: tokens[start:])
    common = common_prefixes(tokens, suffix_array(tokens)).tolist()
    assert len(common) == len(order)
    for (before, after), length in zip(itertools.pairwise(order), common[1:], strict=True):
        one, two = tokens[before:], tokens[after:]
        assert one[:length] == two[:length]
        assert one[length : length + 1] != two[length : length + 1]


@given(small_samples)
def test_highlights_are_disjoint_true_repeats(tokens: list[int]) -> None:
    marks = highlights(tokens, min_tokens=2)
    assert marks == highlights(tokens, min_tokens=2)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(marks))
    groups: dict[int, set[tuple[int, ...]]] = {}
    for mark in marks:
        groups.setdefault(mark.group, set()).add(tuple(tokens[mark.start : mark.stop]))
    assert sorted(groups) == list(range(len(groups)))
    for group, contents in groups.items():
        assert len(contents) == 1
        assert sum(mark.group == group for mark in marks) >= 2
        assert all(len(content) >= 2 for content in contents)


def test_a_repeated_block_is_marked_whole() -> None:
    block = [7, 3, 9, 4, 4, 8]
    marks = highlights([1, *block, 2, *block, 5])
    assert [(mark.start, mark.stop, mark.group) for mark in marks] == [(1, 7, 0), (8, 14, 0)]


def test_two_tokens_count_when_their_text_is_long_enough() -> None:
    tokens, long = [1, 2, 3, 1, 2], ["identifier", "_suffix", " ", "identifier", "_suffix"]
    assert len(highlights(tokens, texts=long, min_chars=12)) == 2
    assert highlights(tokens, texts=["a", "b", " ", "a", "b"], min_chars=12) == []
    assert highlights([5, 5, 5, 1, 5, 5, 5], texts=[" "] * 7) == []


def test_a_long_sample_of_one_token_is_marked() -> None:
    marks = highlights(np.zeros(2048, dtype=np.int64))
    assert sum(mark.stop - mark.start for mark in marks) == 2048


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="min_tokens 0"):
        repeated_spans([1], min_tokens=0)
    with pytest.raises(ValueError, match="2 texts for 1 tokens"):
        highlights([1], texts=["a", "b"])


@given(small_samples, st.integers(1, 30))
def test_pieces_hold_the_text_shown_and_nothing_else(tokens: list[int], most: int) -> None:
    texts = [f"<{token}>" for token in tokens]
    pieces, share = pieces_of(tokens, texts, most=most)
    assert "".join(piece.text for piece in pieces) == "".join(texts[:most])
    assert 0.0 <= share <= 1.0
    assert all(piece.times >= 2 for piece in pieces if piece.group is not None)


def test_characters_split_over_tokens_are_decoded_together() -> None:
    pieces, _ = pieces_of([1, 2], ["\ufffd", "\ufffd"], decode=lambda ids: "é" * (len(ids) - 1))
    assert [piece.text for piece in pieces] == ["é"]


def test_characters_that_act_are_shown_by_their_code() -> None:
    assert visible("a\tb\n\x00\u202e\u200b é") == "a\tb\n<U+0000><U+202E><U+200B> é"
