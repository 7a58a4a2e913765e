"""Samples for a plan that the corpus does not hold, made into rows beside it."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeAlias

from mda_lightning.corpora import TokenRows
from mda_lightning.corpora.inserted import (
    inserted_from_generator,
    inserted_from_texts,
    inserted_from_tokens,
)
from mda_lightning.files import read_json
from mda_lightning.interventions import Source
from mda_lightning.recipes.plan_choice import Choice
from mda_lightning.recipes.plan_numbers import counted
from mda_lightning.recipes.plan_stream import BaseStream

Kind: TypeAlias = Literal["texts", "tokens", "generator"]
KINDS: tuple[Kind, ...] = ("texts", "tokens", "generator")
"""Of samples that the corpus does not hold."""

SAMPLES_SUFFIX = ".samples"


def from_elsewhere(
    kind: Kind,
    what: str,
    folder: Path,
    *,
    stream: BaseStream,
    n_rows: int | None = None,
    draw: int = 0,
    force: bool = False,
) -> Choice:
    """Samples that the corpus does not hold, made into rows of their own.

    They come to lie in ``folder`` when the choice is settled, after the plan has been checked.

    Args:
        force: write over other rows that are there.

    Raises:
        ValueError: no corpus that tells their length and vocabulary, another folder of that name,
            or what the reader or the generator refuses.
    """
    if stream.rows is None:
        raise ValueError(
            f"--{kind} makes rows of the length and vocabulary of the base corpus; give it with "
            "--corpus, or with --run where it still lies where the run found it"
        )
    _refuse_another_folder(folder)
    if kind == "generator" and n_rows is None:
        raise ValueError("--generator makes as many rows as it is told; add --rows N")

    def made(place: Path) -> TokenRows:
        base = stream.rows
        assert base is not None
        if kind == "texts":
            return inserted_from_texts(place, what, base=base)
        if kind == "tokens":
            return inserted_from_tokens(place, what, base=base)
        with _importing_from_here():
            return inserted_from_generator(place, what, base=base, n_rows=n_rows or 0, seed=draw)

    aside = TemporaryDirectory(dir=_nearest(folder), prefix=f".{folder.name}-")
    rows = made(Path(aside.name) / "rows")
    is_there = folder.exists() and TokenRows.open(folder).content_hash == rows.content_hash
    if folder.exists() and not is_there and not force:
        raise ValueError(
            f"{folder} holds other samples, which are kept; give another --output or --name, or "
            "--force to write over them"
        )

    def settle() -> None:
        with aside:
            if is_there:
                return
            folder.parent.mkdir(parents=True, exist_ok=True)
            if folder.exists():
                folder.rename(Path(aside.name) / "former")
            (Path(aside.name) / "rows").rename(folder)

    own = Source.of(rows, name=name_of(kind, what))
    own = dataclasses.replace(own, path=str(folder.absolute()))
    ids = own.ids()
    if n_rows is not None and n_rows > len(ids):
        raise ValueError(
            f"--rows {n_rows:,} were asked for, {what} has {len(ids):,}; ask for no more, or give "
            "more text or tokens"
        )
    if n_rows is not None:
        ids = ids[:n_rows]
    words = f"{counted(len(ids), 'row')} of {rows.row_length} tokens from {what} (kept in {folder})"
    left_out = []
    if len(ids) < own.n_rows:
        left_out.append(f"{counted(own.n_rows - len(ids), 'row')} more than --rows")
    if dropped := sum((rows.provenance.get("dropped_tokens") or {}).values()):
        share = dropped / (dropped + rows.row_length * own.n_rows)
        left_out.append(
            f"{counted(dropped, 'token')} too few for a row at the end of a domain ({share:.2%} of "
            "the text)"
        )
    return Choice(
        ids,
        words,
        {kind: what, **rows.provenance},
        sources=(own,),
        name=name_of(kind, what),
        left_out=left_out,
        settle=settle,
    )


def name_of(kind: str, what: str) -> str:
    """What new samples are called: their generator, or their file without its ending."""
    return what.rpartition(":")[2] if kind == "generator" else Path(what).name.partition(".")[0]


@contextmanager
def _importing_from_here() -> Iterator[None]:
    """Modules of the working folder can be imported, as with ``python -m``."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _refuse_another_folder(folder: Path) -> None:
    if not folder.exists():
        return
    meta = folder / "meta.json"
    if not meta.is_file() or read_json(meta).get("kind") != "token_rows":
        raise ValueError(
            f"{folder} is where the inserted samples go and holds something else; give another "
            "--output"
        )


def _nearest(folder: Path) -> Path:
    """The first folder above it that is there, of the same disk."""
    return next(parent for parent in folder.absolute().parents if parent.is_dir())
