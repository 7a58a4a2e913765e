"""``mda-lightning score``: against the engine called by hand, interrupted, shared, and misused."""

from __future__ import annotations

import json
import struct

import numpy as np
import pandas as pd
import pytest
import torch
from models import random_neox
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from mda_lightning.cli import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK, main
from mda_lightning.corpora import TokenRows
from mda_lightning.corpora.sources import open_tokens
from mda_lightning.curvature import SubspaceEKFAC
from mda_lightning.gradients import probe_gradients
from mda_lightning.influence import ReplayScorer, fit_and_score, token_scores
from mda_lightning.mechanisms import mechanism
from mda_lightning.recipes.score_settings import ScoreSettings
from mda_lightning.store import ScoreRows, ScoreTable, ScoreWriter
from mda_lightning.store.chunks import ChunkFolder
from mda_lightning.units import Head

N, LENGTH, VOCAB = 23, 12, 60
EPSILON = 1e-4


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    found = np.random.default_rng(0).integers(1, VOCAB, (N, LENGTH + 1))
    found.flat[: VOCAB - 1] = np.arange(1, VOCAB)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory, rows):
    """Two checkpoints of a model, and the rows as a corpus and as an array."""
    folder = tmp_path_factory.mktemp("score")
    for step in (100, 200):
        random_neox(seed=step, vocab_size=VOCAB).save_pretrained(folder / "models" / f"step{step}")
    domains = ["even" if i % 2 == 0 else "odd" for i in range(N)]
    TokenRows.write(
        folder / "corpus", rows, domains=domains, vocab_size=VOCAB, special_ids=(0,), provenance={}
    )
    np.save(folder / "rows.npy", rows.astype(np.uint16))
    return folder


def _score(place, output, *arguments: str, data: str = "corpus", model: str = "models") -> int:
    # The probe's token ids are the corpus's own; for other data the model's configuration tells.
    return _main(place / model, place / data, output, "--curvature-samples", "23", *arguments)


def _main(model, data, output, *arguments: str) -> int:
    places = [str(model), "--data", str(data), "--output", str(output)]
    return main(["score", *places, "--quiet", *arguments])


def _expected(step: int, rows: np.ndarray, probe: str = "attention", units=None) -> torch.Tensor:
    model = random_neox(seed=step, vocab_size=VOCAB)
    own = mechanism("induction", probe_function=probe, token_ids=np.unique(rows).tolist())
    units = units or [Head(0, 0), Head(0, 1), Head(1, 0), Head(1, 1)]
    _, found = fit_and_score(model, {"induction": own}, units, [torch.from_numpy(rows)])
    return found["induction"].values


def _values(table: ScoreTable) -> np.ndarray:
    return np.stack(
        [[table.scores(u, b)[1] for b in table.blocks] for u in table.units]
    ).T.swapaxes(1, 2)


def test_scores_are_the_engines_averaged_over_checkpoints(place, rows, tmp_path) -> None:
    assert _score(place, tmp_path, "--probe", "copy_logprob") == EXIT_OK
    table = ScoreTable.open(tmp_path)
    expected = [_expected(step, rows, "copy_logprob") for step in (100, 200)]
    mean = torch.stack(expected).mean(0).numpy()
    ids, _ = table.scores("L0H0")
    assert ids.tolist() == list(range(N)) and table.estimator == "replay" and table.complete
    scale = np.abs(mean).max()
    np.testing.assert_allclose(_values(table), mean, atol=1e-4 * scale, rtol=0)
    assert not np.allclose(expected[0].numpy(), mean, atol=1e-2 * scale)
    kept = table.provenance["checkpoints"]
    assert [one["step"] for one in kept] == [100, 200]
    assert kept[0]["curvature"] == "ekfac" and kept[0]["n_sequences"] == N
    frame = pd.read_parquet(tmp_path / "induction")
    assert (frame["ihvp_step"] == -1).all() and (frame["step"] == -1).all()
    assert set(frame.loc[frame.sample_id % 2 == 0, "domain"]) == {"even"}
    assert not (tmp_path / ".work").exists() or not any((tmp_path / ".work").iterdir())


def test_several_mechanisms_share_a_pass_and_are_two_tables(place, tmp_path, monkeypatch) -> None:
    passes = []
    score = ReplayScorer.score
    monkeypatch.setattr(
        ReplayScorer, "score", lambda self, t: passes.append(len(t)) or score(self, t)
    )
    both = ("--mechanism", "induction,previous_token", "--units", "L1H0,L0H1")
    assert _score(place, tmp_path / "both", *both, model="models/step100") == EXIT_OK
    assert sum(passes) == N
    for name in ("induction", "previous_token"):
        alone = ("--mechanism", name, "--units", "L1H0,L0H1")
        assert _score(place, tmp_path / name, *alone, model="models/step100") == EXIT_OK
        one = ScoreTable.open(tmp_path / name)
        other = ScoreTable.open(tmp_path / "both", mechanism=name)
        assert other.units == ("L1H0", "L0H1")
        a, b = _values(one), _values(other)
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max(), rtol=0)


@pytest.mark.parametrize("arguments", [("--batch-size", "1"), ("--batch-size", "7"), ()])
def test_an_interrupted_call_goes_on_with_the_next_sample(
    place, tmp_path, monkeypatch, capsys, arguments
) -> None:
    """Stopped after every batch in turn, it scores each sample once, to the same bits."""
    whole = tmp_path / "whole"
    own = arguments or ("--batch-size", "3")
    assert _score(place, whole, *own) == EXIT_OK
    score, scored = ReplayScorer.score, []

    def stopping(self, tokens):
        if len(scored) % 2:
            scored.append(0)
            raise KeyboardInterrupt
        scored.append(len(tokens))
        return score(self, tokens)

    monkeypatch.setattr(ReplayScorer, "score", stopping)
    codes = []
    while not codes or codes[-1] != EXIT_OK:
        codes.append(_score(place, tmp_path / "parts", *own))
    assert set(codes[:-1]) == {EXIT_INTERRUPTED} and len(codes) > 3
    assert sum(scored) == 2 * N
    assert "goes on with the sample that comes next" in capsys.readouterr().err
    np.testing.assert_array_equal(
        _values(ScoreTable.open(tmp_path / "parts")), _values(ScoreTable.open(whole))
    )


def test_the_batch_size_and_the_shares_change_nothing(place, tmp_path, capsys) -> None:
    assert _score(place, tmp_path / "one") == EXIT_OK
    reference = _values(ScoreTable.open(tmp_path / "one"))
    scale = np.abs(reference).max()
    assert _score(place, tmp_path / "small", "--batch-size", "2") == EXIT_OK
    small = _values(ScoreTable.open(tmp_path / "small"))
    np.testing.assert_allclose(small, reference, atol=1e-5 * scale, rtol=0)
    for share in (2, 0, 2):
        assert _score(place, tmp_path / "shared", "--share", f"{share}/3") == EXIT_OK
        assert not (tmp_path / "shared" / "induction").exists()
    assert "written once share 1 is" in capsys.readouterr().err
    assert _score(place, tmp_path / "shared", "--share", "1/3") == EXIT_OK
    table = ScoreTable.open(tmp_path / "shared")
    assert table.complete and len(table) == N
    order = np.argsort(table.scores("L0H0")[0])
    np.testing.assert_allclose(_values(table)[order], reference, atol=1e-5 * scale, rtol=0)


def test_shares_of_other_checkpoints_or_settings_are_not_mixed(place, tmp_path, capsys) -> None:
    """Each waits for shares of its own kind; whichever kind is whole first is the table."""
    for step, damping, share in ((100, 0.1, 0), (200, 0.1, 1), (100, 10, 0), (200, 0.1, 0)):
        assert not (tmp_path / "out" / "induction").exists()
        arguments = ("--share", f"{share}/2", "--damping", str(damping))
        assert _score(place, tmp_path / "out", *arguments, model=f"models/step{step}") == EXIT_OK
    assert _score(place, tmp_path / "alone", model="models/step200") == EXIT_OK
    found, alone = (ScoreTable.open(tmp_path / name) for name in ("out", "alone"))
    assert found.complete and len(found) == N
    np.testing.assert_allclose(
        _values(found), _values(alone), rtol=0, atol=1e-5 * np.abs(_values(alone)).max()
    )


def test_a_table_that_was_cut_short_is_written_anew(place, tmp_path, monkeypatch) -> None:
    """Killed while the tables are written: the rows that are there are not doubled."""
    finish, calls = ScoreWriter.finish, []

    def dying(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return finish(self, *args, **kwargs)

    both = ("--mechanism", "induction,previous_token")
    monkeypatch.setattr(ScoreWriter, "finish", dying)
    assert _score(place, tmp_path, *both) == EXIT_INTERRUPTED
    assert _score(place, tmp_path, *both) == EXIT_OK
    for name in ("induction", "previous_token"):
        table = ScoreTable.open(tmp_path, mechanism=name)
        assert table.complete and table.scores("L0H0")[0].tolist() == list(range(N))


def test_the_same_weights_under_another_configuration_are_scored_again(
    place, tmp_path, capsys
) -> None:
    other = tmp_path / "sequential"
    random_neox(seed=100, vocab_size=VOCAB, parallel=False).save_pretrained(other)
    one = place / "models/step100"
    found = {}
    for name, seed in (("a", "0"), ("b", "1")):
        for model in (one, other):
            out = tmp_path / f"{name}-{model.name}"
            assert _main(model, place / "corpus", out, "--seed", seed, "--units", "L1H0") == EXIT_OK
            found[name, model.name] = ScoreTable.open(out).scores("L1H0")[1]
    # One folder for all factors: none is taken for another's, whatever the seed or configuration.
    shared = tmp_path / "shared"
    for name, seed in (("a", "0"), ("b", "1")):
        for model in (one, other):
            arguments = ("--seed", seed, "--units", "L1H0")
            assert _main(model, place / "corpus", shared, *arguments) == EXIT_OK
            table = ScoreTable.open(shared)
            np.testing.assert_allclose(table.scores("L1H0")[1], found[name, model.name], rtol=1e-4)
            for file in (shared / "induction").iterdir():
                file.unlink()
            (shared / "induction").rmdir()
    assert len(list((shared / "factors").glob("*.safetensors"))) == 4
    values = list(found.values())
    assert all(not np.allclose(values[0], v, rtol=1e-3) for v in values[1:])
    assert _main(one, place / "corpus", tmp_path / "c", "--units", "L1H0") == EXIT_OK
    assert _main(other, place / "corpus", tmp_path / "c", "--units", "L1H0") == EXIT_ERROR
    assert "other samples or settings" in capsys.readouterr().err


def test_a_second_process_is_kept_from_the_same_share(place, tmp_path, monkeypatch, capsys) -> None:
    score = ReplayScorer.score
    codes = []

    def meanwhile(self, tokens):
        if not codes:
            codes.append(0)
            codes[0] = _score(place, tmp_path)
        return score(self, tokens)

    monkeypatch.setattr(ReplayScorer, "score", meanwhile)
    assert _score(place, tmp_path) == EXIT_OK
    assert codes == [EXIT_ERROR]
    assert "another process is scoring share 0 of 1" in capsys.readouterr().err


def test_chunks_are_read_from_inside_and_across(tmp_path) -> None:
    values = np.arange(40, dtype=np.float32).reshape(20, 1, 2)
    folder = ChunkFolder(tmp_path, first=100, most_held=1000)
    for first, last in ((0, 7), (7, 8), (8, 20)):
        folder.add({"f": values[first:last]}, values[first:last, 0, 0])
        folder.flush()
    again = ChunkFolder(tmp_path, first=100, most_held=1000)
    assert again.next == 120
    for first, last in ((100, 120), (103, 105), (105, 113), (107, 108), (119, 120)):
        found = again.read(first, last)
        np.testing.assert_array_equal(found.values["f"], values[first - 100 : last - 100])
        np.testing.assert_array_equal(found.loss, values[first - 100 : last - 100, 0, 0])
    (tmp_path / f"{107:012}-{108:012}.npz").unlink()
    assert ChunkFolder(tmp_path, first=100, most_held=1000).next == 107


def test_curvature_is_of_samples_drawn_from_all(place) -> None:
    ids = ScoreSettings(n_curvature=50).curvature_ids(1000, 2000)
    assert len(set(ids)) == 50 and ids.min() >= 1000 and ids.max() < 2000
    assert ids.min() < 1100 and ids.max() > 1900 and not np.array_equal(ids, np.sort(ids))
    assert np.array_equal(ids, ScoreSettings(n_curvature=50).curvature_ids(1000, 2000))
    assert not np.array_equal(ids, ScoreSettings(n_curvature=50, seed=1).curvature_ids(1000, 2000))


def test_scores_that_are_there_are_not_made_again(place, tmp_path, monkeypatch, capsys) -> None:
    assert _score(place, tmp_path) == EXIT_OK
    monkeypatch.setattr(ReplayScorer, "score", lambda *_: pytest.fail("scored again"))
    assert _score(place, tmp_path) == EXIT_OK
    assert "holds these scores already" in capsys.readouterr().err
    for arguments in (("--seed", "1"), ("--units", "L0H0"), ("--samples", "0:5")):
        assert _score(place, tmp_path, *arguments) == EXIT_ERROR
        assert "give another --output, or remove it" in capsys.readouterr().err
    assert _score(place, tmp_path, model="models/step100") == EXIT_ERROR
    assert "the mean over 2 checkpoints, not over 1" in capsys.readouterr().err


def test_factors_are_kept_and_used_again(place, tmp_path, monkeypatch) -> None:
    assert _score(place, tmp_path, "--samples", "0:20") == EXIT_OK
    files = sorted((tmp_path / "factors").glob("*.safetensors"))
    assert len(files) == 2
    for name in ("induction",):
        for file in (tmp_path / name).iterdir():
            file.unlink()
        (tmp_path / name).rmdir()
    monkeypatch.setattr(SubspaceEKFAC, "fit", lambda *_, **__: pytest.fail("fitted again"))
    assert _score(place, tmp_path, "--samples", "0:20", "--damping", "0.3") == EXIT_OK
    assert ScoreTable.open(tmp_path).provenance["checkpoints"][0]["damping"] == 0.3


def test_the_sign_is_that_of_a_step_on_the_sample(place, rows, tmp_path) -> None:
    """With the plain dot product, a small SGD step on a sample moves f by its score."""
    arguments = ("--curvature", "identity", "--units", "L1H0", "--probe", "copy_logprob")
    assert _score(place, tmp_path, *arguments, model="models/step100") == EXIT_OK
    table = ScoreTable.open(tmp_path)
    ids, scores = table.scores("L1H0")
    model = random_neox(seed=100, vocab_size=VOCAB).double()
    own = mechanism("induction", probe_function="copy_logprob", token_ids=np.unique(rows).tolist())
    before = own.probe(model).item()
    for sample in (ids[scores.argmax()], ids[scores.argmin()]):
        model = random_neox(seed=100, vocab_size=VOCAB).double()
        tokens = torch.from_numpy(rows[sample])[None]
        logits = model(tokens[:, :-1]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
        attention = model.gpt_neox.layers[1].attention
        qkv, out = torch.autograd.grad(
            loss, [attention.query_key_value.weight, attention.dense.weight]
        )
        with torch.no_grad():
            attention.query_key_value.weight[:24] -= EPSILON * qkv[:24]
            attention.dense.weight[:, :8] -= EPSILON * out[:, :8]
        change = (own.probe(model).item() - before) / EPSILON
        assert change == pytest.approx(float(scores[list(ids).index(sample)]), rel=0.05)


def test_each_position_part_sums_to_the_score(place, tmp_path) -> None:
    arguments = ("--per-token", "3,17", "--probe", "copy_logprob")
    assert _score(place, tmp_path, *arguments) == EXIT_OK
    parts = pd.read_parquet(tmp_path / "per-token-induction.parquet")
    assert len(parts) == 2 * LENGTH
    table = ScoreTable.open(tmp_path)
    for sample in (3, 17):
        own = parts[parts.sample_id == sample]
        assert own.position.tolist() == list(range(LENGTH))
        for unit in table.units:
            for block in table.blocks:
                ids, scores = table.scores(unit, block)
                total = own[f"{unit}.{block}"].sum()
                assert total == pytest.approx(
                    float(scores[list(ids).index(sample)]), rel=1e-3, abs=1e-6
                )


def test_steps_choose_samples_in_the_order_of_training(place, tmp_path) -> None:
    arguments = ("--steps", "2:5", "--samples-per-step", "4")
    assert _score(place, tmp_path, *arguments, model="models/step200") == EXIT_OK
    frame = ScoreTable.open(tmp_path).frame("L0H0")
    assert frame.sample_id.tolist() == list(range(8, 20))
    assert frame.step.tolist() == [2] * 4 + [3] * 4 + [4] * 4
    assert (frame.ihvp_step == 200).all()


def test_arrays_and_megatron_files_score_as_the_corpus_does(place, rows, tmp_path) -> None:
    magic = b"MMIDIDX\x00\x00"
    header = struct.pack("<9sQBQQ", magic, 1, 8, N, N + 1)
    sizes = np.full(N, LENGTH + 1, "<i4")
    pointers = np.arange(N, dtype="<i8") * 2 * (LENGTH + 1)
    documents = np.arange(N + 1, dtype="<i8")
    index = header + sizes.tobytes() + pointers.tobytes() + documents.tobytes()
    (place / "pile.idx").write_bytes(index)
    (place / "pile.bin").write_bytes(rows.astype("<u2").tobytes())
    found = {}
    for data in ("corpus", "rows.npy", "pile", "pile.bin"):
        assert _score(place, tmp_path / data, data=data, model="models/step100") == EXIT_OK
        found[data] = _values(ScoreTable.open(tmp_path / data))
    # Without a corpus the probes draw from all but the special ids, which here are the same ones:
    # every id but 0 occurs in the rows.
    for data in ("rows.npy", "pile", "pile.bin"):
        np.testing.assert_allclose(found[data], found["corpus"], rtol=1e-5, atol=1e-9)


def test_documents_are_samples_of_their_own_length(place, tmp_path, capsys) -> None:
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rng = np.random.default_rng(1)
    texts = [" ".join(f"w{i}" for i in rng.integers(1, 40, n)) for n in (9, 3, 1, 13, 5, 30)]
    lines = [
        json.dumps({"text": text, "meta": {"domain": f"d{i % 2}"}}) for i, text in enumerate(texts)
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    source = open_tokens(tmp_path / "texts.jsonl", tokenizer=tokenizer, row_length=13)
    assert len(source) == 6 and source.get([1]).tolist()[0].count(-1) == 10
    arguments = ("--tokenizer", str(tmp_path / "tokenizer.json"), "--length", "12")
    places = (place / "models/step100", tmp_path / "texts.jsonl", tmp_path / "out")
    assert _main(*places, *arguments, "--per-token", "2") == EXIT_ERROR
    assert "sample 2 has fewer than 2 tokens" in capsys.readouterr().err
    assert _main(*places, *arguments, "--curvature", "identity") == EXIT_OK
    table = ScoreTable.open(tmp_path / "out")
    model = random_neox(seed=100, vocab_size=VOCAB)
    own = mechanism("induction", token_ids=range(VOCAB))
    probe = probe_gradients(model, own, [Head(1, 1)])
    for sample, text in enumerate(texts):
        tokens = torch.tensor([[words[w] for w in text.split()][:13]])
        ids, scores = table.scores("L1H1")
        if len(text.split()) < 2:
            assert np.isnan(scores[list(ids).index(sample)])
            continue
        expected = token_scores(model, probe, tokens).values.sum()
        assert float(scores[list(ids).index(sample)]) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory", "1KiB"), "a memory budget of 0 MiB is too small: one sequence of 12 tokens"),
        (("--memory", "lots"), "'lots' is no amount of memory"),
        (("--units", "L7H0"), "unit L7H0: layer 7 is out of range: this model has layers 0..1"),
        (("--samples", "5:99"), r"samples [5, 99) do not exist: the data has 23"),
        (("--mechanism", "telepathy"), "'telepathy' is not a mechanism; there are: induction"),
        (("--length", "12"), "--length is for texts"),
        (("--per-token", "99"), "sample 99 does not exist"),
        (("--damping", "-1"), "damping -1.0 must be a finite number >= 0"),
        (("--seed", "-1"), "seed is -1; it is at least 0"),
        (("--memory", "1e400"), "'1e400' is no amount of memory"),
        (("--memory", "1.2.3G"), "'1.2.3G' is no amount of memory"),
        (("--damping", "nan", "--curvature", "identity"), "damping nan must be a finite number"),
        (("--steps", "2:99", "--samples-per-step", "4"), "samples [8, 396) (steps [2, 99)) do not"),
    ],
)
def test_bad_arguments_say_what_to_do(place, tmp_path, capsys, arguments, message) -> None:
    assert _score(place, tmp_path / "out", *arguments) == EXIT_ERROR
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "induction").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--share", "3/3"), "'3/3': write I/N with I from 0 to N-1"),
        (("--share", "half"), "'half': write I/N"),
        (("--mechanism", "previous_token", "--probe", "attention"), "--probe is of the induction"),
        (("--steps", "0:2"), "--steps needs --samples-per-step"),
        (("--steps", "0:2", "--samples", "0:4"), "give --samples or --steps, not both"),
        (("--samples", "4:4"), "'4:4': write A:B with 0 <= A < B"),
        (("--per-token", "one"), "'one': write sample ids such as 3,17"),
    ],
)
def test_wrong_usage_is_told_at_once(place, tmp_path, capsys, arguments, message) -> None:
    with pytest.raises(SystemExit) as stopped:
        _score(place, tmp_path / "out", *arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_what_is_in_the_way_is_told_before_anything_is_scored(
    place, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(ReplayScorer, "score", lambda *_: pytest.fail("scored"))
    (tmp_path / "file").touch()
    assert _score(place, tmp_path / "file") == EXIT_ERROR
    assert "is a file; --output names a folder" in capsys.readouterr().err
    (tmp_path / "foreign" / "induction").mkdir(parents=True)
    (tmp_path / "foreign" / "induction" / "notes.txt").touch()
    assert _score(place, tmp_path / "foreign") == EXIT_ERROR
    assert "is not empty and no score table" in capsys.readouterr().err
    running = ScoreWriter(
        tmp_path / "run" / "induction", units=["L0H0"], blocks=["QK"], estimator="in_run"
    )
    one = np.zeros(1, np.int64)
    running.add(ScoreRows(one, one, np.zeros((1, 1, 1)), np.zeros(1), one))
    running.flush()
    assert _score(place, tmp_path / "run") == EXIT_ERROR
    assert "give another" in capsys.readouterr().err


def test_the_same_checkpoint_twice_is_scored_once(place, rows, tmp_path, capsys) -> None:
    """A folder with a copy of its last checkpoint, as some trainers leave it."""
    models = tmp_path / "models"
    for name in ("step100", "checkpoint-100"):
        random_neox(seed=100, vocab_size=VOCAB).save_pretrained(models / name)
    assert _main(models, place / "corpus", tmp_path / "out", "--units", "L0H0") == EXIT_OK
    assert "again; it is scored once" in capsys.readouterr().err
    assert len(ScoreTable.open(tmp_path / "out").provenance["checkpoints"]) == 1
    random_neox(seed=100, vocab_size=VOCAB).save_pretrained(models / "step200")
    assert _main(models, place / "corpus", tmp_path / "other", "--units", "L0H0") == EXIT_ERROR
    assert "one of them is not what it says" in capsys.readouterr().err


def test_data_that_does_not_fit_is_refused(place, tmp_path, capsys) -> None:
    np.save(tmp_path / "long.npy", np.ones((3, 200), np.int64))
    np.save(tmp_path / "high.npy", np.full((3, 9), 99))
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "inside.npy", np.array([[3, -1, 4, 5]]))
    for name, message in (
        ("broken.npy", "broken.npy cannot be read as an array of integers"),
        ("inside.npy", "sample 0 holds token id -1 before a real one"),
        ("long.npy", "samples of 199 tokens are longer than the model's context of 64"),
        ("high.npy", "token id 99 is not in the model's vocabulary 0..59"),
        ("none", "there is nothing at"),
    ):
        assert _main(place / "models/step100", tmp_path / name, tmp_path / "out") == EXIT_ERROR
        assert message in capsys.readouterr().err


def test_broken_samples_and_dead_heads_are_named(place, rows, tmp_path, capsys) -> None:
    """An infinite embedding spoils the samples that hold its token; a zeroed head has no score."""
    model = random_neox(seed=100, vocab_size=VOCAB)
    with torch.no_grad():
        model.gpt_neox.embed_in.weight[5] = torch.inf
        qkv = model.gpt_neox.layers[1].attention.query_key_value
        qkv.weight[:16] = 0
        qkv.bias[:16] = 0
    model.save_pretrained(tmp_path / "model")
    fit = rows[~(rows[:, :-1] == 5).any(1)]
    assert 0 < len(fit) < N
    own = TokenRows.write(
        tmp_path / "data", rows, vocab_size=VOCAB, special_ids=(0, 5), provenance={}
    )
    assert 5 not in own.token_ids
    places = (tmp_path / "model", tmp_path / "data", tmp_path / "out")
    assert _main(*places, "--curvature-samples", "23") == EXIT_OK
    said = capsys.readouterr().err
    broken = np.flatnonzero((rows[:, :-1] == 5).any(1))
    assert f"{len(broken)} of {N} samples have a gradient that is not finite" in said
    assert f"(NaN): {broken[0]}" in said
    assert f"not finite at {tmp_path / 'model'} (step " in said
    assert "the gradient of induction's f is zero in L1H0" in said
    table = ScoreTable.open(tmp_path / "out")
    ids_, scores = table.scores("L0H0")
    assert ids_[np.isnan(scores)].tolist() == broken.tolist()
    with pytest.warns(UserWarning, match="no finite score for L0H0"):
        assert not set(table.top("L0H0", count=5)) & set(broken)
    assert np.isnan(table.scores("L1H0")[1]).all()
