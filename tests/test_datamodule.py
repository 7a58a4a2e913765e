"""A resumed run trains on exactly what an uninterrupted one does; a branch, where it may differ."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, OnExceptionCheckpoint

from mda_lightning.corpora import TokenRows
from mda_lightning.datamodules import TokenDataModule
from mda_lightning.datamodules.scheduled_batches import ScheduledBatches
from mda_lightning.interventions import Plan
from mda_lightning.schedule import BaseOrder, Schedule

BATCH, STEPS = 4, 9


class Recorder(pl.LightningModule):
    """A model whose weight depends on the order of its batches, and a ledger of them."""

    def __init__(self, *, estimate: bool = False, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.estimate, self.fail_at = estimate, fail_at
        self.seen: list[tuple[int, int, float, int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.fail_at == batch_idx:
            raise RuntimeError("pulled the plug")
        self.seen += [
            (self.global_step, *row)
            for row in zip(
                batch["sample_id"].tolist(),
                batch["weight"].tolist(),
                batch["provenance"].tolist(),
                strict=True,
            )
        ]
        values = batch["tokens"].float().mean(1) * batch["weight"]
        return (values * self.weight.sin()).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.estimate:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    module: pl.LightningModule,
    data: TokenDataModule,
    folder: Path,
    *callbacks: Callback,
    accumulate: int = 1,
    ckpt_path: str | None = None,
    max_steps: int | None = None,
) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=len(data.schedule) if max_steps is None else max_steps,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder,
        filename="{step}",
        every_n_train_steps=1,
        save_top_k=-1,
        save_on_train_epoch_end=False,
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> TokenRows:
    tokens = np.random.default_rng(0).integers(0, 50, (24, 6))
    return TokenRows.write(tmp_path_factory.mktemp("rows") / "c", tokens, provenance={})


def expected(schedule: Schedule, first: int = 0) -> list[tuple[int, int, float, int]]:
    return [
        (step, int(i), float(w), int(p))
        for step in range(first, len(schedule))
        for i, w, p in zip(*schedule.batch(step), strict=True)
    ]


PLAN = Plan.mask([1, 2, 3, 5, 8], steps=(5, 9)) | Plan.insert([1, 2, 3, 5, 8], steps=(5, 8))


@pytest.mark.parametrize(
    ("estimate", "workers", "accumulate"),
    [(False, 0, 1), (True, 0, 1), (False, 0, 2), (True, 0, 2), (False, 2, 1), (True, 2, 2)],
)
def test_resume_is_exact_from_step_and_exception_checkpoints(
    rows: TokenRows, tmp_path: Path, estimate: bool, workers: int, accumulate: int
) -> None:
    """The samples of every step, and the final weight, are those of an uninterrupted run."""

    def data() -> TokenDataModule:
        return TokenDataModule(
            rows, batch_size=BATCH, n_steps=STEPS, seed=3, plan=PLAN, num_workers=workers
        )

    whole = Recorder(estimate=estimate)
    fit(whole, data(), tmp_path, every_step(tmp_path), accumulate=accumulate)
    assert whole.seen == expected(data().schedule)
    assert len(whole.seen) == (STEPS + 2) * BATCH  # 5 insertions add two steps

    from_step = Recorder(estimate=estimate)
    checkpoint = str(tmp_path / "step=4.ckpt")
    fit(from_step, data(), tmp_path, accumulate=accumulate, ckpt_path=checkpoint)
    assert from_step.seen == expected(data().schedule, first=4)
    assert torch.equal(from_step.weight, whole.weight)

    # With accumulation the failure comes between the two micro-batches of step 6.
    failing = Recorder(estimate=estimate, fail_at=6 * accumulate + accumulate - 1)
    on_exception = OnExceptionCheckpoint(tmp_path, "failed")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        fit(failing, data(), tmp_path, on_exception, accumulate=accumulate)
    resumed = Recorder(estimate=estimate)
    checkpoint = str(tmp_path / "failed.ckpt")
    fit(resumed, data(), tmp_path, accumulate=accumulate, ckpt_path=checkpoint)
    assert resumed.seen == expected(data().schedule, first=6)
    assert torch.equal(resumed.weight, whole.weight)


def test_resume_with_other_micro_batches(rows: TokenRows, tmp_path: Path) -> None:
    """A checkpoint of a run with one micro-batch a step goes on with two, at the same samples."""

    def data() -> TokenDataModule:
        return TokenDataModule(rows, batch_size=BATCH, n_steps=STEPS)

    whole, resumed = Recorder(), Recorder()
    fit(whole, data(), tmp_path, every_step(tmp_path))
    fit(resumed, data(), tmp_path, accumulate=2, ckpt_path=str(tmp_path / "step=5.ckpt"))
    assert resumed.seen == expected(data().schedule, first=5)
    assert torch.allclose(resumed.weight, whole.weight, rtol=1e-6)


def test_a_finished_run_goes_on_where_it_ended(rows: TokenRows, tmp_path: Path) -> None:
    """A longer run of the same order carries on; and its own checkpoints resume exactly."""
    short = TokenDataModule(rows, batch_size=BATCH, n_steps=4)
    fit(Recorder(), short, tmp_path).save_checkpoint(tmp_path / "short.ckpt")

    def data() -> TokenDataModule:
        return TokenDataModule(rows, batch_size=BATCH, n_steps=STEPS)

    longer, again = Recorder(), Recorder()
    path = str(tmp_path / "short.ckpt")
    fit(longer, data(), tmp_path, every_step(tmp_path), ckpt_path=path)
    assert longer.seen == expected(data().schedule, first=4)
    fit(again, data(), tmp_path, ckpt_path=str(tmp_path / "step=7.ckpt"))
    assert again.seen == expected(data().schedule, first=7)
    assert torch.equal(again.weight, longer.weight)


def test_branch_to_another_plan_at_a_checkpoint(rows: TokenRows, tmp_path: Path) -> None:
    base = TokenDataModule(rows, batch_size=BATCH, n_steps=STEPS)
    fit(Recorder(), base, tmp_path, every_step(tmp_path))
    checkpoint = str(tmp_path / "step=5.ckpt")

    with pytest.raises(ValueError, match=r"another|pass branch=True"):
        refused = TokenDataModule(rows, batch_size=BATCH, n_steps=STEPS, plan=PLAN)
        fit(Recorder(), refused, tmp_path, ckpt_path=checkpoint)

    branch = TokenDataModule(rows, batch_size=BATCH, n_steps=STEPS, plan=PLAN, branch=True)
    branched = Recorder()
    fit(branched, branch, tmp_path, every_step(tmp_path / "b"), ckpt_path=checkpoint)
    assert branched.seen == expected(branch.schedule, first=5)
    assert any(weight == 0 for _, _, weight, _ in branched.seen)
    assert any(provenance for *_, provenance in branched.seen)

    resumed = Recorder()
    resume = TokenDataModule(rows, batch_size=BATCH, n_steps=STEPS, plan=PLAN)
    fit(resumed, resume, tmp_path, ckpt_path=str(tmp_path / "b" / "step=8.ckpt"))
    assert resumed.seen == expected(branch.schedule, first=8)
    assert torch.equal(resumed.weight, branched.weight)


def test_a_branch_that_rewrites_the_past_is_refused(rows: TokenRows, tmp_path: Path) -> None:
    base = TokenDataModule(rows, batch_size=BATCH, n_steps=STEPS)
    fit(Recorder(), base, tmp_path, every_step(tmp_path))
    trained = base.schedule.batch(2).sample_ids[:1]
    plan = Plan.mask(trained, steps=(2, 3))
    branch = TokenDataModule(rows, batch_size=BATCH, n_steps=STEPS, plan=plan, branch=True)
    with pytest.raises(ValueError, match="differ within the 5 steps"):
        fit(Recorder(), branch, tmp_path, ckpt_path=str(tmp_path / "step=5.ckpt"))
    module = Recorder()
    fit(module, branch, tmp_path, ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert module.seen == expected(branch.schedule, first=2)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"batch_size": 2}, {"shuffle": False}])
def test_another_order_is_refused(rows: TokenRows, tmp_path: Path, changed: dict[str, int]) -> None:
    settings = {"batch_size": BATCH, "n_steps": 4}
    base = TokenDataModule(rows, **settings)
    state = base.state_dict() | {"step": 2}
    with pytest.raises(ValueError, match="trained on order"):
        TokenDataModule(rows, **(settings | changed), branch=True).load_state_dict(state)


def test_a_plan_or_checkpoint_of_another_corpus_is_refused(rows: TokenRows, tmp_path: Path) -> None:
    other = TokenRows.write(tmp_path / "o", rows.get(range(24)) + 1, provenance={})
    plan = Plan.mask([1]).bound(corpus_hash=other.content_hash)
    with pytest.raises(ValueError, match=other.content_hash[:12]):
        TokenDataModule(rows, batch_size=BATCH, n_steps=4, plan=plan)
    state = TokenDataModule(other, batch_size=BATCH, n_steps=4).state_dict()
    with pytest.raises(ValueError, match="trained on corpus"):
        TokenDataModule(rows, batch_size=BATCH, n_steps=4).load_state_dict(state)


def test_a_trainer_that_disagrees_is_refused(rows: TokenRows, tmp_path: Path) -> None:
    data = TokenDataModule(rows, batch_size=BATCH, n_steps=4, accumulate=2)
    with pytest.raises(ValueError, match="accumulate is 2"):
        fit(Recorder(), data, tmp_path)
    data = TokenDataModule(rows, batch_size=BATCH, n_steps=4)
    with pytest.raises(ValueError, match="has 4 steps"):
        fit(Recorder(), data, tmp_path, max_steps=5)
    with pytest.raises(ValueError, match="multiple of 3"):
        fit(Recorder(), data, tmp_path, accumulate=3)


def test_a_checkpoint_of_another_data_module_is_refused(rows: TokenRows, tmp_path: Path) -> None:
    class Other(TokenDataModule):
        pass

    fit(Recorder(), Other(rows, batch_size=BATCH, n_steps=4), tmp_path, every_step(tmp_path))
    data = TokenDataModule(rows, batch_size=BATCH, n_steps=4)
    with pytest.raises(ValueError, match="holds no position"):
        fit(Recorder(), data, tmp_path, ckpt_path=str(tmp_path / "step=2.ckpt"))


def test_the_module_leaves_torchs_generator_and_the_trainer_alone(
    rows: TokenRows, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trainer = fit(Recorder(), TokenDataModule(rows, batch_size=BATCH, n_steps=3), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert trainer.callbacks == []


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (2, 1), (1, 3), (2, 3), (3, 2)])
def test_ranks_and_micro_batches_share_out_the_global_batch(
    rows: TokenRows, accumulate: int, world_size: int
) -> None:
    """Each step's samples are the same, in the same order, on any number of ranks."""
    schedule = Schedule(BaseOrder(len(rows), 6 * 2, 5, seed=1), Plan.mask([3, 4]))
    parts = [
        ScheduledBatches(rows, schedule, accumulate=accumulate, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    for step in range(5):
        batches = [
            parts[rank][step * accumulate + micro]
            for micro in range(accumulate)
            for rank in range(world_size)
        ]
        want = schedule.batch(step)
        assert torch.cat([b["sample_id"] for b in batches]).tolist() == want.sample_ids.tolist()
        assert torch.cat([b["weight"] for b in batches]).tolist() == want.weights.tolist()
        tokens = torch.cat([b["tokens"] for b in batches]).numpy()
        assert (tokens == rows.get(want.sample_ids)).all()


class RankRecorder(Recorder):
    """Leave each rank's ledger in a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self) -> None:
        torch.save((self.seen, self.weight.item()), self.folder / f"rank-{self.global_rank}.pt")


@pytest.mark.slow
def test_two_ranks_train_on_the_global_batch(rows: TokenRows, tmp_path: Path) -> None:
    """With the Trainer's default ``use_distributed_sampler``: each sample once, in rank order."""
    data = TokenDataModule(rows, batch_size=BATCH, n_steps=4)
    pl.Trainer(
        max_steps=4,
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(RankRecorder(tmp_path), datamodule=data)
    (first, one), (second, other) = (torch.load(tmp_path / f"rank-{r}.pt") for r in range(2))
    assert one == other
    for step, want in enumerate(data.schedule.batch(k).sample_ids.tolist() for k in range(4)):
        shares = [[row[1] for row in seen if row[0] == step] for seen in (first, second)]
        assert shares == [want[:2], want[2:]]


def test_validation_rows_come_once_each_in_order(rows: TokenRows) -> None:
    data = TokenDataModule(rows, batch_size=5, n_steps=2, val_rows=str(rows.folder))
    ids = torch.cat([batch["sample_id"] for batch in data.val_dataloader()])
    assert ids.tolist() == list(range(24))
