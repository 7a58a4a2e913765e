"""Which rows of a corpus a study trains on, and which it keeps back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from mda_lightning import __version__
from mda_lightning.corpora import TokenRows
from mda_lightning.corpora.streamed_rows import ROWS_AT_ONCE, write_streamed
from mda_lightning.files import sha256_of
from mda_lightning.recipes.studies.settings import CorpusSettings
from mda_lightning.shuffling import key_of, keyed_order

Progress = Callable[[str, float], None]
_LONGEST_BLOCK = 32
_FEWEST_BLOCKS = 8


def divided(
    whole: TokenRows, settings: CorpusSettings, cache: Path, report: Progress
) -> tuple[TokenRows, TokenRows | None]:
    """Training rows and held-out rows of a corpus; no row is in both.

    See :func:`~mda_lightning.recipes.studies.study_corpus.study_corpus`.

    Raises:
        ValueError: more rows are held out than there are.
    """
    total, held = len(whole), settings.held_out_rows
    # An embedded corpus has the size that was asked for, or all that the library has.
    wanted = None if settings.kind == "embedded" else settings.n_rows
    if held < 0 or held >= total:
        raise ValueError(
            f"corpus.held_out_rows is {held}, the corpus has {total} rows; hold out fewer, so that "
            "some are left to train on"
        )
    if not held and (wanted is None or wanted >= total):
        return whole, None
    n_train = min(total - held, total - held if wanted is None else wanted)
    if settings.shuffle:
        names = whole.domains(np.arange(total)) or [""] * total
        _, strata = np.unique(np.asarray(names), return_inverse=True)
        kept_back = stratified_blocks(strata, held, key=key_of("held out", settings.seed))
        others = np.setdiff1d(np.arange(total), kept_back)
        chosen = stratified_blocks(strata[others], n_train, key=key_of("rows", settings.seed))
        train = others[chosen]
    else:
        train, kept_back = np.arange(n_train), np.arange(n_train, n_train + held)
    about = {
        "kind": "part",
        "corpus": whole.content_hash,
        "held_out_rows": held,
        "n_rows": n_train,
        "seed": settings.seed,
        "shuffle": settings.shuffle,
    }
    rows = _part(whole, train, place(cache, "rows", about), about, report)
    if not held:
        return rows, None
    return rows, _part(whole, kept_back, place(cache, "held-out", about), about, report)


def stratified_blocks(strata: NDArray[np.int64], n: int, *, key: np.uint64) -> NDArray[np.int64]:
    """``n`` of the rows, ascending, of each stratum in proportion, in blocks of neighbours.

    Args:
        strata: int [N], 0 to S - 1, the stratum of each row.
        n: at most N.
        key: of the draw.
    """
    sizes = np.bincount(strata)
    if n >= len(strata):
        return np.arange(len(strata))
    exact = n * sizes / len(strata)
    quotas = np.floor(exact).astype(np.int64)
    largest = np.argsort(quotas - exact, kind="stable")  # the largest remainders first
    quotas[largest[: n - quotas.sum()]] += 1
    chosen = [np.empty(0, np.int64)]
    for stratum, quota in enumerate(quotas.tolist()):
        rows = np.flatnonzero(strata == stratum)
        size = max(1, min(_LONGEST_BLOCK, quota // _FEWEST_BLOCKS))
        order = keyed_order(key ^ key_of("stratum", stratum), -(-len(rows) // size))
        places = (order[:, None] * size + np.arange(size)).reshape(-1)
        chosen.append(rows[places[places < len(rows)][:quota]])
    return np.sort(np.concatenate(chosen))


def _part(
    whole: TokenRows,
    ids: NDArray[np.int64],
    folder: Path,
    about: dict[str, Any],
    report: Progress,
) -> TokenRows:
    if folder.is_dir():
        return TokenRows.open(folder)
    tokenizer = whole.folder / "tokenizer.json"
    # What the whole corpus leaves out of its ids, such as an end of text, its parts do too.
    special = np.setdiff1d(np.arange(whole.vocab_size), whole.token_ids)
    return write_streamed(
        folder,
        (whole.get(ids[at : at + ROWS_AT_ONCE]) for at in range(0, len(ids), ROWS_AT_ONCE)),
        n_rows=len(ids),
        row_length=whole.row_length,
        vocab_size=whole.vocab_size,
        domains=whole.domains(ids),
        tokenizer_json=tokenizer.read_text("utf-8") if tokenizer.is_file() else None,
        special_ids=special.tolist(),
        provenance=about | {"of": whole.provenance},
        progress=lambda share: report("dividing the corpus", share),
    )


def place(cache: Path, name: str, made_from: dict[str, Any]) -> Path:
    """Where a corpus is kept, by all that determines it and what made it."""
    settings = made_from | {"package": __version__, "tokenizers": tokenizers.__version__}
    return cache / f"{name}-{sha256_of(json.dumps(settings, sort_keys=True))[:16]}"
