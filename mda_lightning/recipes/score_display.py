"""What a person sees once samples are scored."""

from __future__ import annotations

import numpy as np
from rich.table import Table

from mda_lightning.corpora.sources import TokenSource
from mda_lightning.store import ScoreTable

_UNITS = 8
_NUMBERS = 46  # columns that the numbers take
_LEAST, _MOST = 20, 80


def top_samples(
    mechanism: str, table: ScoreTable, source: TokenSource, *, count: int, width: int
) -> Table:
    """The samples that promote each unit most; the first units where there are many.

    Args:
        count: samples a unit.
        width: of the terminal; the texts are cut to what is left of it.
    """
    room = min(max(width - _NUMBERS - len(mechanism), _LEAST), _MOST)
    shown = Table(box=None, pad_edge=False, header_style="")
    shown.add_column(mechanism, no_wrap=True)
    for heading in ("sample", "score", "of all positive"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("text", no_wrap=True, overflow="ellipsis")
    for unit in table.units[:_UNITS]:
        ids, scores = table.mean_scores(unit)
        known = np.nan_to_num(scores, nan=-np.inf)
        best = np.argsort(-known, kind="stable")[:count]
        best = best[known[best] > 0]
        if not len(best):
            finite = bool(np.isfinite(scores).any())
            shown.add_row(unit, "", "none above 0" if finite else "no finite score", "", "")
        total = float(known[known > 0].sum())
        for place, i in enumerate(best):
            shown.add_row(
                unit if place == 0 else "",
                str(ids[i]),
                f"{scores[i]:.3g}",
                f"{scores[i] / total:.1%}",
                _short(source.text(int(ids[i])), room),
            )
    if len(table.units) > _UNITS:
        shown.add_row("...", "", f"{len(table.units) - _UNITS} more", "", "")
    return shown


def _short(text: str, room: int) -> str:
    flat = " ".join(text.split())
    cut = flat if len(flat) <= room else f"{flat[: room - 3]}..."
    return cut.replace("[", "\\[")
