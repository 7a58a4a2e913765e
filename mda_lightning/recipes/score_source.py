"""The samples that ``mda-lightning score`` is given, with the tokenizer that texts need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedModel

from mda_lightning.checkpoints import find_checkpoints
from mda_lightning.corpora.sources import TokenSource, holds_text, open_tokens
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


def _read(place: str) -> Tokenizer:
    path = Path(place)
    if path.is_dir():
        path /= "tokenizer.json"
    return Tokenizer.from_file(str(path)) if path.is_file() else Tokenizer.from_pretrained(place)
