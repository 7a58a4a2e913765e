"""A schedule as micro-batches of tensors: the part of loading that knows nothing of a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from mda_lightning.corpora import TokenRows
from mda_lightning.schedule import BASE, Schedule, ScheduledBatch

Batch = dict[str, torch.Tensor]
"""tokens int64 [B, T + 1], sample_id int64 [B], weight float32 [B], provenance uint8 [B]."""


class ScheduledBatches(Dataset[Batch]):
    """Micro-batch number -> batch; micro-batches ``[k a, (k + 1) a)`` make step k.

    Every rank takes its own part of each micro-batch of the *global* batch, in rank order, so that
    the samples of a step are the same on any number of ranks and with any accumulation ``a``.

    Raises:
        ValueError: the global batch cannot be divided evenly.
    """

    def __init__(
        self,
        rows: TokenRows,
        schedule: Schedule,
        *,
        accumulate: int = 1,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        parts = accumulate * world_size
        batch_size = schedule.order.batch_size
        if batch_size % parts:
            raise ValueError(
                f"batch_size {batch_size} cannot be divided into {accumulate} micro-batches on "
                f"{world_size} ranks; make it a multiple of {parts}"
            )
        self.rows = rows
        self.schedule = schedule
        self.accumulate = accumulate
        self._size = batch_size // parts
        self._world_size = world_size
        self._rank = rank

    def __len__(self) -> int:
        return len(self.schedule) * self.accumulate

    def __getitem__(self, number: int) -> Batch:
        ids, weights, provenance = self.scheduled(number, self.schedule)
        return {
            "tokens": torch.from_numpy(self.rows.get(ids)),
            "sample_id": torch.from_numpy(ids.copy()),
            "weight": torch.from_numpy(weights.copy()),
            "provenance": torch.from_numpy(provenance.copy()),
        }

    def scheduled(self, number: int, schedule: Schedule) -> ScheduledBatch:
        """What a schedule has for this rank's micro-batch; views."""
        step, part = divmod(number, self.accumulate)
        start = (part * self._world_size + self._rank) * self._size
        mine = slice(start, start + self._size)
        ids, weights, provenance = schedule.batch(step)
        return ScheduledBatch(ids[mine], weights[mine], provenance[mine])

    def corrected(self, number: int, batch: Batch, schedule: Schedule) -> Batch:
        """A batch that was loaded by an earlier schedule, made that of ``schedule``, in place."""
        ids, weights, provenance = self.scheduled(number, schedule)
        differ = np.flatnonzero(batch["sample_id"].numpy() != ids)
        if differ.size:
            at = torch.from_numpy(differ)
            batch["tokens"][at] = torch.from_numpy(self.rows.get(ids[differ]))
            batch["sample_id"][at] = torch.from_numpy(ids[differ])
        batch["weight"].copy_(torch.from_numpy(weights.copy()))
        batch["provenance"].copy_(torch.from_numpy(provenance.copy()))
        return batch


class RowBatches(Dataset[Batch]):
    """All rows of a corpus in order, for validation; ranks take turns.

    With several ranks the last few batches are left out, so that every rank has as many.
    """

    def __init__(
        self, rows: TokenRows, batch_size: int, *, world_size: int = 1, rank: int = 0
    ) -> None:
        self.rows = rows
        self._size = batch_size
        self._world_size = world_size
        self._rank = rank

    def __len__(self) -> int:
        return -(-len(self.rows) // self._size) // self._world_size

    def __getitem__(self, number: int) -> Batch:
        start = (number * self._world_size + self._rank) * self._size
        ids = np.arange(start, min(start + self._size, len(self.rows)), dtype=np.int64)
        return {
            "tokens": torch.from_numpy(self.rows.get(ids)),
            "sample_id": torch.from_numpy(ids),
            "weight": torch.ones(len(ids)),
            "provenance": torch.full((len(ids),), BASE, dtype=torch.uint8),
        }


class FromPosition(DistributedSampler[int]):
    """The numbers ``start() .. length - 1``, ``start`` asked when iteration begins.

    Its length is the whole run's, also after a resume: Lightning counts the batches that were
    trained before the checkpoint towards it. It is a DistributedSampler because ranks are already
    told apart, in the batches: Lightning leaves such a sampler in its place.
    """

    def __init__(self, length: int, start: Callable[[], int]) -> None:
        super().__init__(range(length), num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]
        self._length = length
        self._start = start

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._start(), self._length))


class BatchLoader(DataLoader[Batch]):
    """A loader of ready batches whose position is kept by the data module.

    It has the two state methods by which Lightning tells that a loader can be resumed, and no state
    of its own: without them Lightning warns, on every exact resume, that it may not be exact.

    Args:
        batches: micro-batch number -> batch.
        sampler: the numbers.
        corrected: changes a batch in the training process when it is handed out, so that what was
            decided since a worker loaded it holds; None hands it out as it was loaded.
    """

    def __init__(
        self,
        batches: Dataset[Batch],
        sampler: FromPosition,
        *,
        num_workers: int,
        seed: int,
        corrected: Callable[[int, Batch], Batch] | None = None,
    ) -> None:
        # A generator of its own: a loader without one draws its seed from torch's global generator,
        # and a resumed run would draw another number of times than an uninterrupted one.
        super().__init__(
            batches,
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(seed),
            pin_memory=torch.cuda.is_available(),
        )
        self._numbers = sampler
        self._corrected = corrected

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch names its own class
        loaded: Iterator[Batch] = super().__iter__()
        if self._corrected is None:
            return loaded
        return map(self._corrected, self._numbers, loaded)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see :meth:`TokenDataModule.state_dict`."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: see :meth:`TokenDataModule.load_state_dict`."""
