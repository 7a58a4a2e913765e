"""What a model is, as hashes: its weights, and the configuration it computes under."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn
from transformers import PreTrainedModel

_NOT_COMPUTED_WITH = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
)


def config_hash(model: PreTrainedModel) -> str:
    """SHA-256 over a model's configuration: the same weights compute otherwise under another.

    Left out is what has no part in it: where it was loaded from, by which version.
    """
    content = model.config.to_dict()
    for key in _NOT_COMPUTED_WITH:
        content.pop(key, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        data = tensor.detach().cpu().contiguous()
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b"")
    return digest.hexdigest()
