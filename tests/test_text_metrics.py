"""Text as fixed rows of tokens, the ids of a tokenizer, and attention scores on text."""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from models import copying_neox, random_neox
from tokenizers import AddedToken, Tokenizer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from mda_lightning import evaluation_text
from mda_lightning.corpora import TokenRows, train_bpe
from mda_lightning.evaluation_text import HubText, text_rows
from mda_lightning.measures import MEASURES, Measure, measure
from mda_lightning.probes import (
    prefix_matching_sequences,
    previous_token_sequences,
    repeated_sequences,
)
from mda_lightning.vocabulary import read_vocabulary, token_ids_of

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is absent")
TEXTS = [f"the {word} saw the {other} and the {word} ran\n" * 3 for word, other in
         (("cat", "dog"), ("bird", "fox"), ("lion", "mouse"), ("whale", "shark"))]  # fmt: skip


@pytest.fixture(scope="module")
def bpe() -> str:
    return train_bpe(TEXTS, vocab_size=300, seed=0)


@pytest.fixture(scope="module")
def stream(bpe: str) -> list[int]:
    """The four documents, each closed by id 0."""
    tokenizer = Tokenizer.from_str(bpe)
    return [i for text in TEXTS for i in [*tokenizer.encode(text).ids, 0]]


# -- rows -------------------------------------------------------------------------------------


def _sources(folder: Path) -> dict[str, object]:
    """The same four documents in every form that is read."""
    (folder / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / "texts" / f"{number}.txt").write_text(text, "utf-8")
    (folder / "texts" / "picture.png").write_bytes(b"\x89PNG\xff")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "t.jsonl").write_text(lines, "utf-8")
    with gzip.open(folder / "t.jsonl.gz", "wt", encoding="utf-8") as packed:
        packed.write(lines)
    table = pa.table({"text": TEXTS, "number": range(4)})
    pq.write_table(table, folder / "t.parquet")
    (folder / "arrow").mkdir()
    for name, new in (("f", pa.ipc.new_file), ("s", pa.ipc.new_stream)):
        with new(folder / "arrow" / f"{name}.arrow", table.schema) as sink:
            sink.write_table(table)
    return {
        "strings": TEXTS,
        "folder": folder / "texts",
        "jsonl": str(folder / "t.jsonl"),
        "jsonl.gz": folder / "t.jsonl.gz",
        "parquet": folder / "t.parquet",
        "arrow file": folder / "arrow" / "f.arrow",
        "arrow stream": folder / "arrow" / "s.arrow",
    }


def test_every_form_of_a_text_gives_the_same_rows(
    tmp_path: Path, bpe: str, stream: list[int]
) -> None:
    tokenizer = Tokenizer.from_str(bpe)
    expected = torch.tensor(stream[: len(stream) // 30 * 30]).view(-1, 30)
    assert len(expected) == 4
    for name, source in _sources(tmp_path).items():
        rows = text_rows(source, row_length=30, n_rows=100, tokenizer=tokenizer)
        assert torch.equal(rows, expected), name
        few = text_rows(source, row_length=30, n_rows=2, tokenizer=tokenizer)
        assert torch.equal(few, expected[:2]), name


def test_a_tokenizer_is_read_in_every_form(tmp_path: Path, bpe: str, stream: list[int]) -> None:
    (tmp_path / "tokenizer.json").write_text(bpe, "utf-8")
    tokenizer = Tokenizer.from_str(bpe)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(tmp_path / "saved")
    expected = text_rows(TEXTS, row_length=30, n_rows=9, tokenizer=tokenizer)
    assert expected.flatten().tolist() == stream[: expected.numel()]
    for given in (tmp_path / "tokenizer.json", str(tmp_path), str(tmp_path / "saved"), fast):
        assert torch.equal(text_rows(TEXTS, row_length=30, n_rows=9, tokenizer=given), expected)


def test_tokens_that_exist_are_taken_evenly_and_cut(tmp_path: Path, bpe: str) -> None:
    tokens = np.arange(90).reshape(10, 9)
    corpus = TokenRows.write(tmp_path / "c", tokens, tokenizer_json=bpe, provenance={})
    expected = torch.from_numpy(tokens[[0, 4, 9], :5])
    for source in (corpus, tmp_path / "c", str(tmp_path / "c"), tokens, torch.from_numpy(tokens)):
        assert torch.equal(text_rows(source, row_length=5, n_rows=3), expected)
    flat = text_rows(torch.arange(23), row_length=5, n_rows=3)
    assert torch.equal(flat, torch.arange(15).view(3, 5))


def test_named_text_is_read_through_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bpe: str
) -> None:
    """Lines of a local data set, as the hub holds WikiText: blank lines are empty rows."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    lines = [" \n", " = Cats = \n", " \n", " the cat saw the dog \n", " the dog ran \n"] * 20
    (tmp_path / "wiki").mkdir()
    rows = [line if line.strip() else "" for line in lines]
    pq.write_table(pa.table({"text": rows}), tmp_path / "wiki" / "validation.parquet")
    pq.write_table(pa.table({"text": ["other"]}), tmp_path / "wiki" / "train.parquet")
    text = HubText(str(tmp_path / "wiki"), None, "validation", lines=True)
    monkeypatch.setitem(evaluation_text.NAMED_TEXTS, "wikitext-2", text)
    tokenizer = Tokenizer.from_str(bpe)
    found = text_rows("wikitext-2", row_length=40, n_rows=10, tokenizer=tokenizer)
    (tmp_path / "wiki.raw").write_text("".join(lines), "utf-8")
    as_file = text_rows(tmp_path / "wiki.raw", row_length=40, n_rows=10, tokenizer=tokenizer)
    assert len(found) == 10 and torch.equal(found, as_file)


def test_wikitext_is_asked_for_by_its_name_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, bpe: str
) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def unreachable(*args: object, **settings: object) -> None:
        asked.append((args, settings))
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(OSError, match=r"'wikitext-2' .*no route.* give the path of a copy"):
        text_rows("wikitext-2", row_length=9, n_rows=1, tokenizer=Tokenizer.from_str(bpe))
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "validation"})]


def test_without_datasets_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, bpe: str
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mda-lightning\[data\]'"):
        text_rows("wikitext-2", row_length=9, n_rows=1, tokenizer=Tokenizer.from_str(bpe))


def test_bad_texts_name_the_way_out(tmp_path: Path, bpe: str) -> None:
    tokenizer = Tokenizer.from_str(bpe)
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes("é".encode("latin1"))
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "t.parquet")
    cases = [
        (["a few"], ValueError, r"1 strings gives \d+ tokens, too little text for one row of 30"),
        ([], ValueError, "0 strings gives 0 tokens"),
        (torch.arange(8).view(2, 4), ValueError, "rows of 4 tokens, too short for 30"),
        (torch.ones(2, 40), ValueError, "float32 of shape"),
        (torch.arange(20), ValueError, "20 tokens, too little text"),
        (tmp_path / "absent", FileNotFoundError, r"no file or folder.*wikitext-2"),
        (tmp_path / "empty", FileNotFoundError, r"no text in the folder .*\.jsonl"),
        (tmp_path / "latin.txt", ValueError, "is not UTF-8"),
        (tmp_path / "t.parquet", ValueError, "no column 'text', only body"),
        ([1, 2], TypeError, "not a list"),
    ]
    for source, kind, message in cases:
        with pytest.raises(kind, match=message):
            text_rows(source, row_length=30, n_rows=2, tokenizer=tokenizer)
    assert len(text_rows(tmp_path / "t.parquet", row_length=30, n_rows=2, tokenizer=tokenizer,
                         text_key="body")) == 2  # fmt: skip
    with pytest.raises(ValueError, match="4 strings is text and needs a tokenizer"):
        text_rows(TEXTS, row_length=30, n_rows=2)
    with pytest.raises(ValueError, match="ids go up to 297, the model has 200"):
        text_rows(TEXTS, row_length=30, n_rows=2, tokenizer=tokenizer, vocab_size=200)
    with pytest.raises(ValueError, match=r"token ids 0\.\.89, the model has 0\.\.39"):
        text_rows(torch.arange(90).view(3, 30), row_length=30, n_rows=3, vocab_size=40)


# -- vocabulary -------------------------------------------------------------------------------


def test_token_ids_leave_out_special_and_padding_ids(bpe: str) -> None:
    tokenizer = Tokenizer.from_str(bpe)
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True)])
    tokenizer.add_tokens(["        "])
    found = token_ids_of(tokenizer, random_neox(vocab_size=size + 60))
    assert found.tolist() == [*range(1, size), size + 1]  # the added blanks are text
    assert read_vocabulary(tokenizer).end_of_text == 0
    with pytest.raises(ValueError, match=f"ids go up to {size + 1}, the model has {size + 1}"):
        token_ids_of(tokenizer, random_neox(vocab_size=size + 1))


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="dict is not a tokenizer"):
        read_vocabulary({})  # type: ignore[arg-type]
    (tmp_path / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(ValueError, match=r"no tokenizer could be read from .*tokenizer\.json"):
        read_vocabulary(tmp_path / "tokenizer.json")


@needs_shared
def test_pythias_tokenizer_and_wikitext() -> None:
    tokenizer = SHARED / "20B_tokenizer.json"
    model = random_neox(vocab_size=50_304, hidden_size=16, n_layers=1)
    # 0 and 1 are special; 50254..50276, added runs of blanks, are text.
    assert torch.equal(token_ids_of(tokenizer, model), torch.arange(2, 50_277))
    wikitext = SHARED / "wikitext2" / "wiki.valid.raw.gz"
    rows = text_rows(wikitext, row_length=513, n_rows=128, tokenizer=tokenizer, vocab_size=50_304)
    assert rows.shape == (128, 513)
    text = gzip.decompress(wikitext.read_bytes()).decode("utf-8")
    decoded = Tokenizer.from_file(str(tokenizer)).decode(rows.flatten().tolist())
    assert text.startswith(decoded[:-10]) and len(decoded) > 200_000


# -- attention on text ------------------------------------------------------------------------


def _eager_patterns(model, tokens: torch.Tensor) -> torch.Tensor:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return torch.stack(attentions, dim=1)  # [N, L, heads, T, T]


def _plain_prefix_matching(pattern: torch.Tensor, row: list[int]) -> torch.Tensor | None:
    """One row: mean over queries met before of the attention to what followed them."""
    totals = []
    for q in range(len(row)):
        keys = [p + 1 for p in range(q) if row[p] == row[q]]
        if keys:
            totals.append(sum(pattern[:, :, q, k] for k in keys))
    return torch.stack(totals).mean(0) if totals else None


ROWS = torch.randint(0, 9, (6, 24), generator=torch.Generator().manual_seed(2))
ROWS[3] = torch.arange(10, 34)  # no token twice: left out
ROWS[4, 5:9] = 7  # a token that follows itself


def test_prefix_matching_is_the_definition_on_eager_attention() -> None:
    model = random_neox()
    patterns = _eager_patterns(model, ROWS)
    each = [
        _plain_prefix_matching(pattern, row)
        for pattern, row in zip(patterns, ROWS.tolist(), strict=True)
    ]
    rows = torch.stack([value for value in each if value is not None])
    assert len(rows) == 5
    prefix = measure("prefix_matching", text=ROWS, length=24)
    prefix.check(model)
    found = prefix.measure(model)["prefix_matching"]
    torch.testing.assert_close(found.mean, rows.mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.se, rows.std(0) / 5**0.5, atol=1e-6, rtol=1e-4)


def test_previous_token_on_text_is_the_definition_on_eager_attention() -> None:
    model = random_neox()
    patterns = _eager_patterns(model, ROWS)
    rows = torch.stack([patterns[:, :, :, t, t - 1] for t in range(1, 24)]).mean(0)
    found = measure("previous_token_text", text=ROWS, length=24).measure(model)
    scores = found["previous_token_text"]
    torch.testing.assert_close(scores.mean, rows.mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(scores.se, rows.std(0) / 6**0.5, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["prefix_matching", "previous_token_text"])
def test_uniform_attention_scores_the_chance_value(name: str) -> None:
    """Several keys a query count as often as there are."""
    model = random_neox(std=0.0)
    one = measure(name, text=ROWS, length=24)
    scores = one.measure(model)[name].mean
    chance = one.probes(model).chance
    torch.testing.assert_close(scores, torch.full_like(scores, chance), atol=1e-6, rtol=1e-5)
    rows = [_plain_prefix_matching(1 / torch.arange(1, 25).view(1, 1, 24, 1).expand(1, 1, 24, 24),
                                   row) for row in ROWS.tolist()]  # fmt: skip
    if name == "prefix_matching":
        kept = [float(value) for value in rows if value is not None]
        assert chance == pytest.approx(sum(kept) / len(kept), abs=1e-6)


def test_prefix_matching_of_repeated_tokens_is_the_induction_score() -> None:
    """But for the first token's second coming, whose successor is known as well."""
    probes = repeated_sequences(range(1, 24), seed=0, n_sequences=4, length=(9, 9))
    found = prefix_matching_sequences(probes.tokens)
    pairs = set(zip(found.sequence.tolist(), found.query.tolist(), found.key.tolist(), strict=True))
    stripe = zip(probes.sequence.tolist(), probes.query.tolist(), probes.key.tolist(), strict=True)
    last = {(n, 17, 9) for n in range(4)}
    assert pairs == set(stripe) | last
    assert torch.equal(found.target, found.tokens[found.sequence, found.key])
    scores = measure("prefix_matching", text=probes.tokens, length=18).measure(copying_neox())
    assert scores["prefix_matching"].mean[1, 0] > 0.85


def test_rows_that_hold_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no token occurs twice in any of the 2 rows of 10 tokens"):
        prefix_matching_sequences(torch.arange(20).view(2, 10))
    with pytest.raises(ValueError, match=r"got \(3, 1\)"):
        previous_token_sequences(torch.ones(3, 1, dtype=torch.int64))


# -- measures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["icl", "prefix_matching", "previous_token_text"])
def test_text_measures_read_the_text_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bpe: str, name: str
) -> None:
    (tmp_path / "tokenizer.json").write_text(bpe, "utf-8")
    (tmp_path / "text.txt").write_text("".join(TEXTS), "utf-8")
    model = random_neox(vocab_size=300)
    one = measure(name, text=tmp_path / "text.txt", tokenizer=tmp_path, n_rows=3,
                  **{"context" if name == "icl" else "length": 30})  # fmt: skip
    assert isinstance(one, Measure) and one.name == name and one.every_n_steps is None
    assert one.with_token_ids([3, 4]) is one
    one.check(model)
    (tmp_path / "text.txt").unlink()
    first, second = one.measure(model), one.measure(model)
    assert first and all(key.split("/")[0] == name for key in first)
    for key in first:
        assert torch.equal(first[key].mean, second[key].mean)
    settings = one.settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["text"] == "text.txt" and len(settings["rows_sha256"]) == 64


def test_a_text_without_a_tokenizer_asks_for_one_before_training() -> None:
    model = random_neox()
    for name in ("icl", "prefix_matching", "previous_token_text"):
        with pytest.raises(ValueError, match="needs a tokenizer"):
            measure(name, text=TEXTS, **({} if name == "icl" else {"length": 30})).check(model)
        with pytest.raises(ValueError, match="longer than the model's 64"):
            long = {"context" if name == "icl" else "length": 65}
            measure(name, text=TEXTS, **long).check(model)
    assert set(MEASURES) >= {"icl", "copying", "prefix_matching", "previous_token_text"}


# -- the page ---------------------------------------------------------------------------------


def test_the_examples_of_the_metrics_page_run(tmp_path: Path, bpe: str) -> None:
    """All but the first, which loads a model from the hub; texts and tokenizer are local ones."""
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text("utf-8")
    first, *blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert "from_pretrained" in first and len(blocks) >= 6
    (tmp_path / "tokenizer.json").write_text(bpe, "utf-8")
    (tmp_path / "text.txt").write_text("".join(TEXTS) * 40, "utf-8")
    config = GPTNeoXConfig(
        vocab_size=300,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=512,
    )
    names: dict[str, object] = {"model": GPTNeoXForCausalLM(config)}
    names["model"].config._name_or_path = str(tmp_path)
    for block in blocks:
        block = block.replace('"EleutherAI/pythia-70m"', repr(str(tmp_path)))
        exec(block.replace('"wikitext-2"', repr(str(tmp_path / "text.txt"))), names)
    assert set(names["scores"]) == {"icl/gain", "icl/olsson"}
    assert 0 < names["chance"] < 1
