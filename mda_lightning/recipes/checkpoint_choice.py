"""What commands on saved checkpoints share: where and in what the model computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from mda_lightning.checkpoints import Checkpoint
from mda_lightning.pretraining.sizes import model_config

DTYPES: Mapping[str, torch.dtype | None] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": None,
}


@dataclass(frozen=True)
class CheckpointProgress:
    """Where a call is: ``done`` of ``total``, and what is being done to which checkpoint.

    Attributes:
        remote: whether it comes from the hub, whose library may show its own bar.
        seconds_left: estimated from what was done in this call; None before there is anything.
    """

    doing: str
    done: int
    total: int
    label: str
    remote: bool
    seconds_left: float | None


def device_named(wanted: str) -> torch.device:
    """ "auto" is CUDA where there is one.

    Raises:
        ValueError: CUDA is asked for and torch finds none.
    """
    cuda = torch.cuda.is_available()
    if wanted == "auto":
        return torch.device("cuda" if cuda else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and not cuda:
        raise ValueError(f"device {wanted!r}: torch finds no CUDA here; use cpu")
    return device


def check_dtype(dtype: str) -> None:
    """Refuse what is no dtype here.

    Raises:
        ValueError: it is none of :data:`DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")


def check_same_shape(first: Checkpoint, other: Checkpoint) -> None:
    """Refuse checkpoints of two models.

    Raises:
        ValueError: they differ in family, layers or heads.
    """

    def shape(config: PreTrainedConfig) -> tuple[str, int, int]:
        return config.model_type, int(config.num_hidden_layers), int(config.num_attention_heads)

    expected, found = shape(first.config()), shape(other.config())
    if found != expected:
        words = "{} of {} layers with {} heads"
        raise ValueError(
            f"{other.label} is a {words.format(*found)} and {first.label} a "
            f"{words.format(*expected)}: one table follows one model; call the command for each, "
            "with another --output"
        )


def pythia_config(hyperparameters: Mapping[str, Any]) -> PreTrainedConfig | None:
    """The configuration in a checkpoint of :class:`PythiaModule`, or None for another module's."""
    if not {"size", "init_seed", "normalize"} <= set(hyperparameters):
        return None
    return model_config(
        hyperparameters["size"],
        vocab_size=hyperparameters.get("vocab_size"),
        seq_len=hyperparameters.get("seq_len"),
    )
