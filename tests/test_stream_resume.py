"""Over random plans, ranks, workers, micro-batches and resume points: each sample in its place."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    OnExceptionCheckpoint,
)
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.exceptions import SIGTERMException
from test_datamodule import Recorder, every_step, expected, fit
from test_schedule_operations import scheduled

from mda_lightning.corpora import JoinedRows, TokenRows, train_bpe
from mda_lightning.datamodules import TokenDataModule
from mda_lightning.datamodules.scheduled_batches import BatchLoader, FromPosition, ScheduledBatches
from mda_lightning.interventions import Insert, Mask, Plan
from mda_lightning.schedule import BASE, INSERTED, Schedule, StreamDigest


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> TokenRows:
    """60 rows: a row's tokens tell its number."""
    tokens = np.arange(60)[:, None] * np.array([1, 0, 1, 0, 0]) + np.arange(5)
    return TokenRows.write(tmp_path_factory.mktemp("rows") / "c", tokens, provenance={})


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_each_sample_in_its_place(rows: TokenRows, data: st.DataObject) -> None:
    """Ranks and micro-batches put together, from any step on, are the schedule; nothing else.

    What is steered after the loader began to load is in the batches that it hands out.
    """
    schedule: Schedule = data.draw(scheduled())
    size = schedule.order.batch_size
    world_size = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    rest = size // world_size
    accumulate = data.draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0]))
    start = data.draw(st.integers(0, len(schedule)))
    # Processes that load ahead cost a tenth of a second to start.
    workers = data.draw(st.sampled_from([0] * 9 + [2]))
    later = schedule
    if data.draw(st.booleans()) and start < len(schedule):
        some = np.unique(schedule.batch(start).sample_ids[:2])
        mask = Mask(some, (start, len(schedule)), 0.0, "all", "run", online=True)
        later = schedule.extended([mask], start)
        first = later.base_step_at(start)
        if first < schedule.order.n_steps:
            insert = Insert(np.array([7, 9]), (first, schedule.order.n_steps), online=True)
            later = later.extended([insert], start)
    loaders = []
    for rank in range(world_size):
        batches = ScheduledBatches(
            rows, schedule, accumulate=accumulate, world_size=world_size, rank=rank
        )

        def corrected(number: int, batch: Any, mine: ScheduledBatches = batches) -> Any:
            return mine.corrected(number, batch, later)

        sampler = FromPosition(len(batches), lambda: start * accumulate)
        loaders.append(
            iter(BatchLoader(batches, sampler, num_workers=workers, seed=0, corrected=corrected))
        )
    for step in range(start, len(schedule)):
        parts = [next(loader) for _ in range(accumulate) for loader in loaders]
        want = later.batch(step)
        got = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
        np.testing.assert_array_equal(got["sample_id"], want.sample_ids)
        np.testing.assert_array_equal(got["weight"], want.weights)
        np.testing.assert_array_equal(got["provenance"], want.provenance)
        np.testing.assert_array_equal(got["tokens"], rows.get(want.sample_ids))
    assert all(next(loader, None) is None for loader in loaders)


# -- a Trainer ------------------------------------------------------------------------------------


class Steer(Callback):
    """Change the coming data after some steps."""

    def __init__(self, data: TokenDataModule, decisions: dict[int, list[Any]]) -> None:
        self.data, self.decisions = data, decisions

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        accumulated = (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if accumulated and (decided := self.decisions.get(trainer.global_step)):
            self.data.steer(decided, trainer.global_step)


DECISIONS = {
    2: [Insert(np.array([50, 51, 52]), (2, 5), placement="replace", online=True)],
    3: [Mask(np.arange(30), (3, 4), occurrences="all", clock="run", online=True)],
    5: [Mask(np.arange(60), (5, 6), occurrences="all", clock="run", online=True)],
}
PLAN = Plan.mask([1, 2, 3], steps=(1, 7)) | Plan.insert([1, 2, 3, 4], steps=(1, 4))


@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (2, 1), (0, 2), (2, 2)])
def test_steering_holds_for_the_next_batch_and_replays_as_a_plan(
    rows: TokenRows, tmp_path: Path, workers: int, accumulate: int
) -> None:
    def data(plan: Plan = PLAN) -> TokenDataModule:
        return TokenDataModule(rows, batch_size=4, n_steps=9, plan=plan, num_workers=workers)

    steered, module = data(), Recorder()
    before = expected(steered.schedule)
    fit(module, steered, tmp_path, Steer(steered, DECISIONS), every_step(tmp_path),
        accumulate=accumulate)  # fmt: skip
    assert module.seen == expected(steered.schedule) != before
    masked = [weight for step, _, weight, _ in module.seen if step == 5]
    assert masked == [0.0] * 4 and torch.isfinite(module.weight)

    replayed = Recorder()
    fit(replayed, data(steered.schedule.plan), tmp_path, accumulate=accumulate)
    assert replayed.seen == module.seen
    assert torch.equal(replayed.weight, module.weight)

    # Resumed before, between and after decisions; those that were made are in the checkpoint.
    for step in (1, 3, 4, 7):
        again = data()
        resumed = Recorder()
        rest = {k: v for k, v in DECISIONS.items() if k > step}
        fit(resumed, again, tmp_path, Steer(again, rest), accumulate=accumulate,
            ckpt_path=str(tmp_path / f"step={step}.ckpt"))  # fmt: skip
        assert resumed.seen == [row for row in module.seen if row[0] >= step]
        assert torch.equal(resumed.weight, module.weight)

    # A fit from the start forgets what an earlier one decided.
    fresh = Recorder()
    fit(fresh, steered, tmp_path, accumulate=accumulate)
    assert fresh.seen == before


def test_the_past_cannot_be_steered(rows: TokenRows, tmp_path: Path) -> None:
    data = TokenDataModule(rows, batch_size=4, n_steps=9)
    late = {3: [Mask(np.array([1]), (2, 9), clock="run", online=True)]}
    with pytest.raises(ValueError, match="has been trained on"):
        fit(Recorder(), data, tmp_path, Steer(data, late))
    mask = Mask(np.array([1]), (3, 9), clock="run", online=True)
    with pytest.raises(ValueError, match="no fit is going on"):
        data.steer([mask], 3)


class SteerIn(Callback):
    """Steer from the present step in some hook of batch 3."""

    def __init__(self, data: TokenDataModule, hook: str) -> None:
        self.data = data
        setattr(self, hook, self._steer)

    def _steer(self, trainer: pl.Trainer, *_: Any) -> None:
        step = trainer.global_step
        mask = Mask(np.arange(60), (step, step + 1), clock="run", online=True)
        if trainer.fit_loop.batch_idx == 3 or step == 5:
            self.data.steer([mask], step)


def test_a_batch_that_is_out_cannot_be_steered(rows: TokenRows, tmp_path: Path) -> None:
    """Before the batch, where the plan would say masked and training would not have been."""

    def data() -> TokenDataModule:
        return TokenDataModule(rows, batch_size=4, n_steps=9)

    for hook, accumulate in (("on_train_batch_start", 1), ("on_after_backward", 1),
                             ("on_train_batch_end", 2)):  # fmt: skip
        own = data()
        with pytest.raises(ValueError, match="have been given to training"):
            fit(Recorder(), own, tmp_path, SteerIn(own, hook), accumulate=accumulate)
    own = data()
    fit(Recorder(), own, tmp_path, every_step(tmp_path))
    resumed = data()
    path = str(tmp_path / "step=5.ckpt")
    module = Recorder()
    fit(module, resumed, tmp_path, SteerIn(resumed, "on_train_start"), ckpt_path=path)
    assert [weight for step, _, weight, _ in module.seen if step == 5] == [0.0] * 4


def test_a_stream_is_trained_on_once(rows: TokenRows, tmp_path: Path) -> None:
    """A second epoch, or a second fit of one Trainer, would begin it anew."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }

    def data() -> TokenDataModule:
        return TokenDataModule(rows, batch_size=4, n_steps=9)

    with pytest.raises(ValueError, match="second epoch at step 5"):
        pl.Trainer(max_steps=9, limit_train_batches=5, **settings).fit(Recorder(), data())
    module = Recorder()
    trainer = pl.Trainer(max_steps=5, limit_train_batches=5, **settings)
    trainer.fit(module, datamodule=data())
    assert len(module.seen) == 20
    with pytest.raises(ValueError, match="has trained 5 steps already"):
        trainer.fit_loop.epoch_loop.max_steps = 9
        trainer.fit(module, datamodule=data())
    scheduler = GradientAccumulationScheduler({0: 2})
    with pytest.raises(ValueError, match="use accumulate_grad_batches"):
        pl.Trainer(max_steps=9, callbacks=[scheduler], **settings).fit(Recorder(), data())
    shift = [Insert(np.array([7]), (4, 6), online=True)]
    own = data()
    with pytest.raises(ValueError, match="has no end of its own"):
        steer = Steer(own, {3: shift})
        pl.Trainer(max_epochs=1, callbacks=[steer], **settings).fit(Recorder(), datamodule=own)


def test_positions_of_other_schemas(rows: TokenRows) -> None:
    """An older one is judged by what was trained on, since plans had other hashes."""
    data = TokenDataModule(rows, batch_size=4, n_steps=9)
    state = data.state_dict() | {"step": 3, "stream_hash": StreamDigest(data.schedule).at(3)}
    old = {k: v for k, v in state.items() if k != "online"} | {"schema_version": 1, "plan_hash": ""}
    data.load_state_dict(old)
    with pytest.raises(ValueError, match="pass branch=True"):
        data.load_state_dict(old | {"stream_hash": "0"})
    with pytest.raises(ValueError, match="schema 99"):
        data.load_state_dict(state | {"schema_version": 99})


class SendAt(Callback):
    """Send this process a signal at a hook of a step."""

    def __init__(self, hook: str, batch: int, number: signal.Signals) -> None:
        self.batch, self.number = batch, number
        setattr(self, hook, self._send)

    def _send(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.batch_idx == self.batch:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (2, 1), (0, 2)])
@pytest.mark.parametrize("estimate", [False, True])
def test_resume_from_the_checkpoint_of_a_termination(
    rows: TokenRows, tmp_path: Path, workers: int, accumulate: int, estimate: bool
) -> None:
    """SIGTERM ends the fit after the batch, and Lightning saves a checkpoint of the exception."""

    def data() -> TokenDataModule:
        return TokenDataModule(rows, batch_size=4, n_steps=9, plan=PLAN, num_workers=workers)

    whole = Recorder(estimate=estimate)
    fit(whole, data(), tmp_path, accumulate=accumulate)
    stopped = Recorder(estimate=estimate)
    send = SendAt("on_train_batch_start", 5 * accumulate, signal.SIGTERM)
    with pytest.raises((SystemExit, SIGTERMException)):
        fit(stopped, data(), tmp_path, send, OnExceptionCheckpoint(tmp_path, "told"),
            accumulate=accumulate)  # fmt: skip
    resumed = Recorder(estimate=estimate)
    fit(resumed, data(), tmp_path, accumulate=accumulate, ckpt_path=str(tmp_path / "told.ckpt"))
    first = resumed.seen[0][0]
    assert 0 < first < 9
    assert resumed.seen == expected(data().schedule, first=first)
    assert torch.equal(resumed.weight, whole.weight)


class AfterTheStep(PassThroughProfiler):
    """Send the signal when the optimizer has stepped and nothing has been counted yet."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def stop(self, action_name: str) -> None:
        if action_name == "run_training_batch":
            self.steps += 1
            if self.steps == 6:
                os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.parametrize(
    "hook",
    [
        "on_train_batch_start",
        "on_before_zero_grad",
        "on_after_backward",
        "on_train_batch_end",
        "after_the_step",
    ],
)
def test_resume_from_the_checkpoint_that_a_scheduler_asks_for(
    rows: TokenRows, tmp_path: Path, hook: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM's signal has a checkpoint saved at once, wherever in a step training is."""
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "1")

    def data() -> TokenDataModule:
        return TokenDataModule(rows, batch_size=4, n_steps=9, plan=PLAN)

    def trainer(folder: Path, *callbacks: Callback) -> pl.Trainer:
        return pl.Trainer(
            max_steps=len(data().schedule),
            callbacks=list(callbacks),
            default_root_dir=folder,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            plugins=[SLURMEnvironment(auto_requeue=True, requeue_signal=signal.SIGUSR1)],
            profiler=AfterTheStep() if hook == "after_the_step" else None,
        )

    whole = Recorder()
    fit(whole, data(), tmp_path)
    trainer(tmp_path, SendAt(hook, 5, signal.SIGUSR1)).fit(Recorder(), datamodule=data())
    saved = sorted(tmp_path.glob("hpc_ckpt_*.ckpt"))
    assert saved
    resumed = Recorder()
    fit(resumed, data(), tmp_path, ckpt_path=str(saved[-1]))
    first = resumed.seen[0][0]
    assert first in (5, 6)
    assert resumed.seen == expected(data().schedule, first=first)
    assert torch.equal(resumed.weight, whole.weight)


# -- further corpora ------------------------------------------------------------------------------


@pytest.fixture
def extra(tmp_path: Path) -> TokenRows:
    return TokenRows.write(tmp_path / "extra", np.full((6, 5), 3), vocab_size=60, provenance={})


def test_a_run_trains_on_another_corpus_rows(
    rows: TokenRows, extra: TokenRows, tmp_path: Path
) -> None:
    plan = Plan.insert_rows(extra, steps=(2, 6), placement="replace")
    path = plan.save(tmp_path / "plans" / "p.json")
    assert Plan.load(path).sources[0].path == str(extra.folder)
    data = TokenDataModule(rows, batch_size=4, n_steps=9, plan=str(path), num_workers=2)
    assert isinstance(data.rows, JoinedRows) and len(data.rows) == 60
    seen = list(data.train_dataloader())
    for batch in seen:
        inserted = batch["provenance"] == INSERTED
        assert (batch["tokens"][inserted] == 3).all()
        base = batch["sample_id"][batch["provenance"] == BASE]
        assert (batch["tokens"][~inserted] == torch.from_numpy(rows.get(base))).all()
    assert sum(int((batch["provenance"] == INSERTED).sum()) for batch in seen) == 6


def test_a_corpus_that_changed_or_moved_is_refused(
    rows: TokenRows, extra: TokenRows, tmp_path: Path
) -> None:
    def data(plan: Plan, **sources: str) -> TokenDataModule:
        return TokenDataModule(rows, batch_size=4, n_steps=9, plan=plan, sources=sources)

    plan = Plan.insert_rows(extra, steps=(2, 6))
    other = TokenRows.write(tmp_path / "o", np.full((6, 5), 4), vocab_size=60, provenance={})
    with pytest.raises(ValueError, match="it has changed since"):
        data(plan, extra=str(other.folder))
    with pytest.raises(FileNotFoundError, match=r"no corpus at .*; give its folder: sources="):
        data(plan, extra=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="inserts from 'extra'"):
        data(plan, more=str(other.folder))
    long = TokenRows.write(tmp_path / "l", np.full((6, 7), 4), vocab_size=60, provenance={})
    with pytest.raises(ValueError, match="rows of 7 tokens"):
        data(Plan.insert_rows(long, steps=(2, 6)))
    bpe, other_bpe = (train_bpe([text] * 9, vocab_size=260, seed=0) for text in ("ab ab", "yz yz"))
    named = TokenRows.write(tmp_path / "b", rows.get(range(60)), tokenizer_json=bpe, provenance={})
    foreign = TokenRows.write(
        tmp_path / "t", np.full((6, 5), 4), tokenizer_json=other_bpe, provenance={}
    )
    with pytest.raises(ValueError, match="has another tokenizer than"):
        JoinedRows(named, {1: foreign})
    JoinedRows(named, {1: named, 2: rows})
    large = TokenRows.write(tmp_path / "v", np.full((6, 5), 4), vocab_size=90, provenance={})
    with pytest.raises(ValueError, match="vocabulary of 90"):
        data(Plan.insert_rows(large, steps=(2, 6)))
