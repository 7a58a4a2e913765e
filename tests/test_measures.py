"""Measures: ids in every form, settings that JSON can hold, rows that belong to their text."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import random_neox
from tokenizers import Tokenizer, models, pre_tokenizers

from mda_lightning.callbacks.measuring import Measuring
from mda_lightning.measures import measure

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = [" ".join(LETTERS * 4)]


def letters(shift: int) -> Tokenizer:
    """A letter's id is its place in the alphabet, moved on by ``shift``."""
    ids = {letter: (i + shift) % 30 for i, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(ids | {"[UNK]": 39}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def sha256_of_rows(rows: torch.Tensor) -> str:
    """The hash that settings are to hold, from the rows' bytes as they are documented."""
    array = rows.numpy()
    head = f"array:{array.dtype.str}:{array.shape}:".encode()
    return hashlib.sha256(head + array.tobytes()).hexdigest()


# -- token ids --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ablation", "copying"])
def test_ids_may_come_in_any_form(name: str) -> None:
    model = random_neox()
    settings = {"n_sequences": 4, "length": 10}
    expected = measure(name, token_ids=tuple(range(1, 40)), **settings).measure(model)
    forms = (
        range(1, 40),
        list(range(1, 40)),
        np.arange(1, 40, dtype=np.uint16),
        torch.arange(1, 40),
        [np.int64(i) for i in range(1, 40)],
    )
    for ids in forms:
        one = measure(name, token_ids=ids, **settings)
        assert one.token_ids == tuple(range(1, 40))
        assert all(type(i) is int for i in one.token_ids)
        said = json.loads(json.dumps(one.settings()))
        assert said["token_ids"] == {"first": 1, "last": 39}
        hash(one)
        for key, scores in one.measure(model).items():
            assert torch.equal(scores.mean, expected[key].mean)


@pytest.mark.parametrize("name", ["ablation", "copying"])
def test_settings_tell_ids_apart_in_few_words(name: str) -> None:
    many = list(range(0, 60_000, 2))
    said = measure(name, token_ids=many).settings()["token_ids"]
    array = np.array(many, dtype="<i8")
    digest = hashlib.sha256(b"array:<i8:(30000,):" + array.tobytes()).hexdigest()
    assert said == {"count": 30_000, "sha256": digest}
    assert measure(name, token_ids=[*many[:-1], 7]).settings()["token_ids"] != said
    assert measure(name, token_ids=[3, 5, 9]).settings()["token_ids"] == [3, 5, 9]
    assert measure(name).settings()["token_ids"] is None
    assert measure(name).with_token_ids([4, 5, 6]).settings()["token_ids"] == {
        "first": 4,
        "last": 6,
    }


@pytest.mark.parametrize("name", ["ablation", "copying"])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "token_ids is empty"),
        (range(0), "token_ids is empty"),
        ([1.0, 2.0], "whole numbers.*float"),
        (torch.ones(3), "whole numbers.*float"),
        (np.ones((2, 3), dtype=np.int64), "in one row.*list"),
    ],
)
def test_what_are_no_ids_is_refused(name: str, ids, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(name, token_ids=ids)


def test_copying_draws_from_the_ids_of_the_model_it_measures() -> None:
    """Two models of one size may have other special ids."""
    first, second = random_neox(), random_neox()
    second.config.bos_token_id = second.config.eos_token_id = 17
    used, fresh = measure("copying"), measure("copying")
    used.measure(first)
    found, expected = used.measure(second)["copying"], fresh.measure(second)["copying"]
    assert torch.equal(found.mean, expected.mean)
    assert not torch.equal(found.mean, used.measure(first)["copying"].mean)


# -- rows of text -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["icl", "prefix_matching", "previous_token_text"])
def test_another_tokenizer_or_text_is_read_anew(name: str) -> None:
    model = random_neox()
    size = {"context" if name == "icl" else "length": 30}
    one = measure(name, text=TEXT, tokenizer=letters(0), n_rows=2, **size)
    assert one.rows(model)[0, :5].tolist() == [0, 1, 2, 3, 4]
    moved = replace(one, tokenizer=letters(3))
    assert moved.rows(model)[0, :5].tolist() == [3, 4, 5, 6, 7]
    backwards = replace(one, text=[" ".join(LETTERS[::-1] * 4)])
    assert backwards.rows(model)[0, :5].tolist() == [25, 24, 23, 22, 21]
    assert len(replace(one, n_rows=1).rows(model)) == 1
    for other in (moved, backwards):
        other.measure(model)
        assert other.settings()["rows_sha256"] == sha256_of_rows(other.rows(model))
    assert one.rows(model)[0, :5].tolist() == [0, 1, 2, 3, 4]


def test_one_measure_in_two_monitors_reads_with_the_tokenizer_of_each() -> None:
    model = random_neox()
    icl = measure("icl", text=TEXT, context=20)
    found = []
    for shift in (0, 3):
        measuring = Measuring([], [icl], tokenizer=letters(shift))
        measuring.attach(model)
        found.append(measuring.measures[0].rows(model)[0, :3].tolist())
    assert found == [[0, 1, 2], [3, 4, 5]]


def test_settings_hold_the_hash_of_the_rows_that_were_measured() -> None:
    """A model of a short context is measured on shorter rows; then the first one again."""
    long, short = random_neox(), random_neox()
    short.config.max_position_embeddings = 32
    icl = measure("icl", text=torch.randint(1, 40, (400,)))
    assert icl.settings()["rows_sha256"] is None
    for model, width in ((long, 65), (short, 33), (long, 65)):
        icl.measure(model)
        assert icl.rows(model).shape[1] == width
        assert icl.settings()["rows_sha256"] == sha256_of_rows(icl.rows(model))
