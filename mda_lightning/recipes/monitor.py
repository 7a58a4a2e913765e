"""``mda-lightning monitor``: the metrics of every head over saved or hub checkpoints."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from mda_lightning.architectures import describe
from mda_lightning.checkpoints import Checkpoint, HubRevision, find_checkpoints
from mda_lightning.influence import weights_hash
from mda_lightning.measures import Measure
from mda_lightning.mechanisms import Mechanism
from mda_lightning.recipes.checkpoint_choice import (
    DTYPES,
    CheckpointProgress,
    check_dtype,
    check_same_shape,
    device_named,
    pythia_config,
)
from mda_lightning.recipes.monitor_files import (
    BY_PLACE,
    KEPT,
    KeptMeasurements,
    MeasuredCheckpoint,
    Scores,
    write_figures,
    write_table,
)
from mda_lightning.recipes.monitor_metrics import (
    DEFAULT_METRICS,
    Metric,
    build_metrics,
    measure_all,
    measurement_key,
    own_tokenizer,
    short_settings,
    versions,
)
from mda_lightning.vocabulary import token_ids_of


class RepeatedWeightsError(ValueError):
    """A checkpoint's weights equal those of another step of the training."""


def monitor_checkpoints(
    checkpoints: Sequence[str],
    *,
    metrics: Sequence[str | Metric] = DEFAULT_METRICS,
    output: str | Path = "runs/monitor",
    config: str | None = None,
    prefix: str | None = None,
    text: str | None = None,
    tokenizer: str | None = None,
    seed: int | None = None,
    n_sequences: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    strict: bool = False,
    trust: bool = False,
    warn: Callable[[str], None] | None = None,
    watch: Callable[[CheckpointProgress], None] | None = None,
) -> pd.DataFrame:
    """Measure all heads at every checkpoint; one is in memory at a time.

    Writes to ``output``: ``metrics.parquet`` and ``metrics.csv`` (the long table), a PNG for each
    metric, and under ``measured/`` each checkpoint's numbers as they come. Called again, whatever
    was measured with the same weights and settings is not measured again. Interrupted, the table
    and figures hold what there is so far.

    Args:
        checkpoints: see :func:`mda_lightning.checkpoints.find_checkpoints`.
        metrics: names of mechanisms and measures, or the objects.
        config, prefix, trust: for ``.ckpt`` files; see the same.
        text: for metrics measured on text: a name such as ``wikitext-2``, or a path.
        tokenizer: of such text, and of the token ids that random sequences are drawn from; a path
            or hub name. None takes the first checkpoint's own for text, and for random sequences
            the ids that the model's configuration tells.
        seed, n_sequences: of the metrics that have them; None leaves each its own.
        device: "auto" is CUDA where there is one.
        dtype: what the model computes in: "float32", "bfloat16", "float16", or "auto", the one it
            was saved in. Weights are compared before they are rounded to it.
        strict: raise where two steps of the training have equal weights, rather than mark them.
        warn: told what the user should know; None is :func:`warnings.warn`.
        watch: told of the progress.

    Returns:
        The long table: step, layer, head, metric, value, se, checkpoint, weights_sha256, repeats.
        Layer and head are missing where a metric is of the whole model; ``repeats`` names other
        checkpoints with the same weights.

    Raises:
        ValueError, OSError: a checkpoint, metric or option that cannot be; all checkpoints'
            configurations are read before the first is measured.
        RepeatedWeightsError: with ``strict``, weights that repeat at another step.
    """
    say = warn or (lambda message: warnings.warn(message, stacklevel=3))
    show = watch or (lambda progress: None)
    check_dtype(dtype)
    where = device_named(device)
    found = find_checkpoints(
        checkpoints, config=config, prefix=prefix, config_of=pythia_config, trust=trust
    )
    for i, checkpoint in enumerate(found):
        show(_progress("reading", i, found, checkpoint, None))
        check_same_shape(found[0], checkpoint)
    built = build_metrics(
        metrics,
        text=text,
        tokenizer=tokenizer or own_tokenizer(found[0], metrics),
        seed=seed,
        n_sequences=n_sequences,
    )
    run = _Run(built, tokenizer, Path(output), where, dtype, strict, say)
    started, n_new = time.monotonic(), 0
    try:
        for i, (checkpoint, step, step_from) in enumerate(_steps(found, say)):
            left = (time.monotonic() - started) / n_new * (len(found) - i) if n_new else None
            show(_progress("loading", i, found, checkpoint, left))
            model = checkpoint.load(None if dtype == "auto" else torch.float32)
            show(_progress("measuring", i, found, checkpoint, left))
            n_new += run.take(checkpoint, model, step, step_from)
            del model
    except BaseException:
        if run.measured:
            run.write(complete=False)
        raise
    n = len(found)
    show(CheckpointProgress("writing", n, n, "the table and figures", False, None))
    return run.write(complete=True)


class _Run:
    """The checkpoints measured so far, in one call."""

    def __init__(
        self,
        metrics: Sequence[Metric],
        tokenizer: str | None,
        folder: Path,
        device: torch.device,
        dtype: str,
        strict: bool,
        say: Callable[[str], None],
    ) -> None:
        self._metrics = list(metrics)
        self._tokenizer = tokenizer
        self._folder = folder
        self._device, self._dtype = device, dtype
        self._strict, self._say = strict, say
        self._kept = KeptMeasurements(folder / KEPT)
        self._about: dict[str, Any] = {}
        self.measured: list[MeasuredCheckpoint] = []

    def take(
        self, checkpoint: Checkpoint, model: PreTrainedModel, step: int, step_from: str
    ) -> bool:
        """Measure a checkpoint, or take up what is kept; whether anything was measured."""
        sha = weights_hash(model)
        if not self._is_new(checkpoint, sha, step):
            return False
        target = DTYPES[self._dtype] or model.dtype
        place: Any = model.to  # its decorator hides its signature
        place(device=self._device, dtype=target)
        if not self._about:
            self._begin(model)
        for metric in self._metrics:
            if isinstance(metric, Measure):
                metric.check(model)  # which also reads its text, if it has one
        scores: Scores = {}
        measured_any = False
        for metric in self._metrics:
            key = measurement_key(metric, model, sha)
            own = self._kept.get(metric.name, key)
            if own is None:
                own, measured_any = measure_all(metric, model), True
                self._kept.put(
                    metric.name, key, own, checkpoint=checkpoint.label, weights_sha256=sha
                )
            scores |= own
        self._report_missing(checkpoint.label, step, scores)
        self.measured.append(
            MeasuredCheckpoint(
                checkpoint.label,
                step,
                step_from,
                checkpoint.step,
                sha,
                scores,
                checkpoint.provenance(),
            )
        )
        return measured_any

    def write(self, *, complete: bool) -> pd.DataFrame:
        """Write the table and the figures of what was measured."""
        provenance = {
            "metrics": {m.name: short_settings(m.settings()) for m in self._metrics},
            "chance": self._chance(),
            **self._about,
            "dtype": self._dtype,
            "device": self._device.type,
            "versions": versions(),
            "complete": complete,
            "checkpoints": [
                {
                    "checkpoint": one.label,
                    "step": one.step,
                    "step_from": one.step_from,
                    "weights_sha256": one.weights_sha256,
                    **one.provenance,
                }
                for one in self.measured
            ],
        }
        table = write_table(self._folder, self.measured, provenance=provenance)
        write_figures(self._folder, self.measured, chance=self._chance())
        return table

    def _is_new(self, checkpoint: Checkpoint, sha: str, step: int) -> bool:
        """Look for the same weights, and for other weights of the same step, so far."""
        label, own = checkpoint.label, checkpoint.step
        same = [other for other in self.measured if other.weights_sha256 == sha]
        for other in same:
            if own is not None and other.own_step == own:
                self._say(f"{label} is {other.label} again; it is measured once")
                return False
        accused = [other for other in same if None not in (own, other.own_step)]
        marked = "Both stay in the table, marked under `repeats`"
        if accused:
            other = accused[0]
            message = (
                f"repeated weights: {label} (step {own}) has the very weights of {other.label} "
                f"(step {other.own_step}); one of them is not what it says"
            )
            if self._strict:
                raise RepeatedWeightsError(f"{message}; stopped, for --strict was given")
            self._say(f"{message}. {marked}")
        elif same:
            unknown = label if own is None else same[0].label
            self._say(
                f"{label} has the weights of {same[0].label}; the step of {unknown} is not known, "
                f"so they may be one checkpoint. {marked}"
            )
        for other in self.measured:
            if other.step == step and other.weights_sha256 != sha:
                self._say(
                    f"two checkpoints are of step {step}, with different weights: {other.label} "
                    f"and {label}; the column `checkpoint` tells them apart"
                )
        return True

    def _begin(self, model: PreTrainedModel) -> None:
        """What is known once there is a model: its layout and its token ids."""
        layout = describe(model)
        if self._tokenizer is not None:
            ids = token_ids_of(self._tokenizer, model).tolist()
            self._metrics = [m.with_token_ids(ids) for m in self._metrics]
        if layout.sharing:
            self._say(layout.sharing)
        self._about = {
            "model_type": layout.model_type,
            "n_layers": layout.n_layers,
            "n_heads": layout.n_heads,
            "sharing": layout.sharing,
        }

    def _chance(self) -> dict[str, float]:
        return {m.name: m.chance for m in self._metrics if isinstance(m, Mechanism)}

    def _report_missing(self, label: str, step: int, scores: Scores) -> None:
        for metric, (value, _) in scores.items():
            broken = np.argwhere(~np.isfinite(value))
            if len(broken):
                place = f" from layer {broken[0][0]} on" if value.ndim else ""
                self._say(
                    f"{metric} of {label} (step {step}) is not finite{place}: the model's "
                    "activations are not; the table has NaN there"
                )


def _steps(
    found: Sequence[Checkpoint], say: Callable[[str], None]
) -> list[tuple[Checkpoint, int, str]]:
    """Checkpoints with the step of their rows, ascending."""
    unknown = [checkpoint.label for checkpoint in found if checkpoint.step is None]
    if unknown:
        if len(found) > 1:
            say(
                f"no step is known for {', '.join(unknown[:3])}{' ...' if unknown[3:] else ''}: "
                "the column `step` is each checkpoint's place in the list, from 0"
            )
        return [(checkpoint, i, BY_PLACE) for i, checkpoint in enumerate(found)]
    known = [(c, int(c.step or 0), c.step_from or "") for c in found]
    return sorted(known, key=lambda one: one[1])


def _progress(
    doing: str,
    done: int,
    found: Sequence[Checkpoint],
    checkpoint: Checkpoint,
    left: float | None,
) -> CheckpointProgress:
    remote = isinstance(checkpoint, HubRevision)
    return CheckpointProgress(doing, done, len(found), checkpoint.label, remote, left)
