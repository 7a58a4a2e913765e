"""Units that hand their role over to each other (App. K of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mda_lightning.window.rule import Window, WindowEvent


def hand_overs(
    events: Sequence[WindowEvent],
    ended: Sequence[Window],
    *,
    rising: NDArray[np.bool_],
    formed: NDArray[np.bool_],
    last_high: NDArray[np.int64],
    lapsed_at: NDArray[np.int64],
) -> list[WindowEvent]:
    """Pairs of units of which one fell back while the other rose.

    A fall lasts from when the unit's EMA was last near its maximum until the lapse, a rise from the
    back-dated start until the window's end. Each pair is told once, when the later of the lapse and
    the opening happens.

    Args:
        events: of one evaluation.
        ended: windows that are over.
        rising, formed: [n_units] after the evaluation.
        last_high: [n_units] steps at which each unit was last near its maximum.
        lapsed_at: [n_units] steps at which those lapsed that still are; else -1.
    """
    found: dict[tuple[int, int], WindowEvent] = {}  # a lapse and a rise may fall on one evaluation
    for event in events:
        unit = event.unit_index
        pairs: list[tuple[int, int]] = []
        if event.kind == "lapsed" and lapsed_at[unit] >= 0:
            since = last_high[unit]
            rose = {w.unit_index for w in ended if w.end is not None and w.end >= since}
            rose = {i for i in rose if formed[i]} | {int(i) for i in np.flatnonzero(rising)}
            pairs = [(unit, other) for other in sorted(rose)]
        elif event.kind == "opened":
            pairs = [(int(other), unit) for other in np.flatnonzero(lapsed_at >= event.start)]
        for one, other in pairs:
            if one != other:
                found[one, other] = WindowEvent(
                    "handed_over", one, event.step, event.start, None, other
                )
    return list(found.values())
