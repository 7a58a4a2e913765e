"""Score a window's samples afterwards, at the checkpoints kept around it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from mda_lightning.architectures import describe
from mda_lightning.files import sha256_of
from mda_lightning.influence import ReplayScorer, weights_hash
from mda_lightning.influence.inverse_probes import (
    CurvatureSettings,
    InverseProbes,
    inverse_probes,
    warn_of_unscored,
)
from mda_lightning.mechanisms import Mechanism
from mda_lightning.micro_batch import micro_batch
from mda_lightning.store import ScoreRows
from mda_lightning.store.chunks import ChunkFolder, mean_chunk
from mda_lightning.units import Head
from mda_lightning.window import Edge

_HELD_NUMBERS = 2**20


class Rows(Protocol):
    """A corpus: see :class:`mda_lightning.corpora.TokenRows`."""

    def get(self, ids: NDArray[np.int64]) -> NDArray[np.int64]: ...


class Stream(Protocol):
    """A training stream: see :class:`mda_lightning.schedule.Schedule`."""

    def batch(self, step: int) -> Any: ...


@dataclass(frozen=True)
class WindowData:
    """The samples that a run trained on in steps [start, end), less those masked to weight 0.

    Attributes:
        sample_id, step: int64 [N], in the order of the stream.
    """

    rows: Rows
    sample_id: NDArray[np.int64]
    step: NDArray[np.int64]

    @classmethod
    def read(cls, rows: Rows, stream: Stream, *, start: int, end: int) -> WindowData:
        ids, steps = [], []
        for step in range(start, end):
            batch = stream.batch(step)
            ids.append(np.asarray(batch.sample_ids, np.int64)[batch.weights > 0])
            steps.append(np.full(len(ids[-1]), step))
        if not ids:
            raise ValueError(f"the window {start} to {end} holds no step")
        return cls(rows, np.concatenate(ids), np.concatenate(steps).astype(np.int64))

    def tokens(self, ids: NDArray[np.int64], batch_size: int) -> Iterator[Tensor]:
        for first in range(0, len(ids), batch_size):
            yield torch.from_numpy(self.rows.get(ids[first : first + batch_size]))

    def spread(self, count: int) -> NDArray[np.int64]:
        """``count`` sample ids evenly spread over the window, each once."""
        unique = self.sample_id[np.sort(np.unique(self.sample_id, return_index=True)[1])]
        if len(unique) <= count:
            return unique
        return unique[np.linspace(0, len(unique) - 1, count).round().astype(np.int64)]


def fresh_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same configuration, device and dtype, without the other's hooks or state."""
    other: Any = type(model)(copy.deepcopy(model.config))
    return cast(PreTrainedModel, other.to(device=model.device, dtype=model.dtype).eval())


def load_from_checkpoint(
    model: PreTrainedModel, owner: nn.Module, live: PreTrainedModel, path: Path
) -> None:
    """Load the language model's weights from a checkpoint of the LightningModule ``owner``.

    Args:
        model: takes the weights.
        owner: the module that trains.
        live: the language model inside ``owner``, which says under what name to look.
        path: a checkpoint that this run wrote.
    """
    name = next(n for n, module in owner.named_modules() if module is live)
    prefix = f"{name}." if name else ""
    saved: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)[
        "state_dict"
    ]
    own = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
    model.load_state_dict(own)


def replay_window(
    live: PreTrainedModel,
    owner: nn.Module,
    checkpoints: Mapping[Edge, tuple[int, Path]],
    data: WindowData,
    *,
    mechanism: Mechanism,
    units: Sequence[Head],
    n_curvature: int,
    batch_size: int | None,
    settings: CurvatureSettings,
    work: Path,
    curvature_data: WindowData | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[ScoreRows, dict[str, Any]]:
    """Mean over checkpoints of Algorithm 1's scores, and their provenance.

    Ranks share the samples and all estimate the same curvature. Scores are kept in ``work`` as they
    come: interrupted, the same call goes on with the sample that comes next.

    Args:
        live: the language model that trains; it is not touched.
        owner: the module that holds it, whose checkpoints these are.
        checkpoints: edge of the window -> (step, path).
        data: the samples.
        mechanism, units: whose f is scored, and which heads.
        n_curvature: sequences, evenly spread over the window, for the curvature; at most so many
            where the settings have a tolerance.
        batch_size: sequences at once; None takes as many as half of the free memory holds.
        settings: of the curvature.
        work: a folder for this; whoever calls removes it.
        curvature_data: samples that the curvature is estimated on; None takes ``data``.
        rank, world_size: this process, and how many share the work.
        progress: told what is done, how many samples, and of how many.

    Returns:
        This rank's rows, in the order of the stream, and the provenance.
    """
    model = fresh_copy(live)
    # A sample that was trained on twice is scored once.
    unique = np.unique(data.sample_id)
    own = unique[len(unique) * rank // world_size : len(unique) * (rank + 1) // world_size]
    curvature_ids = (curvature_data or data).spread(n_curvature)
    if settings.tolerance is not None:  # any beginning of it represents the window
        curvature_ids = np.random.default_rng(settings.seed).permutation(curvature_ids)
    chunks: list[ChunkFolder] = []
    used: list[dict[str, Any]] = []
    found: InverseProbes | None = None
    for edge, (step, path) in checkpoints.items():
        load_from_checkpoint(model, owner, live, path)
        sha = weights_hash(model)
        used.append({"edge": edge, "step": step, "weights_hash": sha})
        if batch_size is None:
            batch_size = _batch_size(model, mechanism, units, data)
        offered = list(data.tokens(curvature_ids, batch_size))
        found = inverse_probes(model, {mechanism.name: mechanism}, units, offered, settings)
        warn_of_unscored(found, at=f" at step {step}")
        key = sha256_of(
            repr((mechanism.name, mechanism.settings(), [str(u) for u in units], settings)),
            sha,
            own,
            curvature_ids,
        )
        held = max(1, _HELD_NUMBERS // (len(units) * len(mechanism.block_names)))
        chunks.append(ChunkFolder(work / key[:16], first=0, most_held=held))
        scorer = ReplayScorer(model, found.ihvps)
        try:
            for tokens in data.tokens(own[chunks[-1].next :], batch_size):
                values, loss = scorer.score(tokens)
                chunks[-1].add({k: v.numpy() for k, v in values.items()}, loss.numpy())
                if progress is not None:
                    done = (len(chunks) - 1) * len(own) + chunks[-1].next
                    progress(f"step {step}", done, len(own) * len(checkpoints))
        finally:
            chunks[-1].flush()
    assert found is not None
    if not len(own):
        raise ValueError(
            f"{len(unique)} samples are too few to share among {world_size} processes; score them "
            "with `mda-lightning score`, or train on fewer"
        )
    mean = mean_chunk([one.read(0, len(own)) for one in chunks])
    mine = np.isin(data.sample_id, own)
    place = np.searchsorted(own, data.sample_id[mine])
    taken_at = used[0]["step"] if len(used) == 1 else -1  # no single step for a mean
    rows = ScoreRows(
        data.sample_id[mine],
        data.step[mine],
        mean.values[mechanism.name][place],
        mean.loss[place],
        np.full(len(place), taken_at, np.int64),
    )
    return rows, {"checkpoints": used, **found.provenance}


def _batch_size(
    model: PreTrainedModel, mechanism: Mechanism, units: Sequence[Head], data: WindowData
) -> int:
    blocks = describe(model).blocks(units, mechanism.block_names)
    names = list(dict.fromkeys(name for block in blocks for name in block.modules))
    length = data.rows.get(data.sample_id[:1]).shape[1] - 1
    return micro_batch(model, names, length=length)
