"""What every kind of checkpoint offers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig, PreTrainedModel

_STEP = re.compile(r"(?:step|checkpoint|iter(?:ation)?)[-_=]?(\d+)", re.IGNORECASE)


class Checkpoint(Protocol):
    """A causal language model's weights, saved at some step of its training."""

    @property
    def label(self) -> str:
        """How a person would name it: a path, or ``name@revision``."""
        ...

    @property
    def step(self) -> int | None:
        """Optimizer steps done, or None where nothing says so; :attr:`step_from` says what did."""
        ...

    @property
    def step_from(self) -> str | None:
        """ "revision", "global_step" or "name"; None where the step is not known."""
        ...

    def config(self) -> PreTrainedConfig:
        """The model's configuration, read without its weights.

        Raises:
            ValueError, OSError: this cannot be loaded; the message says why.
        """
        ...

    def load(self, dtype: torch.dtype | None) -> PreTrainedModel:
        """The model on the CPU, in eval mode; ``dtype`` None keeps the one it was saved in.

        Raises:
            ValueError, OSError: the weights are not there, not whole, or of another model.
        """
        ...

    def tokenizer(self) -> Path | None:
        """The ``tokenizer.json`` beside the weights, or None."""
        ...

    def provenance(self) -> dict[str, Any]:
        """Where it came from, as JSON values."""
        ...


def step_in(name: str) -> int | None:
    """The step that a file, folder or revision is named for: step512, step=100, checkpoint-500."""
    found = _STEP.findall(name)
    return int(found[-1]) if found else None
