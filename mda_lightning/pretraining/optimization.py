"""Pythia's AdamW and learning-rate schedules.

A schedule maps ``s``, the number of optimizer steps completed, to a multiple of the peak rate; the
update that takes the step count from s to s + 1 is made at the rate of s. With warmup w, total n,
decay d and floor m (all schedules hold their last value when a run goes on past n):

=============  ===================================================================================
``pythia``     s <= w: max(1, s) / w;  then m + (1 - m) / 2 (1 + cos(pi (s - w) / (n - w)))
               (GPT-NeoX since August 2023; the rate of the first update as since May 2026)
``pythia_v1``  s <= w: s / w;  then max(m, 1 / 2 (1 + cos(pi (min(s, n - w) - w) / n)))
               (GPT-NeoX v1.0: heads for 0, clamped at m; its first update has rate 0)
``wsd``        (s + 1) / w up to 1;  from n - d on: m + (1 - m) (n - s) / d
``constant``   (s + 1) / w up to 1
=============  ===================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

from torch import nn

ScheduleName: TypeAlias = Literal["pythia", "pythia_v1", "wsd", "constant"]


def learning_rate_schedule(
    name: ScheduleName,
    *,
    total_steps: int,
    warmup_steps: int,
    decay_steps: int = 0,
    min_lr_ratio: float = 0.1,
) -> Callable[[int], float]:
    """The function from optimizer steps completed to a multiple of the peak learning rate.

    Raises:
        ValueError: an unknown name, or steps that do not fit into ``total_steps``.
    """
    if name not in get_args(ScheduleName):
        raise ValueError(
            f"unknown schedule {name!r}: there are {', '.join(get_args(ScheduleName))}"
        )
    needed = warmup_steps + (decay_steps if name == "wsd" else 0)
    if min(warmup_steps, decay_steps) < 0 or needed > total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} and decay_steps={decay_steps} do not fit into "
            f"total_steps={total_steps}; give fewer, none below 0"
        )
    w, n, d, m = warmup_steps, total_steps, decay_steps, min_lr_ratio

    def warmup(s: int) -> float:
        return min(1.0, (s + 1) / w) if w else 1.0

    def pythia(s: int) -> float:
        if s <= w and w:
            return max(1, s) / w
        progress = min(1.0, (s - w) / max(1, n - w))
        return m + (1 - m) / 2 * (1 + math.cos(math.pi * progress))

    def pythia_v1(s: int) -> float:
        s = min(s, n - w)
        if s <= w and w:
            return s / w
        return max(m, (1 + math.cos(math.pi * (s - w) / n)) / 2)

    def wsd(s: int) -> float:
        if d == 0 or s <= n - d:
            return warmup(s)
        return m + (1 - m) * max(0, n - s) / d

    return {"pythia": pythia, "pythia_v1": pythia_v1, "wsd": wsd, "constant": warmup}[name]


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups of the trainable parameters: matrices decay, biases and norms do not.

    Embeddings are matrices and do decay, as in NeoX.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "name": "decay",
            "params": [p for p in trainable if p.ndim >= 2],
            "weight_decay": weight_decay,
        },
        {"name": "no_decay", "params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
