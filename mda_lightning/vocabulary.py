"""A tokenizer, however it is given, and which of a model's token ids it really uses."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mda_lightning.corpora.bpe import END_OF_TEXT
from mda_lightning.files import sha256_of

#: A path to ``tokenizer.json``, a folder or hub name that ``AutoTokenizer`` reads, or an object of
#: the `tokenizers` or `transformers` library.
TokenizerLike = str | os.PathLike[str] | Tokenizer | PreTrainedTokenizerBase

#: Token ids as a caller may give them; of an array or tensor, one dimension.
TokenIds = Sequence[int] | Tensor | NDArray[np.integer]

_SHORT = 100


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer and its ids.

    Attributes:
        tokenizer: of the `tokenizers` library.
        ids: int64, ascending; every id that it can give.
        special: those that stand for no text: end of text, padding and their like.
        end_of_text: the id that closes a document, or None.
    """

    tokenizer: Tokenizer
    ids: Tensor
    special: Tensor
    end_of_text: int | None

    def check_fits(self, vocab_size: int) -> None:
        """Check that a model of ``vocab_size`` ids has all of this tokenizer's.

        Raises:
            ValueError: it has not; the message gives both numbers.
        """
        largest = int(self.ids.max())
        if largest >= vocab_size:
            raise ValueError(
                f"the tokenizer is larger than the model: its ids go up to {largest}, the model "
                f"has {vocab_size} (0..{vocab_size - 1}); give the tokenizer that the model was "
                "trained with"
            )


def read_vocabulary(tokenizer: TokenizerLike) -> Vocabulary:
    """A tokenizer by path, by name, or as an object.

    Raises:
        ValueError: nothing readable lies there, or it has no tokens.
        TypeError: the object is no tokenizer, or one written in Python alone, which has no
            `tokenizers` object inside.
    """
    found: Any = tokenizer
    if isinstance(tokenizer, str | os.PathLike):
        found = _read(tokenizer)
    end_of_text, special = None, set[int]()
    if isinstance(found, PreTrainedTokenizerBase):
        end_of_text = found.eos_token_id
        special = set(found.all_special_ids)
        found = getattr(found, "backend_tokenizer", None)
    if not isinstance(found, Tokenizer):
        raise TypeError(
            f"{type(tokenizer).__name__} is not a tokenizer that can be used here: give a path to "
            "tokenizer.json, a folder or hub name, a tokenizers.Tokenizer, or a fast tokenizer of "
            "transformers"
        )
    ids = set(found.get_vocab(with_added_tokens=True).values())
    if not ids:
        raise ValueError("the tokenizer has no tokens; give one that was trained")
    if end_of_text is None:
        end_of_text = found.token_to_id(END_OF_TEXT)
    special |= {i for i, token in found.get_added_tokens_decoder().items() if token.special}
    return Vocabulary(found, _ids(ids), _ids(special & ids), end_of_text)


def token_ids_of(tokenizer: TokenizerLike, model: PreTrainedModel) -> Tensor:
    """Token ids that a tokenizer really uses in running text, int64 [V'], ascending.

    Special tokens (end of text, padding) are left out, and so are a model's ids beyond the
    tokenizer's, which pad its vocabulary and were never trained. Tokens added later that are text,
    such as runs of blanks, are kept. Probe sequences are drawn from these.

    Raises:
        ValueError: the tokenizer has ids that the model lacks, or no tokenizer can be read.
        TypeError: no tokenizer.
    """
    vocabulary = read_vocabulary(tokenizer)
    vocabulary.check_fits(int(model.config.vocab_size))
    return vocabulary.ids[~torch.isin(vocabulary.ids, vocabulary.special)]


def token_id_tuple(token_ids: TokenIds) -> tuple[int, ...]:
    """Token ids as a tuple of int, in the order given.

    Raises:
        ValueError: none, or something other than whole numbers in one row.
    """
    given = token_ids.tolist() if isinstance(token_ids, Tensor | np.ndarray) else token_ids
    try:
        found = tuple(operator.index(i) for i in given)
    except TypeError as error:
        raise ValueError(
            f"token_ids are whole numbers in one row ({error}); give for example range(1, 50000)"
        ) from error
    if not found:
        raise ValueError("token_ids is empty; give at least as many as a sequence has tokens")
    return found


def describe_token_ids(token_ids: Sequence[int] | None) -> Any:
    """What determines token ids, as short JSON values.

    A contiguous range by its ends, ``{"first", "last"}``; up to 100 others as a list; more of them
    by ``{"count", "sha256"}``, the hash over their int64 values in order. None stays None.
    """
    if token_ids is None:
        return None
    ids = list(token_ids)
    if ids == list(range(ids[0], ids[-1] + 1)):
        return {"first": ids[0], "last": ids[-1]}
    if len(ids) <= _SHORT:
        return ids
    return {"count": len(ids), "sha256": sha256_of(np.asarray(ids, dtype=np.int64))}


def _read(place: str | os.PathLike[str]) -> Tokenizer | PreTrainedTokenizerBase:
    path = Path(place)
    if path.is_dir() and (path / "tokenizer.json").is_file():
        # Without a configuration beside it AutoTokenizer would have to guess a class.
        has_settings = (path / "tokenizer_config.json").is_file()
        path = path if has_settings else path / "tokenizer.json"
    try:
        if path.is_file():
            return Tokenizer.from_file(str(path))
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(place))
    except Exception as error:
        raise ValueError(
            f"no tokenizer could be read from {str(place)!r}: {error}. Give a path to "
            "tokenizer.json, a folder saved by save_pretrained, or a name on the hub"
        ) from error
    return found


def _ids(values: set[int]) -> Tensor:
    return torch.tensor(sorted(values), dtype=torch.int64)
