"""Score a window's samples afterwards, at the checkpoints kept around it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from mda_lightning.influence import replay_scores, weights_hash
from mda_lightning.inverse_probes import CurvatureSettings, inverse_probes, warn_of_unscored
from mda_lightning.mechanisms import Mechanism
from mda_lightning.store import ScoreRows
from mda_lightning.units import Head
from mda_lightning.window import Edge


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
    batch_size: int,
    settings: CurvatureSettings,
) -> tuple[ScoreRows, dict[str, Any]]:
    """Mean over checkpoints of Algorithm 1's scores, and their provenance.

    Args:
        live: the language model that trains; it is not touched.
        owner: the module that holds it, whose checkpoints these are.
        checkpoints: edge of the window -> (step, path).
        data: the samples.
        mechanism, units: whose f is scored, and which heads.
        n_curvature: sequences, evenly spread over the window, for the curvature.
        batch_size: sequences at once.
        settings: of the curvature.
    """
    model = fresh_copy(live)
    values: Tensor | float = 0.0
    loss: Tensor | float = 0.0
    used: list[dict[str, Any]] = []
    # A sample that was trained on twice is scored once.
    unique, place = np.unique(data.sample_id, return_inverse=True)
    for edge, (step, path) in checkpoints.items():
        load_from_checkpoint(model, owner, live, path)
        found = inverse_probes(
            model,
            {mechanism.name: mechanism},
            units,
            list(data.tokens(data.spread(n_curvature), batch_size)),
            settings,
        )
        warn_of_unscored(found, at=f" at step {step}")
        scores = replay_scores(model, found.ihvps[mechanism.name], data.tokens(unique, batch_size))
        values = values + scores.values.double() / len(checkpoints)
        loss = loss + scores.loss.double() / len(checkpoints)
        used.append({"edge": edge, "step": step, "weights_hash": weights_hash(model)})
    assert isinstance(values, Tensor) and isinstance(loss, Tensor)
    taken_at = used[0]["step"] if len(used) == 1 else -1  # no single step for a mean
    rows = ScoreRows(
        data.sample_id,
        data.step,
        values.float().numpy()[place],
        loss.float().numpy()[place],
        np.full(len(place), taken_at, np.int64),
    )
    return rows, {"checkpoints": used, **found.provenance}
