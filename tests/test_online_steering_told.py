"""OnlineSteering says what came to nothing, where it writes, and what its table lacks."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from in_run_fits import INDUCTION, UNITS, MovingModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from steered_runs import BATCH, STEPS, amplify, corpus, steered, suppress
from training import fit

from mda_lightning.callbacks import OnlineSteering, UnitMonitor
from mda_lightning.callbacks.metric_table import Measurement
from mda_lightning.callbacks.steering import (
    Decisions,
    DelayLevel,
    FromScores,
    HoldCurve,
    ReachLevel,
    Suppress,
    decisions,
)
from mda_lightning.callbacks.steering.aiming import Aim
from mda_lightning.datamodules import TokenDataModule
from mda_lightning.interventions import Plan
from mda_lightning.store import ScoreTable
from mda_lightning.units import Head


def told(folder: Path, policy: Any, *extra: Any, **settings: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steered(folder, corpus(folder), policy, *extra, **settings)
    return [str(one.message) for one in caught if "never acted" in str(one.message)]


def test_a_policy_that_never_acted_is_told_with_the_reason(tmp_path: Path) -> None:
    assert told(tmp_path / "acts", suppress()) == []
    (small,) = told(tmp_path / "small", suppress(share=1e-9))
    assert small.startswith("Suppress never acted") and "never came to a whole sample" in small
    assert "asked at 14 steps, on at 14 of them" in small
    (late,) = told(tmp_path / "late", suppress(active=(30, 40)))
    assert "active=(30, 40) holds none of the steps of this fit" in late
    (reached,) = told(tmp_path / "reached", suppress(which="bottom"), target=ReachLevel(-1.0))
    assert "ReachLevel never asked for a push up" in reached and "aimed at -1" in reached
    one, other = told(
        tmp_path / "two",
        [suppress(), amplify(name="again")],
        target=DelayLevel(50.0, until_step=STEPS),
    )
    assert one.startswith("Suppress never") and "a push down" in one
    assert other.startswith("again never") and "a push up" in other


def test_a_table_of_which_nothing_comes_is_told(tmp_path: Path) -> None:
    coming = TokenDataModule(corpus(tmp_path), batch_size=BATCH, n_steps=STEPS, seed=2).schedule
    met = np.concatenate([coming.batch(step).sample_ids for step in range(STEPS)])
    away = np.setdiff1d(np.arange(300), met)
    table = ScoreTable.write(
        tmp_path / "away",
        sample_id=away,
        step=0,
        values=np.ones((len(away), len(UNITS), 1)),
        loss=np.ones(len(away)),
        units=UNITS,
        blocks=["QK"],
        estimator="replay",
        provenance={},
    )
    (none,) = told(tmp_path / "run", FromScores(table, "mask"), in_run=False)
    assert "no sample of the table's top share came in these steps" in none
    assert told(tmp_path / "in", FromScores(table, "insert"), in_run=False) == []


def test_what_acted_before_a_resume_is_not_told_again(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "at", filename="last", every_n_train_steps=5)
    early = {"active": (0, 4)}
    assert told(tmp_path / "run", suppress(**early), saver, max_steps=5) == []
    at = tmp_path / "at" / "last.ckpt"
    assert told(tmp_path / "run", suppress(**early), ckpt_path=at) == []


@pytest.mark.parametrize("last", [4, STEPS])
def test_a_table_that_lacks_decisions_makes_no_plan(tmp_path: Path, last: int) -> None:
    """A run that went on in another folder: some of its decisions, or all, are in the first."""
    rows = corpus(tmp_path)
    saver = ModelCheckpoint(tmp_path / "at", filename="last", every_n_train_steps=5)
    steered(tmp_path / "a", rows, suppress(active=(0, last)), saver, max_steps=5)
    with pytest.warns(UserWarning, match="wrote to"):
        steered(
            tmp_path / "b",
            rows,
            suppress(active=(0, last)),
            ckpt_path=tmp_path / "at" / "last.ckpt",
        )
    later = Decisions.open(tmp_path / "b")
    n_first = len(Decisions.open(tmp_path / "a"))
    with pytest.raises(
        ValueError, match=r"lacks [1-6] of .* the first of them number 0"
    ) as refused:
        later.plan()
    path = tmp_path / "b" / "steering" / "plan.json"
    assert str(path) in str(refused.value) and n_first >= 4
    assert len(Plan.load(path).operations) >= n_first


def test_where_it_writes(tmp_path: Path) -> None:
    """As told, else with a monitor before it, else with the ledger."""
    for named, monitored, ledger in (
        ("named", "monitored", "ledger"),
        (None, "monitored", "ledger"),
        (None, None, "ledger"),
        (None, None, None),
    ):
        own = tmp_path / f"{named}-{monitored}-{ledger}"
        rows = corpus(own)

        def place(name: str | None, own: Path = own) -> str | None:
            return None if name is None else str(own / name)

        one = OnlineSteering(INDUCTION, policy=suppress(), units=UNITS, folder=place(named))
        before: list[Any] = []
        if monitored:
            before = [UnitMonitor([INDUCTION], measures=[], folder=place(monitored), live=False)]
        data = TokenDataModule(rows, batch_size=BATCH, n_steps=3, folder=place(ledger))
        fit(MovingModule(), [*before, one], own, data=data, max_steps=2)
        first = next((n for n in (named, monitored, ledger) if n), "mda")
        assert (own / first / "steering" / "plan.json").is_file()
        assert len(list(own.rglob("steering"))) == 1


def test_a_curve_covers_the_steps_of_this_fit(tmp_path: Path) -> None:
    """Of a run that begins at step 5 and ends at step 9 of a longer order."""
    rows = corpus(tmp_path)
    saver = ModelCheckpoint(tmp_path / "at", filename="last", every_n_train_steps=5)
    whole = HoldCurve([[0, 0.5], [STEPS, 0.5]])
    steered(tmp_path / "a", rows, suppress(), saver, target=whole, max_steps=5, in_run=False)
    resumed: dict[str, Any] = {"ckpt_path": tmp_path / "at" / "last.ckpt", "in_run": False}
    part = HoldCurve([[5, 0.5], [8, 0.5]])
    one, _, _ = steered(tmp_path / "a", rows, suppress(), target=part, max_steps=9, **resumed)
    assert one.global_step == 9
    short = HoldCurve([[5, 0.5], [7, 0.5]])
    with pytest.raises(ValueError, match=r"steering asks for 5\.\.8"):
        steered(tmp_path / "b", rows, suppress(), target=short, max_steps=9, **resumed)
    active = suppress(active=(6, 8))
    two, _, _ = steered(tmp_path / "b", rows, active, target=short, max_steps=9, **resumed)
    assert two.global_step == 9
    past = suppress(active=(0, 4))  # nothing is left to do
    steered(tmp_path / "c", rows, past, target=HoldCurve([[0, 1], [1, 1]]), max_steps=9, **resumed)


def test_policies_are_objects() -> None:
    for given in ("suppress", Suppress, 3):
        with pytest.raises(ValueError, match=r"policy=.*(suppress|Suppress|3).*: Amplify\("):
            OnlineSteering(policy=given)  # type: ignore[arg-type]


def test_a_value_from_before_the_curve_begins_is_not_judged_by_it() -> None:
    """Of every fourth step; the curve begins at step 6."""
    target = HoldCurve([[6, 0.5], [20, 0.5]], tolerance=0.0, full_at=0.1)
    aiming = OnlineSteering(policy=suppress(which="bottom"), target=target)._aiming
    unit = [Head(0, 0)]
    value = np.zeros((1, 1), np.float32)
    assert not aiming.take(Measurement(4, "induction", value, value), unit)
    assert aiming.strength(1, 6) == 0.0 and aiming.aim == Aim()
    assert aiming.take(Measurement(8, "induction", value, value), unit)
    assert aiming.strength(1, 8) == 1.0
    assert not aiming.take(Measurement(24, "induction", value + 1, value), unit)
    assert aiming.strength(1, 24) == 1.0


def test_the_first_curvature_takes_samples_to_come(tmp_path: Path) -> None:
    rows = corpus(tmp_path)
    taken = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            policy = suppress(n_curvature=20)
            run = SimpleNamespace(schedule=trainer.datamodule.schedule)
            taken.append(policy._coming._curvature_samples(run, trainer.global_step))  # type: ignore[arg-type]

    data = TokenDataModule(rows, batch_size=BATCH, n_steps=STEPS, seed=2, folder=str(tmp_path))
    fit(MovingModule(), [Looks()], tmp_path, data=data, max_steps=STEPS)
    order = data.schedule.order.at(np.arange(BATCH * STEPS))
    assert taken[0].tolist() == order[:20].tolist() and taken[1].tolist() == order[:20].tolist()
    assert taken[2].tolist() == order[4:24].tolist()


def test_samples_of_another_weight_are_ranked_by_weight_times_score(tmp_path: Path) -> None:
    """Of the first batch: what has most is given so little weight that it counts less."""
    rows = corpus(tmp_path)
    once = {"share": 1 / BATCH, "active": (0, 1)}
    steered(tmp_path / "a", rows, suppress(**once), in_run=False)
    (first,) = Decisions.open(tmp_path / "a").frame["sample_id"]
    plan = Plan.mask([first], (0, 1), weight=1e-6)
    _, _, data = steered(tmp_path / "b", rows, suppress(**once), in_run=False, plan=plan)
    (other,) = Decisions.open(tmp_path / "b").frame["sample_id"]
    assert other != first and sorted(data.schedule.batch(0).weights)[:2] == [0.0, np.float32(1e-6)]


class Killed(Callback):
    """No more of the callback's hooks run: the process is gone."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 6:
            raise KilledError


class KilledError(Exception):
    pass


def test_a_killed_run_leaves_its_decisions_and_no_plan_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = corpus(tmp_path)
    steered(tmp_path, rows, suppress(share=0.5))
    former = Decisions.open(tmp_path).plan().content_hash
    monkeypatch.setattr(decisions, "_EVERY", -1.0)
    with monkeypatch.context() as gone, pytest.raises(KilledError):
        gone.setattr(OnlineSteering, "on_exception", lambda *_: None)
        steered(tmp_path, rows, suppress(), Killed())
    left = Decisions.open(tmp_path)
    assert len(left) == 7 and left.plan().content_hash != former
    assert not (tmp_path / "steering" / "plan.json").exists()
    assert len(list((tmp_path / "steering" / "decisions").iterdir())) == 1
    # A part that a longer one replaced, and that was not taken away in time, counts once.
    (part,) = (tmp_path / "steering" / "decisions").iterdir()
    shutil.copy(part, part.with_name("00000000-00000003.parquet"))
    assert len(Decisions.open(tmp_path).frame) == len(left.frame)
    steered(tmp_path, rows, suppress())
    whole = Decisions.open(tmp_path)
    assert len(whole) == STEPS
    assert whole.plan().content_hash == Plan.load(tmp_path / "steering/plan.json").content_hash
