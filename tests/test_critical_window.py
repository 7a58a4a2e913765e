"""CriticalWindow: the window found, its checkpoints kept, training resumed from them exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from training import (
    Clock,
    CurveMechanism,
    Rows,
    StrangersModule,
    assert_bit_identical,
    fit,
    jump,
    training_state,
)

from mda_lightning.callbacks import CriticalWindow, UnitMonitor
from mda_lightning.callbacks.checkpoint_ring import CheckpointRing, to_evict
from mda_lightning.corpora import TokenRows
from mda_lightning.datamodules import TokenDataModule
from mda_lightning.interventions import Plan
from mda_lightning.pretraining import PythiaModule
from mda_lightning.units import Head
from mda_lightning.window import MechanismWindow, WindowRule

CURVE = jump(31, ramp=20)


def watch(folder: Path, *, curve: Any = CURVE, every: int = 2, **settings: Any) -> list[Any]:
    clock = Clock()
    monitor = UnitMonitor([CurveMechanism(clock, curve)], every_n_steps=every, folder=str(folder))
    return [clock, monitor, CriticalWindow("curve", **settings)]


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "window.json").read_text())


def steps_of(path: Path) -> list[int]:
    return sorted(int(p.stem.rpartition("step")[2].lstrip("-")) for p in path.glob("*.ckpt"))


def test_the_window_is_found_and_its_checkpoints_are_kept(tmp_path: Path) -> None:
    callbacks = watch(tmp_path)
    fit(StrangersModule(), callbacks, tmp_path, max_steps=64)
    found = report(tmp_path)
    assert (found["status"], found["target"]) == ("closed", "L1H1")
    window, steps = found["window"], found["checkpoint_steps"]
    crossing = next(s for s in range(0, 64, 2) if CURVE(s).max() > 0.10)
    assert abs(window["start"] - crossing) <= 2
    assert window["end_reason"] == "level" and not window["censored"]
    assert window["start"] < window["midpoint"] < window["end"]
    assert steps["start"] <= window["start"] and steps["end"] == window["end"]
    assert steps["start"] < steps["mid"] < steps["end"]
    assert abs(steps["mid"] - window["midpoint"]) <= 10
    for edge, path in found["checkpoints"].items():
        saved = torch.load(tmp_path / path, weights_only=True)
        assert saved["global_step"] == steps[edge]
    assert not (tmp_path / "ring").exists()
    assert sorted(p.name for p in (tmp_path / "window").iterdir()) == sorted(
        Path(p).name for p in found["checkpoints"].values()
    )


def test_the_ring_is_bounded_at_every_step(tmp_path: Path) -> None:
    counts = []

    class Counts(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            counts.append(len(list((tmp_path / "ring").glob("*"))))

    run = [*watch(tmp_path, ring=3, ring_every=1), Counts()]
    fit(StrangersModule(), run, tmp_path, max_steps=40)
    assert max(counts) == 3


def test_checkpoints_are_kept_five_times_as_often_once_a_head_stirs(tmp_path: Path) -> None:
    """And at the warning itself, and when a head has formed."""
    saved: list[tuple[int, bool]] = []
    callbacks = watch(tmp_path, curve=jump(101, ramp=60), every=1, ring_every=2)
    window = callbacks[-1]

    class Sees(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            now = steps_of(tmp_path / "ring") if (tmp_path / "ring").exists() else []
            if now and now[-1] == trainer.global_step:
                saved.append((trainer.global_step, window.asks))

    fit(StrangersModule(), [*callbacks, Sees()], tmp_path, data=Rows(1200), max_steps=140)
    calm = [step for step, asks in saved if not asks]
    stirred = [step for step, asks in saved if asks]
    assert calm == list(range(10, calm[-1] + 1, 10)), "every 2nd evaluation, five times as seldom"
    assert stirred and calm[-1] < stirred[0] <= report(tmp_path)["window"]["start"]
    assert max(np.diff(stirred)) <= 2


@pytest.mark.parametrize(("accumulate", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_training_resumes_exactly_from_every_promoted_checkpoint(
    tmp_path: Path, accumulate: int, workers: int
) -> None:
    """Weights, optimizer, learning rate, metric table: those of the run that never stopped."""
    rows = TokenRows.write(
        tmp_path / "rows", np.random.default_rng(0).integers(2, 60, (300, 17)), provenance={}
    )
    torch.set_num_threads(1)

    def run(folder: Path, extra: list[Any], ckpt_path: Path | None = None) -> tuple[Any, Any]:
        module = PythiaModule(
            {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
            vocab_size=60,
            seq_len=16,
            total_steps=60,
            warmup_steps=5,
        )
        clock = Clock()
        monitor = UnitMonitor(
            [CurveMechanism(clock, CURVE), "previous_token"],
            measures=(),
            every_n_steps=2,
            folder=str(folder),
            token_ids=range(2, 60),
        )
        monitor.mechanisms[1] = type(monitor.mechanisms[1])(
            n_sequences=4, length=(8, 12), token_ids=tuple(range(2, 60))
        )
        trainer = fit(
            module,
            [clock, monitor, *extra],
            folder,
            data=TokenDataModule(rows, batch_size=4, n_steps=60, seed=1, num_workers=workers),
            ckpt_path=ckpt_path,
            max_steps=60,
            accumulate_grad_batches=accumulate,
            use_distributed_sampler=False,
        )
        return trainer, monitor

    whole, monitor = run(tmp_path / "whole", [CriticalWindow("curve")])
    expected = training_state(whole)
    kept = report(tmp_path / "whole")["checkpoints"]
    assert kept.keys() == {"start", "mid", "end"}
    for edge, path in kept.items():
        saved = torch.load(tmp_path / "whole" / path, weights_only=False)
        assert saved["TokenDataModule"]["step"] == saved["global_step"], edge
        again, other = run(tmp_path / edge, [], tmp_path / "whole" / path)
        assert again.global_step == 60
        assert_bit_identical(training_state(again), expected, edge)
        assert_bit_identical(other.table.state_dict(), monitor.table.state_dict(), edge)
        assert_bit_identical(
            [s.scheduler.state_dict()["last_epoch"] for s in again.lr_scheduler_configs],
            [s.scheduler.state_dict()["last_epoch"] for s in whole.lr_scheduler_configs],
        )


def test_an_arm_branches_from_the_windows_start(tmp_path: Path) -> None:
    """A plan that changes nothing before the branch: allowed, and it changes what comes after."""
    tokens = np.random.default_rng(0).integers(1, 40, (300, 17))
    rows = TokenRows.write(tmp_path / "rows", tokens, provenance={})

    def data(**settings: Any) -> TokenDataModule:
        return TokenDataModule(rows, batch_size=4, n_steps=64, **settings)

    base = fit(StrangersModule(), watch(tmp_path / "base"), tmp_path, data=data(), max_steps=64)
    found = report(tmp_path / "base")
    start, path = found["window"]["start"], tmp_path / "base" / found["checkpoints"]["start"]
    ids = data().schedule.batch(start)[0]
    plan = Plan.mask([int(i) for i in ids], steps=(start, 64))

    def arm(**settings: Any) -> pl.Trainer:
        module = WeightedModule()
        return fit(module, [], tmp_path, data=data(**settings), ckpt_path=path, max_steps=64)

    same = arm(branch=True)
    assert_bit_identical(training_state(same), training_state(base))
    other = arm(plan=plan, branch=True)
    weights = [t.lightning_module.net["lm"].lm_head.weight for t in (base, other)]
    assert not torch.equal(*weights)


class WeightedModule(StrangersModule):
    """As the stranger's, but for weights other than 1."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if bool((batch["weight"] == 1).all()):
            return super().training_step(batch, batch_idx)
        tokens = batch["tokens"]
        logits = self.net["lm"](input_ids=tokens[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        return (losses.mean(1) * batch["weight"]).mean()


@pytest.mark.parametrize("stop_at", [12, 38, 56])
def test_stopped_and_resumed_it_reports_the_identical_window(tmp_path: Path, stop_at: int) -> None:
    tokens = np.random.default_rng(0).integers(1, 40, (300, 17))
    rows = TokenRows.write(tmp_path / "rows", tokens, provenance={})

    def run(folder: Path, max_steps: int, *extra: Any, ckpt_path: Any = None) -> None:
        data = TokenDataModule(rows, batch_size=4, n_steps=64)
        run = [*watch(folder), *extra]
        fit(
            StrangersModule(),
            run,
            folder,
            data=data,
            max_steps=max_steps,
            enable_checkpointing=bool(extra),
            ckpt_path=ckpt_path,
        )

    run(tmp_path / "whole", 64)
    saver = ModelCheckpoint(tmp_path / "at", filename="last", every_n_train_steps=stop_at)
    run(tmp_path / "cut", stop_at, saver)
    run(tmp_path / "cut", 64, ckpt_path=tmp_path / "at" / "last.ckpt")
    assert report(tmp_path / "cut") == report(tmp_path / "whole")
    assert steps_of(tmp_path / "cut" / "window") == steps_of(tmp_path / "whole" / "window")


def test_added_later_it_takes_the_past_from_the_monitors_table(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "at", filename="last", every_n_train_steps=40)
    clock, monitor, _ = watch(tmp_path)
    fit(
        StrangersModule(),
        [clock, monitor, saver],
        tmp_path,
        max_steps=40,
        enable_checkpointing=True,
    )
    fit(
        StrangersModule(),
        watch(tmp_path),
        tmp_path,
        max_steps=64,
        ckpt_path=tmp_path / "at" / "last.ckpt",
    )
    found = report(tmp_path)
    assert found["status"] == "closed" and found["window"]["start"] < 40
    assert "start" not in found["checkpoints"], "none was saved before the window's start"


def test_a_run_without_a_window_says_so(tmp_path: Path) -> None:
    fit(StrangersModule(), watch(tmp_path, curve=jump(31, to=0.09)), tmp_path, max_steps=40)
    found = report(tmp_path)
    assert (found["status"], found["target"], found["window"]) == ("none", None, None)
    assert "no window had opened by step 40" in found["message"]
    assert "no window had opened by step 40" in (tmp_path / "live.html").read_text()
    assert found["highest"]["score"] == pytest.approx(float(jump(31, to=0.09)(40).max()), abs=1e-3)


def test_a_run_that_ends_inside_its_window_is_censored(tmp_path: Path) -> None:
    fit(StrangersModule(), watch(tmp_path), tmp_path, max_steps=46)
    found = report(tmp_path)
    assert found["status"] == "censored" and found["window"]["end"] is None
    assert "train longer" in found["message"]
    assert found["checkpoints"].keys() == {"start"}
    assert found["checkpoint_steps"]["start"] <= found["window"]["start"]


def test_a_head_that_falls_back_is_reported_as_lapsed(tmp_path: Path) -> None:
    def curve(step: int) -> np.ndarray:
        values = np.full((2, 2), 0.05)
        values[0, 0] = 0.2 if 10 <= step < 24 else 0.05
        return values

    fit(StrangersModule(), watch(tmp_path, curve=curve), tmp_path, max_steps=50)
    assert report(tmp_path)["status"] == "lapsed"


def test_training_stops_some_steps_after_the_close(tmp_path: Path) -> None:
    run = watch(tmp_path, stop_when_closed=True, margin_steps=3)
    trainer = fit(StrangersModule(), run, tmp_path, max_steps=200)
    assert trainer.global_step == report(tmp_path)["window"]["end"] + 3


def test_announcements_and_phases(tmp_path: Path) -> None:
    run = watch(tmp_path)
    window, heard, phases = run[-1], [], []
    window.subscribe(lambda one: heard.append((one.kind, str(one.unit))))

    class Phases(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            phases.append((trainer.global_step, window.phase))

    fit(StrangersModule(), [*run, Phases()], tmp_path, max_steps=64)
    assert heard == [("opened", "L1H1"), ("closed", "L1H1")]
    found = report(tmp_path)["window"]
    # The step that follows the first value above the threshold is already under a warning.
    assert dict(phases)[found["start"]] == "warned"
    assert dict(phases)[found["start"] - 1] == "before"
    assert dict(phases)[found["end"] - 1] == "open" and dict(phases)[found["end"]] == "closed"


def test_no_room_on_disk_is_reported_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", full)
    with pytest.warns(UserWarning, match="No space left"):
        trainer = fit(StrangersModule(), watch(tmp_path), tmp_path, max_steps=64)
    assert trainer.global_step == 64
    found = report(tmp_path)
    assert found["status"] == "closed" and found["checkpoints"] == {}
    assert found["checkpoints_lost"] > 1


def test_bad_input_is_named(tmp_path: Path) -> None:
    clock, monitor, window = watch(tmp_path)
    with pytest.raises(ValueError, match="put UnitMonitor"):
        fit(StrangersModule(), [CriticalWindow("curve")], tmp_path)
    with pytest.raises(ValueError, match="stands before the UnitMonitor"):
        fit(StrangersModule(), [clock, window, monitor], tmp_path)
    with pytest.raises(ValueError, match=r"head 9 is out of range: layer 1 .* heads 0\.\.1"):
        fit(StrangersModule(), watch(tmp_path, targets="L1H9"), tmp_path)
    with pytest.raises(ValueError, match="ring=2"):
        CriticalWindow(ring=2)
    with pytest.raises(ValueError, match="targets=0"):
        CriticalWindow(targets=0)


def follower(target: Head | None = None) -> MechanismWindow:
    heads = [Head(0, 0), Head(0, 1)]
    return MechanismWindow(
        heads, chance=0.05, targets=1 if target is None else [target], rule=WindowRule()
    )


def two_heads(step: int) -> np.ndarray:
    """L0H0 rises first and stays low; L0H1 rises later and higher."""
    return np.array([[0.2 if step >= 100 else 0.05, 0.7 if step >= 160 else 0.05]])


def test_the_target_is_the_head_that_is_highest_when_its_window_closes() -> None:
    free, named = follower(), follower(Head(0, 0))
    for step in range(0, 600, 10):
        for one in (free, named):
            one.update(step, two_heads(step))
    assert free.window[0] == Head(0, 1) and free.window[1].start == 160
    assert named.window[0] == Head(0, 0) and named.window[1].end_reason == "plateau"


@given(
    gaps=st.lists(st.integers(1, 50), min_size=4, max_size=12),
    starts=st.lists(st.integers(0, 400), max_size=5),
)
def test_eviction_keeps_what_a_window_needs(gaps: list[int], starts: list[int]) -> None:
    steps = list(np.cumsum(gaps))
    gone = to_evict(steps, starts)
    assert gone in steps and gone != steps[-1]
    reachable = [s for s in starts if s >= steps[0]]
    if reachable:
        floor = max(s for s in steps if s <= min(reachable))
        assert gone != floor, "the earliest start keeps the last checkpoint before it"
    else:
        assert gone == steps[0]


def test_what_is_kept_spans_an_open_window_evenly() -> None:
    ring, kept = CheckpointRing(5), []
    for step in range(0, 1000, 10):
        kept.append(step)
        while len(kept) > ring.size:
            kept.remove(to_evict(kept, [200] if step >= 200 else []))
    gaps = np.diff(kept)
    assert kept[0] == 200 and kept[-1] == 990
    assert gaps.max() <= 4 * np.median(gaps)
