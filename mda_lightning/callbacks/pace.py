"""How often to measure: seldom while nothing happens, often where something moves. No Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_N_SIGMA = 4.0
_ENOUGH = 5


def _noise(scores: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Per score, the noise about its trend, from the MAD of what one measurement changes; 0 where
    too few are known. [n, ...] to [...]."""
    if len(scores) < _ENOUGH:
        return np.zeros(scores.shape[1:])
    changes = np.where(np.isfinite(steps := np.diff(scores, axis=0)), steps, 0.0)
    mad = np.median(np.abs(changes - np.median(changes, axis=0)), axis=0)
    return np.asarray(_MAD_TO_SIGMA * mad / np.sqrt(2.0))


class Pace:
    """A rate that adapts to the scores it measures.

    Steps are measured on a grid: every ``every_n_steps`` while the pace is dense, every
    ``quiet_every_n_steps`` otherwise. It is dense while any score has moved by more than
    ``tolerance``, and by more than its own noise makes it, within the last ``look_back`` quiet
    intervals; or while someone asks for it.

    It is a function of the scores alone, so that it decides alike on every rank that has the same
    scores, and goes on after a resume as if it had never stopped.

    Args:
        every_n_steps: optimizer steps between measurements while dense.
        quiet_every_n_steps: the same while quiet, a multiple of the former; None is a fixed rate.
        tolerance: in units of the score (an attention probability).
        look_back: in quiet intervals.

    Raises:
        ValueError: an interval below 1, or a quiet one off the dense one's grid.
    """

    def __init__(
        self,
        every_n_steps: int,
        quiet_every_n_steps: int | None = None,
        *,
        tolerance: float = 0.02,
        look_back: int = 5,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: measure at most every step, 1")
        quiet = every_n_steps if quiet_every_n_steps is None else quiet_every_n_steps
        if quiet < every_n_steps or quiet % every_n_steps:
            raise ValueError(
                f"quiet_every_n_steps={quiet} is not a multiple of every_n_steps={every_n_steps}: "
                "both share one grid of steps; give a multiple, "
                f"such as {10 * every_n_steps}"
            )
        if tolerance <= 0 or look_back < 1:
            raise ValueError(
                f"tolerance={tolerance} and look_back={look_back}: a positive change of a score, "
                "within at least 1 quiet interval"
            )
        self.every_n_steps = every_n_steps
        self.quiet_every_n_steps = quiet
        self.tolerance = tolerance
        self.look_back = look_back
        self._moving = False

    @property
    def adapts(self) -> bool:
        """Whether there are two rates at all."""
        return self.quiet_every_n_steps > self.every_n_steps

    @property
    def span(self) -> int:
        """The steps over which a change counts."""
        return self.look_back * self.quiet_every_n_steps

    def interval(self, *, asked: bool) -> int:
        """Steps between measurements now; ``asked``: someone wants the dense rate."""
        return self.every_n_steps if asked or self._moving else self.quiet_every_n_steps

    def words(self, *, asked: bool) -> str:
        """The rate now, for a reader."""
        now = self.interval(asked=asked)
        if not self.adapts:
            return f"every {now} steps"
        other = "quiet" if now == self.every_n_steps else "dense"
        interval = self.quiet_every_n_steps if other == "quiet" else self.every_n_steps
        return f"every {now} steps now, every {interval} while {other}"

    def is_due(self, step: int, *, asked: bool) -> bool:
        """Whether ``step`` is measured."""
        return step % self.interval(asked=asked) == 0

    def take(self, recent: Iterable[NDArray[np.floating[Any]]]) -> None:
        """Decide from the scores of the last :attr:`span` steps, the newest last: [n, ...] each.

        Scores that are not finite count as at rest.
        """
        self._moving = any(self._has_moved(scores) for scores in recent)

    def _has_moved(self, scores: NDArray[np.floating[Any]]) -> bool:
        if len(scores) < 2:
            return False
        change = np.abs(scores[:-1] - scores[-1])
        limit = np.broadcast_to(self.tolerance + _N_SIGMA * _noise(scores), change.shape)
        finite = np.isfinite(change)
        return bool((change[finite] > limit[finite]).any())

    def state_dict(self) -> dict[str, Any]:
        return {"moving": self._moving}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moving = bool(state["moving"])
