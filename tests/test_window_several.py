"""Several windows in one run; and runs in which there is little to find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from training import Clock, CurveMechanism, StrangersModule, fit, jump
from window_runs import (
    CURVE,
    N_STEPS,
    KeepEverything,
    assert_same_outcome,
    outcome,
    report_of,
    run,
    watching,
)

from mda_lightning.callbacks import CriticalWindow, UnitMonitor
from mda_lightning.corpora import TokenRows

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


# -- several at once ------------------------------------------------------------------------------


def two_mechanisms(folder: Path) -> tuple[Clock, UnitMonitor]:
    clock = Clock()
    other = CurveMechanism(clock, lambda k: CURVE(k + 8))
    other.name = "other"  # type: ignore[misc]
    both = [CurveMechanism(clock, CURVE), other]
    return clock, UnitMonitor(both, measures=(), every_n_steps=2, folder=str(folder), live=False)


def test_two_windows_of_one_run_have_folders_of_their_own(rows: TokenRows, tmp_path: Path) -> None:
    clock, monitor = two_mechanisms(tmp_path / "both")
    windows = [CriticalWindow("curve"), CriticalWindow("other")]
    keeping = KeepEverything(tmp_path / "both", tmp_path / "kept")
    run(rows, tmp_path, [clock, monitor, *windows, keeping])
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == ["curve", "other"]
    alone = {}
    for name in ("curve", "other"):
        clock, monitor = two_mechanisms(tmp_path / name)
        run(rows, tmp_path, [clock, monitor, CriticalWindow(name)])
        alone[name] = report_of(tmp_path / name)
        assert report_of(tmp_path / "both" / name) == alone[name]
        for path in alone[name]["checkpoints"].values():
            assert (tmp_path / "both" / name / path).exists()
    assert alone["curve"]["window"]["start"] > alone["other"]["window"]["start"]
    found = {name: outcome(tmp_path / "both" / name) for name in alone}
    keeping.put_back(None)
    for step in (alone["other"]["window"]["start"] + 5, alone["curve"]["window"]["start"] + 6):
        keeping.put_back(step)
        clock, monitor = two_mechanisms(tmp_path / "both")
        windows = [CriticalWindow("curve"), CriticalWindow("other")]
        run(rows, tmp_path, [clock, monitor, *windows], ckpt_path=keeping.checkpoint(step))
        for name, one in found.items():
            assert_same_outcome(tmp_path / "both" / name, one, f"{name} from {step}")


def test_two_windows_of_one_metric_need_two_folders(rows: TokenRows, tmp_path: Path) -> None:
    clock, monitor = two_mechanisms(tmp_path / "run")
    first, second = CriticalWindow("curve"), CriticalWindow("curve", targets=["L1H1"])
    with pytest.raises(ValueError, match=r"two CriticalWindow\('curve'\) would write over"):
        run(rows, tmp_path, [clock, monitor, first, second], max_steps=4)
    clock, monitor = two_mechanisms(tmp_path / "run")
    apart = CriticalWindow("curve", targets=["L1H1"], folder=str(tmp_path / "named"))
    run(rows, tmp_path, [clock, monitor, CriticalWindow("curve"), apart])
    assert report_of(tmp_path / "run")["window"] == report_of(tmp_path / "named")["window"]


# -- and besides ----------------------------------------------------------------------------------


def test_a_rehearsal_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    callbacks = watching(folder, every=1, curve=jump(1, ramp=1))
    fit(StrangersModule(), callbacks, tmp_path, fast_dev_run=12)
    assert callbacks[2].phase != "before", "there was something to write"
    assert not folder.exists()


def test_a_target_that_never_rises_leaves_the_window_open(rows: TokenRows, tmp_path: Path) -> None:
    """One of two named: the other's window closes, the mechanism's does not."""
    callbacks = watching(tmp_path, targets=["L0H0", "L1H1"], stop_when_closed=True)
    trainer = run(rows, tmp_path, callbacks)
    found = report_of(tmp_path)
    assert trainer.global_step == N_STEPS and callbacks[2].phase == "open"
    assert found["status"] == "censored" and found["window"]["end"] is None
    assert [one["unit"] for one in found["windows"] if one["end"]] == ["L1H1"]
    assert found["checkpoints"].keys() == {"start"} and (tmp_path / "ring").exists()


def test_a_ring_that_no_window_needs_is_cleared(rows: TokenRows, tmp_path: Path) -> None:
    run(rows, tmp_path, watching(tmp_path, curve=jump(99)))
    assert report_of(tmp_path)["status"] == "none"
    assert not (tmp_path / "ring").exists() and not (tmp_path / "window").exists()


def test_a_past_that_it_was_not_there_for_is_not_saved_as_the_present(
    rows: TokenRows, tmp_path: Path
) -> None:
    """Added at step 41 to a run that measured step 40 last: no checkpoint is named 40."""
    clock, monitor, _ = watching(tmp_path / "run")
    keeping = KeepEverything(tmp_path / "none", tmp_path / "kept")
    run(rows, tmp_path, [clock, monitor, keeping], max_steps=41)
    names: dict[str, int] = {}

    class Looks(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            for path in (tmp_path / "run").glob("*/*.ckpt"):
                names[path.name] = torch.load(path, weights_only=True)["global_step"]

    callbacks = watching(tmp_path / "run", ring_every=1)
    run(rows, tmp_path, [*callbacks, Looks()], ckpt_path=keeping.checkpoint(41))
    assert report_of(tmp_path / "run")["window"]["start"] < 40
    assert names and min(names.values()) > 41
    for name, step in names.items():
        assert name.endswith((f"step-{step}.ckpt", f"-step{step}.ckpt"))


@pytest.mark.parametrize("edge", ["start", "end"])
def test_in_another_folder_only_what_is_there_is_listed(
    rows: TokenRows, tmp_path: Path, edge: str
) -> None:
    """A run that goes on elsewhere finds the same window; the former's files are the former's."""
    run(rows, tmp_path, watching(tmp_path / "first", ring=3))
    first = report_of(tmp_path / "first")
    at = tmp_path / "first" / first["checkpoints"][edge]
    with pytest.warns(UserWarning, match="this one writes to"):
        run(rows, tmp_path, watching(tmp_path / "second", ring=3), ckpt_path=at)
    second = report_of(tmp_path / "second")
    assert second["window"] == first["window"] and second["checkpoints_lost"] == 0
    kept = sorted(p.name for p in (tmp_path / "second").glob("window/*"))
    assert kept == sorted(Path(p).name for p in second["checkpoints"].values())
    assert bool(kept) == (edge == "start")
