"""Decoded samples in pieces a template can escape: plain text and repeated spans."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mda_lightning.analysis.spans import highlights

MOST_TOKENS = 700
"""Tokens shown of one sample; the rest is counted, not shown."""


@dataclass(frozen=True)
class Piece:
    """A run of text; ``group`` numbers the repeated span it shows, ``times`` counts its marks."""

    text: str
    group: int | None = None
    times: int = 0


@dataclass(frozen=True)
class ShownSample:
    """One sample as the report shows it.

    Attributes:
        repeated_share: share of the sample's tokens inside marked repeats, in [0, 1].
        hidden_tokens: tokens beyond what is shown.
    """

    sample_id: int
    domain: str | None
    score: float
    step: int
    pieces: tuple[Piece, ...]
    repeated_share: float
    hidden_tokens: int


def pieces_of(
    tokens: ArrayLike,
    texts: Sequence[str],
    *,
    decode: Callable[[Sequence[int]], str] | None = None,
    most: int = MOST_TOKENS,
) -> tuple[tuple[Piece, ...], float]:
    """Cut a sample into plain and repeated pieces.

    Args:
        tokens: token ids, [T].
        texts: the text of every token, [T].
        decode: text of several tokens together, used where a token on its own is part of a
            character (U+FFFD).
        most: show at most this many tokens; repeats are still looked for in all of them.

    Returns:
        The pieces, and the share of all tokens that are inside a repeat.
    """
    ids = np.asarray(tokens, dtype=np.int64).ravel()
    marks = highlights(ids, texts=texts)
    times = Counter(mark.group for mark in marks)
    shown = min(most, ids.size)
    pieces: list[Piece] = []

    def text(start: int, stop: int) -> str:
        joined = "".join(texts[start:stop])
        if decode is not None and "\ufffd" in joined:
            joined = decode(ids[start:stop].tolist())
        return visible(joined)

    at = 0
    for mark in marks:
        if mark.start >= shown:
            break
        if mark.start > at:
            pieces.append(Piece(text(at, mark.start)))
        stop = min(mark.stop, shown)
        pieces.append(Piece(text(mark.start, stop), mark.group, times[mark.group]))
        at = stop
    if at < shown:
        pieces.append(Piece(text(at, shown)))
    covered = sum(mark.stop - mark.start for mark in marks)
    return tuple(pieces), covered / ids.size if ids.size else 0.0


def visible(text: str) -> str:
    """Control and direction-changing characters as ``<U+202E>``, so that none acts on the page."""
    return "".join(
        f"<U+{ord(c):04X}>"
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t"
        else c
        for c in text
    )
