"""A byte-level BPE tokenizer trained on the spot."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mda_lightning.shuffling import key_of, keyed_order

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0

# GPT-2's pattern (Radford et al. 2019), which ByteLevel cuts words by, on ASCII text.
_WORDS = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII
)


def train_bpe(
    texts: Sequence[str],
    *,
    vocab_size: int,
    seed: int,
    sample_characters: int = 3_000_000,
    whole_byte_alphabet: bool = True,
) -> str:
    """Train a byte-level BPE on a seeded sample of whole texts; its JSON.

    Id 0 is ``<|endoftext|>``.

    Args:
        texts: to sample from; texts are drawn in random order until the sample is full.
        vocab_size: ids, the end of text and single bytes included.
        seed: of the sample.
        sample_characters: about how much text is read.
        whole_byte_alphabet: True gives each of the 256 bytes an id, so that no text is lost; False
            only those that occur in the sample: others are left out of encoded text.

    Raises:
        ValueError: no text, or a vocabulary too small for its bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if whole_byte_alphabet else []
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: the end of text and {len(alphabet)} single "
            f"bytes need ids, at least {smallest}"
        )
    if not any(texts):
        raise ValueError("there is no text to train a tokenizer on; the corpus is empty")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts, seed, sample_characters), trainer)
    return str(tokenizer.to_str())


def encode(
    tokenizer: Tokenizer, texts: Iterable[str], *, batch: int = 64
) -> Iterator[NDArray[np.uint32]]:
    """Token ids of each text, in order, special tokens not added; uint32 [n]."""
    pending: list[str] = []
    for text in texts:
        pending.append(text)
        if len(pending) == batch:
            yield from _encoded(tokenizer, pending)
            pending = []
    yield from _encoded(tokenizer, pending)


def encode_ascii(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[NDArray[np.uint32]]:
    """As :func:`encode`, several times faster, for ASCII text and a tokenizer of :func:`train_bpe`.

    Byte-level BPE never merges across words, so each distinct word is encoded once.
    """
    known: dict[str, list[int]] = {}
    for text in texts:
        words = _WORDS.findall(text)
        new = [word for word in dict.fromkeys(words) if word not in known]
        encoded = tokenizer.encode_batch_fast(new, add_special_tokens=False)
        known.update(zip(new, (encoding.ids for encoding in encoded), strict=True))
        ids = itertools.chain.from_iterable(known[word] for word in words)
        yield np.fromiter(ids, dtype=np.uint32)


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> Iterator[NDArray[np.uint32]]:
    # The fast call leaves out offsets, which nobody asks for.
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        yield np.asarray(encoding.ids, dtype=np.uint32)


def _sample(texts: Sequence[str], seed: int, characters: int) -> Iterator[str]:
    for number in keyed_order(key_of("tokenizer sample", seed), len(texts)):
        if characters <= 0:
            return
        characters -= len(texts[number])
        yield texts[number]
