"""What in-run scoring reads from a user's batch: sample ids, tokens, weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class MissingFieldError(KeyError):
    """A batch lacks what scoring needs."""

    def __str__(self) -> str:
        return str(self.args[0])


class HeldBatch(NamedTuple):
    """Sample ids int64 [B] on the CPU, tokens [B, T+1], weights [B] or None."""

    ids: Tensor
    tokens: Tensor
    weights: Tensor | None


@dataclass(frozen=True)
class BatchFields:
    """Names under which a batch holds what scoring needs.

    Attributes:
        sample_id: stable integer ids [B].
        tokens: token ids [B, T+1], the inputs of all positions and the last one's label; a sequence
            that is shorter is filled up on the right, with any id below 0 or of a token.
        weight: weights [B] of the samples in the loss; a batch without it has weight 1 throughout.
    """

    sample_id: str = "sample_id"
    tokens: str | None = None
    weight: str = "weight"

    def read(self, batch: Any) -> HeldBatch:
        """All three.

        Raises:
            MissingFieldError: the batch lacks the sample ids or the tokens.
        """
        return HeldBatch(self.read_ids(batch), self.read_tokens(batch), self.read_weights(batch))

    def check(self, batch: Any) -> None:
        """Refuse a batch that cannot be scored; it waits for the device, so not for every step.

        Raises:
            MissingFieldError: as for :meth:`read`.
            ValueError: the batch is filled up on the left.
        """
        tokens = self.read(batch).tokens
        if filled_on_the_left(tokens):
            raise ValueError(
                f"the batch has a token id {int(tokens.min())} before real ones; fill sequences up "
                "on the right, or with a token of the vocabulary that the loss ignores"
            )

    def read_ids(self, batch: Any) -> Tensor:
        """int64 [B] on the CPU.

        Raises:
            MissingFieldError: the batch has no sample ids of that name.
        """
        keys = _keys(batch)
        if self.sample_id not in keys:
            raise MissingFieldError(
                f"in-run scoring needs a sample id per sample, and the batch has no "
                f"{self.sample_id!r} (it has {_listed(keys)}); add one to your dataset's items, "
                "or name yours with sample_id_key='...'"
            )
        return torch.as_tensor(batch[self.sample_id]).detach().cpu().to(torch.int64)

    def read_tokens(self, batch: Any) -> Tensor:
        """int64 [B, T+1], where the batch is.

        Raises:
            MissingFieldError: the batch has no tokens of that name.
        """
        keys = _keys(batch)
        names = ("tokens", "input_ids") if self.tokens is None else (self.tokens,)
        for name in names:
            if name in keys and torch.is_tensor(batch[name]) and batch[name].dim() == 2:
                tokens: Tensor = batch[name]
                return tokens.detach()
        raise MissingFieldError(
            f"in-run scoring needs the token ids [B, T+1], and the batch has no "
            f"{' or '.join(map(repr, names))} (it has {_listed(keys)}); name yours with "
            "tokens_key='...'"
        )

    def read_weights(self, batch: Any) -> Tensor | None:
        """float32 [B], or None where every sample counts in full."""
        if self.weight not in _keys(batch):
            return None
        return torch.as_tensor(batch[self.weight]).detach().float()


def filled_on_the_left(tokens: Tensor) -> bool:
    """Whether an id below 0 stands before a token in any sequence of [B, T+1]."""
    there = tokens >= 0
    return bool((there[:, 1:] & ~there[:, :-1]).any())


def _keys(batch: Any) -> list[str]:
    if isinstance(batch, Mapping) or hasattr(batch, "keys"):  # also transformers' BatchEncoding
        return [str(key) for key in batch.keys()]  # noqa: SIM118 - not every one is iterable
    return []


def _listed(keys: list[str]) -> str:
    return ", ".join(map(repr, keys)) if keys else "no keys at all: it is not a mapping"
