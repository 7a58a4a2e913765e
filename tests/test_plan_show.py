"""The strip of a plan's stream against a loop over its batches, and what people see of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mda_lightning.analysis.figures.plan_strip import plan_strip
from mda_lightning.cli import EXIT_ERROR, EXIT_OK, main
from mda_lightning.corpora import TokenRows, rows_from_texts
from mda_lightning.interventions import Insert, Mask, Plan, Prune, Replace
from mda_lightning.recipes.plan_rates import Rates, rates_of
from mda_lightning.recipes.plan_show import strip_lines
from mda_lightning.schedule import INSERTED, REPLACED, BaseOrder, Schedule
from mda_lightning.schedule import strip as strip_module
from mda_lightning.schedule.strip import KINDS, Tally, run_steps, strip_of

N, BATCH, STEPS = 50, 4, 20
ORDER = BaseOrder(N, BATCH, STEPS, seed=2)


@st.composite
def windows(draw: st.DrawFn, low: int = 0, high: int = STEPS) -> tuple[int, int]:
    start = draw(st.integers(low, high - 1))
    return start, draw(st.integers(start + 1, high))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Several operations that do not contradict: each kind of named sample is its own."""
    ids = st.integers(0, 9)
    few = st.lists(ids, min_size=1, max_size=5, unique=True)
    operations: list[Any] = []
    if draw(st.booleans()):
        weight = draw(st.sampled_from([0.0, 0.5]))
        occurrences = draw(st.sampled_from(["base", "all"]))
        window = draw(st.none() | windows(0, 15))
        operations.append(Mask(draw(few), window, weight, occurrences))
    for _ in range(draw(st.integers(0, 2))):
        operations.append(
            Insert(
                [30 + i for i in draw(few)],
                draw(windows()),
                draw(st.sampled_from(["dispersed", "concentrated"])),
                "shift",
                draw(st.integers(1, 4)),
            )
        )
    if draw(st.booleans()):
        # Its 32 places hold as many different samples, more than any plan names.
        operations.append(Insert([40, 41], (0, 8), "dispersed", "replace"))
    if draw(st.booleans()):
        one_for_one = draw(st.booleans())
        by = [45, 46, 47]
        operations.append(
            Replace(draw(windows(8)), [20, 21, 22], by)
            if one_for_one
            else Replace((15, draw(st.integers(16, STEPS))), None, by)
        )
    if draw(st.booleans()):
        # A share of a step's places that is no place is refused.
        operations.append(Prune(draw(st.none() | windows()), draw(st.floats(0.13, 1.0)), 0.25))
    return Plan(tuple(operations), seed=draw(st.integers(0, 3)))


def by_loop(schedule: Schedule) -> dict[str, list[int]]:
    """Places of each kind a step; pruned ones are those with a quarter of a weight."""
    found: dict[str, list[int]] = {kind: [] for kind in (*KINDS, "weight")}
    for step in range(len(schedule)):
        _, weights, provenance = schedule.batch(step)
        quarters = [w in (0.25, 0.125) for w in weights]
        by_masks = [w * 4 if quarter else w for w, quarter in zip(weights, quarters, strict=True)]
        found["masked"].append(sum(w == 0 for w in by_masks))
        found["reweighted"].append(sum(w == 0.5 for w in by_masks))
        found["pruned"].append(sum(quarters))
        found["inserted"].append(sum(p == INSERTED for p in provenance))
        found["replaced"].append(sum(p == REPLACED for p in provenance))
        found["weight"].append(float(sum(weights)))
    return found


@given(plan=plans(), n_spans=st.integers(1, 30), at_once=st.sampled_from([4, 12, 2**18]))
def test_a_strip_counts_what_a_loop_over_the_batches_counts(
    plan: Plan, n_spans: int, at_once: int
) -> None:
    """Whatever the length of the blocks; only the windows of the operations are looked at."""
    schedule = Schedule(ORDER, plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strip_module, "_PLACES_AT_ONCE", at_once)
        strip = strip_of(schedule, n_spans=n_spans)
    expected = by_loop(schedule)
    assert strip.edges[0] == 0 and strip.edges[-1] == len(schedule)
    for i, (begin, end) in enumerate(zip(strip.edges, strip.edges[1:], strict=False)):
        assert strip.places[i] == (end - begin) * BATCH
        for kind in KINDS:
            assert strip.counts[kind][i] == sum(expected[kind][begin:end])
        mean = sum(expected["weight"][begin:end]) / strip.places[i]
        assert strip.weight[i] == pytest.approx(mean, abs=1e-12)
    touched = [step for step in range(len(schedule)) if any(expected[k][step] for k in KINDS)]
    for kind in KINDS:
        there = [step for step, n in enumerate(expected[kind]) if n]
        tally = strip.tallies[kind]
        assert tally.total == sum(expected[kind])
        if there:
            inside = expected[kind][there[0] : there[-1] + 1]
            assert (tally.first, tally.last) == (there[0], there[-1] + 1)
            assert (tally.least, tally.most) == (min(inside), max(inside))
            assert tally.mean == pytest.approx(sum(inside) / len(inside))
    assert strip.touched == ((touched[0], touched[-1] + 1) if touched else None)


@given(plan=plans())
def test_operations_are_counted_where_they_act(plan: Plan) -> None:
    schedule = Schedule(ORDER, plan)
    strip = strip_of(schedule)
    base = np.concatenate([ORDER.ids(step) for step in range(STEPS)])
    for one in strip.operations:
        op = one.operation
        first, last = op.steps or (0, STEPS)
        window = base[first * BATCH : last * BATCH]
        if isinstance(op, Insert):
            assert one.places == len(op.sample_ids) * op.copies
        elif isinstance(op, Prune):
            # Of its number in the plan, and alone: nothing takes the places that it has drawn.
            before = [Prune((0, 1), 1.0, 1.0)] * (len(plan.operations) - 1)
            of_one = Schedule(ORDER, Plan((*before, op), seed=plan.seed))
            weights = np.concatenate([of_one.batch(step).weights for step in range(STEPS)])
            assert one.places == (weights == 0.25).sum()
        elif isinstance(op, Replace) and op.sample_ids is not None:
            assert set(one.unmet) == set(op.sample_ids) - set(window)
            assert one.places == np.isin(window, op.sample_ids).sum()
        elif isinstance(op, Mask) and op.occurrences == "base" and op.steps is not None:
            alone = all(isinstance(other, Mask | Prune) for other in plan.operations)
            if alone:
                assert set(one.unmet) == set(op.sample_ids) - set(window)
                assert one.places == np.isin(window, op.sample_ids).sum()
            else:
                assert set(one.unmet) >= set(op.sample_ids) - set(window)


@given(plan=plans(), window=windows())
def test_run_steps_hold_a_window(plan: Plan, window: tuple[int, int]) -> None:
    schedule = Schedule(ORDER, plan)
    first, last = run_steps(schedule, window)
    inside = set(range(window[0] * BATCH, window[1] * BATCH))
    assert inside <= set(schedule.base_positions(first, last).tolist())
    # And hardly anything else.
    held = schedule.base_positions(first, last)
    held = held[held >= 0]
    assert held.min() >= min(max(0, window[0] - 2), STEPS) * BATCH
    assert held.max() < (window[1] + 1) * BATCH


def test_a_strip_of_a_part_is_a_part_of_the_strip() -> None:
    schedule = Schedule(ORDER, Plan.prune(0.4, (3, 17)))
    whole = strip_of(schedule, n_spans=100)
    part = strip_of(schedule, steps=(5, 12), n_spans=100)
    np.testing.assert_array_equal(part.counts["pruned"], whole.counts["pruned"][5:12])
    with pytest.raises(ValueError, match="outside the run, which has 20"):
        strip_of(schedule, steps=(5, 21))


def test_steps_without_gradient_are_named() -> None:
    ids = np.unique(np.concatenate([ORDER.ids(step) for step in (4, 5, 9)]))
    schedule = Schedule(ORDER, Plan.mask(ids))
    strip = strip_of(schedule)
    empty = [s for s in range(STEPS) if not schedule.batch(s).weights.any()]
    assert set(empty) >= {4, 5, 9}
    assert strip.n_fully_masked == len(empty) and list(strip.fully_masked) == empty[:10]


def test_only_the_windows_of_a_long_run_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    order = BaseOrder(146_000_000, 1024, 140_000)
    schedule = Schedule(order, Plan.prune(0.95, (900, 920)) | Plan.insert([5, 6], steps=(10, 12)))
    looked: list[int] = []
    batch: Callable[..., Any] = Schedule.batch
    monkeypatch.setattr(Schedule, "batch", lambda s, step: looked.append(step) or batch(s, step))
    strip = strip_of(schedule)
    assert strip.tallies["pruned"].total == round(0.95 * 20 * 1024)
    assert strip.tallies["inserted"].total == 2
    assert len(set(looked)) <= 30


@given(counts=st.lists(st.integers(0, 3), min_size=1, max_size=30), size=st.integers(1, 7))
def test_a_tally_does_not_depend_on_its_pieces(counts: list[int], size: int) -> None:
    whole, pieces = Tally(), Tally()
    whole.add(0, np.array(counts))
    for start in range(0, len(counts), size):
        pieces.add(start, np.array(counts[start : start + size]))
    assert whole == pieces


# -- learning rates -------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [None, 24])
@pytest.mark.parametrize("placement", ["shift", "replace"])
def test_rates_before_and_after(placement: Any, total: int | None) -> None:
    plan = Plan.insert([1, 2, 3], steps=(5, 9), copies=4, placement=placement)
    schedule = Schedule(ORDER, plan)
    rates = Rates("pythia", total, 2.0, 3)
    found = rates_of(schedule, (5, 9), rates)
    before, after = rates.over(STEPS), rates.over(len(schedule))
    met: dict[int, int] = {}
    for step in range(len(schedule)):
        for position in schedule.base_positions(step, step + 1).tolist():
            met[position] = step
    window = range(5 * BATCH, 9 * BATCH)
    assert found["before"] == pytest.approx(np.mean([before(p // BATCH) for p in window]))
    assert found["after"] == pytest.approx(np.mean([after(met[p]) for p in window]))
    if placement == "replace":
        assert found["after"] == pytest.approx(found["before"])
    else:
        assert found["after"] != pytest.approx(found["before"])
    # The multiple of the peak is that of GPT-NeoX's schedule at these steps.
    assert before(0) == pytest.approx(2.0 / 3) and before(3) == pytest.approx(2.0)


# -- for people -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenRows:
    folder = tmp_path_factory.mktemp("show") / "corpus"
    texts = [("a", f"word{i} greets name{i % 7} and goes. ") for i in range(300)]
    return rows_from_texts(folder, texts, row_length=12, vocab_size=300)


@pytest.fixture
def tied(corpus: TokenRows) -> BaseOrder:
    return BaseOrder(len(corpus), 8, 400)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["plan", "show", *map(str, arguments)]) == EXIT_OK
    told = capsys.readouterr()
    return told.out, told.err


def test_a_plan_is_shown(
    corpus: TokenRows, tied: BaseOrder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = np.unique(tied.ids(104))
    plan = (Plan.mask(ids, steps=(104, 114)) | Plan.insert(ids, steps=(200, 210), copies=3)).bound(
        corpus_hash=corpus.content_hash, order=tied, name="both"
    )
    plan.save(tmp_path / "plan.json")
    out, _ = shown(
        capsys, tmp_path / "plan.json", "--corpus", corpus.folder, "--width", "90",
        "--schedule", "constant", "--figure", tmp_path / "strip.png",
    )  # fmt: skip
    assert "mask: 8 samples with weight 0 in steps 104:114: 8 of 80 places (10.00%)" in out
    assert "run: 400 -> 403 steps: 24 insertions by shift / batch 8" in out
    assert "every sample of 1 step has weight 0" in out and "momentum" in out
    assert "comes 3 steps later" in out
    lines = out.splitlines()
    strips = [line for line in lines if line.startswith(("masked ", "inserted "))]
    assert len(strips) == 2 * 2  # the run, and the part of it that is touched
    assert all("█" in line for line in strips) and all(len(line) <= 90 for line in strips)
    text = " ".join(corpus.decode(corpus.get([int(ids[0])])[0]).split())
    assert text[:20] in out
    assert matplotlib.image.imread(tmp_path / "strip.png").ndim == 3

    out, _ = shown(capsys, tmp_path / "plan.json", "--json")
    numbers = json.loads(out)
    assert numbers["run"] == {"base_steps": 400, "steps": 403, "added_steps": 3, "batch_size": 8}
    assert numbers["fully_masked"] == {"steps": 1, "first": [104]}
    assert sum(numbers["strip"]["masked"]) == 8 and sum(numbers["zoom"]["inserted"]) == 24


def test_the_characters_of_a_strip_are_its_spans(
    tied: BaseOrder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of ten spans are pruned, one of them by half."""
    plan = Plan((Prune((40, 80), 1.0), Prune((320, 360), 0.5))).bound(order=tied)
    plan.save(tmp_path / "plan.json")
    out, _ = shown(capsys, tmp_path / "plan.json", "--width", "75")
    (line,) = (line for line in out.splitlines() if line.startswith("pruned  "))
    strip = line[11:51]
    assert strip[4:8] == "████" and set(strip[:4] + strip[8:32] + strip[36:]) == {"·"}
    assert set(strip[32:36]) <= {"▒", "▓"}


def test_decisions_of_a_steered_run_are_told_in_a_line(
    tied: BaseOrder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    window = [(step, step + 1) for step in range(100, 130)]
    masks = [Mask(np.unique(tied.ids(s[0]))[:2], s, 0, "all", "run", online=True) for s in window]
    inserts = [Insert([5, 6, 7], (s, s + 9), placement="replace", online=True) for s in (50, 60)]
    plan = Plan((Mask([3], (0, 5)), *masks, *inserts)).bound(order=tied)
    plan.save(tmp_path / "p.json")
    out, _ = shown(capsys, tmp_path / "p.json")
    told = [line for line in out.splitlines() if line.startswith(("  mask:", "  insert:"))]
    assert len(told) == 3 and "30 decisions while the run went on" in told[1]
    assert "in steps 100:130 (the run's own steps), 60 times a sample with weight 0" in told[1]
    assert told[1].endswith("60 of 240 places (25.00%)")
    assert "2 decisions while the run went on, in steps 50:69, 6 samples, dispersed" in told[2]
    assert told[2].endswith("6 of 152 places (3.95%)")
    away = Mask([int(tied.ids(7)[0])], (9, 10), 0, "all", "run", online=True)
    Plan((*masks, away, away)).bound(order=tied).save(tmp_path / "q.json")
    out, _ = shown(capsys, tmp_path / "q.json")
    assert out.count("  ! ") == 1 and "2 samples of 2 masks decided while the run" in out


def test_rates_of_a_plan_of_the_whole_run(
    tied: BaseOrder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Plan.mask([3, 4]) | Plan.insert([5], steps=(20, 30), copies=16)).bound(order=tied).save(
        tmp_path / "p.json"
    )
    out, _ = shown(capsys, tmp_path / "p.json", "--schedule", "constant", "--learning-rate", "0.5")
    rates = [line for line in out.splitlines() if line.startswith("  learning rate (constant")]
    assert len(rates) == 2 and "base samples of steps 0:400 " in rates[0]


@pytest.mark.parametrize("first", [3, 104])
@pytest.mark.parametrize("n_steps", [1, 2, 5, 9, 14])
def test_labels_of_an_axis_do_not_run_together(first: int, n_steps: int, tied: BaseOrder) -> None:
    strip = strip_of(Schedule(tied, Plan.prune(0.5)), steps=(first, first + n_steps))
    labels = strip_lines(strip)[-1].plain.split()
    assert labels[0] == "step" and len(labels) in (3, 4)
    numbers = [int(label) for label in labels[1:]]
    assert numbers[0] == first and numbers[-1] == first + n_steps
    assert first <= numbers[1] <= first + n_steps


def test_what_has_no_effect_is_told(
    corpus: TokenRows, tied: BaseOrder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = int(np.setdiff1d(np.arange(len(corpus)), tied.at(np.arange(10 * 8)))[0])
    Plan.mask([away, int(tied.ids(3)[0])], steps=(0, 10)).bound(order=tied).save(
        tmp_path / "p.json"
    )
    out, _ = shown(capsys, tmp_path / "p.json")
    assert "1 of the 2 samples of the mask is not in steps 0:10" in out and f": {away}" in out


def test_a_plan_without_an_order(
    corpus: TokenRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Plan.insert([3, 4], steps=(2, 5)).save(tmp_path / "p.json")
    out, _ = shown(capsys, tmp_path / "p.json")
    assert "longer by 2 samples" in out and "give --run" in out
    assert "--run or --corpus shows their texts" in out
    out, _ = shown(
        capsys, tmp_path / "p.json", "--corpus", corpus.folder, "--batch-size", 2, "--n-steps", 9
    )
    assert "run: 9 -> 10 steps" in out
    for arguments, message in (
        (["--figure", str(tmp_path / "x.png")], "not tied to a base order"),
        (["--schedule", "constant"], "not tied to a base order"),
        (["--batch-size", "2"], "add --corpus"),
        (["--corpus", str(corpus.folder), "--batch-size", "2"], "both --batch-size and --n-steps"),
        (
            ["--corpus", str(corpus.folder), "--batch-size", "2", "--n-steps", "4"],
            "ends outside the run, which has 4 steps",
        ),
    ):
        assert main(["plan", "show", str(tmp_path / "p.json"), *arguments]) == EXIT_ERROR
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1


def test_a_plan_of_another_corpus_or_order_is_refused(
    corpus: TokenRows, tied: BaseOrder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Plan.mask([3]).bound(corpus_hash="a" * 64).save(tmp_path / "p.json")
    assert main(["plan", "show", str(tmp_path / "p.json"), "--corpus", str(corpus.folder)]) == 1
    assert "was made for corpus aaaaaaaaaaaa" in capsys.readouterr().err
    Plan.mask([3]).bound(order=tied).save(tmp_path / "q.json")
    other = ["--corpus", str(corpus.folder), "--batch-size", "4", "--n-steps", "400"]
    assert main(["plan", "show", str(tmp_path / "q.json"), *other]) == EXIT_ERROR
    assert "was made for base order" in capsys.readouterr().err


def test_a_figure_has_a_panel_for_each_kind() -> None:
    plan = Plan.insert([1, 2], steps=(3, 9), copies=5) | Plan.prune(0.5, (10, 15))
    strip = strip_of(Schedule(ORDER, plan))
    figure = plan_strip(strip)
    assert [ax.get_ylabel() for ax in figure.axes] == ["pruned", "inserted"]
