"""A file with a state dict: a Lightning checkpoint of this package's module or of another's."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mda_lightning.architectures import UnsupportedModelError
from mda_lightning.checkpoints.checkpoint import step_in
from mda_lightning.checkpoints.folder import check_complete, first_line, quiet_loading, whole
from mda_lightning.families import FAMILIES

ConfigOf = Callable[[Mapping[str, Any]], PreTrainedConfig | None]
"""A model's configuration from a module's hyperparameters, or None where they are another's."""


class StateFile:
    """A ``.ckpt``: the language model is found in it by its configuration.

    Args:
        path: the file.
        config: the language model's configuration; None asks ``config_of``.
        prefix: of the language model's names in the state dict, such as ``net.lm``; None finds it.
        config_of: makes a configuration of the hyperparameters in the file.
        trust: unpickle any object in the file, which can run code; else only tensors and
            primitives are.
    """

    def __init__(
        self,
        path: Path,
        *,
        config: PreTrainedConfig | None = None,
        prefix: str | None = None,
        config_of: ConfigOf | None = None,
        trust: bool = False,
    ) -> None:
        self.path = path
        self.label = str(path)
        self._given, self._prefix, self._config_of, self._trust = config, prefix, config_of, trust

    @cached_property
    def _head(self) -> tuple[int | None, Mapping[str, Any]]:
        """``global_step`` and hyperparameters; the weights are not kept."""
        content = self._read()
        step = content.get("global_step")
        return (int(step) if step is not None else None), content.get("hyper_parameters") or {}

    @property
    def step(self) -> int | None:
        step = self._head[0]
        return step_in(self.path.name) if step is None else step

    @property
    def step_from(self) -> str | None:
        if self._head[0] is not None:
            return "global_step"
        return None if self.step is None else "name"

    @cached_property
    def _config(self) -> PreTrainedConfig:
        config = self._given
        if config is None and self._config_of is not None:
            config = self._config_of(self._head[1])
        if config is None:
            raise ValueError(
                f"{self.path} does not say what model it holds: it is not of PythiaModule; give "
                "the model's configuration with --config, a Hugging Face folder or name"
            )
        if config.model_type not in FAMILIES:
            raise UnsupportedModelError(
                f"{self.path}: model family {config.model_type!r} has no layout here; supported: "
                f"{', '.join(FAMILIES)}"
            )
        return config

    def config(self) -> PreTrainedConfig:
        return self._config

    def load(self, dtype: torch.dtype | None) -> PreTrainedModel:
        state = self._state()
        auto_model: Any = AutoModelForCausalLM
        with quiet_loading(), torch.device("meta"):
            skeleton = auto_model.from_config(self._config)
        backbone = _backbone(skeleton)
        prefix = self._find_prefix(state, backbone)
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        model_class: Any = type(skeleton)
        try:
            with quiet_loading():
                # This also renames what other releases of transformers called otherwise.
                model, report = model_class.from_pretrained(
                    None,
                    config=self._config,
                    state_dict=own,
                    dtype=dtype or _saved_dtype(own[name] for name in backbone),
                    output_loading_info=True,
                )
        except RuntimeError as error:
            raise ValueError(f"{self.path} does not fit its configuration: {error}") from error
        check_complete(report, self.label)
        return whole(model)

    def tokenizer(self) -> Path | None:
        return None

    def provenance(self) -> dict[str, Any]:
        return {"kind": "state_file", "prefix": self._prefix}

    def _read(self) -> Mapping[str, Any]:
        if self.path.is_dir():
            raise IsADirectoryError(
                f"{self.path} is a folder, a checkpoint in shards: make one file of it first, with "
                "`python -m lightning.pytorch.utilities.consolidate_checkpoint`"
            )
        try:
            content = torch.load(
                self.path, map_location="cpu", mmap=True, weights_only=not self._trust
            )
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{self.path} holds objects other than tensors and primitives, which could run "
                "code when read. If you trust the file, add --trust; else save its state dict "
                f"alone. ({_refused(error)})"
            ) from error
        except (RuntimeError, EOFError, ValueError) as error:
            raise ValueError(
                f"{self.path} is not a checkpoint that torch can read: {first_line(error)}"
            ) from error
        if not isinstance(content, Mapping):
            raise ValueError(f"{self.path} holds a {type(content).__name__}, not a checkpoint")
        return content

    def _state(self) -> dict[str, Tensor]:
        content = self._read()
        state = content.get("state_dict", content)
        # torch.compile, wrapped round a module, adds a name in the middle of others.
        tensors = {
            str(name).replace("_orig_mod.", ""): value
            for name, value in state.items()
            if isinstance(value, Tensor)
        }
        if not tensors:
            raise ValueError(f"{self.path} holds no weights under 'state_dict'")
        return tensors

    def _find_prefix(self, state: Mapping[str, Tensor], backbone: Mapping[str, Tensor]) -> str:
        first = next(iter(backbone))
        ends = [k.removesuffix(first) for k in state if k == first or k.endswith(f".{first}")]
        reasons = {end: _misfit(state, backbone, end) for end in ends}
        fitting = [end for end, reason in reasons.items() if reason is None]
        if self._prefix is not None:
            wanted = f"{self._prefix.rstrip('.')}." if self._prefix else ""
            if wanted in fitting:
                return wanted
            why = reasons.get(wanted) or f"there is no {wanted}{first}"
            raise ValueError(
                f"{self.path} has no {self._config.model_type} of the configuration under prefix "
                f"{self._prefix!r}: {why}; {_listed(fitting)}"
            )
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise ValueError(
                f"{self.path} holds several models of the configuration; {_listed(fitting)}: "
                "choose with --prefix"
            )
        why = "; ".join(f"under {_shown(e)}, {reason}" for e, reason in reasons.items())
        heads = sorted({k.partition(".")[0] for k in state})[:8]
        raise ValueError(
            f"{self.path} holds no {self._config.model_type} of the configuration: "
            + (why or f"no name ends in {first!r}; names begin with {', '.join(heads)}")
        )


def _backbone(skeleton: PreTrainedModel) -> dict[str, Tensor]:
    """Names and shapes that must be there; the unembedding may be tied, or called otherwise."""
    inner = f"{skeleton.base_model_prefix}."
    return {k: v for k, v in skeleton.state_dict().items() if k.startswith(inner)}


def _saved_dtype(weights: Iterable[Tensor]) -> torch.dtype:
    """Of the first weight that is a fraction; counters and masks say nothing of the model."""
    return next((one.dtype for one in weights if one.is_floating_point()), torch.float32)


def _misfit(state: Mapping[str, Tensor], backbone: Mapping[str, Tensor], end: str) -> str | None:
    for name, expected in backbone.items():
        found = state.get(end + name)
        if found is None:
            return f"{name} is missing"
        if found.shape != expected.shape:
            return (
                f"{name} is {list(found.shape)} and the configuration says {list(expected.shape)}"
            )
    return None


def _shown(end: str) -> str:
    return repr(end.rstrip("."))


def _listed(fitting: list[str]) -> str:
    if not fitting:
        return "no prefix fits"
    return f"prefixes that fit: {', '.join(map(_shown, fitting))}"


def _refused(error: BaseException) -> str:
    """Which class torch would not load, from its many lines."""
    lines = [line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line]
    return (lines[0] if lines else first_line(error)).strip()
