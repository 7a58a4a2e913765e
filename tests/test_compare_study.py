"""A study of every kind of arm, with a window that the recipe names: plans, rankings, subsets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mda_lightning.corpora import TokenRows
from mda_lightning.interventions import Insert, Mask, Plan, Prune, Replace
from mda_lightning.recipes.studies import study as study_module
from mda_lightning.recipes.studies.arms import step_of, steps_of
from mda_lightning.recipes.studies.building import build_data, build_module, study_order
from mda_lightning.recipes.studies.runs import check_branch
from mda_lightning.recipes.studies.settings import ArmSettings
from mda_lightning.recipes.studies.study import Study, StudyFolderError
from mda_lightning.recipes.studies.study_corpus import StudyCorpus, study_corpus
from mda_lightning.schedule import BASE, Schedule
from mda_lightning.store.rankings import Rankings
from tests.study_runs import TINY, run_here

WINDOW = (20, 40)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> StudyCorpus:
    return study_corpus(TINY.corpus, tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def study(corpus: StudyCorpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_module, "run_jobs", run_here)
        _study(folder, corpus).run()
    return folder


def _study(folder: Path, corpus: StudyCorpus, **changes) -> Study:
    values = {"settings": TINY, "seeds": (3,), "held_out": corpus.held_out.folder} | changes
    return Study(folder, values.pop("settings"), values.pop("seeds"), corpus.rows.folder, **values)


def _seed(folder: Path) -> dict:
    return json.loads((folder / "study.json").read_text())["seeds"][0]


def _plan(folder: Path, name: str) -> Plan:
    return Plan.load(folder / "seed-3" / "plans" / f"{name}.json")


def _in_window(corpus: StudyCorpus, steps: tuple[int, int] = WINDOW) -> np.ndarray:
    order = study_order(TINY, corpus.rows, 3)
    return np.concatenate([order.ids(step) for step in range(*steps)])


def test_every_arm_ends_at_the_window_and_is_in_the_file(study: Path) -> None:
    stored = json.loads((study / "study.json").read_text())
    seed = stored["seeds"][0]
    assert seed["status"] == "complete", seed
    assert set(seed["arms"]) == {"baseline", *TINY.arms}
    assert (seed["branch"], seed["end"], seed["measured_at"]) == (20, 40, [35, 40])
    for name, where in seed["arms"].items():
        curves = pd.read_parquet(study / where / "unit_metrics.parquet")
        assert curves["step"].max() == 40, name
        assert {"held_out_loss", "icl/gain@63", "ablation/logprob"} <= set(curves["metric"]), name
    assert stored["arms"]["mask-loss"]["control"] == "mask-random"
    assert stored["arms"]["prune"]["control"] is None
    assert stored["arms"]["generated"]["do"] == "insert"
    values = pd.read_parquet(study / seed["base"] / "unit_metrics.parquet")
    late = values[(values["metric"] == "previous_token") & values["step"].isin([35, 40])]
    means = late.groupby(["layer", "head"])["value"].mean().sort_values(ascending=False)
    heads = [f"L{int(layer)}H{int(head)}" for layer, head in means.index]
    assert seed["units"] == {"target": heads[0], "second": heads[1], "lowest": heads[-1]}


def test_rankings_hold_what_was_asked_for(study: Path, corpus: StudyCorpus) -> None:
    rankings = Rankings.open(study / _seed(study)["rankings"])
    assert set(rankings.names) == {"influence", "loss", "repeated_ngrams", "dot", "random"}
    inside = np.unique(_in_window(corpus))
    assert rankings.provenance["intervals"] == [[10, 40]]  # the replacement's samples, too
    for name in rankings.names:
        unit = _seed(study)["target"] if rankings.units(name) else None
        ids, values = rankings.values(name, unit, steps=WINDOW)
        np.testing.assert_array_equal(ids, inside)
        assert np.isfinite(values).all(), name
        assert len(rankings.values(name, unit)[0]) == len(np.unique(_in_window(corpus, (10, 40))))
    assert len(rankings.units("influence")) == 4 and rankings.units("loss") == ()
    with pytest.raises(KeyError, match="it has influence"):
        rankings.values("nothing")
    with pytest.raises(KeyError, match="no head 'L9H9'"):
        rankings.values("dot", "L9H9")


def test_the_loss_ranking_is_the_loss_at_the_midpoint(study: Path, corpus: StudyCorpus) -> None:
    seed = _seed(study)
    module = build_module(TINY, corpus.rows, 3)
    held = torch.load(study / seed["base"] / "checkpoints" / "step-30.ckpt", weights_only=True)
    module.load_state_dict(held["state_dict"])
    ids, values = Rankings.open(study / seed["rankings"]).values("loss", steps=WINDOW)
    tokens = torch.from_numpy(corpus.rows.get(ids[:5]))
    for row, value in zip(tokens, values[:5], strict=True):
        loss = module.model(input_ids=row[None, :-1], labels=row[None, :-1]).logits
        expected = torch.nn.functional.cross_entropy(loss[0], row[1:])
        assert value == pytest.approx(float(expected.detach()), rel=1e-4)


def test_plans_do_what_the_arms_say(study: Path, corpus: StudyCorpus) -> None:
    seed = _seed(study)
    rankings = Rankings.open(study / seed["rankings"])
    n = len(np.unique(_in_window(corpus)))

    def best(name: str, count: int, *, unit: str | None = None, sign: int = -1, steps=WINDOW):
        ids, values = rankings.values(name, unit, steps=steps)
        return set(ids[np.argsort(sign * values, kind="stable")][:count].tolist())

    def treated(name: str, kind: type) -> Insert | Mask:
        (operation,) = _plan(study, name).operations
        assert isinstance(operation, kind)
        return operation

    share = round(0.1 * n)
    target, second = seed["units"]["target"], seed["units"]["second"]
    assert set(treated("mask-top", Mask).sample_ids) == best("influence", share, unit=target)
    assert set(treated("mask-loss", Mask).sample_ids) == best("loss", share)
    assert set(treated("mask-ngrams", Mask).sample_ids) == best("repeated_ngrams", share, sign=1)
    assert set(treated("insert-second", Insert).sample_ids) == best("influence", share, unit=second)
    control = treated("mask-random", Mask).sample_ids
    assert len(control) == share and set(control) <= set(_in_window(corpus))
    assert not set(control) & best("influence", share, unit=target)
    (prune,) = _plan(study, "prune").operations
    assert isinstance(prune, Prune) and prune.fraction == 0.5 and prune.steps == WINDOW
    (replacement,) = _plan(study, "replace").operations
    assert isinstance(replacement, Replace) and replacement.steps == (30, 40)
    out = len(np.unique(_in_window(corpus, (30, 40))))
    late = best("influence", round(0.2 * out), unit=target, steps=(30, 40))
    early = best("influence", len(late), unit=target, steps=(10, 20))
    assert set(replacement.sample_ids) == late and set(replacement.by) == early
    (others,) = _plan(study, "replace-random").operations
    np.testing.assert_array_equal(others.sample_ids, replacement.sample_ids)
    assert set(others.by) <= set(_in_window(corpus, (10, 20))) and not set(others.by) & early
    generated = _plan(study, "generated")
    assert len(generated.treated_ids) == 7 and len(generated.sources) == 1


def test_insertions_of_a_group_take_the_same_places(study: Path, corpus: StudyCorpus) -> None:
    order = study_order(TINY, corpus.rows, 3)
    standing = {}
    for name in ("insert-top", "insert-random", "insert-second"):
        schedule = Schedule(order, _plan(study, name))
        batches = [schedule.batch(step) for step in range(*WINDOW)]
        standing[name] = [np.where(b.provenance == BASE, b.sample_ids, -1) for b in batches]
    np.testing.assert_array_equal(standing["insert-top"], standing["insert-random"])
    np.testing.assert_array_equal(standing["insert-top"], standing["insert-second"])


def test_a_steered_arm_has_as_many_random_masks(study: Path) -> None:
    decided = Plan.load(study / _seed(study)["arms"]["suppress"] / "steering" / "plan.json")
    control = _plan(study, "suppress-random")
    counts = [sum(len(op.sample_ids) for op in plan.operations) for plan in (decided, control)]
    assert counts[0] == counts[1] == 2 * 20  # a quarter of 8, in 20 steps
    assert not np.intersect1d(decided.treated_ids, control.treated_ids).size


def test_subsets_are_trained_as_a_plain_loop_would(study: Path, corpus: StudyCorpus) -> None:
    """One subset again by hand: AdamW, clipping and the mean over the whole batch."""
    seed = _seed(study)
    held = np.load(study / seed["subsets"])
    ids, kept, mu = held["sample_ids"], held["kept"], held["mu"]
    np.testing.assert_array_equal(ids, np.unique(_in_window(corpus, (30, 36))))
    assert kept.shape == (3, len(ids)) and (kept.sum(1) == round(0.5 * len(ids))).all()
    assert len({tuple(row) for row in kept}) == 3
    checkpoint = torch.load(
        study / seed["base"] / "checkpoints" / "step-30.ckpt", weights_only=True
    )
    module = build_module(TINY, corpus.rows, 3)
    module.load_state_dict(checkpoint["state_dict"])
    states = checkpoint["optimizer_states"][0]
    decayed = [p for p in module.parameters() if p.ndim > 1]
    plain = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    optimizer.load_state_dict(states)
    keep = set(ids[kept[1]].tolist())
    order = study_order(TINY, corpus.rows, 3)
    for step in range(30, 36):
        batch = order.ids(step)
        tokens = torch.from_numpy(corpus.rows.get(batch))
        logits = module.model(input_ids=tokens[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:], reduction="none"
        ).mean(1)
        weights = torch.tensor([float(one in keep) for one in batch.tolist()])
        optimizer.zero_grad()
        ((losses * weights).sum() / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    from mda_lightning.recipes.studies.building import study_mechanism

    layer, head = int(seed["target"][1]), int(seed["target"][3])
    again = study_mechanism(TINY, corpus.rows).scores(module.model).mean[layer, head]
    assert float(again) == pytest.approx(float(mu[1]), abs=2e-5)
    assert len({*mu.tolist(), float(held["mu_before"])}) == 4


def test_finished_runs_are_kept_and_arms_can_be_added(
    study: Path, corpus: StudyCorpus, monkeypatch
) -> None:
    monkeypatch.setattr(study_module, "run_jobs", run_here)
    states: list[tuple[str, str]] = []
    more = TINY.arms | {"mask-dot": ArmSettings(do="mask", by="dot", control="mask-random")}
    settings = replace(TINY, arms=more)
    _study(
        study, corpus, settings=settings, watch=lambda job, _, s: states.append((job.title, s))
    ).run()
    new = [title for title, state in states if state == "finished"]
    assert new == ["seed 3: mask-dot"]
    assert _seed(study)["status"] == "complete" and "mask-dot" in _seed(study)["arms"]
    other = replace(TINY, training=replace(TINY.training, learning_rate=2e-3))
    with pytest.raises(StudyFolderError, match=r"other settings \(training.learning_rate 0.01"):
        _study(study, corpus, settings=other).run()


def test_what_another_recipe_made_is_not_pooled_with_what_this_one_makes(
    corpus: StudyCorpus, tmp_path: Path, monkeypatch
) -> None:
    """Seeds and arms of a former version of the recipe leave the study as soon as it changes."""
    monkeypatch.setattr(study_module, "run_jobs", run_here)
    arms = {"a": ArmSettings(), "b": ArmSettings(control_of="a"), "c": ArmSettings(by="loss")}
    former = replace(TINY, arms=arms, subsets=replace(TINY.subsets, count=0))
    _study(tmp_path / "s", corpus, settings=former, seeds=(3, 4)).run()
    changed = replace(former, arms=arms | {"a": ArmSettings(fraction=0.4)})

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(study_module, "run_jobs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _study(tmp_path / "s", corpus, settings=changed, seeds=(3,)).run()
    stored = json.loads((tmp_path / "s" / "study.json").read_text())
    for seed in stored["seeds"]:
        assert set(seed["arms"]) == {"baseline", "c"} and seed["status"] == "running"
    monkeypatch.setattr(study_module, "run_jobs", run_here)
    _study(tmp_path / "s", corpus, settings=changed, seeds=(3,)).run()
    first, second = json.loads((tmp_path / "s" / "study.json").read_text())["seeds"]
    assert set(first["arms"]) == {"baseline", "a", "b", "c"} and first["status"] == "complete"
    assert set(second["arms"]) == {"baseline", "c"}
    inside = len(np.unique(_in_window(corpus)))
    assert first["treated"] == {
        "a": round(0.4 * inside),
        "b": round(0.4 * inside),
        "c": round(0.1 * inside),
    }


def test_a_masks_samples_stand_in_its_own_steps(corpus: StudyCorpus, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(study_module, "run_jobs", run_here)
    arms = {"late": ArmSettings(steps=("50%", "100%")), "random": ArmSettings(control_of="late")}
    settings = replace(TINY, arms=arms, subsets=replace(TINY.subsets, count=0))
    _study(tmp_path / "s", corpus, settings=settings).run()
    late = set(_in_window(corpus, (30, 40)))
    for name in arms:
        (operation,) = Plan.load(tmp_path / "s" / "seed-3" / "plans" / f"{name}.json").operations
        assert operation.steps == (30, 40) and set(operation.sample_ids) <= late
        assert len(operation.sample_ids) == round(0.1 * len(late))


def test_two_draws_of_a_control_take_the_same_places(
    study: Path, corpus: StudyCorpus, tmp_path: Path
) -> None:
    from mda_lightning.recipes.studies.arms import SeedFacts, plans_of

    seed, order = _seed(study), study_order(TINY, corpus.rows, 3)
    arms = {
        "top": ArmSettings(do="insert"),
        "first": ArmSettings(control_of="top"),
        "other": ArmSettings(control_of="top", draw=1),
    }
    facts = SeedFacts(
        seed=3,
        window=WINDOW,
        units=seed["units"],
        corpus_hash=corpus.rows.content_hash,
        order=order,
        rankings=Rankings.open(study / seed["rankings"]),
    )
    plans = plans_of(replace(TINY, arms=arms), facts)
    places = []
    for plan in plans.values():
        batches = [Schedule(order, plan).batch(step) for step in range(*WINDOW)]
        places.append([(b.provenance != BASE).tolist() for b in batches])
    assert places[0] == places[1] == places[2]
    ids = [set(plan.operations[0].sample_ids.tolist()) for plan in plans.values()]
    assert not ids[0] & ids[1] and not ids[0] & ids[2] and ids[1] != ids[2]


def test_controls_of_steered_arms_choose_where_the_steering_chose(corpus: StudyCorpus) -> None:
    from mda_lightning.recipes.studies.arms import SeedFacts, steered_control

    order = study_order(TINY, corpus.rows, 3)
    recent = np.unique(_in_window(corpus, (10, 30)))
    decided = Plan.mask(order.ids(31)[:2], steps=(31, 32)) | Plan.insert(
        recent[:5], steps=(30, 40), placement="shift"
    )
    facts = SeedFacts(3, WINDOW, {}, corpus.rows.content_hash, order, None)
    arm = ArmSettings(do="steer", policy="amplify", refresh_every=10)
    mask, insert = steered_control(decided, arm, 0, facts).operations
    assert set(mask.sample_ids) <= set(order.ids(31)[2:].tolist()) and len(mask.sample_ids) == 2
    assert set(insert.sample_ids) <= set(recent[5:].tolist()) and len(insert.sample_ids) == 5
    assert (insert.steps, insert.mode) == ((30, 40), "dispersed")
    again = steered_control(decided, arm, 1, facts).operations[1]
    assert set(again.sample_ids) != set(insert.sample_ids)


def test_studies_share_runs_in_a_common_folder(
    corpus: StudyCorpus, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(study_module, "run_jobs", run_here)
    quick = replace(TINY, subsets=replace(TINY.subsets, count=0))
    first = replace(quick, arms={"a": ArmSettings(), "b": ArmSettings(control_of="a")})
    second = replace(quick, arms={"x": ArmSettings(), "y": ArmSettings(do="prune", fraction=0.25)})
    states: list[str] = []
    for name, settings in (("one", first), ("two", second)):
        states.clear()
        _study(
            tmp_path / name,
            corpus,
            settings=settings,
            shared=tmp_path / "shared",
            watch=lambda job, _, s: states.append(f"{job.title} {s}"),
        ).run()
    assert states == [
        "seed 3: base run kept",
        "seed 3: rankings kept",
        "seed 3: x kept",  # as the first study's arm a
        "seed 3: y finished",
    ]
    arms = _seed(tmp_path / "two")["arms"]
    assert (tmp_path / "two" / arms["x"] / "unit_metrics.parquet").is_file()


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(
    study: Path, corpus: StudyCorpus, tmp_path: Path, monkeypatch
) -> None:
    """The resumed base run leaves the same numbers as the one that was not interrupted."""
    from mda_lightning.recipes.studies import runs

    settings = replace(TINY, training=replace(TINY.training, checkpoint_every_n_steps=8))
    spec = {
        "settings": settings.to_dict(),
        "seed": 3,
        "branch": 20,
        "corpus": str(corpus.rows.folder),
        "held_out": str(corpus.held_out.folder),
        "wandb": "off",
    }

    class Killed(BaseException):
        pass

    def die(self, trainer, *_):
        if trainer.global_step == 21:
            raise Killed

    with monkeypatch.context() as patch:
        from mda_lightning.recipes.studies.building import ProgressFile

        patch.setattr(ProgressFile, "on_train_batch_end", die)
        with pytest.raises(Killed):
            runs.run_base(spec, tmp_path)
    assert [path.name for path in (tmp_path / "resume").iterdir()] == ["epoch=0-step=16.ckpt"]
    steps: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            ProgressFile, "on_train_batch_end", lambda self, t, *_: steps.append(t.global_step)
        )
        result = runs.run_base(spec, tmp_path)
    assert steps[0] == 17 and result["stopped_at"] == 40
    columns = ["step", "metric", "layer", "head", "value"]
    again = pd.read_parquet(tmp_path / "unit_metrics.parquet")[columns]
    whole = pd.read_parquet(study / _seed(study)["base"] / "unit_metrics.parquet")[columns]
    keys = ["step", "metric", "layer", "head"]
    pd.testing.assert_frame_equal(
        again.sort_values(keys, ignore_index=True), whole.sort_values(keys, ignore_index=True)
    )


def test_a_branch_checkpoint_without_optimizer_state_is_refused(
    study: Path, tmp_path: Path
) -> None:
    whole = study / _seed(study)["base"] / "checkpoints" / "step-20.ckpt"
    check_branch(whole)
    held = torch.load(whole, weights_only=False)
    del held["optimizer_states"]
    torch.save(held, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="holds no optimizer state"):
        check_branch(tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="no checkpoint at"):
        check_branch(tmp_path / "absent.ckpt")


def test_weights_of_a_later_step_need_permission(corpus: StudyCorpus, tmp_path: Path) -> None:
    first = build_module(TINY, corpus.rows, 5)
    folder = tmp_path / "step0"
    first.model.save_pretrained(folder)
    taken = replace(TINY, model=replace(TINY.model, weights=str(folder)))
    module = build_module(taken, corpus.rows, 3)
    for own, theirs in zip(module.parameters(), first.parameters(), strict=True):
        assert torch.equal(own, theirs)
    later = tmp_path / "step512"
    first.model.save_pretrained(later)
    taken = replace(TINY, model=replace(TINY.model, weights=str(later)))
    with pytest.raises(ValueError, match="of step 512 and have no optimizer state"):
        build_module(taken, corpus.rows, 3)
    allowed = replace(taken, model=replace(taken.model, fresh_optimizer=True))
    build_module(allowed, corpus.rows, 3)


def test_positions_are_steps_or_places_in_the_window() -> None:
    assert [step_of(at, (100, 200)) for at in (7, "0%", "50%", "100%", "-20%", "110%")] == [
        7,
        100,
        150,
        200,
        80,
        210,
    ]
    assert steps_of(None, (100, 200)) == (100, 200)
    assert steps_of(("25%", 190), (100, 200)) == (125, 190)
    with pytest.raises(ValueError, match="no step lies between"):
        steps_of(("50%", "50%"), (100, 200))
    with pytest.raises(ValueError, match="not before step 0"):
        steps_of(("-200%", "0%"), (100, 200))


def test_the_data_module_of_an_arm_may_branch(corpus: StudyCorpus) -> None:
    rows: TokenRows = corpus.rows
    assert build_data(TINY, rows, 3, branch=True).branch
    assert not build_data(TINY, rows, 3).branch
