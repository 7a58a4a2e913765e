"""In-run scores of the last steps, of all ranks, on every rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class StepRows(NamedTuple):
    """Scored samples of one step.

    Attributes:
        step: of their update.
        ihvp_step: of the IHVP that they were scored with.
        ids: int64 [n].
        values: float32 [n, U]; NaN where there is no score.
    """

    step: int
    ihvp_step: int
    ids: Tensor
    values: Tensor


class RecentScores:
    """A bounded record of in-run scores: the steps from ``now - n_steps`` on.

    Args:
        n_steps: how many steps are kept.
    """

    def __init__(self, n_steps: int) -> None:
        self.n_steps = n_steps
        self._rows: deque[StepRows] = deque()
        self._pending: list[StepRows] = []

    def hear(self, rows: StepRows) -> None:
        """A micro-batch of this rank has been scored."""
        self._pending.append(rows)

    def close(self, trainer: pl.Trainer, step: int) -> None:
        """All of ``step`` has been scored: take up what all ranks heard, drop the oldest."""
        heard = [one for one in self._pending if one.step == step]
        self._pending = []
        if any_rank(trainer, bool(heard)):
            self._rows.append(_gathered(trainer, heard, step))
        while self._rows and self._rows[0].step <= step - self.n_steps:
            self._rows.popleft()

    def drop_from(self, step: int) -> None:
        """Forget steps from ``step`` on, which are to be trained again."""
        while self._rows and self._rows[-1].step >= step:
            self._rows.pop()

    @property
    def oldest(self) -> int | None:
        """The first step of the record; None of an empty one."""
        return self._rows[0].step if self._rows else None

    def rows(
        self, columns: Sequence[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """Sample ids, scores added up over ``columns``, steps and IHVP steps, [N] each."""
        ids = [one.ids.numpy() for one in self._rows]
        scores = [one.values[:, list(columns)].double().sum(1).numpy() for one in self._rows]
        steps = [np.full(len(one.ids), one.step, np.int64) for one in self._rows]
        solved = [np.full(len(one.ids), one.ihvp_step, np.int64) for one in self._rows]
        if not ids:
            none = np.zeros(0, np.int64)
            return none, np.zeros(0), none, none
        return tuple(np.concatenate(part) for part in (ids, scores, steps, solved))  # type: ignore[return-value]

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": [[one.step, one.ihvp_step, one.ids, one.values] for one in self._rows],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._pending = []
        self._rows = deque(
            StepRows(int(step), int(solved), ids.cpu(), values.cpu())
            for step, solved, ids, values in state["rows"]
        )

    def forget(self) -> None:
        """Begin a new run."""
        self._rows.clear()
        self._pending = []


def any_rank(trainer: pl.Trainer, here: bool) -> bool:
    """Whether it holds on any rank; the same answer on all."""
    return (
        trainer.world_size > 1 and bool(trainer.strategy.reduce_boolean_decision(here, all=False))
    ) or here


def all_rows(trainer: pl.Trainer, rows: Tensor) -> Tensor:
    """Every rank's rows [n, C], one rank after another; ranks may have different n."""
    if trainer.world_size == 1:
        return rows
    device = trainer.strategy.root_device
    counts: Any = trainer.strategy.all_gather(torch.tensor(len(rows), device=device))
    most = int(counts.max())
    padded = rows.new_zeros((most, rows.shape[1]), device=device)
    padded[: len(rows)] = rows.to(device)
    gathered: Any = trainer.strategy.all_gather(padded)
    kept = [part[: int(n)] for part, n in zip(gathered, counts, strict=True)]
    return torch.cat(kept).to(rows.device)


def _gathered(trainer: pl.Trainer, heard: Sequence[StepRows], step: int) -> StepRows:
    width = max((one.values.shape[1] for one in heard), default=0)
    if trainer.world_size > 1:
        device = trainer.strategy.root_device
        widths: Any = trainer.strategy.all_gather(torch.tensor(width, device=device))
        width = int(widths.max())
    none = torch.zeros(0, dtype=torch.int64)
    ids = torch.cat([none, *(one.ids for one in heard)])
    values = torch.cat([torch.zeros(0, width), *(one.values.float() for one in heard)])
    solved = torch.full((len(ids),), heard[0].ihvp_step if heard else -1, dtype=torch.int64)
    # Ids need all their bits; float32 scores travel as theirs.
    scores = values.contiguous().view(torch.int32).to(torch.int64)
    rows = all_rows(trainer, torch.cat([ids[:, None], solved[:, None], scores], 1))
    values = rows[:, 2:].to(torch.int32).view(torch.float32)
    return StepRows(step, int(rows[:, 1].max()), rows[:, 0].clone(), values)
