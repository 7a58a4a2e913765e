"""A folder that ``save_pretrained`` wrote: config.json and weights."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from mda_lightning.architectures import UnsupportedModelError
from mda_lightning.checkpoints.checkpoint import step_in
from mda_lightning.families import FAMILIES
from mda_lightning.files import read_json

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files that hold or list the weights, in the order of preference."""


class ModelFolder:
    """A Hugging Face model folder; its step is in the folder's name, or unknown."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = str(path)
        self.step = step_in(path.name)
        self.step_from = None if self.step is None else "name"

    def config(self) -> PreTrainedConfig:
        if not any((self.path / name).is_file() for name in WEIGHTS):
            raise FileNotFoundError(
                f"{self.path} has no weights: expected one of {', '.join(WEIGHTS)} beside {CONFIG}"
            )
        return read_config(self.path)

    def load(self, dtype: torch.dtype | None) -> PreTrainedModel:
        return load_folder(self.path, dtype, self.label)

    def tokenizer(self) -> Path | None:
        path = self.path / TOKENIZER
        return path if path.is_file() else None

    def provenance(self) -> dict[str, Any]:
        return {"kind": "folder"}


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a model folder.

    Raises:
        FileNotFoundError: there is none.
        UnsupportedModelError: of a family that has no layout here.
        ValueError: the file is not a model's configuration.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: it is not a model's folder")
    values = read_json(path)
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type is None:
        raise ValueError(f"{path} names no model_type: it is not a model's configuration")
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{folder}: model family {model_type!r} has no layout here; supported: "
            f"{', '.join(FAMILIES)}. A family is one row of mda_lightning.families.FAMILIES"
        )
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return config


def load_folder(folder: Path, dtype: torch.dtype | None, label: str) -> PreTrainedModel:
    """The whole model in ``folder``.

    Raises:
        ValueError: the weights are damaged, or some are missing; transformers would draw those.
    """
    auto_model: Any = AutoModelForCausalLM
    try:
        with quiet_loading():
            model, report = auto_model.from_pretrained(
                folder,
                dtype=dtype or "auto",
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"the weights of {label} cannot be read: {first_line(error)}") from error
    check_complete(report, label)
    return whole(model)


def whole(model: Any) -> PreTrainedModel:
    """The model in eval mode, its type told to the type checker."""
    assert isinstance(model, PreTrainedModel)
    model.train(False)
    return model


def check_complete(report: dict[str, Any], label: str) -> None:
    """Refuse a load that left weights as they were drawn.

    Raises:
        ValueError: weights are missing or have another shape; the message names the first.
    """
    missing = sorted([*report["missing_keys"], *(str(m) for m in report["mismatched_keys"])])
    if missing:
        raise ValueError(
            f"{label} lacks {len(missing)} of its model's weights, first {missing[0]!r}: random "
            "ones would be measured in their place; was it saved whole, with this config.json?"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' bar and table per load, which say what :func:`check_complete` checks.

    Global random numbers are as before: a weight that is missing would have been drawn with them.
    """
    log: Any = logging  # not annotated
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    no_hub_bars = are_progress_bars_disabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()
            if no_hub_bars:
                disable_progress_bars()
