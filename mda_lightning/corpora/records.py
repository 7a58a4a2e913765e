"""Generated structured records: short documents in which random names recur.

What makes an induction head worthwhile is text whose continuation can only be copied: a name that
no statistics of the language predict, met a second time. Each record makes up its own names and
uses them several times, in one of six layouts; a layout is a domain of its own.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tokenizers import Tokenizer

GENERATOR_VERSION = 1  # changes when the same settings and seed would give other records

_WORDS = (
    *("id", "name", "key", "user", "host", "path", "value", "type", "node", "state", "owner"),
    *("ref", "code", "tag", "src", "dst", "item", "group", "file", "line", "time", "size", "kind"),
    *("next", "data", "port", "mode", "text", "open", "close", "read", "write", "send", "start"),
    *("stop", "wait", "move", "join", "copy", "drop", "retry"),
)
_LONGEST_PIECE = 5  # characters
_LEVELS = ("INFO", "WARNING", "ERROR", "DEBUG")

Draw: TypeAlias = Callable[[], str]
Layout: TypeAlias = Callable[[random.Random, int, Draw, Draw], str]


@dataclass(frozen=True)
class RecordStyle:
    """How records look.

    Attributes:
        pieces: what names are made of: short alphanumeric tokens of the tokenizer's own
            ``"vocabulary"``, so that a name of n pieces has about n tokens drawn from the whole
            vocabulary, or single ``"characters"``.
        pieces_per_name: fewest and most pieces in a name.
        second_name: share of the records that have two names instead of one.
        lines_per_record: fewest and most lines (entries); each uses one of the record's names.
        layouts: which layouts, equally often.
    """

    pieces: Literal["vocabulary", "characters"] = "vocabulary"
    pieces_per_name: tuple[int, int] = (4, 8)
    second_name: float = 0.3
    lines_per_record: tuple[int, int] = (5, 8)
    layouts: tuple[str, ...] = ("keys", "logs", "table", "markup", "csv", "json")

    def __post_init__(self) -> None:
        unknown = set(self.layouts) - set(LAYOUTS)
        if unknown or not self.layouts:
            raise ValueError(
                f"layouts {sorted(unknown)} are unknown; choose among {sorted(LAYOUTS)}"
            )
        if not 0 <= self.second_name <= 1:
            raise ValueError(f"second_name is {self.second_name}; it is a share, 0 to 1")
        for name in ("pieces_per_name", "lines_per_record"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} is ({low}, {high}); fewest and most, at least 1")


class RecordGenerator:
    """An endless, seeded source of records.

    Args:
        style: how they look.
        tokenizer: whose words names are made of, for ``pieces="vocabulary"``.
        seed: records are a pure function of style, tokenizer and seed.
    """

    def __init__(self, style: RecordStyle, tokenizer: Tokenizer, *, seed: int) -> None:
        self._style = style
        self._rng = random.Random(seed)
        self._pieces = _pieces(style, tokenizer)

    def record(self, layout: str) -> str:
        """One document in ``layout``."""
        rng, style = self._rng, self._style
        names = [
            "".join(rng.choices(self._pieces, k=rng.randint(*style.pieces_per_name)))
            for _ in range(1 + (rng.random() < style.second_name))
        ]
        lines = rng.randint(*style.lines_per_record)
        return LAYOUTS[layout](rng, lines, lambda: rng.choice(names), lambda: rng.choice(_WORDS))


def _keys(rng: random.Random, lines: int, name: Draw, word: Draw) -> str:
    return "".join(f"{word()}{rng.choice((' = ', '=', ': '))}{name()}\n" for _ in range(lines))


def _logs(rng: random.Random, lines: int, name: Draw, word: Draw) -> str:
    return "".join(
        f"{rng.choice(_LEVELS)} {word()} {name()}{_sometimes(rng, ' ', word)}\n"
        for _ in range(lines)
    )


def _table(rng: random.Random, lines: int, name: Draw, word: Draw) -> str:
    head = f"| {word()} | {word()} |\n"
    return head + "".join(f"| {word()} | {name()} |\n" for _ in range(lines))


def _markup(rng: random.Random, lines: int, name: Draw, word: Draw) -> str:
    def element() -> str:
        tag = name()
        return f"<{tag}{_sometimes(rng, ' ', word)}>{word()}</{tag}>\n"

    # An element uses its name twice.
    return "".join(element() for _ in range((lines + 1) // 2))


def _csv(rng: random.Random, lines: int, name: Draw, word: Draw) -> str:
    head = f"{word()},{word()}\n"
    return head + "".join(f"{word()},{name()}{_sometimes(rng, ',', word)}\n" for _ in range(lines))


def _json(rng: random.Random, lines: int, name: Draw, word: Draw) -> str:
    return "[" + ", ".join(f'{{"{word()}": "{name()}"}}' for _ in range(lines)) + "]\n"


LAYOUTS: dict[str, Layout] = {
    "keys": _keys,
    "logs": _logs,
    "table": _table,
    "markup": _markup,
    "csv": _csv,
    "json": _json,
}


def _sometimes(rng: random.Random, separator: str, word: Draw) -> str:
    return separator + word() if rng.random() < 0.5 else ""


def _pieces(style: RecordStyle, tokenizer: Tokenizer) -> Sequence[str]:
    if style.pieces == "characters":
        return string.ascii_letters + string.digits
    # Tokens without the leading-space mark: a name is one unbroken string.
    vocabulary = sorted(tokenizer.get_vocab())
    return [t for t in vocabulary if t.isascii() and t.isalnum() and len(t) <= _LONGEST_PIECE]
