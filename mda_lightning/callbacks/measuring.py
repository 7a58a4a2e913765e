"""What a monitor measures: mechanisms, and the measures beside them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.callbacks.attachment import build_mechanism, has_token_ids
from mda_lightning.callbacks.metric_table import Grid, Measurement
from mda_lightning.callbacks.probe_scope import probe_scope
from mda_lightning.measures import Measure, Mu, measure
from mda_lightning.mechanisms import Mechanism
from mda_lightning.metrics import UnitScores
from mda_lightning.vocabulary import TokenizerLike, token_ids_of

EVERY_TENTH = 10
"""A measure without a rate of its own is taken at every tenth measurement of the monitor."""


class Measuring:
    """Mechanisms, taken at every measurement, and measures, each at its own rate.

    Args:
        mechanisms, measures: names or objects, one or several, no name twice. A mechanism among the
            measures is its μ (:class:`~mda_lightning.measures.Mu`).
        token_ids: drawn from by those that have no ids of their own.
        tokenizer: the same, as the ids that it uses; known once there is a model.

    Raises:
        ValueError: an unknown name, a name twice, nothing to measure, or both of the last two.
    """

    def __init__(
        self,
        mechanisms: str | Mechanism | Sequence[str | Mechanism],
        measures: str | Measure | Mechanism | Sequence[str | Measure | Mechanism],
        *,
        token_ids: Sequence[int] | None = None,
        tokenizer: TokenizerLike | None = None,
    ) -> None:
        if token_ids is not None and tokenizer is not None:
            raise ValueError("token_ids and tokenizer both say which ids to draw from: give one")
        self.mechanisms = [build_mechanism(wanted, token_ids) for wanted in _listed(mechanisms)]
        self.measures = [_build_measure(wanted, token_ids) for wanted in _listed(measures)]
        self._given = (list(self.mechanisms), list(self.measures))
        self._tokenizer = tokenizer
        if len(set(self.names)) < len(self.names) or not self.names:
            raise ValueError(
                f"mechanisms and measures {self.names}: give at least one, each of another name"
            )
        for one in self.measures:
            if one.every_n_steps is not None and one.every_n_steps < 1:
                raise ValueError(
                    f"{one.name}: every_n_steps={one.every_n_steps}: measure at most every step, 1"
                )

    def attach(self, model: PreTrainedModel) -> None:
        """Find the token ids, and check that everything can be measured on ``model``.

        Raises:
            ValueError: what cannot; the message says why and what to change.
        """
        if self._tokenizer is not None:
            ids = token_ids_of(self._tokenizer, model).tolist()
            mechanisms, measures = self._given
            self.mechanisms = [build_mechanism(one, ids) for one in mechanisms]
            self.measures = [
                _build_measure(_with_tokenizer(one, self._tokenizer), ids) for one in measures
            ]
        for wanted in self._all:
            wanted.check(model)

    @property
    def names(self) -> list[str]:
        """Of all that is measured."""
        return [one.name for one in self._all]

    @property
    def _all(self) -> list[Mechanism | Measure]:
        return [*self.mechanisms, *self.measures]

    def chances(self) -> dict[str, float]:
        """By key, the score of a head with uniform attention, where that has a meaning."""
        watched = [m.mechanism for m in self.measures if isinstance(m, Mu)]
        return {m.name: m.chance for m in (*self.mechanisms, *watched)}

    def due(self, step: int, n_taken: int, *, on_grid: bool) -> list[Mechanism | Measure]:
        """What is measured at ``step``.

        Args:
            n_taken: measurements of the monitor so far.
            on_grid: whether the monitor measures at this step.
        """
        wanted: list[Mechanism | Measure] = list(self.mechanisms) if on_grid else []
        for one in self.measures:
            if one.every_n_steps is not None:
                if step % one.every_n_steps == 0:
                    wanted.append(one)
            elif on_grid and n_taken % EVERY_TENTH == 0:
                wanted.append(one)
        return wanted

    def take(
        self, model: PreTrainedModel, wanted: Sequence[Mechanism | Measure], *, step: int
    ) -> list[Measurement]:
        """Measure; the model is left as it was (:func:`probe_scope`), also by an error.

        Raises:
            ValueError: a result is neither one number a head nor one number.
        """
        with probe_scope(model):
            return [
                Measurement(step, key, _grid(key, scores.mean), _grid(key, scores.se))
                for one in wanted
                for key, scores in _results(one, model).items()
            ]


class NotFinite:
    """Says once a metric, in words, that it is not finite."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def words(self, one: Measurement) -> str | None:
        """What to tell of a measurement, or None."""
        if np.isfinite(one.value).all() or one.metric in self._told:
            return None
        self._told.add(one.metric)
        where = ""
        if one.value.ndim == 2:
            broken = np.flatnonzero(~np.isfinite(one.value).all(axis=1))
            where = f" in layer {int(broken[0])}" + (" and later ones" if len(broken) > 1 else "")
        return (
            f"{one.metric} is not finite at step {one.step}{where}: the model's activations are "
            "not; training goes on, and the table keeps NaN there"
        )


class Stopwatch:
    """Adds up seconds of the device's own time, where Python runs ahead of it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        if device.type != "cuda":
            began = time.perf_counter()
            try:
                yield
            finally:
                self.seconds += time.perf_counter() - began
            return
        with torch.cuda.device(device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            yield
            last.record()
            last.synchronize()  # the numbers are read next, so this waits for nothing more
            self.seconds += first.elapsed_time(last) / 1000.0


def _listed(given: Any) -> list[Any]:
    """One name or one object is a list of one."""
    return [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)


def _build_measure(wanted: str | Measure | Mechanism, token_ids: Sequence[int] | None) -> Measure:
    built = measure(wanted) if isinstance(wanted, str) else wanted
    if not isinstance(built, Measure):
        built = Mu(built)
    if token_ids is not None and not has_token_ids(built):
        built = built.with_token_ids([int(i) for i in token_ids])
    return built


def _with_tokenizer(one: Any, tokenizer: TokenizerLike) -> Any:
    """A measure of text reads it with the monitor's tokenizer if it has none of its own."""
    if is_dataclass(one) and getattr(one, "tokenizer", tokenizer) is None:
        return replace(one, tokenizer=tokenizer)  # type: ignore[type-var]
    return one


def _results(one: Mechanism | Measure, model: PreTrainedModel) -> dict[str, UnitScores]:
    return one.measure(model) if isinstance(one, Measure) else {one.name: one.scores(model)}


def _grid(key: str, values: Tensor) -> Grid:
    grid = values.detach().float().cpu().numpy()
    if grid.ndim not in (0, 2):
        raise ValueError(
            f"{key} gives numbers of shape {list(grid.shape)}: a measure gives one number a head, "
            "[layers, heads], or one number of the whole model, []"
        )
    return grid
