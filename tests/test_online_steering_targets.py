"""Targets: when and how hard they push, against cases worked out by hand; what steering refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from in_run_fits import INDUCTION, UNITS, MovingModule, scoring
from lightning.pytorch.loggers import CSVLogger
from steered_runs import BATCH, STEPS, amplify, corpus, earlier_scores, steered, suppress
from training import Clock, CurveMechanism, Rows, StrangersModule, fit, jump

from mda_lightning.callbacks import CriticalWindow, OnlineSteering, UnitMonitor
from mda_lightning.callbacks.attachment import UnsupportedTrainerError
from mda_lightning.callbacks.metric_table import Measurement, MetricTable
from mda_lightning.callbacks.steering import (
    Amplify,
    Decisions,
    DelayLevel,
    FromScores,
    HoldCurve,
    ReachLevel,
    Suppress,
)
from mda_lightning.datamodules import TokenDataModule
from mda_lightning.store import ScoreTable
from mda_lightning.units import Head


def test_hold_curve_pushes_in_proportion_beyond_its_tolerance() -> None:
    target = HoldCurve([[0, 0.1], [100, 0.3]], tolerance=0.02, full_at=0.06)
    target.check_covers(0, 100)
    for step, mu, expected in [
        (50, 0.20, 0.0),
        (50, 0.181, 0.0),
        (50, 0.16, 0.5),  # 0.04 below: half way from 0.02 to 0.06
        (50, 0.14, 1.0),
        (50, 0.0, 1.0),
        (25, 0.19, -0.5),  # the reference is 0.15
        (100, 0.9, -1.0),
    ]:
        push = target.push(step, mu)
        assert push.strength == pytest.approx(expected, abs=1e-9)
        assert push.reference == pytest.approx(0.1 + 0.002 * step)


def test_what_is_missing_for_long_is_pushed_harder_and_does_not_wind_up() -> None:
    curve = [[0, 0.5], [1000, 0.5]]
    target = HoldCurve(curve, tolerance=0.0, full_at=0.1, integral=2.0)
    # e = 0.02 each time: 0.2 of proportion, and 0.04 more at every evaluation.
    found = [target.push(step, 0.48).strength for step in range(4)]
    assert found == pytest.approx([0.24, 0.28, 0.32, 0.36])
    again = HoldCurve(curve, tolerance=0.0, full_at=0.1, integral=2.0)
    again.load_state_dict(target.state_dict())
    assert again.push(4, 0.48) == target.push(4, 0.48)
    # A long time out of reach, then at the curve: what had added up is what it was before.
    before = target.state_dict()
    assert [target.push(step, 0.1).strength for step in range(5, 50)] == [1.0] * 45
    assert target.state_dict() == before
    target.forget()
    assert target.push(0, 0.5).strength == 0.0


def test_reach_level_stops_once_it_was_there() -> None:
    target = ReachLevel(0.4)
    assert [target.push(s, mu).strength for s, mu in [(0, 0.1), (10, 0.39)]] == [1.0, 1.0]
    assert target.push(20, 0.4).strength == 0.0 and target.reached_at == 20
    assert target.push(30, 0.2).strength == 0.0
    again = ReachLevel(0.4)
    again.load_state_dict(target.state_dict())
    assert again.push(40, 0.1).strength == 0.0 and again.reached_at == 20


def test_delay_level_pushes_down_near_the_level_until_its_step() -> None:
    target = DelayLevel(0.4, until_step=100, near=0.5)
    found = [target.push(s, mu).strength for s, mu in [(0, 0.1), (50, 0.2), (99, 0.6), (100, 0.6)]]
    assert found == [0.0, -1.0, -1.0, 0.0]
    assert target.holds(99) and not target.holds(100)
    assert DelayLevel(0.4, 100, near=0.0).push(0, -1.0).strength == -1.0


def written(folder: Path, steps: range) -> Path:
    """A monitor's table whose heads have values of their own."""
    table = MetricTable()
    for step in steps:
        heads = np.array([[0.1, 0.2], [0.3, 0.4]], np.float32) * step
        table.append(step, "induction", heads, np.zeros_like(heads))
        table.append(step, "other", heads + 7, np.zeros_like(heads))
    return table.write(folder / "unit_metrics.parquet", provenance={})


def test_a_reference_curve_is_read_from_an_earlier_runs_table(tmp_path: Path) -> None:
    path = written(tmp_path, range(0, 50, 10))
    for given, units, over, slope in [
        (path, [Head(1, 0)], "mean", 0.3),
        (tmp_path, [Head(0, 1), Head(1, 1)], "mean", 0.3),
        (str(path), [Head(0, 1), Head(1, 1)], "max", 0.4),
    ]:
        target = HoldCurve(given)
        target.prepare("induction", units, over)
        target.check_covers(0, 49)  # the next evaluation would have been at 50
        assert target.push(25, 0.0).reference == pytest.approx(25 * slope, rel=1e-5)
    own = HoldCurve(path, unit="L0H0")
    own.prepare("induction", [Head(1, 1)], "mean")
    assert own.push(10, 0.0).reference == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"covers steps 0\.\.49, .* 0\.\.99: steps 50\.\.99 have"):
        own.check_covers(0, 99)
    with pytest.raises(ValueError, match=r"no 'induction' of L3H0"):
        HoldCurve(path, unit="L3H0").prepare("induction", [], "mean")
    with pytest.raises(FileNotFoundError, match=r"unit_metrics\.parquet"):
        HoldCurve(tmp_path / "nothing").prepare("induction", [Head(0, 0)], "mean")


class Watched(CurveMechanism):
    """A given curve to watch, with the induction probe to steer by."""

    name = "curve"
    block_names = INDUCTION.block_names

    def probe(self, model: Any) -> torch.Tensor:
        return INDUCTION.probe(model)


def aimed(
    folder: Path,
    curve: Any,
    target: Any,
    policy: Any,
    *extra: Any,
    n_steps: int = STEPS,
    every: int = 2,
    **settings: Any,
) -> pd.DataFrame:
    """Decisions of a run whose μ is given."""
    clock = Clock()
    one = Watched(clock, curve)
    steering = OnlineSteering(
        one, policy=policy, target=target, folder=str(folder), **({"units": ["L1H1"]} | settings)
    )
    callbacks = [
        clock,
        UnitMonitor([one], measures=[], every_n_steps=every, folder=str(folder), live=False),
        *extra,
        steering,
    ]
    data = TokenDataModule(
        corpus(folder), batch_size=BATCH, n_steps=n_steps, seed=2, folder=str(folder)
    )
    fit(MovingModule(), callbacks, folder, data=data, max_steps=n_steps)
    return Decisions.open(folder).frame


def rising(step: int) -> np.ndarray:
    """L1H1 has 0.05 a step, the others nothing."""
    return np.array([[0.0, 0.0], [0.0, 0.05 * step]])


def test_a_target_chooses_the_policy_and_scales_its_share(tmp_path: Path) -> None:
    """Reference 0.3: measured at even steps, full at 0.1 off; at 5 and 7 it is the last one's."""
    both = [
        suppress(share=0.25, name="down"),
        suppress(share=0.25, which="bottom", name="up"),
    ]
    target = HoldCurve([[0, 0.3], [STEPS, 0.3]], tolerance=0.0, full_at=0.2)
    frame = aimed(tmp_path, rising, target, both)
    pushes = {0: 1.0, 2: 1.0, 4: 0.5, 6: 0.0, 8: -0.5, 10: -1.0, 12: -1.0}
    for step in range(STEPS):
        push = pushes[step // 2 * 2]
        found = frame[frame["decided_at"] == step]
        assert len(found) == round(abs(push) * 0.25 * BATCH), step
        if push:
            assert set(found["policy"]) == {"up" if push > 0 else "down"}
            np.testing.assert_allclose(found["push"], push, atol=1e-6)
            np.testing.assert_allclose(found["mu"], 0.05 * (step // 2 * 2), atol=1e-6)
            assert set(found["reference"]) == {0.3}


def test_what_it_does_is_logged(tmp_path: Path) -> None:
    """Every second step is an evaluation, whose row has the totals up to then."""
    rows = corpus(tmp_path)
    logger = CSVLogger(tmp_path, name="", version="csv")
    target = HoldCurve([[0, 0.9], [STEPS, 0.9]])
    policy = [suppress(which="bottom", share=0.25), amplify()]
    trainer, _, _ = steered(tmp_path / "run", rows, policy, target=target, logger=logger)
    logged = pd.read_csv(tmp_path / "csv" / "metrics.csv")
    name = "induction/steering/"
    own = logged[logged[name + "masked"].notna()].set_index("step")
    assert own.index.tolist() == list(range(0, STEPS, 2))
    frame = Decisions.open(tmp_path / "run").frame
    masks = frame[frame["action"] == "mask"]
    assert own[name + "masked"].tolist() == [
        (masks["decided_at"] <= step).sum() for step in own.index
    ]
    assert own[name + "masked"].iloc[0] == 2.0
    inserts = frame[frame["action"] == "insert"]
    assert own[name + "inserted"].tolist() == [
        (inserts["decided_at"] <= step).sum() for step in own.index
    ]
    assert set(own[name + "push"]) == {1.0} and set(own[name + "reference"]) == {0.9}
    assert float(trainer.callback_metrics[name + "push"]) == 1.0


def test_levels_end_the_push(tmp_path: Path) -> None:
    frame = aimed(tmp_path / "a", rising, ReachLevel(0.4), suppress(which="bottom"))
    assert sorted(set(frame["decided_at"])) == list(range(8))  # 0.4 is measured at step 8
    frame = aimed(tmp_path / "b", rising, DelayLevel(0.4, until_step=9), suppress())
    assert sorted(set(frame["decided_at"])) == list(range(4, 9))  # from half the level on


def test_window_and_target_units_wait_for_critical_window(tmp_path: Path) -> None:
    """Nothing before the window is open; the head is the window's own, not one that was named."""
    window = CriticalWindow("curve")
    curve = jump(21, to=0.6, ramp=12)
    policy = suppress(active="window")
    frame = aimed(tmp_path / "a", curve, None, policy, window, n_steps=48, every=1, units="target")
    unit, found = window.window
    assert str(unit) == "L1H1" and found.start >= 21
    # A start is known after five evaluations; the end is when the window closed.
    steps = sorted(set(frame["decided_at"]))
    assert steps == list(range(steps[0], steps[-1] + 1))
    assert steps[0] in (found.start + 4, found.start + 5)
    assert window.phase == "closed" and found.end - 1 <= steps[-1] < 47
    assert policy._coming.units == [Head(1, 1)]
    frame = aimed(
        tmp_path / "b",
        curve,
        None,
        suppress(active="window"),
        CriticalWindow("curve"),
        n_steps=48,
        every=1,
    )
    assert 21 < frame["decided_at"].min() < steps[0]  # a warning counts, as it does for scoring


def test_a_target_state_goes_round_a_checkpoint(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    rows = corpus(tmp_path)
    target = {"curve": [[0, 0.5], [STEPS, 0.5]], "tolerance": 0.0, "full_at": 2.0, "integral": 0.2}

    def run(folder: Path, *extra: Any, **settings: Any) -> pd.DataFrame:
        policy = [suppress(name="down"), suppress(which="bottom", name="up")]
        steered(folder, rows, policy, *extra, target=HoldCurve(**target), in_run=False, **settings)
        return Decisions.open(folder).frame

    whole = run(tmp_path / "whole")
    saver = ModelCheckpoint(tmp_path / "at", filename="last", every_n_train_steps=5)
    run(tmp_path / "cut", saver, max_steps=8)
    states = torch.load(tmp_path / "at" / "last.ckpt", weights_only=True)["callbacks"]
    assert any(key.startswith("OnlineSteering") for key in states)
    cut = run(tmp_path / "cut", ckpt_path=tmp_path / "at" / "last.ckpt")
    pd.testing.assert_frame_equal(whole, cut, check_exact=True)
    assert whole["push"].nunique() > 3


def test_warnings_say_what_comes_to_nothing(tmp_path: Path) -> None:
    rows = corpus(tmp_path)
    with pytest.warns(UserWarning, match="Suppress and Suppress-2 push in opposite directions"):
        OnlineSteering(policy=[Suppress(), Suppress(which="bottom")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = Suppress(active=(0, 5))
        OnlineSteering(policy=[first, Suppress(which="bottom", active=(5, 9))])
        OnlineSteering(policy=[Suppress(), Suppress(which="bottom")], target=HoldCurve([[0, 1]]))
    with pytest.warns(UserWarning, match=r"finds no in-run scores of all of steps 7\.\.9"):
        late = scoring(active=(11, 13), folder=str(tmp_path))
        one = OnlineSteering(
            INDUCTION, policy=amplify(active=(6, 14)), units=UNITS, folder=str(tmp_path)
        )
        data = TokenDataModule(rows, batch_size=BATCH, n_steps=STEPS, folder=str(tmp_path))
        fit(MovingModule(), [late, one], tmp_path, data=data, max_steps=STEPS)
    crowded = amplify(share=1.0, copies=9)
    with pytest.warns(UserWarning, match="have places for 4 samples, 12 were to be inserted"):
        steered(tmp_path / "room", rows, crowded)
    with pytest.warns(UserWarning, match="beyond the end of the run; .* the 3 steps that are left"):
        steered(tmp_path / "end", rows, amplify())
    far = HoldCurve([[0, 9.0], [20, 9.0]])
    with pytest.warns(UserWarning, match="full push at 20 evaluations in a row"):
        aiming = OnlineSteering(policy=Suppress(which="bottom"), target=far)._aiming
        aiming.prepare("induction", [Head(0, 0)], 0, 20)
        value = np.zeros((1, 1), np.float32)
        for step in range(20):
            assert aiming.take(Measurement(step, "induction", value, value), [Head(0, 0)])
            assert not aiming.take(Measurement(step, "induction", value, value), [Head(0, 0)])
    with pytest.warns(UserWarning, match="induction is not finite at step 30: no push"):
        nan = np.full((1, 1), np.nan, np.float32)
        assert aiming.take(Measurement(30, "induction", nan, nan), [Head(0, 0)])
        assert aiming.strength(1, 30) == 0.0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Suppress(share=0.0), "share=0.0: a share"),
        (lambda: Amplify(share=1.5), "share=1.5: a share"),
        (lambda: Amplify(which="best"), "which='best': 'top'"),
        (lambda: Amplify(copies=0), "copies=0: at least 1"),
        (lambda: Amplify(mode="together"), "mode 'together'"),
        (lambda: Suppress(weight=1.0), "weight=1.0"),
        (lambda: Suppress(weight=float("nan")), "weight nan"),
        (lambda: Suppress(curvature="full"), "curvature='full'"),
        (lambda: Suppress(active=(5, 5)), "first < last"),
        (lambda: FromScores("x", action="drop"), "action='drop'"),
        (lambda: FromScores("x", per_step=0.0), "per_step=0.0"),
        (lambda: HoldCurve([[3, 0.1], [2, 0.1]]), "steps must ascend"),
        (lambda: HoldCurve([0.1, 0.2]), r"points \[step, value\]"),
        (lambda: HoldCurve([[0, 1]], tolerance=0.2, full_at=0.1), "tolerance < full_at"),
        (lambda: ReachLevel(float("nan")), "level=nan"),
        (lambda: DelayLevel(0.4, 0), "until_step=0"),
        (lambda: DelayLevel(0.4, 10, near=2.0), "near=2.0"),
        (lambda: OnlineSteering(policy=[]), "give one or more"),
        (lambda: OnlineSteering("inductoin", policy=Suppress()), "inductoin"),
        (lambda: OnlineSteering(policy=Suppress(), units=["L0"]), "'L0' is not a unit"),
        (lambda: OnlineSteering(policy=Suppress(), units="some"), "units='some'"),
        (
            lambda: OnlineSteering(policy=Suppress(), target=ReachLevel(0.4)),
            r"ReachLevel pushes up, and no policy does \(Suppress\)",
        ),
        (
            lambda: OnlineSteering(policy=[Suppress(name="a"), Suppress(name="a")]),
            "a name of its own",
        ),
    ],
)
def test_arguments_that_mean_nothing_are_refused_at_once(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_what_cannot_be_steered_is_refused_at_setup(tmp_path: Path) -> None:
    rows = corpus(tmp_path)

    def run(callbacks: list[pl.Callback], module: Any = None, data: Any = None) -> None:
        own = TokenDataModule(rows, batch_size=BATCH, n_steps=STEPS, folder=str(tmp_path))
        fit(module or MovingModule(), callbacks, tmp_path, data=data or own, max_steps=2)

    def steering(policy: Any = None, **settings: Any) -> OnlineSteering:
        return OnlineSteering(INDUCTION, policy=policy or Suppress(), **settings)

    monitor = UnitMonitor([INDUCTION], measures=[], live=False)
    with pytest.raises(ValueError, match=r"stream of a TokenDataModule .*data module: NoneType"):
        run([steering()], StrangersModule(), Rows(64))
    with pytest.raises(ValueError, match=r"put InfluenceScoring\('induction', estimator='in_run'"):
        run([steering(Amplify())])
    with pytest.raises(ValueError, match="does not score L0H1, by which"):
        run([scoring(), steering(Amplify(), units=["L0H1"])])
    with pytest.raises(ValueError, match=r"put UnitMonitor\(\['induction'\]\) before it"):
        run([steering(target=HoldCurve([[0, 1]]))])
    with pytest.raises(ValueError, match="put it after its UnitMonitor"):
        run([steering(target=HoldCurve([[0, 1]])), monitor])
    with pytest.raises(ValueError, match=r"covers steps 1\.\.5, steering asks for 0\.\.1"):
        run([monitor, steering(target=HoldCurve([[1, 1], [5, 1]]))])
    run([monitor, steering(Suppress(active=(0, 6)), target=HoldCurve([[0, 0], [5, 0]]))])
    with pytest.raises(ValueError, match=r"put CriticalWindow\('induction'\) before it"):
        run([steering(Suppress(active="window"))])
    with pytest.raises(ValueError, match=r"units='target' and no window"):
        run([steering(units="target")])
    with pytest.raises(ValueError, match="layer 7 is out of range"):
        run([steering(units=["L7H0"])])
    with pytest.raises(ValueError, match=r"Amplify has placement='shift'.*max_steps=14"):
        steered(tmp_path, rows, amplify(placement="shift"), max_steps=-1, max_epochs=1)
    with pytest.raises(ValueError, match="two OnlineSteering change one stream"):
        run([OnlineSteering("previous_token", policy=Suppress()), steering()])

    class Manual(MovingModule):
        automatic_optimization = False

    with pytest.raises(UnsupportedTrainerError, match="manual optimization"):
        run([steering()], Manual())
    other = earlier_scores(tmp_path)
    with pytest.raises(KeyError, match="L0H1"):
        run([steering(FromScores(str(other)), units=["L0H1"])])
    ScoreTable.write(
        tmp_path / "elsewhere",
        sample_id=[0],
        step=0,
        units=UNITS,
        blocks=["QK"],
        values=np.ones((1, 2, 1)),
        loss=[1.0],
        estimator="replay",
        provenance={"data": {"corpus_hash": "0123456789abcdef"}},
    )
    with pytest.raises(ValueError, match="scores of corpus 0123456789ab, this run has"):
        run([steering(FromScores(str(tmp_path / "elsewhere")), units=UNITS)])


def test_policies_and_targets_come_from_yaml() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(OnlineSteering, "steering")
    place = "mda_lightning.callbacks.steering"
    settings = {
        "class_path": "mda_lightning.callbacks.OnlineSteering",
        "init_args": {
            "mechanism": "induction",
            "units": ["L1H1"],
            "policy": [
                {"class_path": f"{place}.Amplify", "init_args": {"share": 0.2}},
                {"class_path": f"{place}.Suppress", "init_args": {"active": [5, 9]}},
                {"class_path": f"{place}.FromScores", "init_args": {"scores": "a/b"}},
            ],
            "target": {
                "class_path": f"{place}.HoldCurve",
                "init_args": {"curve": [[0, 0.1], [9, 0.2]], "full_at": 0.3},
            },
        },
    }
    found = parser.instantiate(parser.parse_object({"steering": settings})).steering
    assert [one.name for one in found.policies] == ["Amplify", "Suppress", "FromScores"]
    assert found.policies[1].steps(100) == (5, 8)
    assert found._aiming.target.full_at == 0.3
    settings["init_args"]["policy"] = settings["init_args"]["policy"][1]
    settings["init_args"]["target"]["init_args"]["curve"] = "runs/base/unit_metrics.parquet"
    found = parser.instantiate(parser.parse_object({"steering": settings})).steering
    assert len(found.policies) == 1


def test_a_target_is_asked_within_the_span_of_its_policies(tmp_path: Path) -> None:
    """Measured at even steps; before step 6 nobody could act, and what is summed up would count."""
    asked = []

    class Asked(ReachLevel):
        def push(self, step: int, mu: float) -> Any:
            asked.append(step)
            return super().push(step, mu)

    aimed(tmp_path, rising, Asked(9.0), suppress(which="bottom", active=(5, 10)))
    assert asked == [4, 6, 8]  # at step 5 the last measurement is that of step 4


@pytest.mark.parametrize(("over", "mu"), [("mean", 0.25), ("max", 0.4)])
def test_several_heads_become_one_number(over: Any, mu: float) -> None:
    target = HoldCurve([[0, 0.3], [9, 0.3]], tolerance=0.0, full_at=0.1)
    steering = OnlineSteering(policy=Suppress(), target=target, over=over)
    value = np.array([[0.1, 0.9], [0.4, 0.9]], np.float32)
    heads = [Head(0, 0), Head(1, 0)]
    assert steering._aiming.take(Measurement(2, "induction", value, value), heads)
    aim = steering._aiming.aim
    assert aim.mu == pytest.approx(mu) and aim.push == pytest.approx(max(-1, (0.3 - mu) / 0.1))
