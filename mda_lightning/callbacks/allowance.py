"""Leave to write something now and then, so seldom that it costs next to nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Allowance:
    """Wall-clock time that writing may take: at most ``share`` of it, judged by the last time.

    Args:
        share: of the wall time.
        wait: seconds before the first time, and between two at least.
    """

    def __init__(self, *, share: float = 0.003, wait: float = 0.0) -> None:
        self._share = share
        self._wait = wait
        self._next = 0.0
        self.seconds = 0.0
        """Spent so far."""

    def begin(self) -> None:
        """Count from now."""
        self._next = time.monotonic() + self._wait
        self.seconds = 0.0

    def is_due(self) -> bool:
        return time.monotonic() >= self._next

    @contextmanager
    def spending(self) -> Iterator[None]:
        """What is done within counts."""
        began = time.monotonic()
        try:
            yield
        finally:
            ended = time.monotonic()
            self.seconds += ended - began
            self._next = ended + max(self._wait, (ended - began) / self._share)
