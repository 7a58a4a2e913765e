"""What a person sees once samples are scored."""

from __future__ import annotations

import numpy as np
from rich.table import Table

from mda_lightning.corpora.sources import RowsSource, TokenSource
from mda_lightning.store import ScoreTable

_UNITS = 8
_TEXT = 60


def top_samples(mechanism: str, table: ScoreTable, source: TokenSource, *, count: int) -> Table:
    """The samples that promote each unit most; the first units where there are many."""
    shown = Table(box=None, pad_edge=False, header_style="")
    shown.add_column(mechanism)
    for heading in ("sample", "score", "of all positive"):
        shown.add_column(heading, justify="right")
    shown.add_column("text", no_wrap=True, overflow="ellipsis")
    for unit in table.units[:_UNITS]:
        ids, scores = table.mean_scores(unit)
        if not np.isfinite(scores).any():
            shown.add_row(unit, "none", "no finite score", "", "")
            continue
        positive = float(np.clip(np.nan_to_num(scores), 0, None).sum())
        best = np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")[:count]
        for place, i in enumerate(best):
            share = f"{scores[i] / positive:.1%}" if scores[i] > 0 else ""
            shown.add_row(
                unit if place == 0 else "",
                str(ids[i]),
                f"{scores[i]:.3g}",
                share,
                _text(source, int(ids[i])),
            )
    if len(table.units) > _UNITS:
        shown.add_row(f"... {len(table.units) - _UNITS} more", "", "", "", "")
    return shown


def _text(source: TokenSource, sample: int) -> str:
    if not isinstance(source, RowsSource):
        return ""
    try:
        text = source.rows.decode(source.get([sample])[0])
    except ValueError:  # a corpus without a tokenizer
        return ""
    flat = " ".join(text.split()).replace("[", "\\[")
    return flat[:_TEXT] + ("..." if len(flat) > _TEXT else "")
