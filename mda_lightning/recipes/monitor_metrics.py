"""What ``mda-lightning monitor`` measures: metrics by name, and when two measurements are one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from mda_lightning import __version__
from mda_lightning.checkpoints import Checkpoint
from mda_lightning.files import sha256_of
from mda_lightning.measures import MEASURES, Measure, measure
from mda_lightning.mechanisms import MECHANISMS, Mechanism, mechanism
from mda_lightning.metrics import UnitScores
from mda_lightning.recipes.monitor_files import Scores

DEFAULT_METRICS = ("induction", "previous_token", "ablation")
Metric = Mechanism | Measure

#: Of a configuration, what says nothing about the numbers a model computes.
_NOT_COMPUTED = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}


def build_metrics(
    wanted: Sequence[str | Metric],
    *,
    text: str | None = None,
    tokenizer: str | None = None,
    seed: int | None = None,
    n_sequences: int | None = None,
) -> list[Metric]:
    """Mechanisms and measures by name, with the options that each has.

    Raises:
        ValueError: an unknown name, none or two alike, or an option that none of them has.
    """
    options = {"text": text, "tokenizer": tokenizer, "seed": seed, "n_sequences": n_sequences}
    used: set[str] = set()
    built: list[Metric] = []
    for one in wanted:
        if not isinstance(one, str):
            built.append(one)
            continue
        if one not in MECHANISMS and one not in MEASURES:
            raise ValueError(f"{one!r} is no metric; there are: {', '.join(metric_names())}")
        known = _options(one)
        settings = {k: v for k, v in options.items() if v is not None and k in known}
        used |= set(settings)
        if seed is not None and "probe_seed" in known:
            settings["probe_seed"] = seed + 1  # μ does not use it, but it must differ
        built.append(mechanism(one, **settings) if one in MECHANISMS else measure(one, **settings))
    names = [m.name for m in built]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"metrics {names}: give at least one, each once")
    if text is not None and "text" not in used:
        raise ValueError(f"none of {', '.join(names)} is measured on text; leave --text out")
    return built


def metric_names() -> list[str]:
    """Every metric that can be asked for by name."""
    return [*MECHANISMS, *MEASURES]


def own_tokenizer(checkpoint: Checkpoint, metrics: Sequence[str | Metric]) -> str | None:
    """The tokenizer beside a checkpoint, if a metric asks for one."""
    if not any(isinstance(m, str) and "tokenizer" in _options(m) for m in metrics):
        return None
    path = checkpoint.tokenizer()
    return None if path is None else str(path)


def _options(name: str) -> Mapping[str, inspect.Parameter]:
    """What a metric's constructor takes; nothing where the name is unknown."""
    factory = MECHANISMS.get(name) or MEASURES.get(name)
    return {} if factory is None else inspect.signature(factory).parameters


def measure_all(metric: Metric, model: PreTrainedModel) -> Scores:
    """A metric's numbers of one model, by key."""
    found: Mapping[str, UnitScores] = (
        metric.measure(model)
        if isinstance(metric, Measure)
        else {metric.name: metric.scores(model)}
    )
    return {
        name: (one.mean.detach().float().cpu().numpy(), one.se.detach().float().cpu().numpy())
        for name, one in found.items()
    }


def measurement_key(metric: Metric, model: PreTrainedModel, weights_sha256: str) -> str:
    """A hash of all that determines a metric's numbers on a model; ``check`` it first."""
    computed = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_COMPUTED}
    everything = {
        "weights": weights_sha256,
        "config": computed,
        "metric": metric.name,
        "settings": metric.settings(),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "versions": versions(),
    }
    return sha256_of(json.dumps(everything, sort_keys=True, default=str))


def short_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for people: long lists of token ids by count and hash."""
    return {
        name: {"count": len(value), "sha256": sha256_of(json.dumps(value))}
        if isinstance(value, (list, tuple)) and len(value) > 100
        else value
        for name, value in settings.items()
    }


def versions() -> dict[str, str]:
    """The versions that numbers may depend on."""
    return {
        "mda_lightning": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
