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
_LEVELS = ("INFO", "WARNING", "ERROR", "DEBUG")

Draw: TypeAlias = Callable[[], str]
Layout: TypeAlias = Callable[[random.Random, int, Draw, Draw], str]


@dataclass(frozen=True)
class RecordStyle:
    """How records look.

    Attributes:
        pieces: what names are made of: short alphanumeric words of the tokenizer's own
            ``"vocabulary"``, so that a name of n pieces has about n tokens drawn from the whole
            vocabulary, or single ``"characters"``.
        pieces_per_name: fewest and most pieces in a name.
        names_per_record: fewest and most different names in a record.
        lines_per_record: fewest and most lines (entries); each uses one of the record's names.
        layouts: which layouts, equally often.
    """

    pieces: Literal["vocabulary", "characters"] = "vocabulary"
    pieces_per_name: tuple[int, int] = (6, 14)
    names_per_record: tuple[int, int] = (1, 2)
    lines_per_record: tuple[int, int] = (4, 6)
    layouts: tuple[str, ...] = ("keys", "logs", "table", "markup", "csv", "json")

    def __post_init__(self) -> None:
        unknown = set(self.layouts) - set(LAYOUTS)
        if unknown or not self.layouts:
            raise ValueError(
                f"layouts {sorted(unknown)} are unknown; choose among {sorted(LAYOUTS)}"
            )
        for name in ("pieces_per_name", "names_per_record", "lines_per_record"):
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
            for _ in range(rng.randint(*style.names_per_record))
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
    words = sorted(token for token in tokenizer.get_vocab() if token.isascii() and token.isalnum())
    return [word for word in words if len(word) >= 2] or words
