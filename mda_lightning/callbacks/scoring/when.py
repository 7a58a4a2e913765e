"""When in-run scoring is on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mda_lightning.window import Phase

Active = Literal["window", "always"] | tuple[int, int]


@dataclass(frozen=True)
class When:
    """Inside the window that CriticalWindow announces, always, or in steps [first, last)."""

    active: Active

    def __post_init__(self) -> None:
        if isinstance(self.active, str):
            if self.active not in ("window", "always"):
                raise ValueError(f"active={self.active!r}: 'window', 'always' or (first, last)")
            return
        first, last = (int(step) for step in self.active)
        object.__setattr__(self, "active", (first, last))  # a YAML file gives a list
        if not 0 <= first < last:
            raise ValueError(f"active=({first}, {last}): steps [first, last), 0 <= first < last")

    @property
    def by_window(self) -> bool:
        return self.active == "window"

    def is_on(self, step: int, phase: Phase) -> bool:
        """Whether the samples of this step are scored. A warning counts: it may be a start."""
        if isinstance(self.active, tuple):
            return self.active[0] <= step < self.active[1]
        return self.active == "always" or phase in ("warned", "open")

    def is_over(self, step: int, phase: Phase) -> bool:
        """Whether no sample of this step or a later one will be scored."""
        if isinstance(self.active, tuple):
            return step >= self.active[1]
        return self.active == "window" and phase == "closed"
