"""The evaluations so far, in arrays that double when they are full."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class History:
    """Steps [n] and values [n, n_units] in single precision."""

    def __init__(self, n_units: int) -> None:
        self._n = 0
        self._steps = np.zeros(64, np.int64)
        self._values = np.zeros((64, n_units), np.float32)

    def __len__(self) -> int:
        return self._n

    @property
    def steps(self) -> NDArray[np.int64]:
        return self._steps[: self._n]

    @property
    def values(self) -> NDArray[np.float32]:
        return self._values[: self._n]

    def admits(self, step: int) -> bool:
        """Whether ``step`` may be appended; False where it is the last one again.

        Raises:
            ValueError: it lies before the last one, or is no whole number.
        """
        if step != int(step):
            raise ValueError(f"step {step}: optimizer steps are whole numbers")
        last = int(self.steps[-1]) if self._n else None
        if last is not None and step < last:
            raise ValueError(
                f"step {step} comes after step {last}: evaluations must be in order; sort them, or "
                "begin again with a new detector"
            )
        return step != last

    @property
    def newest(self) -> NDArray[np.float64]:
        """[n_units] the last values, finite or not; NaN before the first."""
        return self._reduced(self.values[-1:])

    @property
    def highest(self) -> NDArray[np.float64]:
        """[n_units] the highest values; NaN where none was finite."""
        return self._reduced(self.values)

    def _reduced(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        highest = np.fmax.reduce(values, axis=0, initial=np.nan)
        return np.asarray(highest, np.float64)

    def append(self, step: int, values: NDArray[np.float32]) -> None:
        if self._n == len(self._steps):
            self._steps = np.concatenate([self._steps, np.zeros_like(self._steps)])
            self._values = np.concatenate([self._values, np.zeros_like(self._values)])
        self._steps[self._n], self._values[self._n] = step, values
        self._n += 1
