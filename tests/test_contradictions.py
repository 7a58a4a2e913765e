"""Settings that cannot hold together are refused, by value, limit and way out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mda_lightning.base_order import BaseOrder
from mda_lightning.interventions import Plan
from mda_lightning.interventions.selection import samples_of
from mda_lightning.recipes.studies.arms import steps_of
from mda_lightning.recipes.studies.contradictions import (
    ContradictionError,
    refuse_contradictions,
    remarks_on,
)
from mda_lightning.recipes.studies.settings import (
    STANDARD_ARMS,
    ArmSettings,
    RankingSettings,
    StudySettings,
)

FIXED = {"window.start": 100, "window.end": 300}


def settings(arms: dict[str, ArmSettings] | None = None, /, **changes: Any) -> StudySettings:
    """The quickstart's settings, with some changed: ``part.field`` or a field of the study."""
    made = StudySettings(arms=dict(STANDARD_ARMS) if arms is None else arms)
    for key, value in changes.items():
        part, _, name = key.partition(".")
        new = dataclasses.replace(getattr(made, part), **{name: value}) if name else value
        made = dataclasses.replace(made, **{part: new})
    return made


def refused(made: StudySettings) -> str:
    with pytest.raises(ContradictionError) as caught:
        refuse_contradictions(made)
    return str(caught.value)


def one(**fields: Any) -> dict[str, ArmSettings]:
    return {"x": ArmSettings(**fields)}


CASES: list[tuple[dict[str, Any], str]] = [
    ({"mechanism": "copying"}, "mechanism is 'copying'; there are: induction, previous_token"),
    # model and corpus
    ({"model.size": "15m"}, "model.size is '15m'; Pythia has 14m, 31m"),
    ({"model.n_heads": 0}, "model.n_heads is 0; at least 1"),
    (
        {"model.d_model": 66},
        "model.d_model is 66 and model.n_heads 4, which does not divide it; try d_model 64",
    ),
    ({"model.rotary_fraction": 1.5}, "model.rotary_fraction is 1.5"),
    ({"corpus.path": "/x"}, "corpus.path is '/x', and an embedded corpus comes from the running"),
    ({"corpus.n_rows": None}, "corpus.n_rows is null, and an embedded corpus is made to size"),
    (
        {"corpus.kind": "jsonl"},
        "corpus.kind is 'jsonl' and corpus.path is missing; say where it lies",
    ),
    (
        {"corpus.tokenizer": "t.json"},
        "corpus.tokenizer is 't.json', and a corpus of kind 'embedded' has its own",
    ),
    (
        {"corpus.held_out_rows": 5, "corpus.held_out": "v"},
        "corpus.held_out_rows is 5 and corpus.held_out names 'v'; give one",
    ),
    ({"corpus.held_out_rows": -1}, "corpus.held_out_rows is -1"),
    ({"corpus.n_rows": 0}, "corpus.n_rows is 0; at least 1"),
    (
        {
            "corpus.kind": "megatron",
            "corpus.path": "p",
            "corpus.n_rows": None,
            "corpus.held_out_rows": 9,
        },
        "held_out_rows is 9: of a Megatron corpus the rows after the training rows",
    ),
    ({"corpus.sequence_length": 39}, "corpus.sequence_length is 39; at least 40 is needed"),
    ({"corpus.records_share": 2.0}, "corpus.records_share is 2"),
    ({"corpus.pieces_per_name": (5, 4)}, "corpus.pieces_per_name is [5, 4]"),
    # training
    (
        {"training.micro_batch": 3},
        "training.micro_batch is 3, which does not divide training.batch_size 8",
    ),
    (
        {"training.warmup_steps": 20_000},
        "training.warmup_steps is 20000, the schedule has 12000 (training.max_steps)",
    ),
    (
        {"training.schedule_steps": 40},
        "warmup_steps is 50, the schedule has 40 (training.schedule_steps)",
    ),
    (
        {"training.learning_rate": None},
        "training.learning_rate is null, which takes that of a Pythia size",
    ),
    ({"training.learning_rate": -1.0}, "training.learning_rate is -1; it is above 0"),
    ({"training.margin_steps": -1}, "training.margin_steps is -1; at least 0"),
    ({"training.batch_size": 0}, "training.batch_size is 0; at least 1"),
    # window
    ({"window.start": 10}, "window.start is 10 and window.end is missing; give both, or neither"),
    ({"window.end": 10}, "window.end is 10 and window.start is missing"),
    (
        {"window.start": 300, "window.end": 300},
        "the window is [300, 300); its start comes before its end",
    ),
    (
        {"window.start": 1, "window.end": 12_001},
        "window.end is 12001, training.max_steps 12000; train longer",
    ),
    (
        {**FIXED, "window.target": "L3H0"},
        "window.target is L3H0, and the model has layers 0..2 of heads 0..3",
    ),
    ({**FIXED, "window.target": "best"}, "window.target is 'best', no head; one is written L3H0"),
    (
        {**FIXED, "window.target": "L6H0", "model.size": "14m"},
        "window.target is L6H0, and Pythia 14m has layers 0..5 of heads 0..3",
    ),
    (
        {"window.target": "L1H0"},
        "window.target is L1H0, and a base run that finds its window finds the head too",
    ),
    (
        {**FIXED, "scoring.estimator": "in_run"},
        "scoring.estimator is 'in_run', which is not supported with a fixed window",
    ),
    # scoring, monitor, intervention
    ({"scoring.damping": 0.0}, "scoring.damping is 0; it is above 0"),
    ({"scoring.n_curvature": 0}, "scoring.n_curvature is 0"),
    ({"scoring.replay_at": ()}, "scoring.replay_at is []"),
    (
        {"scoring.probe_function": "copy_logprob", "mechanism": "previous_token"},
        "scoring.probe_function is copy_logprob, which is of induction heads",
    ),
    ({"monitor.every_n_steps": 0}, "monitor.every_n_steps is 0; at least 1"),
    ({"monitor.thresholds": (0.2, 1.5)}, "monitor.thresholds holds 1.5"),
    (
        {"monitor.every_n_steps": 15},
        "monitor.quiet_every_n_steps is 50, no multiple of monitor.every_n_steps, 15: both share "
        "one grid of steps; give a multiple, such as 45",
    ),
    ({"monitor.quiet_every_n_steps": 5}, "is 5, no multiple of monitor.every_n_steps, 10"),
    (
        {**FIXED, "monitor.every_n_steps": 50},
        "averaged_evaluations is 5, every 50 steps: 250 steps, and the window has 200",
    ),
    ({"intervention.fraction": 1.1}, "intervention.fraction is 1.1"),
    ({"intervention.copies": 0}, "intervention.copies is 0"),
    # subsets and rankings
    (
        {"subsets.count": 3, "subsets.rankings": ("ekfac", "kffac")},
        "subsets.rankings holds 'kffac', and there is no such ranking",
    ),
    ({"subsets.count": 3, "subsets.keep": 1.0}, "subsets.keep is 1; it is a share between"),
    ({"subsets.count": -1}, "subsets.count is -1"),
    (
        {**FIXED, "subsets.count": 3, "subsets.steps": 101},
        "subsets.steps is 101: from the window's midpoint, step 200, they go beyond its end",
    ),
    (
        {"subsets.count": 3, "subsets.steps": 12_001},
        "subsets.steps is 12001, training.max_steps 12000",
    ),
    (
        {"rankings": {"a": RankingSettings("loss", curvature="kfac")}},
        "rankings.a.curvature is kfac, and the method 'loss' has none",
    ),
    ({"rankings": {"a": RankingSettings(n=0)}}, "rankings.a.n is 0"),
    (
        {"rankings": {"a": RankingSettings("repeated_ngrams", n=130)}},
        "rankings.a.n is 130, and a row has 129 tokens (corpus.sequence_length and one more); give "
        "at most 129",
    ),
    (
        {
            "rankings": {"a": RankingSettings(probe_function="copy_logprob")},
            "mechanism": "previous_token",
        },
        "the ranking 'a' is by the probe function copy_logprob, which is of induction heads",
    ),
]


@pytest.mark.parametrize(("changes", "said"), CASES, ids=[said[:50] for _, said in CASES])
def test_settings_refused(changes: dict[str, Any], said: str) -> None:
    assert said in refused(settings(**changes))


ARMS: list[tuple[dict[str, ArmSettings], str]] = [
    (one(control_of="y"), "arms.x.control_of is 'y', and there is no such arm; there are: x"),
    (one(control="y"), "arms.x.control is 'y', and there is no such arm"),
    (one(control="x"), "arms.x.control is the arm itself"),
    (
        one(control="baseline"),
        "arms.x.control is 'baseline', with which every arm is compared anyway",
    ),
    (
        {**one(), "c": ArmSettings(control_of="x"), "d": ArmSettings(control_of="c")},
        "arms.d.control_of is 'c', which is itself a control (of 'x')",
    ),
    (
        {**one(), "c": ArmSettings(control_of="x", fraction=0.1)},
        "arms.c is the control of 'x' and takes everything but its draw from it, and",
    ),
    ({**one(), "c": ArmSettings(control_of="x", control="x")}, "and control is given"),
    ({"Baseline": ArmSettings()}, "arms.Baseline: 'baseline' is the base run gone on unchanged"),
    ({"a/b": ArmSettings()}, "arms.'a/b' cannot be a folder's name"),
    ({".hidden": ArmSettings()}, "arms.'.hidden' cannot be a folder's name"),
    (
        {"a": ArmSettings(), "A": ArmSettings(do="insert")},
        "arms.A and arms.a differ only in capitals",
    ),
    (one(fraction=0.0), "arms.x.fraction is 0; it is a share, above 0 and at most 1"),
    (one(fraction=1.01), "arms.x.fraction is 1.01"),
    (one(fraction=0.1, count=5), "arms.x gives fraction 0.1 and count 5; give one of the two"),
    (one(count=0), "arms.x.count is 0; at least 1"),
    (one(do="insert", copies=0), "arms.x.copies is 0; at least 1"),
    (one(weight=float("nan")), "arms.x.weight is nan"),
    (one(weight=1.0), "arms.x.weight is 1, which changes nothing"),
    (
        one(by="ekfca"),
        "arms.x.by is 'ekfca', and there is no such ranking; there are: influence, ekfac",
    ),
    (one(by="loss", unit="second"), "arms.x.unit is second, and the ranking 'loss' is of samples"),
    (
        one(unit="third"),
        "arms.x.unit is 'third', no head; one is written L3H0 (layer 3, head 0",
    ),
    (one(unit="third"), "or target, second or lowest"),
    (one(unit="L0H4"), "arms.x.unit is L0H4, and the model has layers 0..2 of heads 0..3"),
    (one(mode="dispersed"), "arms.x.mode is 'dispersed', and 'mask' has no mode (only insert)"),
    (one(copies=2), "arms.x.copies is 2, and 'mask' has no copies (only insert)"),
    (one(placement="shift"), "arms.x.placement is 'shift', and 'mask' has no placement"),
    (
        one(do="prune", from_steps=("0%", "5%")),
        "'prune' has no from_steps (only mask, insert, replace)",
    ),
    (one(do="prune", count=5), "'prune' has no count"),
    (one(do="prune", by="loss"), "'prune' has no by"),
    (one(do="steer", count=5), "'steer' has no count"),
    (one(policy="amplify"), "arms.x.policy is 'amplify', and 'mask' has no policy (only steer)"),
    (one(refresh_every=5), "'mask' has no refresh_every (only steer)"),
    (one(do="insert", weight=0.5), "'insert' has no weight"),
    (one(do="replace"), "arms.x replaces the best samples of its steps by themselves"),
    (one(generator="records", count=5), "'mask' has no generator (only insert)"),
    (one(do="insert", generator="records"), "arms.x has a generator and no count"),
    (
        one(do="insert", generator="recrods", count=5),
        "arms.x.generator is 'recrods'; there are repeated_tokens, records",
    ),
    (
        one(do="insert", generator="records", count=5, by="loss"),
        "inserts what the generator 'records' makes, and by chooses samples",
    ),
    (one(steps=("a%", "50%")), "arms.x.steps has 'a%'; a position is a step such as 900"),
    (one(from_steps=("5", "50%")), "arms.x.from_steps has '5'; a position"),
    (one(steps=("50%", "50%")), "arms.x.steps is [50%, 50%]; the start comes before the end"),
    (one(steps=(200, 100)), "arms.x.steps is [200, 100]; the start comes before the end"),
    (
        one(steps=(0, 12_001)),
        "arms.x.steps is [0, 12001]: step 12001 is not among the 0 to 12000 of training.max_steps",
    ),
    (one(steps=(-5, 100)), "step -5 is not among"),
    (one(steps=("-10%", "50%")), "arms.x.steps begins at -10%, before the window"),
    (
        one(steps=("100%", "120%")),
        "arms.x.steps begins at 100%, and arms are compared at the window's end",
    ),
    (
        {
            "m": ArmSettings(),
            "c": ArmSettings(control_of="m"),
            "i": ArmSettings(do="insert", control="c"),
        },
        "arms.i.control is 'c', which does 'mask', and the arm 'insert': their difference would",
    ),
    (
        {"m": ArmSettings(control="p"), "p": ArmSettings(do="prune")},
        "arms.m.control is 'p', which does 'prune', and the arm 'mask'",
    ),
    (
        one(from_steps=("0%", "50%")),
        "arms.x.from_steps is [0%, 50%] and its steps are [0%, 100%]: a mask can only take what",
    ),
    (
        one(from_steps=("0%", "50%"), steps=("50%", "100%")),
        "arms.x.from_steps is [0%, 50%] and its steps are [50%, 100%]",
    ),
    (
        {"x": ArmSettings(fraction=0.1), "y": ArmSettings()},
        "arms.x and arms.y are the same; leave one out",
    ),
    (
        {"x": ArmSettings(), "y": ArmSettings(steps=("0%", "100%"))},
        "arms.x and arms.y are the same",
    ),
    (
        {**one(), "c": ArmSettings(control_of="x"), "d": ArmSettings(control_of="x")},
        "arms.c and arms.d are the same; leave one out, or give one another draw",
    ),
]


@pytest.mark.parametrize(("arms", "said"), ARMS, ids=[said[:50] for _, said in ARMS])
def test_arms_refused(arms: dict[str, ArmSettings], said: str) -> None:
    assert said in refused(settings(arms))


WITH_WINDOW: list[tuple[ArmSettings, str]] = [
    (
        ArmSettings(steps=("0%", "6000%")),
        "[0%, 6000%] (steps 100 to 12100), and training has steps 0 to 12000",
    ),
    (
        ArmSettings(steps=("-60%", "50%")),
        "[-60%, 50%] (steps -20 to 200), and training has steps 0",
    ),
    (ArmSettings(steps=(250, "50%")), "[250, 50%] (steps 250 to 200); the start comes before"),
    (
        ArmSettings(steps=(300, 400)),
        "arms.x.steps begins at step 300, and arms are compared at the window's end, step 300",
    ),
    (ArmSettings(from_steps=("50%", "0%")), "[50%, 0%] (steps 200 to 100); the start"),
]


@pytest.mark.parametrize(("arm", "said"), WITH_WINDOW)
def test_places_are_checked_as_steps_where_the_window_is_fixed(arm: ArmSettings, said: str) -> None:
    assert said in refused(settings({"x": arm}, **FIXED))


def with_control(**fields: Any) -> dict[str, ArmSettings]:
    return one(**fields) | {"c": ArmSettings(control_of="x")}


# The window [100, 300) of the 8 samples of a step has 1,600.
POOLS: list[tuple[dict[str, ArmSettings], dict[str, Any], str]] = [
    (with_control(fraction=0.6), FIXED, "arms.x treats 60% of the 1,600 samples of its interval"),
    (with_control(fraction=0.6), {}, "arms.x treats 60% of the samples and has a random control"),
    (with_control(), {"intervention.fraction": 0.7}, "arms.x treats 70% of the samples"),
    (
        with_control(steps=(100, 101)),
        FIXED | {"training.batch_size": 1, "training.micro_batch": None},
        "arms.x treats 10% of the 1 samples of its interval",
    ),
    (
        with_control(count=801),
        FIXED,
        "arms.x.count is 801, and as many others for its random control, and its interval has "
        "1,600 samples; give at most 800, or choose from more steps",
    ),
    (one(count=1601), FIXED, "arms.x.count is 1,601, and its interval has 1,600 samples; give at"),
    (one(count=401, steps=("50%", 250)), FIXED, "its interval has 400 samples; give at most 400"),
    (one(do="insert", count=401, from_steps=(100, 150)), FIXED, "has 400 samples"),
    (one(count=1001), FIXED | {"corpus.n_rows": 1000}, "its interval has 1,000 samples"),
    (one(count=45_001), {}, "arms.x.count is 45,001, and training has 45,000 samples"),
    (with_control(do="insert", count=22_501), {}, "give at most 22,500"),
    (
        with_control(do="insert", generator="records", count=1601),
        FIXED,
        "arms.x.count is 1,601, and its interval has 1,600 samples",
    ),
    (
        with_control(do="replace", steps=(200, 300), from_steps=(100, 150), fraction=0.6),
        FIXED,
        "arms.x treats 60% of the 400 samples",
    ),
    (
        with_control(do="replace", steps=(200, 300), from_steps=(100, 150), count=201),
        FIXED,
        "arms.x.count is 201, and as many others for its random control, and its interval has 400",
    ),
    (
        with_control(do="replace", steps=("50%", "100%"), from_steps=("0%", "50%"), fraction=0.6),
        {},
        "arms.x treats 60% of the samples",
    ),
    (with_control(do="steer", fraction=0.6), {}, "arms.x treats 60% of the samples"),
    (
        with_control(do="steer", fraction=0.5),
        {"training.batch_size": 5},
        "arms.x masks up to 3 of the 5 samples of a batch and has a random control",
    ),
]


@pytest.mark.parametrize(("arms", "changes", "said"), POOLS, ids=[said[:50] for *_, said in POOLS])
def test_more_samples_than_there_are_are_refused(
    arms: dict[str, ArmSettings], changes: dict[str, Any], said: str
) -> None:
    assert said in refused(settings(arms, **changes))


def test_as_many_samples_as_there_are_are_not_refused() -> None:
    for arms in (
        with_control(fraction=0.5),
        one(fraction=1.0),
        one(count=1600),
        with_control(count=800),
        with_control(do="insert", generator="records", count=1600),
        with_control(do="replace", steps=("40%", "50%"), from_steps=("0%", "40%"), fraction=0.9),
        with_control(do="prune", fraction=0.95),
        with_control(do="steer", fraction=0.5),
        with_control(do="steer", policy="amplify", fraction=0.5),
        one(do="steer", fraction=0.9),
    ):
        for window in (FIXED, {}):
            refuse_contradictions(settings(arms, **window))


def test_a_pool_is_as_large_as_the_stream_makes_it() -> None:
    """The limit that is named is one that the plans can be made with, and one more is not."""
    for fields in ({"steps": ("50%", "75%")}, {"do": "insert", "from_steps": (250, 300)}):
        base = settings(**FIXED, **{"corpus.n_rows": 3000})
        order = BaseOrder(3000, base.training.batch_size, base.training.max_steps)
        steps = steps_of(fields.get("from_steps") or fields.get("steps"), (100, 300))
        limit = len(samples_of(order, steps)) // 2
        made = settings(with_control(count=limit, **fields), **FIXED)
        refuse_contradictions(made)
        ids = samples_of(order, steps)
        Plan.mask(ids[:limit]).random_control(ids, seed=0)
        with pytest.raises(ValueError, match="the random control needs"):
            Plan.mask(ids[: limit + 1]).random_control(ids, seed=0)
        over = settings(with_control(count=limit + 1, **fields), **FIXED)
        assert f"give at most {limit}" in refused(over)


IN_RUN = {"scoring.estimator": "in_run"}


def test_in_run_scores_are_of_the_window_alone() -> None:
    for arms, key in (
        (one(do="insert", from_steps=("-10%", "50%")), "from_steps is [-10%, 50%]"),
        (one(do="insert", from_steps=(300, 400)), "from_steps is [300, 400]"),
        (one(steps=("0%", "110%")), "steps is [0%, 110%]"),
        (one(do="replace", steps=("50%", "110%")), "steps is [50%, 110%]"),
    ):
        said = refused(settings(arms, **IN_RUN))
        assert f"arms.x.{key} and scoring.estimator 'in_run'" in said
        refuse_contradictions(settings(arms))
    for arms in (
        one(do="insert", from_steps=("0%", "100%"), steps=("0%", "120%")),
        one(steps=("25%", "50%")),
    ):
        refuse_contradictions(settings(arms, **IN_RUN))


def test_what_holds_together_is_not_refused() -> None:
    refuse_contradictions(StudySettings())
    refuse_contradictions(settings({}))
    for arms in (
        one(steps=("-50%", 150)),  # branches before the window
        one(do="insert", from_steps=(300, 400)),  # later samples may be chosen
        one(steps=("50%", "100%"), from_steps=(200, 300)),  # the same steps
        one(do="insert", steps=(50, 51), mode="concentrated", placement="shift", count=1000),
        one(do="prune", fraction=0.95),
        one(do="steer", policy="amplify", refresh_every=20, unit="second"),
        one(do="replace", steps=("0%", "10%"), from_steps=("90%", "100%")),
        one(by="loss", which="bottom"),
        one(by="mine"),
        one(do="insert", generator="my_package.made:rows", count=10),
        {**one(), "c": ArmSettings(control_of="x"), "d": ArmSettings(control_of="x", draw=1)},
        {**one(), "p": ArmSettings("prune"), "q": ArmSettings("prune", draw=1)},
    ):
        made = settings(arms, **FIXED, rankings={"mine": RankingSettings(curvature="kfac")})
        refuse_contradictions(made)


def test_the_first_of_several_is_told_and_how_many_there_are() -> None:
    said = refused(settings(one(fraction=2.0, copies=2), **{"training.batch_size": 0}))
    assert said.startswith("training.batch_size is 0") and said.endswith("(2 more after that)")


# -- remarks ----------------------------------------------------------------------------------


def test_remarks_name_arms_without_control_and_few_seeds() -> None:
    arms = {**STANDARD_ARMS, "x": ArmSettings(by="loss"), "y": ArmSettings("prune", fraction=0.5)}
    found = remarks_on(settings(arms), (0,))
    assert len(found) == 2
    assert found[0].startswith("no matched random control: x, y; compared with the baseline only")
    assert found[1] == "one seed: differences have no interval; give more (seeds=5)"
    shared = {**STANDARD_ARMS, "x": ArmSettings(by="loss", control="mask-random")}
    assert remarks_on(settings(shared), (0, 1, 2))[0].startswith("3 seeds: intervals")
    assert remarks_on(settings(shared), tuple(range(5))) == ()
    # An arm that others are compared with is itself a control.
    serving = {"x": ArmSettings(control="z"), "z": ArmSettings(by="random")}
    assert remarks_on(settings(serving), tuple(range(5))) == ()


def test_remarks_on_controls_that_were_drawn_for_an_arm_of_another_kind() -> None:
    seeds = tuple(range(5))
    arms = {
        **STANDARD_ARMS,
        "more": ArmSettings(do="insert", fraction=0.2, copies=3, control="insert-random"),
        "same": ArmSettings(do="insert", fraction=0.1, unit="second", control="insert-random"),
    }
    (said,) = remarks_on(settings(arms, **{"scoring.units": "all"}), seeds)
    assert said == (
        "more is compared with insert-random, which was drawn for insert-top, and differs from "
        "that one in fraction, copies: no matched control (control_of=more is)"
    )


def test_remarks_on_what_hangs_on_the_window() -> None:
    seeds = tuple(range(5))
    numbered = with_control(steps=("50%", 9000))
    (said,) = remarks_on(settings(numbered), seeds)
    assert said.startswith("steps of x are numbers, and the window is yet to be found")
    assert remarks_on(settings(with_control(steps=("50%", 290)), **FIXED), seeds) == ()
    arms = {**STANDARD_ARMS, "k": ArmSettings(by="kfac", control="mask-random")}
    made = settings(arms, **IN_RUN, rankings={"mine": RankingSettings(probe_function="attention")})
    (said,) = remarks_on(made, seeds)
    assert said.startswith("scoring.estimator is in_run, and kfac would need another curvature")
    assert "by replay at mid" in said
    assert remarks_on(settings(arms), seeds) == ()
    assert remarks_on(settings(**IN_RUN), seeds) == ()


def test_remarks_on_scores_order_passes_and_subsets() -> None:
    seeds = tuple(range(5))
    other = one(unit="second", control=None) | {"c": ArmSettings(control_of="x")}
    (said,) = remarks_on(settings(other), seeds)
    assert said.startswith("scoring.units is target, and x ranks by another head")
    assert remarks_on(settings(other, **{"scoring.units": "all"}), seeds) == ()
    megatron = {"corpus.kind": "megatron", "corpus.path": "p"}
    (said,) = remarks_on(settings(**megatron), seeds)
    assert said.startswith("corpus.shuffle is true")
    few = settings(**megatron, **FIXED, **{"corpus.shuffle": False, "corpus.n_rows": 2399})
    (said,) = remarks_on(few, seeds)
    assert said.startswith("corpus.n_rows is 2,399, and 2,400 samples are trained on")
    (said,) = remarks_on(settings(**{"subsets.count": 4}), seeds)
    assert said.startswith("4 subsets a seed")
