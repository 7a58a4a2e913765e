"""The ledger of real runs: what the training step saw, and a check that finds what was changed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, OnExceptionCheckpoint
from lightning.pytorch.loops.optimization.automatic import Closure
from test_datamodule import BATCH, PLAN, STEPS, Recorder, every_step, expected

from mda_lightning.corpora import TokenRows
from mda_lightning.datamodules import TokenDataModule
from mda_lightning.interventions import Mask, Plan
from mda_lightning.recipes.plan_verify import VerifyReport, verify_run
from mda_lightning.schedule.ledger import Ledger
from mda_lightning.schedule.ledger_file import parts_of


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> TokenRows:
    tokens = np.random.default_rng(0).integers(0, 50, (24, 6))
    return TokenRows.write(tmp_path_factory.mktemp("rows") / "c", tokens, provenance={})


def stream(rows: TokenRows, folder: Path, plan: Plan | None = None, **more: Any) -> TokenDataModule:
    settings = {"batch_size": BATCH, "n_steps": STEPS, "seed": 3, "folder": str(folder)}
    return TokenDataModule(rows, plan=plan, **(settings | more))


def fit(
    module: pl.LightningModule,
    data: TokenDataModule,
    *callbacks: Callback,
    ckpt_path: Path | None = None,
    **trainer: Any,
) -> pl.Trainer:
    settings = {
        "max_steps": len(data.schedule),
        "callbacks": list(callbacks),
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(one, Checkpoint) for one in callbacks),
        "default_root_dir": data.folder,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    fitted = pl.Trainer(**(settings | trainer))
    fitted.fit(module, datamodule=data, ckpt_path=ckpt_path and str(ckpt_path))
    return fitted


def recorded(folder: Path) -> list[tuple[int, int, float, int]]:
    """The ledger in the form of what Recorder saw in its training steps."""
    ledger = Ledger.open(folder)
    return [
        (int(row.step), int(row.sample_id), float(row.weight), int(row.provenance))
        for first, last in ledger.steps
        for row in ledger.frame(first, last).itertuples()
    ]


def verified(folder: Path) -> VerifyReport:
    report = verify_run(folder)
    assert report.ok, report.lines()
    return report


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("plan", [None, PLAN], ids=["base", "plan"])
def test_a_run_leaves_what_its_training_step_saw(
    rows: TokenRows, tmp_path: Path, plan: Plan | None, accumulate: int, workers: int
) -> None:
    """And trains to the same weight as one without a ledger."""
    module, without = Recorder(), Recorder()
    data = stream(rows, tmp_path, plan, num_workers=workers)
    fit(module, data, accumulate_grad_batches=accumulate)
    fit(without, stream(rows, tmp_path, plan, ledger=False), accumulate_grad_batches=accumulate)
    assert torch.equal(module.weight, without.weight)

    n_steps = len(data.schedule)
    assert module.seen == recorded(tmp_path) == expected(data.schedule)
    (line,) = (line for line in verified(tmp_path).verified if "places" in line)
    assert line.startswith(f"steps 0..{n_steps - 1}: {n_steps * BATCH} places, as the plan says")
    masked = sum(weight == 0 for _, _, weight, _ in module.seen)
    assert line.endswith(
        f": {masked} masked, 5 inserted" if plan else ", none masked, inserted or replaced"
    )
    about = Ledger.open(tmp_path).provenance
    assert about["complete"] and about["steps"] == [0, n_steps]
    assert about["corpus_hash"] == rows.content_hash
    assert about["attempts"][0]["micro_batch"] == BATCH // accumulate


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_goes_on_with_its_ledger(
    rows: TokenRows, tmp_path: Path, accumulate: int
) -> None:
    """From a step, so that steps are done again, and from an exception between micro-batches."""
    whole, folder = Recorder(), tmp_path / "run"
    fit(whole, stream(rows, folder, PLAN), every_step(tmp_path), accumulate_grad_batches=accumulate)

    resumed = Recorder()
    checkpoint = tmp_path / "step=4.ckpt"
    arguments: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    fit(resumed, stream(rows, folder, PLAN), ckpt_path=checkpoint, **arguments)
    assert recorded(folder) == whole.seen
    about = Ledger.open(folder).provenance
    assert [attempt["start_step"] for attempt in about["attempts"]] == [0, 4]
    assert about["began_from"] is None
    verified(folder)

    failing = Recorder(fail_at=6 * accumulate + accumulate - 1)
    on_exception = OnExceptionCheckpoint(tmp_path, "failed")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        fit(failing, stream(rows, folder, PLAN), on_exception, **arguments)
    assert recorded(folder) == whole.seen[: 6 * BATCH], "half a step is not trained on"
    report = verified(folder)
    assert any(
        "has not come to its end" in note and "step 6 of 11" in note for note in report.notes
    )

    fit(Recorder(), stream(rows, folder, PLAN), ckpt_path=tmp_path / "failed.ckpt", **arguments)
    assert recorded(folder) == whole.seen
    assert not verified(folder).notes


def test_a_run_resumed_with_other_micro_batches(rows: TokenRows, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit(Recorder(), stream(rows, folder, PLAN), every_step(tmp_path))
    resume = stream(rows, folder, PLAN)
    fit(Recorder(), resume, ckpt_path=tmp_path / "step=5.ckpt", accumulate_grad_batches=4)
    assert recorded(folder) == expected(resume.schedule)
    verified(folder)


def test_a_branch_says_where_it_began(rows: TokenRows, tmp_path: Path) -> None:
    fit(Recorder(), stream(rows, tmp_path / "base"), every_step(tmp_path))
    module, checkpoint = Recorder(), tmp_path / "step=5.ckpt"
    data = stream(rows, tmp_path / "branch", PLAN, branch=True)
    fit(module, data, ckpt_path=checkpoint)
    assert recorded(tmp_path / "branch") == module.seen == expected(data.schedule, first=5)
    began = Ledger.open(tmp_path / "branch").provenance["began_from"]
    assert began["step"] == 5 and began["plan_hash"] == Plan().content_hash
    report = verified(tmp_path / "branch")
    assert any(
        line.startswith("the run began at step 5 from a checkpoint that was trained with plan")
        for line in report.verified
    )
    assert any(line.startswith("steps 5..10: 24 places") for line in report.verified)
    assert recorded(tmp_path / "base") == expected(stream(rows, tmp_path).schedule)

    # A plan that is not the parent's up to there is told, whatever the folder says.
    told = tmp_path / "branch" / "stream" / "stream.json"
    value = json.loads(told.read_text())
    value["began_from"]["stream_hash"] = "0" * 64
    told.write_text(json.dumps(value))
    assert any("were others" in line for line in verify_run(tmp_path / "branch").differences)


def test_what_another_plan_takes_the_place_of_is_kept(rows: TokenRows, tmp_path: Path) -> None:
    """A branch in its parent's folder goes on with the parent's ledger; so may the parent again."""
    run, former = tmp_path / "run", [tmp_path / "run" / f"stream-former-{n}" for n in (1, 2)]
    others = TokenRows.write(tmp_path / "others", rows.get(range(5)) + 1, provenance={})
    parent = Plan.insert_rows(others, steps=(0, 4), placement="replace")
    plan = parent | PLAN
    base = stream(rows, run, parent)
    fit(Recorder(), base, every_step(tmp_path))
    whole = recorded(run)

    branch = stream(rows, run, plan, branch=True)
    with pytest.warns(UserWarning, match=r"takes the place of its steps 5\.\.8.*folder="):
        fit(Recorder(), branch, every_step(tmp_path / "branch"), ckpt_path=tmp_path / "step=5.ckpt")
    assert recorded(run) == expected(branch.schedule)
    verified(run)
    assert recorded(former[0]) == whole
    report = verified(former[0])
    assert not report.notes, "its source is found from where it is kept"

    with pytest.warns(UserWarning, match=r"takes the place of its steps 0\.\.\d+\."):
        fit(Recorder(), stream(rows, run, parent), ckpt_path=tmp_path / "step=7.ckpt")
    assert recorded(run) == whole[7 * BATCH :]
    verified(run)
    assert recorded(former[1]) == expected(branch.schedule)
    verified(former[1])

    # What goes on, or is trained again, under its own plan is kept nowhere.
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*takes the place")
        fit(Recorder(), stream(rows, run, parent), ckpt_path=tmp_path / "step=8.ckpt")
        fit(Recorder(), stream(rows, run, parent))
    assert sorted(run.glob("stream-former-*")) == former
    # Nor is what is kept already: the parent's ledger is again what it was at first.
    with pytest.warns(UserWarning, match=r"copied to .*stream-former-1\."):
        fit(Recorder(), stream(rows, run, PLAN))
    assert sorted(run.glob("stream-former-*")) == former


def test_a_run_resumed_in_another_folder(rows: TokenRows, tmp_path: Path) -> None:
    """As with a logger that makes a folder of its own for each attempt."""
    fit(Recorder(), stream(rows, tmp_path / "one", PLAN), every_step(tmp_path))
    fit(Recorder(), stream(rows, tmp_path / "two", PLAN), ckpt_path=tmp_path / "step=7.ckpt")
    assert recorded(tmp_path / "one")[7 * BATCH :] == recorded(tmp_path / "two")
    assert any("trained with the same plan" in line for line in verified(tmp_path / "two").verified)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_checkpoint_between_the_step_and_its_count(
    rows: TokenRows, tmp_path: Path, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they may disagree on what was trained, the ledger has what the checkpoint has."""
    arguments: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    whole, failing, folder = Recorder(), Recorder(), tmp_path / "run"
    fit(whole, stream(rows, tmp_path / "whole", PLAN), **arguments)
    consume = Closure.consume_result

    def interrupted(closure: Closure) -> Any:
        if failing.global_step == 7:
            raise RuntimeError("pulled the plug")
        return consume(closure)

    with monkeypatch.context() as patch:
        patch.setattr(Closure, "consume_result", interrupted)
        on_exception = OnExceptionCheckpoint(tmp_path, "failed")
        with pytest.raises(RuntimeError, match="pulled the plug"):
            fit(failing, stream(rows, folder, PLAN), on_exception, **arguments)
    checkpoint = torch.load(tmp_path / "failed.ckpt", weights_only=False)
    n_steps = checkpoint["TokenDataModule"]["step"]
    assert n_steps in (6, 7)
    assert recorded(folder) == whole.seen[: n_steps * BATCH]
    verified(folder)


class Declining(Recorder):
    """Ends the epoch before a batch, as Lightning allows."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 5 else None


def test_a_batch_that_a_hook_declined_is_not_trained_on(rows: TokenRows, tmp_path: Path) -> None:
    module = Declining()
    fit(module, stream(rows, tmp_path), max_epochs=1)
    assert recorded(tmp_path) == module.seen
    assert len(module.seen) == 5 * BATCH
    assert verified(tmp_path).notes == ["the run ended at step 5 of 9"]


def test_a_run_that_goes_on_behind_a_declined_batch(rows: TokenRows, tmp_path: Path) -> None:
    """The data module counts it as read; it was not trained on, and its step is missing."""
    trainer = fit(Declining(), stream(rows, tmp_path), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "declined.ckpt")
    fit(Recorder(), stream(rows, tmp_path), ckpt_path=tmp_path / "declined.ckpt", max_steps=8)
    assert verify_run(tmp_path).differences[0] == "step 5: not all of their places are there"


def test_a_run_that_leaves_the_order_of_its_batches_ends_its_ledger(
    rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here in a second Lightning epoch, whose batches are numbered from 0; it is refused else."""
    refusing = "mda_lightning.datamodules.resume.ResumeAtStep.on_train_epoch_start"
    monkeypatch.setattr(refusing, lambda *args: None)
    module = Declining()
    with pytest.warns(UserWarning, match="micro-batch 0 came where 6 was due") as caught:
        fit(module, stream(rows, tmp_path))
    assert sum("ledger" in str(warning.message) for warning in caught) == 1
    assert len(module.seen) == STEPS * BATCH
    assert recorded(tmp_path) == module.seen[: 5 * BATCH]
    assert not Ledger.open(tmp_path).provenance["complete"]
    (difference,) = verify_run(tmp_path).differences
    assert difference.startswith("from step 5 on nothing was written down: micro-batch 0 came")


class Copying(Callback):
    """Copy the run's folder before a step: what a process killed there leaves behind."""

    def __init__(self, step: int, folder: Path, to: Path) -> None:
        self.step, self.folder, self.to = step, folder, to

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.step:
            shutil.copytree(self.folder, self.to)


def test_a_killed_run_goes_on(
    rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that were flushed after the last checkpoint are done, and recorded, again."""
    monkeypatch.setattr("mda_lightning.datamodules.ledger_writer._FLUSH_EVERY", 3)
    monkeypatch.setattr("mda_lightning.datamodules.ledger_writer._SECONDS", 0)
    whole, run, killed = Recorder(), tmp_path / "run", tmp_path / "killed"
    fit(Recorder(), stream(rows, tmp_path / "same", PLAN), every_step(tmp_path))
    fit(whole, stream(rows, run, PLAN), Copying(8, run, killed))
    assert recorded(killed) == whole.seen[: 6 * BATCH]
    (note,) = verified(killed).notes
    assert "interrupted, or is still training; its ledger reaches step 6 of 11" in note
    fit(Recorder(), stream(rows, killed, PLAN), ckpt_path=tmp_path / "step=4.ckpt")
    assert recorded(killed) == whole.seen
    assert not verified(killed).notes


class Killed(BaseException):
    """The process is gone: nothing after it runs."""


def count_down(patch: pytest.MonkeyPatch, left: int) -> None:
    """Kill at the change of a file after ``left`` of them."""

    def counted(change: Callable[..., None]) -> Callable[..., None]:
        def changed(*args: Any, **more: Any) -> None:
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            change(*args, **more)

        return changed

    for name in ("replace", "unlink"):
        patch.setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("how", ["steered", "resumed", "steered again", "branched", "new"])
def test_killed_between_any_two_changes_of_the_folder(
    rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """What is left passes, or is no ledger yet; and the run goes on from its checkpoint."""
    monkeypatch.setattr("mda_lightning.datamodules.ledger_writer._FLUSH_EVERY", 2)
    monkeypatch.setattr("mda_lightning.datamodules.ledger_writer._SECONDS", 0)
    monkeypatch.setattr("mda_lightning.datamodules.ledger_writer._PLAN_SHARE", 0)
    first = tmp_path / "first"
    steering = [Steering(2, 5)] if how.startswith("steered") else []
    fit(Recorder(), stream(rows, first), every_step(tmp_path), *steering)
    checkpoint = None if how in ("steered", "new") else tmp_path / "step=4.ckpt"
    plan = {"branched": Plan.prune(0.5, (4, 9)), "new": PLAN}.get(how)
    steering = [Steering(2, 5, 7)] if how.startswith("steered") else []
    for allowed in itertools.count():
        run = tmp_path / str(allowed)
        if how != "steered":
            shutil.copytree(first / "stream", run / "stream")
        finished = False
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            count_down(patch, allowed)
            data = stream(rows, run, plan, branch=True)
            fit(Recorder(), data, *steering, ckpt_path=checkpoint)
            finished = True
        if (run / "stream" / "stream.json").exists():
            verified(run)
        else:
            assert how in ("steered", "new")
        if finished:
            assert recorded(run) == expected(data.schedule)
            break
        again = stream(rows, run, plan, branch=True)
        fit(Recorder(), again, ckpt_path=checkpoint)
        assert recorded(run) == expected(again.schedule)
        verified(run)
    assert allowed > 6, "the writing was never interrupted"


def test_a_plan_of_many_decisions_is_saved_ever_less_often(
    rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a process killed in between leaves behind passes."""
    now, saved, save = 0.0, [], Plan.save

    def slow(plan: Plan, path: Path) -> Path:
        nonlocal now
        now += 1.0  # s
        saved.append(len(plan.operations))
        return save(plan, path)

    def clock() -> float:
        nonlocal now
        now += 0.1
        return now

    monkeypatch.setattr(Plan, "save", slow)
    writer = "mda_lightning.datamodules.ledger_writer"
    monkeypatch.setattr(f"{writer}.time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(f"{writer}._FLUSH_EVERY", 1)
    monkeypatch.setattr(f"{writer}._SECONDS", 0)
    n_steps = 300
    module, data = Recorder(), stream(rows, tmp_path / "run", n_steps=n_steps)
    copying = Copying(150, tmp_path / "run", tmp_path / "killed")
    fit(module, data, Steering(*range(1, n_steps)), copying)
    assert saved[0] in (0, 1) and saved[-1] == n_steps - 1
    # The clock makes fewer than 300 x 4 x 0.1 s besides; a save of 1.1 s is 2% of 55 s.
    assert 3 <= len(saved) <= 5
    assert recorded(tmp_path / "run") == module.seen
    killed = verified(tmp_path / "killed")
    assert 0 < len(recorded(tmp_path / "killed")) < 150 * BATCH
    assert "the run has not come to its end" in killed.notes[0]

    # A checkpoint has its decisions, so the plan beside it must too.
    saved.clear()
    on_exception = OnExceptionCheckpoint(tmp_path, "failed")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        steering = Steering(*range(1, 9))
        fit(Recorder(fail_at=7), stream(rows, tmp_path / "failed"), steering, on_exception)
    assert saved[-1] == 7
    assert len(recorded(tmp_path / "failed")) == 7 * BATCH
    verified(tmp_path / "failed")


def test_weights_at_low_precision(rows: TokenRows, tmp_path: Path) -> None:
    """Lightning rounds what a batch holds; the ledger has the rounded weight, and says so."""
    plan = Plan.mask([1, 2, 3], weight=0.3)
    fit(Recorder(), stream(rows, tmp_path, plan), precision="bf16-true")
    ledger = Ledger.open(tmp_path)
    assert ledger.provenance["attempts"][0]["weight_type"] == "bfloat16"
    rounded = torch.tensor(0.3).bfloat16().item()
    assert rounded != np.float32(0.3)
    assert set(ledger.frame(0, STEPS).weight) == {rounded, 1.0}
    assert "of another weight" in verified(tmp_path).verified[-1]


def test_a_new_run_replaces_an_earlier_one(rows: TokenRows, tmp_path: Path) -> None:
    fit(Recorder(), stream(rows, tmp_path, PLAN))
    shorter = stream(rows, tmp_path, n_steps=3)
    fit(Recorder(), shorter)
    assert recorded(tmp_path) == expected(shorter.schedule)
    verified(tmp_path)


class Steering(Callback):
    """Masks two samples of the next step while the run goes on, at the end of some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        step = trainer.global_step
        data: TokenDataModule = trainer.datamodule  # type: ignore[attr-defined]
        if step in self.steps:
            ids = data.schedule.batch(step).sample_ids[:2]
            data.steer([Mask(ids, (step, step + 1), clock="run", online=True)], from_step=step)


def test_what_is_decided_during_the_run_is_in_plan_and_ledger(
    rows: TokenRows, tmp_path: Path
) -> None:
    module = Recorder()
    fit(module, stream(rows, tmp_path, PLAN), Steering(3))
    assert recorded(tmp_path) == module.seen
    assert [row[2] for row in module.seen if row[0] == 3].count(0.0) == 2
    report = verified(tmp_path)
    assert "3 operations" in report.verified[0]
    # What is on disk is a plan like any other: it makes the same run.
    replayed = stream(rows, tmp_path / "again", Plan.load(tmp_path / "stream" / "plan.json"))
    again = Recorder()
    fit(again, replayed)
    assert again.seen == module.seen and torch.equal(again.weight, module.weight)


class Popping(Recorder):
    """A training step that takes its fields out of the batch."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(dict(batch), batch_idx)
        batch.clear()
        return loss


class TokensOnly(Recorder):
    """A module that trains on tokens alone."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch["tokens"]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (batch.float().mean(1) * self.weight.sin()).mean()


def test_batches_whose_fields_are_taken_out_or_absent(rows: TokenRows, tmp_path: Path) -> None:
    popping = Popping()
    fit(popping, stream(rows, tmp_path / "popping", PLAN))
    assert recorded(tmp_path / "popping") == popping.seen
    assert not verified(tmp_path / "popping").notes

    data = stream(rows, tmp_path / "tokens", PLAN)
    fit(TokensOnly(), data)
    assert recorded(tmp_path / "tokens") == expected(data.schedule)
    assert [note.split(" for ")[0] for note in verified(tmp_path / "tokens").notes] == [
        f"the batches had no {name}" for name in ("provenance", "sample_id", "weight")
    ]


class Changing(Callback):
    """Gives a batch other weights, in place and not, before it is trained on."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 2:
            batch["weight"][1] = 0.25
        if batch_idx == 3:
            batch["weight"] = torch.full((BATCH,), 0.75)


class Spoiling(Recorder):
    """A training step that spoils its weights when it has used them."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        batch["weight"].mul_(2)
        batch["sample_id"] = batch["sample_id"] + 1
        return loss


def test_what_a_batch_had_just_before_its_step_is_recorded(rows: TokenRows, tmp_path: Path) -> None:
    """A callback's change is in the ledger, also of one that comes later; a step's own is not."""
    spoiling = Spoiling()
    fit(spoiling, stream(rows, tmp_path / "spoiled", PLAN))
    assert recorded(tmp_path / "spoiled") == spoiling.seen
    verified(tmp_path / "spoiled")

    spoiling = Spoiling()
    fit(spoiling, stream(rows, tmp_path / "changed", PLAN), every_step(tmp_path), Changing())
    assert recorded(tmp_path / "changed") == spoiling.seen
    differences = verify_run(tmp_path / "changed").differences
    assert {difference.split(",")[0] for difference in differences} == {"step 2", "step 3"}


class Reweighting(Recorder):
    """A batch hook that trains on something else than the plan says."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.global_step == 4:
            batch["weight"][2] = 0.5
        if self.trainer.global_step == 7:
            batch["sample_id"][1] = 23
        return batch


def test_a_run_that_left_its_plan_is_found_out(rows: TokenRows, tmp_path: Path) -> None:
    """The ledger is what the training step had, not what it should have had."""
    module = Reweighting()
    fit(module, stream(rows, tmp_path))
    assert recorded(tmp_path) == module.seen
    report = verify_run(tmp_path)
    ids = stream(rows, tmp_path).schedule.batch(4).sample_ids
    assert report.differences[0] == (
        f"step 4, slot 2: expected sample {ids[2]}, weight 1, of the base order, found sample "
        f"{ids[2]}, weight 0.5, of the base order"
    )
    assert report.differences[1].startswith("step 7, slot 1: expected sample ")
    assert "found sample 23, weight 1" in report.differences[1]
    assert len(report.differences) == 2 and not report.ok


# -- tampering ------------------------------------------------------------------------------------


def the_part(folder: Path) -> Path:
    (part,) = parts_of(folder / "stream" / "ledger")
    return part.path


def rewrite(folder: Path, column: str, change: Callable[[np.ndarray], None]) -> None:
    path = the_part(folder)
    table = pq.read_table(path)
    values = table[column].to_numpy().copy()
    change(values)
    at = table.column_names.index(column)
    pq.write_table(table.set_column(at, table.schema.field(column), [values]), path)


def first_zero(values: np.ndarray) -> None:
    values[np.flatnonzero(values == 0)[0]] = 1


def another_id(values: np.ndarray) -> None:
    values[np.flatnonzero(values >= 0)[0]] += 1


def shifted_base(values: np.ndarray) -> None:
    values[0] += 1


def test_what_was_tampered_with_is_named(rows: TokenRows, tmp_path: Path) -> None:
    def run(name: str) -> Path:
        fit(Recorder(), stream(rows, tmp_path / name, PLAN))
        return tmp_path / name

    folder = run("weight")
    rewrite(folder, "weight", first_zero)
    (difference,) = verify_run(folder).differences
    assert "weight 0, of the base order, found" in difference and "weight 1," in difference

    folder = run("id")
    rewrite(folder, "sample_id", another_id)
    (difference,) = verify_run(folder).differences
    assert "inserted, found sample" in difference

    folder = run("base")
    rewrite(folder, "base_position", shifted_base)
    report = verify_run(folder)
    assert len(report.differences) == 6 and "places differ in all" in report.differences[-1]

    folder = run("provenance")
    rewrite(folder, "provenance", first_zero)
    assert "of the base order, found" in verify_run(folder).differences[0]

    folder = run("lost")
    the_part(folder).unlink()
    assert verify_run(folder).differences == ["steps 0..10: not all of their places are there"]

    folder = run("cut")
    path = the_part(folder)
    path.write_bytes(path.read_bytes()[:-9])
    report = verify_run(folder)
    assert path.name in report.differences[0] and "damaged" in report.differences[0]

    folder = run("plan")
    path = folder / "stream" / "plan.json"
    path.write_text(path.read_text().replace('"weight": 0.0', '"weight": 0.5'))
    assert verify_run(folder).differences[0].startswith("plan.json: ")

    folder = run("another plan")
    Plan.mask([1], steps=(5, 9)).save(folder / "stream" / "plan.json")
    report = verify_run(folder)
    assert any("the run recorded" in difference for difference in report.differences)
    assert any("slot" in difference for difference in report.differences)


def test_samples_of_another_corpus(rows: TokenRows, tmp_path: Path) -> None:
    others = TokenRows.write(tmp_path / "others", rows.get(range(5)) + 1, provenance={})
    plan = Plan.insert_rows(others, steps=(2, 6))
    module, data = Recorder(), stream(rows, tmp_path / "run", plan)
    fit(module, data)
    assert recorded(tmp_path / "run") == module.seen == expected(data.schedule)
    assert sum(sample >= 2**40 for _, sample, _, _ in module.seen) == 5
    report = verified(tmp_path / "run")
    assert any(line.startswith("source 'others'") for line in report.verified)
    assert report.verified[-1].endswith("5 inserted")
    TokenRows.write(tmp_path / "others", rows.get(range(5)), provenance={})
    (difference,) = verify_run(tmp_path / "run").differences
    assert difference.startswith("the source 'others' at")


def test_another_corpus_in_the_record_is_named(rows: TokenRows, tmp_path: Path) -> None:
    """Though a corpus with that hash lies there."""
    plan = PLAN.bound(corpus_hash=rows.content_hash)
    told = tmp_path / "run" / "stream" / "stream.json"

    def differences(plan: Plan, others: TokenRows) -> list[str]:
        fit(Recorder(), stream(rows, tmp_path / "run", plan))
        other = {"corpus": str(others.folder), "corpus_hash": others.content_hash}
        told.write_text(json.dumps(json.loads(told.read_text()) | other))
        return verify_run(tmp_path / "run").differences

    others = TokenRows.write(tmp_path / "o", rows.get(range(24)) + 1, provenance={})
    recorded_one, found = differences(plan, others)
    assert recorded_one.startswith("the corpus that the plan was made for is")
    assert f"the run was trained on {rows.content_hash[:12]}" in found
    fewer = TokenRows.write(tmp_path / "f", rows.get(range(23)), provenance={})
    (difference,) = differences(PLAN, fewer)
    assert "has 23 rows, the base order is one of 24" in difference


def test_a_changed_or_missing_corpus_is_named(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 50, (24, 6))
    corpus = TokenRows.write(tmp_path / "c", tokens, provenance={})
    fit(Recorder(), stream(corpus, tmp_path / "run"))
    path = tmp_path / "c" / "rows.npy"
    changed = np.load(path)
    changed[7, 2] += 1
    np.save(path, changed)
    (difference,) = verify_run(tmp_path / "run").differences
    assert "the corpus at" in difference and corpus.content_hash[:12] in difference

    told = tmp_path / "run" / "stream" / "stream.json"
    value = json.loads(told.read_text())
    for missing in ("order", "corpus_hash"):
        told.write_text(json.dumps({key: one for key, one in value.items() if key != missing}))
        with pytest.raises(ValueError, match=f"lacks.*{missing}"):
            verify_run(tmp_path / "run")
    told.write_text(json.dumps(value))
    (tmp_path / "c").rename(tmp_path / "d")
    assert any("is not at" in note for note in verified(tmp_path / "run").notes)
    assert not verify_run(tmp_path / "run", corpus=tmp_path / "d").ok


# -- where nothing can be written ----------------------------------------------------------------


def test_a_full_disk_does_not_stop_training(
    rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, module = Recorder(), Recorder()
    fit(whole, stream(rows, tmp_path / "whole"))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mda_lightning.schedule.ledger_parts.write_part", full)
    data = stream(rows, tmp_path / "run")
    with pytest.warns(UserWarning, match="No space left on device.*training goes on") as caught:
        fit(module, data, every_step(tmp_path))
    assert sum("ledger" in str(warning.message) for warning in caught) == 1
    assert torch.equal(module.weight, whole.weight)
    assert not Ledger.open(tmp_path / "run").provenance["complete"]
    monkeypatch.undo()

    # The ledger begins where the disk has room again; what is missing is told.
    fit(Recorder(), stream(rows, tmp_path / "run"), ckpt_path=tmp_path / "step=4.ckpt")
    assert verify_run(tmp_path / "run").differences == [
        "steps 0..3: not all of their places are there"
    ]


def test_a_folder_that_is_a_file(rows: TokenRows, tmp_path: Path) -> None:
    (tmp_path / "stream").write_text("in the way")
    with pytest.warns(UserWarning, match="training goes on"):
        fit(Recorder(), stream(rows, tmp_path))


def test_a_rehearsal_leaves_no_files(rows: TokenRows, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(Recorder(), stream(rows, tmp_path / "run"), fast_dev_run=True)
    assert not (tmp_path / "run").exists()


def test_a_refused_resume_leaves_the_ledger_alone(rows: TokenRows, tmp_path: Path) -> None:
    fit(Recorder(), stream(rows, tmp_path / "run"), every_step(tmp_path))
    before = recorded(tmp_path / "run")
    refused = stream(rows, tmp_path / "run", PLAN)
    with pytest.raises(ValueError, match="branch"):
        fit(Recorder(), refused, ckpt_path=tmp_path / "step=5.ckpt")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        fit(Recorder(fail_at=0), stream(rows, tmp_path / "run", PLAN))
    assert recorded(tmp_path / "run") == before
    verified(tmp_path / "run")


@pytest.mark.slow
def test_two_ranks_write_one_ledger(rows: TokenRows, tmp_path: Path) -> None:
    """And one rank goes on with it."""
    data = stream(rows, tmp_path / "run", PLAN)
    fit(Recorder(), data, every_step(tmp_path), devices=2, strategy="ddp_spawn")
    assert {part.rank for part in parts_of(tmp_path / "run" / "stream" / "ledger")} == {0, 1}
    assert recorded(tmp_path / "run") == expected(data.schedule)
    verified(tmp_path / "run")
    fit(Recorder(), stream(rows, tmp_path / "run", PLAN), ckpt_path=tmp_path / "step=5.ckpt")
    assert recorded(tmp_path / "run") == expected(data.schedule)
    verified(tmp_path / "run")
