"""OnlineSteering: what is decided is what the scores say, holds at once, and replays as a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from in_run_fits import HEADS, INDUCTION, UNITS, MovingModule, scoring
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from steered_runs import (
    BATCH,
    STEPS,
    amplify,
    corpus,
    earlier_scores,
    policies,
    replayed,
    steered,
    suppress,
    weights,
)
from training import assert_bit_identical, fit, training_state

from mda_lightning.callbacks import OnlineSteering
from mda_lightning.callbacks.steering import Decisions, DelayLevel, FromScores, ReachLevel
from mda_lightning.datamodules import TokenDataModule
from mda_lightning.influence import replay_scores
from mda_lightning.influence.inverse_probes import CurvatureSettings, inverse_probes
from mda_lightning.interventions import Insert, Mask, Plan
from mda_lightning.schedule import INSERTED
from mda_lightning.store import ScoreTable

KINDS = ["suppress", "amplify", "both", "mask from scores", "insert from scores"]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Seen(Callback):
    """What every optimizer step was trained on."""

    def __init__(self) -> None:
        self.batches: dict[int, list[tuple[list[int], list[float], list[int]]]] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        fields = ("sample_id", "weight", "provenance")
        micro = tuple(batch[name].tolist() for name in fields)
        self.batches.setdefault(trainer.global_step, []).append(micro)

    def step(self, step: int) -> tuple[list[int], list[float], list[int]]:
        parts = self.batches[step]
        return tuple([one for part in parts for one in part[i]] for i in range(3))


@pytest.mark.parametrize(("accumulate", "num_workers"), [(1, 0), (2, 0), (1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_of_a_steered_run_trains_bit_for_bit_the_same(
    tmp_path: Path, kind: str, accumulate: int, num_workers: int
) -> None:
    """From plan.json, and from the audit table alone; what was trained on is what was decided."""
    rows = corpus(tmp_path)
    earlier_scores(tmp_path)
    seen = Seen()
    run, _, _ = steered(
        tmp_path / "run",
        rows,
        policies(kind, tmp_path),
        seen,
        accumulate=accumulate,
        num_workers=num_workers,
    )
    decisions = Decisions.open(tmp_path / "run")
    plan = Plan.load(tmp_path / "run" / "steering" / "plan.json")
    assert decisions.plan().content_hash == plan.content_hash
    assert len(decisions) == len(plan.operations) >= 2
    again, other = replayed(tmp_path / "again", rows, plan, accumulate_grad_batches=accumulate)
    assert_bit_identical(training_state(again), training_state(run))
    untouched, _ = replayed(tmp_path / "plain", rows, None, accumulate_grad_batches=accumulate)
    name = "net.lm.gpt_neox.embed_in.weight"
    assert not torch.equal(weights(untouched)[name], weights(run)[name])
    for step in range(STEPS):
        ids, weight, provenance = seen.step(step)
        batch = other.schedule.batch(step)
        assert (ids, weight) == (batch.sample_ids.tolist(), batch.weights.tolist())
        assert provenance == batch.provenance.tolist()
        # The table names every place that is not as the base order has it.
        frame = decisions.frame[decisions.frame["run_step"] == step]
        changed = np.flatnonzero((batch.weights != 1) | (batch.provenance == INSERTED))
        assert sorted(set(frame["slot"])) == changed.tolist()
        for row in frame.itertuples():
            assert batch.sample_ids[int(row.slot)] == row.sample_id
            assert row.run_step >= row.decided_at


class KeepWeights(Callback):
    """The model's weights before every step."""

    def __init__(self) -> None:
        self.before: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        state = module.net["lm"].state_dict()
        self.before.setdefault(trainer.global_step, {k: v.clone() for k, v in state.items()})


@pytest.mark.parametrize(("which", "accumulate"), [("top", 1), ("top", 2), ("bottom", 1)])
def test_suppress_masks_what_replay_ranks_first_at_the_weights_before_the_step(
    tmp_path: Path, which: str, accumulate: int
) -> None:
    """By hand: IHVPs at the weights of every fourth step, on the 8 samples trained on before."""
    rows = corpus(tmp_path)
    kept = KeepWeights()
    policy = suppress(which=which)
    _, _, data = steered(tmp_path, rows, policy, kept, accumulate=accumulate, in_run=False)
    decisions = Decisions.open(tmp_path)
    base = data.schedule.order
    model, ihvp, carry = MovingModule().net["lm"].eval(), None, 0.0
    for step in range(STEPS):
        model.load_state_dict(kept.before[step])
        if step % 4 == 0:
            latest = data.schedule.batch(max(step - 1, 0))
            earlier = data.schedule.batch(max(step - 2, 0))
            ids = np.concatenate([b.sample_ids[b.weights > 0] for b in (earlier, latest)])[-8:]
            if step == 0:
                ids = base.ids(0)
            groups = [torch.from_numpy(rows.get(g)) for g in (ids[:4], ids[4:])]
            found = inverse_probes(model, {"f": INDUCTION}, HEADS, groups, CurvatureSettings())
            ihvp = found.ihvps["f"]
        ids = np.sort(base.ids(step))
        tokens = [torch.from_numpy(rows.get(group)) for group in (ids[:4], ids[4:])]
        scores = replay_scores(model, ihvp, tokens).values.double().sum((1, 2)).numpy()
        # 2.4 samples a step, what is not whole is carried over; none of the other sign.
        wanted = 2.4 + carry
        order = np.argsort(-scores if which == "top" else scores)[: int(wanted + 1e-6)]
        expected = np.sort(ids[order[scores[order] > 0 if which == "top" else scores[order] < 0]])
        carry = min(wanted - len(expected), 1.0)
        frame = decisions.frame[decisions.frame["decided_at"] == step]
        assert sorted(frame["sample_id"]) == expected.tolist()
        own = dict(zip(ids, scores, strict=True))
        for row in frame.itertuples():
            assert row.score == pytest.approx(own[row.sample_id], rel=1e-4, abs=1e-9)
        assert set(frame["score_step"]) == {step} and set(frame["ihvp_step"]) == {step // 4 * 4}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_masked_step_has_the_gradient_of_the_kept_over_the_original_batch(
    tmp_path: Path, accumulate: int
) -> None:
    class Gradients(KeepWeights):
        def __init__(self) -> None:
            super().__init__()
            self.found: dict[int, dict[str, torch.Tensor]] = {}

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            own = module.net["lm"].named_parameters()
            self.found[trainer.global_step] = {n: p.grad.clone() for n, p in own}

    rows = corpus(tmp_path)
    kept = Gradients()
    _, _, data = steered(
        tmp_path, rows, suppress(), kept, accumulate=accumulate, in_run=False, max_steps=6
    )
    model = MovingModule().net["lm"]
    for step in range(6):
        batch = data.schedule.batch(step)
        tokens = torch.from_numpy(rows.get(batch.sample_ids[batch.weights > 0]))
        assert 0 < len(tokens) < BATCH
        model.load_state_dict(kept.before[step])
        model.zero_grad()
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
        )
        (loss / (BATCH * 16)).backward()
        scale = max(float(p.grad.abs().max()) for p in model.parameters())
        for name, parameter in model.named_parameters():
            found = kept.found[step][name]
            torch.testing.assert_close(found, parameter.grad, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("which", ["top", "bottom"])
def test_amplify_inserts_the_recent_top_share_of_the_in_run_table(
    tmp_path: Path, which: str
) -> None:
    rows = corpus(tmp_path)
    policy = amplify(which=which, copies=2, over_steps=6, every_n_steps=4)
    _, _, data = steered(tmp_path, rows, policy)
    table = ScoreTable.open(tmp_path / "scores")
    scored = table.frame(table.units[0])[["step", "sample_id"]].copy()
    scored["score"] = sum(table.frame(unit)["score"] for unit in table.units)
    decisions = Decisions.open(tmp_path).frame
    assert sorted(set(decisions["decided_at"])) == [3, 7, 11]
    for step, frame in decisions.groupby("decided_at"):
        recent = scored[(scored["step"] >= step - 3) & (scored["step"] < step)]
        means = recent.groupby("sample_id")["score"].mean()
        ranked = means.sort_values(ascending=which == "bottom")
        expected = sorted(ranked.index[: round(0.25 * len(ranked))])
        places = frame.groupby("sample_id").size()
        assert places.index.tolist() == expected and set(places) == {2}
        last = min(step + 6, STEPS)
        assert frame["run_step"].between(step, last - 1).all()
        for row in frame.itertuples():
            assert row.score == pytest.approx(means[row.sample_id], rel=1e-4)
    inserted = sum(int((data.schedule.batch(s).provenance == INSERTED).sum()) for s in range(STEPS))
    assert inserted == len(decisions)


def test_from_scores_masks_and_inserts_by_the_earlier_table(tmp_path: Path) -> None:
    rows = corpus(tmp_path)
    table = ScoreTable.open(earlier_scores(tmp_path))
    total = sum(table.mean_scores(unit)[1] for unit in table.units)
    ranked = np.argsort(-total)
    top = set(ranked[:30].tolist())
    masks = FromScores(table, "mask", every_n_steps=4)
    _, _, data = steered(tmp_path / "mask", rows, masks, in_run=False)
    for step in range(STEPS):
        batch = data.schedule.batch(step)
        assert batch.weights.tolist() == [float(i not in top) for i in batch.sample_ids.tolist()]
    inserts = FromScores(table, "insert", every_n_steps=4, per_step=1.4, share=0.02)
    _, _, data = steered(tmp_path / "insert", rows, inserts, in_run=False)
    frame = Decisions.open(tmp_path / "insert").frame
    # 1.4 a step: 5, 5 (and .6, .2 left), 6, and 2 of the last two steps; best first, then again.
    expected = [ranked[np.arange(a, b) % 6] for a, b in ((0, 5), (5, 11), (11, 16), (16, 19))]
    for (_, part), ids in zip(frame.groupby("decision"), expected, strict=True):
        assert sorted(part["sample_id"]) == sorted(ids.tolist())


def test_a_mask_from_scores_ends_with_its_span_or_its_push(tmp_path: Path) -> None:
    """And leaves alone what is inserted later, what the plan masks, and what another masked."""
    rows = corpus(tmp_path)
    table = str(earlier_scores(tmp_path, least=0.1))

    def masked(folder: str, *policy: Any, **settings: Any) -> list[int]:
        _, _, data = steered(tmp_path / folder, rows, policy, in_run=False, **settings)
        batches = [data.schedule.batch(step) for step in range(STEPS)]
        return [int((batch.weights == 0).sum()) for batch in batches]

    whole = [BATCH if 2 <= step < 4 else 0 for step in range(STEPS)]
    assert masked("a", FromScores(table, "mask", share=1.0, active=(2, 4))) == whole
    late = DelayLevel(1.0, until_step=3, near=0.0)
    ends = [BATCH if step < 3 else 0 for step in range(STEPS)]
    assert masked("b", FromScores(table, "mask", share=1.0), target=late) == ends
    named = np.arange(300)
    plan = Plan.mask(named, (2, 3)) | Plan.mask(named[::2], (5, 6))
    first = FromScores(table, "mask", share=0.5, name="first", active=(3, 9))
    both = [first, FromScores(table, "mask", share=1.0, active=(2, 9))]
    counts = masked("c", *both, plan=plan)
    assert counts[2:9] == [BATCH] * 7
    frame = Decisions.open(tmp_path / "c").frame
    # A place is in the table once, and not where the plan had masked it.
    assert not frame.duplicated(["run_step", "slot"]).any() and frame["run_step"].notna().all()
    assert 2 not in set(frame["run_step"])
    of_five = (frame["run_step"] == 5).sum()
    assert of_five == (steered_base(rows).ids(5) % 2 == 1).sum()


def steered_base(rows: Any) -> Any:
    return TokenDataModule(rows, batch_size=BATCH, n_steps=STEPS, seed=2).schedule.order


def test_what_an_insertion_from_scores_puts_ends_with_its_span(tmp_path: Path) -> None:
    rows = corpus(tmp_path)
    table = str(earlier_scores(tmp_path))
    inserts = FromScores(table, "insert", active=(2, 5), every_n_steps=50, per_step=2.0)
    _, _, data = steered(tmp_path, rows, inserts, in_run=False)
    counts = [int((data.schedule.batch(s).provenance == INSERTED).sum()) for s in range(STEPS)]
    assert sum(counts[2:5]) == sum(counts) == 6


@pytest.mark.parametrize("which", ["top", "bottom"])
def test_no_sample_of_the_other_sign_is_taken(tmp_path: Path, which: Any) -> None:
    """However large the share: the others would push the other way."""
    rows = corpus(tmp_path)
    table = ScoreTable.open(earlier_scores(tmp_path))
    total = sum(table.mean_scores(unit)[1] for unit in table.units)
    for name, policy in (
        ("suppress", suppress(share=1.0, which=which)),
        ("amplify", amplify(share=1.0, which=which)),
        ("scores", FromScores(table, "mask", share=1.0, which=which)),
        ("insert", FromScores(table, "insert", share=1.0, which=which, per_step=2.0)),
    ):
        with pytest.warns(UserWarning, match="samples of its share do not .* are left out"):
            steered(tmp_path / name, rows, policy)
        frame = Decisions.open(tmp_path / name).frame
        assert len(frame) > 10
        assert ((frame["score"] > 0) == (which == "top")).all()
        if name == "scores":
            met = np.concatenate([steered_base(rows).ids(step) for step in range(STEPS)])
            sign = total[met] > 0 if which == "top" else total[met] < 0
            assert sorted(frame["sample_id"]) == sorted(met[sign])


def test_foreign_samples_of_a_table_are_not_inserted(tmp_path: Path) -> None:
    rows = corpus(tmp_path)
    table = ScoreTable.write(
        tmp_path / "earlier",
        sample_id=[3, 5, 2**40 + 1],
        step=0,
        values=np.full((3, len(UNITS), 1), [[[1.0]], [[2.0]], [[3.0]]]),
        loss=np.ones(3),
        units=UNITS,
        blocks=["QK"],
        estimator="in_run",
        provenance={},
    )
    policy = FromScores(table, "insert", share=1.0)
    with pytest.warns(UserWarning, match="1 of the 3 samples of .* are no rows of the corpus"):
        steered(tmp_path / "run", rows, policy, in_run=False)
    assert set(Decisions.open(tmp_path / "run").frame["sample_id"]) == {3, 5}


class SavesBefore(Callback):
    """Saves a checkpoint of a step before the steering callback has acted after it."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("saved", ["after", "before"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop_at", [5, 7])
def test_resumed_it_decides_and_trains_bit_for_bit_the_same(
    tmp_path: Path, kind: str, stop_at: int, saved: str
) -> None:
    """From a checkpoint that was saved after the steering callback had acted, or before it had."""
    rows = corpus(tmp_path)
    earlier_scores(tmp_path)
    whole, _, _ = steered(tmp_path / "whole", rows, policies(kind, tmp_path))
    path = tmp_path / "at" / "last.ckpt"
    first, extra = [], []
    if saved == "before":
        first = [SavesBefore(path, stop_at)]
    else:
        extra = [ModelCheckpoint(path.parent, filename="last", every_n_train_steps=stop_at)]
    own = policies(kind, tmp_path)
    steered(tmp_path / "cut", rows, own, *extra, first=first, max_steps=stop_at + 3)
    lost = Decisions.open(tmp_path / "cut")
    cut, _, _ = steered(
        tmp_path / "cut", rows, policies(kind, tmp_path), ckpt_path=path, num_workers=2
    )
    assert_bit_identical(training_state(cut), training_state(whole))
    a, b = Decisions.open(tmp_path / "whole"), Decisions.open(tmp_path / "cut")
    pd.testing.assert_frame_equal(a.frame, b.frame, check_exact=True)
    if kind == "suppress":  # rows of lost steps were there, and are dropped
        assert lost.frame["decided_at"].max() == stop_at + 2
    plan = Plan.load(tmp_path / "cut" / "steering" / "plan.json")
    assert plan.content_hash == b.plan().content_hash == a.plan().content_hash


class Fails(Callback):
    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 9:
            raise KeyError("stop here")


def test_an_exception_leaves_the_files_and_no_subscriber(tmp_path: Path) -> None:
    """What was decided until then is on disk; the next fit begins anew."""
    rows = corpus(tmp_path)
    whole, _, _ = steered(tmp_path / "whole", rows, [amplify(), suppress(which="bottom")])
    scored = scoring(folder=str(tmp_path / "run"), refresh_every=5)
    own = OnlineSteering(
        INDUCTION,
        policy=[amplify(), suppress(which="bottom")],
        units=UNITS,
        folder=str(tmp_path / "run"),
    )
    data = TokenDataModule(
        rows, batch_size=BATCH, n_steps=STEPS, seed=2, folder=str(tmp_path / "run")
    )
    with pytest.raises(KeyError, match="stop here"):
        fit(MovingModule(), [scored, own, Fails()], tmp_path, data=data, max_steps=STEPS)
    assert not scored._training._subscribers and not own._unsubscribe
    decisions = Decisions.open(tmp_path / "run")
    assert decisions.frame["decided_at"].max() == 9
    plan = Plan.load(tmp_path / "run" / "steering" / "plan.json")
    assert plan.content_hash == decisions.plan().content_hash
    again = fit(MovingModule(), [scored, own], tmp_path, data=data, max_steps=STEPS)
    assert_bit_identical(training_state(again), training_state(whole))
    a, b = Decisions.open(tmp_path / "whole"), Decisions.open(tmp_path / "run")
    pd.testing.assert_frame_equal(a.frame, b.frame, check_exact=True)


def test_a_policy_that_never_acts_leaves_training_bit_identical(tmp_path: Path) -> None:
    rows = corpus(tmp_path)
    torch.manual_seed(5)
    plain, _ = replayed(tmp_path / "plain", rows, None)
    after = torch.rand(3)
    torch.manual_seed(5)
    idle, one, data = steered(
        tmp_path / "idle", rows, [amplify(), suppress(which="bottom")], target=ReachLevel(-1.0)
    )
    assert_bit_identical(training_state(idle), training_state(plain))
    assert torch.equal(torch.rand(3), after)
    assert one._aiming.aim.push == 0.0 and not data.schedule.plan.operations
    assert not len(Decisions.open(tmp_path / "idle"))
    # Scoring batches that are then not masked leaves no trace either.
    scored, _, data = steered(tmp_path / "scored", rows, suppress(weight=0.999999999))
    assert data.schedule.plan.operations
    assert_bit_identical(training_state(scored), training_state(plain))


def test_a_batch_that_is_wholly_masked_has_no_gradient_and_no_nan(tmp_path: Path) -> None:
    class Norms(Callback):
        def __init__(self) -> None:
            self.largest: list[float] = []

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            self.largest.append(max(float(p.grad.abs().max()) for p in module.parameters()))

    rows = corpus(tmp_path)
    norms = Norms()
    table = earlier_scores(tmp_path, least=0.1)
    whole = FromScores(table, "mask", share=1.0, active=(2, 5), every_n_steps=9)
    run, _, data = steered(tmp_path, rows, whole, norms, in_run=False)
    assert [norm == 0 for norm in norms.largest] == [2 <= step < 5 for step in range(STEPS)]
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())
    masked = [float(data.schedule.batch(step).weights.sum()) for step in range(STEPS)]
    assert masked == [0.0 if 2 <= step < 5 else BATCH for step in range(STEPS)]


def test_amplify_under_a_plan_whose_insertions_shift_the_base_order(tmp_path: Path) -> None:
    """Places in the table are the run's own, which base steps are not."""
    rows = corpus(tmp_path)
    plan = Plan.insert(np.arange(280, 300), steps=(1, 4)) | Plan.mask(np.arange(0, 300, 7), (0, 6))
    run, _, data = steered(tmp_path / "run", rows, amplify(over_steps=3), plan=plan)
    decisions = Decisions.open(tmp_path / "run")
    assert len(decisions) >= 2
    for row in decisions.frame.itertuples():
        batch = data.schedule.batch(int(row.run_step))
        assert batch.sample_ids[int(row.slot)] == row.sample_id
        assert batch.provenance[int(row.slot)] == INSERTED
        base = data.schedule.base_positions(int(row.run_step), int(row.run_step) + 1)
        assert row.first_step <= base[int(row.slot)] // BATCH < row.last_step
        assert row.run_step >= row.decided_at
    again, _ = replayed(tmp_path / "again", rows, decisions.plan(plan))
    assert_bit_identical(training_state(again), training_state(run))


def test_steering_goes_on_under_a_plan_and_leaves_its_masks_alone(tmp_path: Path) -> None:
    rows = corpus(tmp_path)
    plain = steered(tmp_path / "plain", rows, suppress(active=(0, 1)), in_run=False)[2]
    named = plain.schedule.batch(3).sample_ids[:4]
    plan = Plan.mask(named, (2, 5)) | Plan.insert(np.arange(290, 296), steps=(4, 6))
    run, _, _ = steered(tmp_path / "run", rows, suppress(), in_run=False, plan=plan)
    decisions = Decisions.open(tmp_path / "run")
    assert not set(decisions.frame.query("decided_at == 3")["sample_id"]) & set(named.tolist())
    again, _ = replayed(tmp_path / "again", rows, decisions.plan(plan))
    assert_bit_identical(training_state(again), training_state(run))
    with pytest.raises(ValueError, match="give the plan that the run was given"):
        decisions.plan()
    masks = [op for op in decisions.operations() if isinstance(op, Mask)]
    assert len(masks) == STEPS


def test_what_is_inserted_by_shift_replays_too(tmp_path: Path) -> None:
    rows = corpus(tmp_path)
    run, _, _ = steered(tmp_path / "run", rows, amplify(placement="shift"))
    decisions = Decisions.open(tmp_path / "run")
    assert decisions.frame["slot"].isna().all() and len(decisions) >= 2
    again, _ = replayed(tmp_path / "again", rows, decisions.plan())
    assert_bit_identical(training_state(again), training_state(run))


def test_more_than_fits_is_left_out(tmp_path: Path) -> None:
    """What is inserted leaves its own places in the window alone, too."""
    rows = corpus(tmp_path)
    earlier_scores(tmp_path)
    crowd = FromScores(tmp_path / "earlier", "insert", share=1.0, every_n_steps=4, per_step=8.0)
    _, _, data = steered(tmp_path, rows, crowd, in_run=False)
    operations = data.schedule.plan.operations
    assert [op.steps for op in operations] == [(0, 4), (4, 8), (8, 12), (12, 14)]
    inserted = [np.isin(b.provenance, INSERTED) for b in map(data.schedule.batch, range(STEPS))]
    for op in operations:
        assert isinstance(op, Insert) and op.steps is not None
        steps = range(*op.steps)
        base = np.concatenate([data.schedule.order.ids(step) for step in steps])
        taken = np.concatenate([inserted[step] for step in steps])
        # All the others' places, or all but as many as the next in rank would have spared.
        assert len(base) - 2 <= taken.sum() + np.isin(base, op.sample_ids).sum() <= len(base)
