"""A hash of what has been trained on."""

from __future__ import annotations

import hashlib

from mda_lightning.schedule.stream import Schedule


class StreamDigest:
    """A hash of what the first ``step`` steps of a schedule train on.

    Two schedules agree on these steps exactly when the digests agree; so a branch is checked
    against what its checkpoint has consumed. Chained step by step: ``step`` and ``value`` carry a
    digest on from a checkpoint.
    """

    def __init__(self, schedule: Schedule, step: int = 0, value: str = "") -> None:
        self.schedule = schedule
        self.step = step
        self.value = value

    def at(self, step: int) -> str:
        """The digest of steps ``0 .. step - 1``, walking on from the last one asked for."""
        if step < self.step:
            self.step, self.value = 0, ""
        for number in range(self.step, step):
            digest = hashlib.sha256(self.value.encode())
            for array in self.schedule.batch(number):
                digest.update(array.data)
            self.value = digest.hexdigest()
        self.step = step
        return self.value
