"""Which of a measurement's numbers are logged as scalars, and under which keys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mda_lightning.callbacks.metric_table import Grid, Measurement, MetricTable


class ScalarKeys:
    """The highest heads of every metric, by name; all heads are in the long table.

    Args:
        top_k: heads logged of each metric: those that have been highest so far.

    Raises:
        ValueError: fewer than 0.
    """

    def __init__(self, top_k: int) -> None:
        if top_k < 0:
            raise ValueError(f"top_k={top_k}: log 0 heads as scalars (none) or more, such as 4")
        self._top_k = top_k
        self._highest: dict[str, Grid] = {}

    def take_up(self, table: MetricTable) -> None:
        """Go on from what a table holds."""
        self._highest = {
            metric: np.fmax.reduce(table.curves(metric)[1])
            for metric in table.metrics
            if table.shape(metric)
        }

    def chosen(self, metric: str) -> list[tuple[int, int]]:
        """(layer, head) of the heads that have been highest so far, in the model's order."""
        highest = self._highest[metric]
        order = np.argsort(-np.nan_to_num(highest, nan=-np.inf).reshape(-1), kind="stable")
        heads = highest.shape[1]
        return [divmod(i, heads) for i in sorted(order[: self._top_k].tolist())]

    def scalars(self, one: Measurement) -> dict[str, float]:
        """What is logged of a measurement; nothing of one that holds no finite number."""
        if one.value.ndim == 0:
            known = {one.metric: float(one.value), f"{one.metric}_se": float(one.se)}
            return {key: number for key, number in known.items() if math.isfinite(number)}
        self._highest[one.metric] = np.fmax(self._highest.get(one.metric, one.value), one.value)
        if not np.isfinite(one.value).any():
            return {}
        return {
            f"{one.metric}/max": float(np.nanmax(one.value)),
            f"{one.metric}/mean": float(np.nanmean(one.value)),
            **{
                f"{one.metric}/L{layer}H{head}": float(one.value[layer, head])
                for layer, head in self.chosen(one.metric)
            },
        }


def best_head(table: MetricTable, metric: str) -> dict[str, Any]:
    """The head that was highest over the run, as summary keys: head, score, and its step."""
    steps, values = table.curves(metric)
    if values.ndim != 3 or not np.isfinite(values).any():
        return {}
    finite: NDArray[Any] = np.where(np.isfinite(values), values, -np.inf)
    at, layer, head = np.unravel_index(int(finite.argmax()), finite.shape)
    return {
        f"{metric}/best_head": f"L{layer}H{head}",
        f"{metric}/best_score": float(values[at, layer, head]),
        f"{metric}/best_step": int(steps[at]),
    }
