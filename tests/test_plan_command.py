"""``mda-lightning plan``: what its commands write, against plans made by hand; and misuse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from test_datamodule import Recorder
from tokenizers import Tokenizer

from mda_lightning.cli import EXIT_ERROR, EXIT_OK, EXIT_USAGE, main
from mda_lightning.corpora import TokenRows, rows_from_texts
from mda_lightning.datamodules import TokenDataModule
from mda_lightning.interventions import Mask, Plan, Replace
from mda_lightning.interventions.selection import samples_of
from mda_lightning.recipes import plan_verify
from mda_lightning.schedule import BaseOrder, Schedule
from mda_lightning.store import ScoreRows, ScoreTable, ScoreWriter

BATCH, STEPS = 4, 40
WINDOW = (10, 20)
UNITS = ["L0H0", "L1H2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenRows:
    folder = tmp_path_factory.mktemp("base") / "corpus"
    texts = [("ab"[i % 2], f"word{i} greets name{i % 7} and goes. ") for i in range(400)]
    return rows_from_texts(folder, texts, row_length=12, vocab_size=300)


@pytest.fixture(scope="module")
def order(corpus: TokenRows) -> BaseOrder:
    return BaseOrder(len(corpus), BATCH, STEPS)


@pytest.fixture(scope="module")
def scores(
    corpus: TokenRows, order: BaseOrder, tmp_path_factory: pytest.TempPathFactory
) -> ScoreTable:
    """In-run scores of the whole run."""
    ids = order.at(np.arange(STEPS * BATCH))
    data = {"corpus_hash": corpus.content_hash, "order_hash": order.content_hash}
    return ScoreTable.write(
        tmp_path_factory.mktemp("scores") / "induction",
        sample_id=ids,
        step=np.arange(len(ids)) // BATCH,
        units=UNITS,
        blocks=["QK"],
        values=np.random.default_rng(0).normal(size=(len(ids), 2, 1)),
        loss=np.zeros(len(ids)),
        estimator="in_run",
        provenance={"data": data},
    )


@pytest.fixture
def tied(corpus: TokenRows) -> list[str]:
    return ["--corpus", str(corpus.folder), "--batch-size", str(BATCH), "--n-steps", str(STEPS)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*arguments: Any) -> int:
    return main(["plan", *map(str, arguments)])


def made(*arguments: Any, output: str = "plan.json") -> Plan:
    assert plan(*arguments, "--output", output, "--force") == EXIT_OK
    return Plan.load(output)


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = EXIT_ERROR) -> str:
    """The one line that says why."""
    capsys.readouterr()
    before = sorted(os.listdir())
    if code == EXIT_USAGE:
        with pytest.raises(SystemExit) as stopped:
            plan(*arguments)
        assert stopped.value.code == EXIT_USAGE
    else:
        assert plan(*arguments) == code
    told = capsys.readouterr()
    assert not told.out and sorted(os.listdir()) == before
    if code == EXIT_ERROR:
        assert told.err.startswith("mda-lightning: ") and told.err.count("\n") == 1, told.err
    return told.err


def streams(plan: Plan, order: BaseOrder) -> list[Any]:
    schedule = Schedule(order, plan)
    return [np.stack(schedule.batch(step)).tolist() for step in range(len(schedule))]


def met_in(order: BaseOrder, window: tuple[int, int]) -> set[int]:
    return {int(i) for step in range(*window) for i in order.ids(step)}


# -- from scores ----------------------------------------------------------------------------------


def test_masking_the_top_by_scores(
    corpus: TokenRows,
    order: BaseOrder,
    scores: ScoreTable,
    tied: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    by_scores = ["--scores", scores.folder.parent, "--unit", "L1H2", "--top", "10%"]
    assert plan("mask", *tied, *by_scores, "--window", "10:20", "--with-control", 2) == EXIT_OK
    out = capsys.readouterr().out
    mask = Plan.load("plans/mask-top-10-percent-L1H2-10-20.json")
    frame = scores.frame("L1H2")
    window = frame[(frame.step >= 10) & (frame.step < 20)]
    top = window.sort_values(["score", "sample_id"], ascending=[False, True]).sample_id[:4]
    by_hand = Plan.mask(top.to_numpy(), steps=WINDOW)
    by_hand = by_hand.bound(corpus_hash=corpus.content_hash, order=order, seed=0)
    assert mask.content_hash == by_hand.content_hash
    for number in (1, 2):
        control = Plan.load(f"plans/mask-top-10-percent-L1H2-10-20-random-{number}.json")
        ids = set(control.treated_ids.tolist())
        assert len(ids) == 4 and ids <= met_in(order, WINDOW) and not ids & set(top)
        assert control.operations[0].steps == WINDOW
        assert f"plans/mask-top-10-percent-L1H2-10-20-random-{number}.json: random control" in out
    assert "4 of the 40 samples scored in steps 10:20" in out
    assert "4 of 40 places (10.00%)" in out and "run: 40 steps, as without" in out
    assert 'TokenDataModule(rows, ..., plan="plans/mask-top-10-percent-L1H2-10-20.json")' in out


@pytest.mark.parametrize("placement", ["shift", "replace"])
def test_inserting_the_union_over_units(
    order: BaseOrder, scores: ScoreTable, tied: list[str], placement: str
) -> None:
    united = made(
        "insert", *tied, "--scores", scores.folder, "--unit", "L0H0", "--unit", "L1H2",
        "--top", 3, "--window", "10:20", "--copies", 2, "--placement", placement,
        "--with-control", 1, "--draw", 7,
    )  # fmt: skip
    frame = scores.steps(10, 20)
    expected: set[int] = set()
    for unit in UNITS:
        expected |= set(frame[frame.unit == unit].nlargest(3, "score").sample_id)
    assert set(united.treated_ids) == expected and united.seed == 7
    control = Plan.load("plan-random.json")
    places = []
    for one in (united, control):
        batches = [Schedule(order, one).batch(s) for s in range(len(Schedule(order, one)))]
        places.append([batch.provenance.tolist() for batch in batches])
        inserted = np.concatenate([b.sample_ids[b.provenance == 1] for b in batches])
        assert sorted(inserted) == sorted([*one.treated_ids] * 2)
    assert places[0] == places[1]
    spared = set(united.spared)
    assert spared == (expected | set(control.treated_ids) if placement == "replace" else set())


def test_conditions_on_the_samples(corpus: TokenRows, scores: ScoreTable, tied: list[str]) -> None:
    by_scores = [*tied, "--scores", scores.folder, "--unit", "L1H2"]
    of_a = made("mask", *by_scores, "--bottom", 5, "--domain", "a", output="a.json")
    assert set(corpus.domains(of_a.treated_ids) or []) == {"a"}
    frame = scores.frame("L1H2")
    own = frame[[name == "a" for name in corpus.domains(frame.sample_id.to_numpy()) or []]]
    means = own.groupby("sample_id").score.mean()
    assert set(of_a.treated_ids) == set(means.nsmallest(5).index)
    (op,) = of_a.operations
    assert isinstance(op, Mask) and op.steps is None
    rest = made("mask", *by_scores, "--bottom", 5, "--exclude-domain", "b", "--exclude", "a.json")
    assert set(rest.treated_ids) == set(means.nsmallest(10).index) - set(of_a.treated_ids)


def test_an_unfinished_table_and_scores_that_are_not_finite_are_told(
    tied: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    writer = ScoreWriter("scores", units=["L0H0"], blocks=["QK"], estimator="in_run")
    values = np.arange(20.0)[:, None, None]
    values[3] = np.nan
    none = np.full(20, -1)
    writer.add(ScoreRows(np.arange(20), np.zeros(20, int), values, np.zeros(20), none))
    writer.flush()
    assert plan("mask", *tied, "--scores", "scores", "--unit", "L0H0", "--top", "2") == EXIT_OK
    told = capsys.readouterr()
    assert told.err.startswith("mda-lightning: scores is not complete")
    assert "left out: 1 without a finite score" in told.out
    assert Plan.load("plans/mask-top-2-L0H0.json").treated_ids.tolist() == [18, 19]


# -- other samples --------------------------------------------------------------------------------


def test_named_and_random_samples(order: BaseOrder, tied: list[str], here: Path) -> None:
    (here / "ids.txt").write_text("5 3\n9")
    named = made("mask", *tied, "--ids", "ids.txt", "--weight", 0.5, "--steps", "0:40")
    (op,) = named.operations
    assert isinstance(op, Mask) and op.weight == 0.5 and op.sample_ids.tolist() == [3, 5, 9]
    drawn = made("mask", *tied, "--random", "25%", "--window", "10:20")
    again = made("mask", *tied, "--random", "0.25", "--window", "10:20")
    other = made("mask", *tied, "--random", "10", "--window", "10:20", "--draw", 1)
    pool = samples_of(order, WINDOW)
    assert len(drawn.treated_ids) == len(other.treated_ids) == round(len(pool) / 4)
    assert set(drawn.treated_ids) | set(other.treated_ids) <= set(pool)
    assert drawn.content_hash == again.content_hash != other.content_hash


def test_pruning_duplicating_and_replacing(order: BaseOrder, tied: list[str], here: Path) -> None:
    pruned = made("prune", *tied, "--fraction", "95%", "--steps", "10:20")
    expected = Plan.prune(0.95, WINDOW).bound(order=order, seed=0)
    assert streams(pruned, order) == streams(expected, order)

    np.save(here / "ids.npy", order.ids(3)[:2])
    tenfold = made("duplicate", *tied, "--ids", "ids.npy", "--times", 10, "--steps", "0:20")
    seen = np.concatenate([Schedule(order, tenfold).batch(s).sample_ids for s in range(STEPS)])
    assert [(seen == i).sum() for i in order.ids(3)[:2]] == [10, 10]

    earlier = made("replace", *tied, "--steps", "10:20", "--by-steps", "0:5")
    for step in range(10, 20):
        found = Schedule(order, earlier).batch(step).sample_ids
        assert found.tolist() == order.ids((step - 10) % 5).tolist()

    made("replace", *tied, "--steps", "10:20", "--by-steps", "0:5", "--with-control", 1)
    (of_control,) = Plan.load("plan-random.json").operations
    assert isinstance(of_control, Replace) and len(of_control.by) == 20
    assert not set(of_control.by) & (met_in(order, WINDOW) | met_in(order, (0, 5)))

    out = made("replace", *tied, "--random", 4, "--window", "10:20", "--with-control", 1)
    (op,) = out.operations
    (of_control,) = Plan.load("plan-random.json").operations
    assert isinstance(op, Replace) and isinstance(of_control, Replace)
    assert op.sample_ids is not None and of_control.sample_ids is not None
    assert set(op.by) == set(of_control.by)
    assert not set(op.sample_ids) & set(of_control.sample_ids)

    (here / "by.json").write_text("[1, 2]")
    given = made("replace", *tied, "--ids", "ids.npy", "--by", "by.json", "--steps", "0:20")
    (op,) = given.operations
    assert isinstance(op, Replace) and set(op.by) == {1, 2}
    whole = made("replace", *tied, "--by", "by.json", "--steps", "10:20")
    assert set(Schedule(order, whole).batch(12).sample_ids) == {1, 2}


@pytest.mark.parametrize("kind", ["texts", "tokens", "generator"])
def test_new_samples(
    corpus: TokenRows,
    order: BaseOrder,
    tied: list[str],
    here: Path,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They lie beside the plan, are found from anywhere, and a run trains on them."""
    (here / "new.txt").write_text("word1 greets name2 and stays. " * 20)
    np.save(here / "new.npy", corpus.get([3, 4, 5]))
    what = {
        "texts": ["--texts", "new.txt"],
        "tokens": ["--tokens", "new.npy"],
        "generator": ["--generator", "records", "--rows", 6],
    }[kind]
    new = made("insert", *tied, *what, "--steps", "10:20", output="plans/new.json")
    stored = json.loads(Path("plans/new.json").read_text())
    assert [source["path"] for source in stored["sources"]] == ["new.samples"]
    rows = TokenRows.open("plans/new.samples")
    assert (rows.row_length, rows.vocab_size) == (corpus.row_length, corpus.vocab_size)
    # The folder of plan and samples may move.
    os.rename("plans", "moved")
    assert plan("show", "moved/new.json", *tied) == EXIT_OK
    assert f"{len(rows)} rows, {here / 'moved' / 'new.samples'}" in capsys.readouterr().out
    data = TokenDataModule(
        corpus, batch_size=BATCH, n_steps=STEPS, plan="moved/new.json", ledger=False
    )
    batches = list(data.train_dataloader())
    tokens = np.concatenate([b["tokens"].numpy() for b in batches])
    inserted = np.concatenate([b["provenance"].numpy() for b in batches]) == 1
    expected = TokenRows.open("moved/new.samples")
    assert sorted(map(tuple, tokens[inserted])) == sorted(
        map(tuple, expected.get(np.arange(len(expected))))
    )
    assert inserted.sum() == len(new.treated_ids) == len(expected)
    TokenRows.write("moved/new.samples", corpus.get([7, 8]), provenance={})
    assert plan("show", "moved/new.json", *tied) == EXIT_OK
    assert "holds other rows" in capsys.readouterr().out
    shutil.rmtree("moved/new.samples")
    assert plan("show", "moved/new.json", *tied) == EXIT_OK
    assert "not at " in capsys.readouterr().out


def test_ones_own_generator_is_found_in_the_working_folder(
    corpus: TokenRows, tied: list[str], here: Path
) -> None:
    code = (
        "def make(rng, n):\n    return [f'word{rng.integers(9)} greets ' * 9 for _ in range(n)]\n"
    )
    (here / "my_own_maker.py").write_text(code)
    arguments = ["--generator", "my_own_maker:make", "--rows", 3, "--steps", "10:20"]
    new = made("insert", *tied, *arguments, "--draw", 4)
    assert new.sources[0].name == "make" and len(new.treated_ids) == 3
    text = corpus.decode(TokenRows.open("plan.samples").get([0])[0])
    assert f"word{np.random.default_rng(4).integers(9)} greets" in text
    assert str(here) not in sys.path


def test_excluded_samples_are_in_no_control(order: BaseOrder, tied: list[str], here: Path) -> None:
    ids = order.ids(12)
    np.save(here / "ids.npy", ids)
    np.save(here / "away.npy", np.concatenate([order.ids(step) for step in range(13, 18)]))
    some = ["--ids", "ids.npy", "--exclude", "away.npy", "--with-control", 3]
    for where in (["--window", "10:20"], ["--steps", "10:20"]):
        made("mask", *tied, *some, *where)
        left = met_in(order, WINDOW) - met_in(order, (12, 18))
        for number in (1, 2, 3):
            assert set(Plan.load(f"plan-random-{number}.json").treated_ids) <= left


def test_a_run_that_differs_from_its_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = plan_verify.VerifyReport(["a holds"], ["b does not"], ["c was not looked at"])
    monkeypatch.setattr(plan_verify, "verify_run", lambda *_, **__: report)
    assert plan("verify", "run") == EXIT_ERROR
    assert capsys.readouterr().out.splitlines()[-1] == "DIFFERS: b does not"
    assert plan("verify", "run", "--json") == EXIT_ERROR
    assert json.loads(capsys.readouterr().out) == {"ok": False, "lines": report.lines()}


def test_a_whole_window_of_new_samples(order: BaseOrder, tied: list[str]) -> None:
    new = made("replace", *tied, "--generator", "repeated_tokens", "--rows", 5, "--steps", "10:12")
    ids = np.concatenate([Schedule(order, new).batch(step).sample_ids for step in (10, 11)])
    assert set(ids) <= set(new.sources[0].ids().tolist())


def test_samples_of_another_corpus_by_their_scores(
    corpus: TokenRows, order: BaseOrder, scores: ScoreTable, here: Path
) -> None:
    """The corpus was scored, the run is of another one."""
    ids = np.random.default_rng(0).permutation(len(corpus))
    small = TokenRows.write(
        "small", corpus.get(ids[:30]), vocab_size=corpus.vocab_size, provenance={}
    )
    tied = ["--corpus", "small", "--batch-size", BATCH, "--n-steps", STEPS]
    by_scores = ["--scores", scores.folder, "--unit", "L1H2", "--top", 3]
    new = made("insert", *tied, *by_scores, "--rows-of", corpus.folder, "--steps", "10:20")
    ids, means = scores.mean_scores("L1H2")
    data = TokenDataModule(small, batch_size=BATCH, n_steps=STEPS, plan="plan.json", ledger=False)
    batches = list(data.train_dataloader())
    tokens = np.concatenate([b["tokens"].numpy()[b["provenance"].numpy() == 1] for b in batches])
    best = corpus.get(ids[np.argsort(-means)[:3]])
    assert sorted(map(tuple, tokens)) == sorted(map(tuple, best))
    assert new.corpus_hash == small.content_hash


# -- of a run -------------------------------------------------------------------------------------


def test_a_plan_for_a_run_is_made_from_what_the_run_wrote(
    corpus: TokenRows, order: BaseOrder, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loop of use: a run, a plan for its order, a run by the plan, and the proof."""

    def fit(folder: str, plan: str | None) -> None:
        data = TokenDataModule(
            corpus, batch_size=BATCH, n_steps=STEPS, plan=plan, folder=str(here / folder)
        )
        trainer = pl.Trainer(
            max_steps=len(data.schedule),
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Recorder(), datamodule=data)

    fit("base", None)
    own = made("insert", "--run", "base", "--random", 6, "--window", "10:20")
    assert own.order == order and own.corpus_hash == corpus.content_hash
    fit("treated", "plan.json")
    capsys.readouterr()
    assert plan("verify", "treated") == EXIT_OK
    assert "as the plan says" in capsys.readouterr().out
    assert plan("show", "treated", "--width", 80) == EXIT_OK
    assert "run: 40 -> 42 steps: 6 insertions by shift / batch 4" in capsys.readouterr().out
    told = refused(capsys, "show", "plan.json", "--run", "base", "--batch-size", 4)
    assert "leave --batch-size" in told
    np.save("rows.npy", corpus.get([1, 2, 3, 4]))
    TokenRows.write("other", np.load("rows.npy"), provenance={})
    told = refused(capsys, "show", "plan.json", "--run", "base", "--corpus", "other")
    assert "was trained on corpus" in told and "give the corpus of the run" in told


# -- plans of plans -------------------------------------------------------------------------------


def test_controls_of_a_plan(
    order: BaseOrder, tied: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = made("mask", *tied, "--random", 5, "--window", "10:20", output="mask.json")
    made("mask", *tied, "--random", 3, "--window", "10:20", "--draw", 9, output="away.json")
    assert plan("control", "mask.json", "--draws", 3, "--exclude", "away.json") == EXIT_OK
    away = set(Plan.load("away.json").treated_ids) | set(first.treated_ids)
    drawn = [Plan.load(f"mask-random-{i}.json") for i in (1, 2, 3)]
    for control in drawn:
        assert len(control.treated_ids) == 5 and not set(control.treated_ids) & away
        assert set(control.treated_ids) <= met_in(order, WINDOW)
    assert not Path("mask-matched.json").exists()
    later = ["control", "mask.json", "--window", "30:40", "--draw", 4]
    assert plan(*later) == EXIT_OK
    assert set(Plan.load("mask-random.json").treated_ids) <= met_in(order, (30, 40))
    capsys.readouterr()
    assert plan(*later, "--json") == EXIT_OK
    assert json.loads(capsys.readouterr().out)["controls"][0]["path"] == "mask-random.json"


def test_both_sides_of_an_insertion_that_replaces_are_written_again(
    order: BaseOrder, tied: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    window = ["--window", "10:20", "--placement", "replace"]
    before = made("insert", *tied, "--random", 5, *window, output="in.json")
    capsys.readouterr()
    assert plan("control", "in.json", "--draws", 2) == EXIT_OK
    assert "train this one instead of in.json" in capsys.readouterr().out
    names = ("in-matched", "in-random-1", "in-random-2")
    plans = [Plan.load(f"{name}.json") for name in names]
    assert set(plans[0].treated_ids) == set(before.treated_ids)
    schedules = [Schedule(order, one) for one in plans]
    places = [[s.batch(i).provenance.tolist() for i in range(STEPS)] for s in schedules]
    assert places[0] == places[1] == places[2]
    assert all(one.source["control_of"] == plans[0].content_hash for one in plans[1:])
    assert Plan.load("in.json").content_hash == before.content_hash  # as it was


def test_composing(order: BaseOrder, tied: list[str], here: Path) -> None:
    made("mask", *tied, "--random", 5, "--window", "10:20", output="a.json")
    made("prune", *tied, "--fraction", "0.5", "--steps", "30:40", "--draw", 3, output="b.json")
    assert plan("compose", "a.json", "b.json", "--output", "c.json") == EXIT_OK
    a, b, both = (Plan.load(f"{name}.json") for name in "abc")
    assert both.operations[0].describe() == a.operations[0].describe()
    assert both.operations[1].describe() == b.operations[0].describe()
    assert both.corpus_hash == a.corpus_hash and both.order == order and both.name == "c"


def test_nothing_is_written_over_unless_told(
    order: BaseOrder, tied: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = ["mask", *tied, "--window", "10:20"]
    assert plan(*mask, "--random", "25%", "--with-control", 3) == EXIT_OK
    name = "plans/mask-random-25-percent-10-20"
    names = [f"{name}.json", *(f"{name}-random-{i}.json" for i in (1, 2, 3))]
    before = [Path(one).read_bytes() for one in names]
    assert plan(*mask, "--random", "25%", "--with-control", 3) == EXIT_OK  # the same again
    # The plan, or one of its controls, would be another one.
    other = [*mask, "--random", "5", "--output", f"{name}.json"]
    assert "holds another plan" in refused(capsys, *other)
    Path(names[2]).write_text("mine")
    told = refused(capsys, *mask, "--random", "25%", "--with-control", 3)
    assert f"{names[2]} holds something else, which is kept" in told and "--force" in told
    assert Path(names[0]).read_bytes() == before[0] and Path(names[2]).read_text() == "mine"
    assert plan(*mask, "--random", "25%", "--with-control", 3, "--force") == EXIT_OK
    assert [Path(one).read_bytes() for one in names] == before
    capsys.readouterr()
    assert plan(*other, "--with-control", 2, "--force") == EXIT_OK
    assert f"{names[3]} is a control of another plan" in capsys.readouterr().err
    assert "holds another plan" in refused(capsys, "control", names[0], "--draws", 3, "--draw", 9)
    made("prune", *tied, "--fraction", "5%", output="c.json")
    told = refused(capsys, "compose", names[0], "--output", "c.json")
    assert "c.json holds another plan" in told


def test_new_samples_are_not_written_over_either(
    corpus: TokenRows, tied: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = ["insert", *tied, "--generator", "repeated_tokens", "--steps", "10:20"]
    assert plan(*new, "--rows", 3) == EXIT_OK and plan(*new, "--rows", 3) == EXIT_OK
    name = "plans/insert-repeated_tokens-10-20"
    before = TokenRows.open(f"{name}.samples").content_hash
    assert "holds other samples, which are kept" in refused(capsys, *new, "--rows", 4)
    assert sorted(os.listdir("plans")) == [
        Path(f"{name}{end}").name for end in (".json", ".samples")
    ]
    assert TokenRows.open(f"{name}.samples").content_hash == before
    assert plan(*new, "--rows", 4, "--force") == EXIT_OK
    assert len(Plan.load(f"{name}.json").treated_ids) == 4
    made("prune", *tied, "--fraction", "5%", output="taken.json")
    assert "taken.json holds something else" in refused(
        capsys, *new, "--rows", 4, "--output", "taken.json"
    )


def test_a_refused_insertion_leaves_what_is_there(
    tied: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where writing over it was asked for: the plan before is still a whole one."""
    new = ["insert", *tied, "--generator", "repeated_tokens", "--output", "new.json", "--force"]
    assert plan(*new, "--rows", 3, "--steps", "10:20") == EXIT_OK
    before = TokenRows.open("new.samples").content_hash
    crowd = ["--rows", 9, "--steps", "10:12", "--placement", "replace"]
    assert "do not fit into steps" in refused(capsys, *new, *crowd)
    assert TokenRows.open("new.samples").content_hash == before
    assert Plan.load("new.json").sources[0].content_hash == before
    assert "do not fit into steps" in refused(capsys, *new[:-3], *crowd)
    assert not Path("plans").exists()


def test_controls_of_composed_replacements_keep_the_side(
    order: BaseOrder, tied: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, window in (("a", "10:20"), ("b", "20:30")):
        made("replace", *tied, "--random", 4, "--window", window, output=f"{name}.json")
    assert plan("compose", "a.json", "b.json", "--output", "c.json") == EXIT_OK
    assert plan("control", "c.json") == EXIT_OK
    both, control = Plan.load("c.json"), Plan.load("c-random.json")
    for op, same in zip(both.operations, control.operations, strict=True):
        assert isinstance(op, Replace) and isinstance(same, Replace)
        assert op.sample_ids is not None and same.sample_ids is not None
        assert set(op.by) == set(same.by) and not set(op.sample_ids) & set(same.sample_ids)
    made("replace", *tied, "--steps", "30:32", "--by-steps", "0:2", output="in.json")
    assert plan("compose", "a.json", "in.json", "--output", "d.json") == EXIT_OK
    assert "say which with treated='in' or 'out'" in refused(capsys, "control", "d.json")


def test_what_controls_come_to_is_told(
    order: BaseOrder, tied: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = made("mask", *tied, "--random", 5, "--window", "10:20", "--domain", "a")
    away = np.setdiff1d(np.arange(order.n_rows), mask.treated_ids)
    np.save(here / "away.npy", away[~np.isin(away, order.at(np.arange(40, 80)))])
    capsys.readouterr()
    assert plan("control", "plan.json") == EXIT_OK
    told = capsys.readouterr()
    assert "were chosen of domain a; its controls are drawn from all" in told.err
    assert ", treats 5 places" in told.out and "this control treats" not in told.err
    assert plan("control", "plan.json", "--pool", "away.npy", "--force") == EXIT_OK
    told = capsys.readouterr()
    assert "this control treats 0 places of the stream, the plan 5" in told.err
    assert "were chosen" not in told.err


def test_a_terminal_without_the_characters(tied: list[str], here: Path) -> None:
    made("prune", *tied, "--fraction", "50%", "--steps", "10:20")
    (here / "ids.txt").write_text("3 5")
    for encoding in ("ascii", "latin-1"):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        for arguments, said in (
            (["show", "plan.json"], "pruned     "),
            (["insert", "--ids", "ids.txt", "--steps", "1:5", "--force"], "batch size"),
        ):
            ran = subprocess.run(
                [sys.executable, "-m", "mda_lightning", "plan", *arguments],
                env=environment, capture_output=True, check=False,
            )  # fmt: skip
            assert ran.returncode == EXIT_OK, ran.stderr
            assert said in ran.stdout.decode(encoding)
        assert "#" in subprocess.run(
            [sys.executable, "-m", "mda_lightning", "plan", "show", "plan.json"],
            env=environment, capture_output=True, check=True,
        ).stdout.decode(encoding)  # fmt: skip


def test_what_is_said_of_a_plan(
    order: BaseOrder,
    corpus: TokenRows,
    tied: list[str],
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*arguments: Any) -> str:
        capsys.readouterr()
        assert plan(*arguments, "--output", "p.json", "--force") == EXIT_OK
        told = capsys.readouterr()
        return told.out + told.err

    away = np.setdiff1d(np.arange(len(corpus)), order.at(np.arange(STEPS * BATCH)))[:2]
    np.save(here / "one.npy", order.ids(3)[:1])
    np.save(here / "away.npy", [*away, order.ids(3)[0]])
    out = said("mask", *tied, "--ids", "one.npy")
    assert "the 1 sample of one.npy" in out and "it stays in its batch" in out
    assert "in the whole run: 1 of 160 places (0.62%)" in out
    assert "tied to" not in out
    times = ["--times", 3, "--steps", "0:9"]
    out = said("duplicate", *tied, "--ids", "away.npy", *times)
    assert "2 of the 3 samples are not in the run's base order, so they are seen once less" in out
    assert f": {away[0]}, {away[1]}" in out
    assert "base order, so" not in said("duplicate", *tied, "--ids", "one.npy", *times)
    assert "tied to no corpus and no base order" in said("mask", "--ids", "one.npy")
    out = said("mask", "--corpus", corpus.folder, "--ids", "one.npy")
    assert "tied to no base order: what it meets in the run is not known" in out
    out = said("replace", *tied, "--random", 2, "--window", "10:20")
    by = Plan.load("p.json").operations[0].by.tolist()  # type: ignore[union-attr]
    assert f"by {by[0]}, {by[1]}, one for one" in out and "drawn from the others" in out
    n_tokens = 12 * 3 + 5  # three rows and five tokens, with the one that closes the text
    tokenizer = Tokenizer.from_file(str(corpus.folder / "tokenizer.json"))
    ids = tokenizer.encode("word1 greets name2 and goes. " * 20).ids[: n_tokens - 1]
    (here / "new.txt").write_text(tokenizer.decode(ids))
    n_made = len(tokenizer.encode((here / "new.txt").read_text()).ids) + 1
    out = said("insert", *tied, "--texts", "new.txt", "--steps", "10:20")
    share = n_made % 12 / n_made
    assert f"left out: {n_made % 12} tokens too few for a row at the end of a" in out
    assert f"({share:.2%} of the text)" in out
    (here / "in.json").unlink(missing_ok=True)
    window = ["--window", "10:20", "--placement", "replace"]
    made("insert", *tied, "--random", 5, *window, output="in.json")
    assert plan("control", "in.json") == EXIT_OK
    assert Plan.load("in-matched.json").name == "in-matched"


# -- misuse ---------------------------------------------------------------------------------------


def test_what_is_refused(
    corpus: TokenRows,
    scores: ScoreTable,
    tied: list[str],
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (here / "ids.txt").write_text("3 5")
    (here / "far.txt").write_text("3 99999")
    (here / "no.json").write_text("{}")
    (here / "taken.samples").mkdir()
    (here / "taken.samples" / "thesis.txt").write_text("mine")
    (here / "replaced.json").write_text("x")
    (here / "five.json").write_text('{"sample_ids": 5}')
    (here / "null.json").write_text("null")
    np.save(here / "rows.npy", corpus.get([1, 2, 3]))
    (here / "bad_maker.py").write_text(
        "def raises(rng, n):\n    raise KeyError(n)\n"
        "def nothing(rng, n):\n    return None\n"
        "def another(n):\n    return []\n"
        "def late(rng, n):\n    yield 'word1'\n    raise OSError('no more')\n"
    )
    TokenRows.write("small", corpus.get(np.arange(8)), provenance={})
    made("replace", *tied, "--steps", "10:20", "--by-steps", "0:5", output="whole.json")
    made("mask", *tied, "--ids", "ids.txt", "--window", "10:20", output="mask.json")
    made("mask", *tied, "--ids", "ids.txt", "--weight", 0.5, output="half.json")
    capsys.readouterr()
    table = ["--scores", scores.folder, "--unit", "L1H2"]
    window = ["--window", "10:20"]
    for arguments, message in (
        # absent samples
        (["mask", *tied, "--ids", "far.txt"], "names sample 99999, the corpus has rows 0.."),
        (["mask", "--corpus", corpus.folder, "--ids", "far.txt"], "sample 99999 is not in the"),
        (["mask", *tied, "--ids", "absent.txt"], "no file of sample ids at absent.txt"),
        (["mask", *tied, "--ids", "no.json"], "no.json"),
        (["mask", *tied, "--ids", "five.json"], "5 is no list of integers"),
        (["mask", *tied, "--ids", "null.json"], "None is no list of integers"),
        *(
            (["insert", *tied, "--generator", f"bad_maker:{name}", "--rows", 3, *window], said)
            for name, said in (
                ("raises", "failed, called as generator(rng, n_rows): KeyError: 3"),
                ("nothing", "TypeError: 'NoneType' object is not iterable"),
                ("another", "TypeError: another() takes 1 positional argument"),
                ("late", "failed: OSError: no more"),
            )
        ),
        (["insert", *tied, "--tokens", "rows.npy", "--rows", 500, *window], "has 3; ask for no"),
        # windows outside the run
        (["insert", *tied, "--ids", "ids.txt", "--steps", "30:50"], "which has 40 steps"),
        (["mask", *tied, "--random", "3", "--window", "30:50"], "a run of 40 steps"),
        (["mask", *tied, *table, "--top", "3", "--window", "90:95"], "has no sample of steps"),
        # more insertions than places
        (
            ["insert", *tied, "--random", 30, *window, "--placement", "replace", "--copies", 9],
            "270 insertions by replacement do not fit",
        ),
        # contradictions
        (
            ["compose", "whole.json", "mask.json", "--output", "c.json"],
            "all places of steps (10, 20) are replaced",
        ),
        (
            ["compose", "half.json", "mask.json", "--output", "c.json"],
            "is given weight 0.5 and weight 0.0",
        ),
        # a corpus that changed
        (
            ["mask", "--corpus", "small", *table, "--top", "3"],
            "their sample ids mean other text",
        ),
        (
            ["compose", "mask.json", "--output", "c.json", "--corpus", "small"],
            "was made for corpus",
        ),
        (["mask", *tied, "--seed", "1", *table, "--top", "3"], "their steps hold other samples"),
        # weights
        (["mask", *tied, "--ids", "ids.txt", "--weight", "-1"], "weight -1.0"),
        (["mask", *tied, "--ids", "ids.txt", "--weight", "nan"], "finite"),
        (["mask", *tied, "--ids", "ids.txt", "--weight", "inf"], "finite"),
        # what is not there
        (["mask", *tied, "--scores", "nowhere", "--unit", "L1H2", "--top", "3"], "no score table"),
        (["mask", *tied, "--scores", scores.folder, "--unit", "L7H7", "--top", "3"], "'L7H7'"),
        (["mask", *tied, *table, "--top", "3", "--block", "V"], "it has QK"),
        (["mask", *tied, *table, "--top", "3", "--domain", "c"], "there are a, b"),
        (["mask", *tied, *table, "--top", "9000"], "9000 samples were asked for"),
        (["mask", *tied, "--random", "3"], "give --window A:B"),
        (["mask", "--random", "3", *window], "give --window A:B, and --run or --corpus"),
        (["mask", *tied, "--random", "900", *window], "ask for fewer"),
        (["control", "mask.json", "--draws", "1", "--pool", "ids.txt"], "random control needs 2"),
        (["control", "absent.json"], "no plan file at absent.json"),
        (["show", "absent.json"], "no plan file at absent.json"),
        (["verify", "."], "holds no ledger"),
        (["mask", "--run", ".", "--ids", "ids.txt"], "holds no ledger"),
        # new samples
        (["insert", "--generator", "records", "--rows", 3, "--steps", "1:5"], "--corpus"),
        (["insert", *tied, "--generator", "records", "--steps", "1:5"], "add --rows N"),
        (["insert", *tied, "--texts", "ids.txt", "--steps", "1:5"], "too few for one row of 12"),
        (
            ["insert", *tied, "--generator", "records", "--rows", 3, "--steps", "1:5",
             "--output", "taken.json"],
            "holds something else",
        ),
        (
            ["insert", *tied, "--generator", "records", "--rows", 3, "--steps", "1:50"],
            "which has 40 steps",
        ),
        (["replace", *tied, "--ids", "ids.txt", "--by", "far.txt", *window], "99999"),
        (["replace", "--ids", "ids.txt", *window], "--by FILE"),
        (["duplicate", *tied, "--ids", "ids.txt", "--times", "1", *window], "times is 1"),
    ):  # fmt: skip
        assert message in refused(capsys, *arguments), arguments
    assert (here / "taken.samples" / "thesis.txt").read_text() == "mine"


def test_wrong_usage(
    scores: ScoreTable, tied: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "ids.txt").write_text("3 5")
    table = ["--scores", scores.folder]
    for arguments, message in (
        ([], "required: COMMAND"),
        (["mask", *tied], "one of the arguments --scores --ids --random is required"),
        (["mask", *table, "--top", "3"], "--scores needs --unit"),
        (["mask", *table, "--unit", "L1H2"], "--scores needs --top or --bottom"),
        (["mask", *table, "--unit", "L1H2", "--top", "3", "--bottom", "3"], "not allowed"),
        (["mask", "--ids", "ids.txt", "--top", "3"], "--top is for --scores"),
        (["mask", "--ids", "ids.txt", "--domain", "a"], "--ids names the samples"),
        (["mask", *table, "--unit", "L1H2", "--top", "1.5"], "write a share such as 0.1 or 10%"),
        (["mask", *table, "--unit", "L1H2", "--top", "0"], "write a share"),
        (["mask", *table, "--unit", "L1H2", "--top", "many"], "write a share"),
        (["mask", "--ids", "ids.txt", "--steps", "20:10"], "write A:B"),
        (["mask", "--ids", "ids.txt", "--output", "plan.txt"], "a plan is a .json file"),
        (["insert", "--ids", "ids.txt"], "give --steps A:B"),
        (
            ["insert", *tied, "--tokens", "rows.npy", "--domain", "a", "--steps", "1:2"],
            "--domain chooses among samples of the corpus",
        ),
        (["show", "p.json", "--schedule", "constant", "--learning-rate", "-1"], "above 0"),
        (["insert", "--ids", "ids.txt", "--steps", "1:2", "--rows", "3"], "--rows is for"),
        (
            ["insert", "--ids", "ids.txt", "--rows-of", ".", "--steps", "1:2"],
            "--rows-of is for --scores",
        ),
        (["prune", "--fraction", "5"], "write a share such as 0.95"),
        (["replace", "--steps", "1:5"], "say what comes in"),
        (["replace", "--steps", "1:5", "--ids", "ids.txt", "--by-steps", "6:7"], "whole window"),
        (["show", "p.json", "--total-steps", "5"], "are of a --schedule"),
        (["show", "p.json", "--figure", "a.pdf"], "the figure is a .png file"),
    ):
        assert message in refused(capsys, *arguments, code=EXIT_USAGE), arguments


def test_batches_without_weight_are_told(
    order: BaseOrder, tied: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(here / "ids.npy", order.ids(12))
    assert plan("mask", *tied, "--ids", "ids.npy", "--steps", "10:20") == EXIT_OK
    told = capsys.readouterr()
    assert "every sample of 1 step has weight 0" in told.err and ": 12" in told.err
    assert "most 4 of 4" in told.out
    assert isinstance(Plan.load("plans/mask-ids-10-20.json").operations[0], Mask)


def test_every_command_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    making = ("mask", "insert", "duplicate", "replace", "prune")
    for name in (*making, "control", "compose", "show", "verify"):
        with pytest.raises(SystemExit):
            plan(name, "--help")
        assert f"mda-lightning plan {name} " in capsys.readouterr().out.split("example")[1]
