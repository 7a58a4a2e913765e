"""The samples that ``mda-lightning score`` is given, with the tokenizer that texts need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.checkpoints import find_checkpoints
from mda_lightning.corpora.sources import TokenSource, holds_text, open_tokens
from mda_lightning.influence import ReplayScorer
from mda_lightning.mechanisms import Mechanism
from mda_lightning.recipes.checkpoint_choice import pythia_config
from mda_lightning.vocabulary import token_ids_of


def open_source(
    data: str,
    checkpoint: str,
    *,
    tokenizer: str | None = None,
    length: int | None = None,
    config: str | None = None,
) -> TokenSource:
    """The samples at ``data``; texts are encoded with ``tokenizer`` or the checkpoint's own.

    Args:
        data: see :func:`mda_lightning.corpora.sources.open_tokens`.
        checkpoint: the first one, for its tokenizer and context.
        tokenizer: a path, a folder, or a name on the hub.
        length: T, at which texts are cut; None is the checkpoint's context.
        config: for a ``.ckpt`` file.

    Raises:
        ValueError: texts for which there is no tokenizer, or a length for rows that have one.
        FileNotFoundError: nothing there.
    """
    if not holds_text(data):
        if length is not None:
            raise ValueError(f"--length is for texts; the rows of {data} have theirs")
        return open_tokens(data)
    first = find_checkpoints([checkpoint], config=config, config_of=pythia_config)[0]
    limit: Any = getattr(first.config(), "max_position_embeddings", None)
    cut = length or limit
    if cut is None:
        raise ValueError("the model's configuration names no context; give --length")
    own = first.tokenizer() if tokenizer is None else tokenizer
    if own is None:
        raise ValueError(f"{first.label} has no tokenizer.json beside it; give --tokenizer")
    return open_tokens(data, tokenizer=_read(str(own)), row_length=int(cut) + 1)


def fit_to_model(
    mechanisms: Sequence[Mechanism],
    model: PreTrainedModel,
    source: TokenSource,
    tokenizer: str | None,
) -> list[Mechanism]:
    """The mechanisms, probed with the tokens in use.

    Args:
        tokenizer: whose ids probe sequences are drawn from; None takes those of the data, where it
            tells them, or else the model's.

    Raises:
        ValueError: samples longer than the model's context, or mechanisms that it cannot have.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    length = source.row_length - 1
    if limit is not None and length > limit:
        raise ValueError(
            f"samples of {length} tokens are longer than the model's context of {limit}; give "
            "shorter ones"
        )
    ids = None if source.token_ids is None else source.token_ids.tolist()
    if tokenizer is not None:
        ids = token_ids_of(tokenizer, model).tolist()
    found = [own if ids is None else own.with_token_ids(ids) for own in mechanisms]
    for mechanism in found:
        mechanism.check(model)
    return found


def score_of_real(
    scorer: ReplayScorer, tokens: Tensor
) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.float32]]:
    """Scores [B, U, K] by mechanism and mean loss [B]; NaN for a sample of fewer than 2 tokens.

    Args:
        tokens: int64 [B, T+1], filled up with -1.
    """
    there = tokens[:, 1] >= 0
    loss = np.full(len(tokens), np.nan, np.float32)
    values = {
        name: np.full((len(tokens), len(own.units), len(own.blocks)), np.nan, np.float32)
        for name, own in scorer.targets.items()
    }
    if bool(there.any()):
        found, of_real = scorer.score(tokens[there])
        loss[there.numpy()] = of_real.numpy()
        for name, own in found.items():
            values[name][there.numpy()] = own.numpy()
    return values, loss


def _read(place: str) -> Tokenizer:
    path = Path(place)
    if path.is_dir():
        path /= "tokenizer.json"
    return Tokenizer.from_file(str(path)) if path.is_file() else Tokenizer.from_pretrained(place)
