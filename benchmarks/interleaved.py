"""Timing of alternatives in turn, so that a machine's drift falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one alternative over the counted rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleaved(
    alternatives: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time each alternative once a round, in turn; a first round is not counted.

    ``clock=time.process_time`` counts the process's own time, for minutes of one thread in which a
    shared machine does other things too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for number in range(rounds + 1):
        for name, run in alternatives.items():
            started = clock()
            run()
            if number:
                seconds[name].append(clock() - started)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratio(a: Timing, b: Timing) -> tuple[float, float, float]:
    """Median, least and greatest of a/b, round by round."""
    pairs = sorted(x / y for x, y in zip(a.seconds, b.seconds, strict=True))
    return statistics.median(pairs), pairs[0], pairs[-1]
