"""What becomes of the learning rate: it follows the step, and a shift moves data to later steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mda_lightning.interventions.operations import Steps
from mda_lightning.schedule import Schedule
from mda_lightning.schedule.strip import run_steps

if TYPE_CHECKING:
    from mda_lightning.pretraining.optimization import ScheduleName

_STEPS_AT_ONCE = 1024


@dataclass(frozen=True)
class Rates:
    """A learning-rate schedule, as of :class:`~mda_lightning.pretraining.PythiaModule`.

    Attributes:
        schedule: its name.
        total_steps: where it ends; None is with the run, so that a longer run stretches it.
        learning_rate: the peak; None gives multiples of it.
        warmup_steps: None is 1% of the total.
    """

    schedule: ScheduleName
    total_steps: int | None = None
    learning_rate: float | None = None
    warmup_steps: int | None = None

    def over(self, n_steps: int) -> Callable[[int], float]:
        """The rate of each step of a run of ``n_steps``."""
        # These take seconds to import, which a plan shown without rates need not wait for.
        from mda_lightning.pretraining.module import DEFAULT_DECAY_FRACTION
        from mda_lightning.pretraining.optimization import learning_rate_schedule
        from mda_lightning.pretraining.sizes import WARMUP_FRACTION

        total = self.total_steps or n_steps
        warmup = self.warmup_steps
        shape = learning_rate_schedule(
            self.schedule,
            total_steps=total,
            warmup_steps=int(WARMUP_FRACTION * total) if warmup is None else warmup,
            decay_steps=int(DEFAULT_DECAY_FRACTION * total) if self.schedule == "wsd" else 0,
        )
        peak = 1.0 if self.learning_rate is None else self.learning_rate
        return lambda step: peak * shape(step)


def rates_of(schedule: Schedule, window: Steps, rates: Rates) -> dict[str, Any]:
    """Mean rate of a window's base samples, of the last ones of the run, before and after.

    Args:
        window: base steps.
    """
    n_steps = schedule.order.n_steps
    before, after = rates.over(n_steps), rates.over(len(schedule))
    last = (n_steps - 1, n_steps)
    return {
        "window": list(window),
        "before": float(np.mean([before(step) for step in range(*window)])),
        "after": _mean(schedule, window, after),
        "at_the_end_before": before(last[0]),
        "at_the_end_after": _mean(schedule, last, after),
    }


def _mean(schedule: Schedule, window: Steps, rate: Callable[[int], float]) -> float:
    """Over the places of the run that hold the window's base places."""
    size = schedule.order.batch_size
    start, end = window[0] * size, window[1] * size
    first, last = run_steps(schedule, window)
    total, n_places = 0.0, 0
    for begin in range(first, last, _STEPS_AT_ONCE):
        stop = min(begin + _STEPS_AT_ONCE, last)
        positions = schedule.base_positions(begin, stop)
        inside = ((positions >= start) & (positions < end)).reshape(-1, size).sum(1)
        total += sum(
            int(n) * rate(step) for step, n in zip(range(begin, stop), inside, strict=True)
        )
        n_places += int(inside.sum())
    return total / max(1, n_places)
