"""A run stopped at any step and resumed gives the identical window and promoted checkpoints."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from training import assert_bit_identical
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

from mda_lightning.callbacks.monitor_output import MonitorOutput
from mda_lightning.corpora import TokenRows

SMALL = {"ring": 4, "ring_every": 2}
PACES: dict[str, dict[str, Any]] = {"fixed": {}, "quiet": {"quiet": 6}}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One thread, no pictures and no advice: some hundred short runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        patch.setattr(MonitorOutput, "write", lambda *_, **__: None)
        yield
    logger.setLevel(level)
    torch.set_num_threads(before)


class Whole:
    """One run to the end, of which everything is kept."""

    stride = 1

    def __init__(self, rows: TokenRows, folder: Path, **settings: Any) -> None:
        self.rows, self.settings = rows, settings
        self.folder = folder / "run"
        self.keeping = KeepEverything(self.folder, folder / "kept")
        self.trainer: dict[str, Any] = {}
        for key in ("accumulate_grad_batches", "limit_train_batches"):
            if key in self.settings:
                self.trainer[key] = self.settings.pop(key)
        run(rows, folder, [*self.watching(), self.keeping], **self.trainer)
        self.outcome = outcome(self.folder)
        self.keeping.put_back(None)

    def watching(self) -> list[pl.Callback]:
        return watching(self.folder, **(SMALL | self.settings))

    @property
    def window(self) -> dict[str, Any]:
        return self.outcome["report"]["window"]

    def resume(self, checkpoint: Path, folder_at: int | None, where: str) -> None:
        """From a checkpoint, in the folder as it was after a step or, None, at the end."""
        self.keeping.put_back(folder_at)
        run(self.rows, self.folder.parent, self.watching(), ckpt_path=checkpoint, **self.trainer)
        assert_same_outcome(self.folder, self.outcome, where)


def every_step(pace: str) -> Any:
    return pytest.param(f"{pace}, every step", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["fixed", "quiet", *map(every_step, PACES)])
def whole(request: Any, rows: TokenRows, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    pace, _, every = request.param.partition(", ")
    whole = Whole(rows, tmp_path_factory.mktemp(pace), **PACES[pace])
    whole.stride = 1 if every else 4
    return whole


def stops(whole: Whole, stride: int | None = None) -> list[int]:
    """Steps inside the window and next to it, every one or every fourth, and some far off."""
    window = whole.window
    near = range(window["start"] - 3, window["end"] + 4, stride or whole.stride)
    return sorted({1, 5, 12, *near, N_STEPS - 1})


def test_the_run_is_one_that_can_go_wrong(whole: Whole) -> None:
    """Three checkpoints apart, of more than the ring holds, some of them evicted in the window."""
    window, steps = whole.window, whole.outcome["report"]["checkpoint_steps"]
    assert window["end_reason"] == "level" and window["end"] - window["start"] >= 16
    assert steps["start"] < steps["mid"] < steps["end"]
    listed = [
        {p.name for p in (whole.keeping.to / f"folder-{k}").glob("ring/*")}
        for k in range(window["start"], window["end"])
    ]
    assert len(set.union(*listed)) > 4 >= max(map(len, listed))
    states = whole.outcome["promoted"][f"end-step{steps['end']}.ckpt"]["callbacks"]
    (own,) = (state for key, state in states.items() if key.startswith("CriticalWindow"))
    assert len(own["checkpoints"]["ring"]) == 5, "at the end none makes room that may be promoted"


def test_in_the_folder_as_it_was(whole: Whole) -> None:
    always = "quiet" not in whole.settings
    for step in stops(whole, stride=1 if always else whole.stride):
        whole.resume(whole.keeping.checkpoint(step), step, f"stopped at {step}")


def test_in_the_folder_as_it_was_at_the_end(whole: Whole) -> None:
    """The ring is gone; what was promoted is there."""
    for step in stops(whole):
        whole.resume(whole.keeping.checkpoint(step), None, f"from {step}, after the end")


def test_in_the_folder_as_it_was_later(whole: Whole) -> None:
    """As after a kill between two saves of the Trainer."""
    for step in stops(whole):
        later = min(step + 1 + step % 9, N_STEPS)
        where = f"killed at {later}, from {step}"
        whole.resume(whole.keeping.checkpoint(step), later, where)


def test_from_its_own_checkpoints(whole: Whole) -> None:
    """Every file of the ring at every step, and those promoted."""
    seen: dict[str, Path] = {}
    for step in range(whole.window["start"], whole.window["end"] + 1):
        for path in (whole.keeping.to / f"folder-{step}" / "ring").glob("*.ckpt"):
            seen.setdefault(path.name, path)
    assert len(seen) > 4
    kept = sorted((whole.keeping.to / "end" / "window").glob("*.ckpt"))
    for path in [*kept, *list(seen.values())[:: whole.stride]]:
        step = int(path.stem.rpartition("step")[2].lstrip("-"))
        whole.resume(path, max(step, 1), f"from {path.name}")
        whole.resume(path, None, f"from {path.name}, after the end")


class Before(pl.Callback):
    """Saves the Trainer before the window's callback, or the monitor, has acted on a step."""

    def __init__(self, folder: Path, steps: list[int]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"step-{trainer.global_step}.ckpt")


@pytest.mark.parametrize("place", [1, 2], ids=["before the monitor", "before the window"])
def test_from_a_checkpoint_that_was_saved_before_it_had_acted(
    rows: TokenRows, tmp_path: Path, place: int
) -> None:
    whole = Whole(rows, tmp_path / "whole")
    window = whole.window
    steps = [window["start"], window["start"] + 8, window["end"], window["end"] + 2]
    saving = Before(tmp_path / "before", steps)
    callbacks = whole.watching()
    callbacks.insert(place, saving)
    run(rows, tmp_path / "again", callbacks)
    for step in steps:
        whole.resume(saving.folder / f"step-{step}.ckpt", step - 1, f"before {step}")


# -- other targets and rates ----------------------------------------------------------------------


def two_rises(step: int) -> Any:
    """L1H1 rises from step 16 on, L0H0 from step 26 on and not as high."""
    values = CURVE(step + 9)
    values[0, 0] = CURVE(step - 1)[1, 1] * 0.8
    return values


@pytest.mark.parametrize(
    "settings",
    [
        {"curve": two_rises, "targets": 2},
        {"curve": two_rises, "targets": ["L0H0", "L1H1"]},
        {"curve": two_rises, "targets": "L0H0"},
        {"ring": 3, "ring_every": 1},
        {"every": 1, "accumulate_grad_batches": 2},
    ],
    ids=["two highest", "two named", "one named", "least ring", "accumulated"],
)
def test_other_targets_and_rates(rows: TokenRows, tmp_path: Path, settings: Any) -> None:
    whole = Whole(rows, tmp_path, **settings)
    window = whole.window
    report = whole.outcome["report"]
    assert (report["status"], report["checkpoints_lost"]) == ("closed", 0)
    assert report["checkpoints"].keys() == {"start", "mid", "end"}
    for i, step in enumerate(range(window["start"] - 1, window["end"] + 3, 5)):
        whole.resume(whole.keeping.checkpoint(step), None if i % 2 else step, f"from {step}")


def overtaken(step: int) -> Any:
    """L0H0 rises first and stays low; L1H1 rises later, and higher."""
    values = CURVE(step + 1)
    values[0, 0] = min(CURVE(step + 17)[1, 1], 0.3)
    return values


def test_a_run_that_is_planned_to_end_inside_its_window(rows: TokenRows, tmp_path: Path) -> None:
    """It promotes the start of the head that leads as it ends; carried on, twice, another leads."""
    whole = Whole(rows, tmp_path / "whole", curve=overtaken)
    window, folder, kept = whole.window, whole.folder, whole.keeping
    assert whole.outcome["report"]["target"] == "L1H1" and window["start"] > 20
    for first, second in [(20, window["end"] - 4), (3, window["start"] + 8)]:
        kept.put_back(1)
        former: Path | None = None
        promoted = []
        for stop in (first, second, N_STEPS):
            keeping = KeepEverything(tmp_path / "nothing", tmp_path / f"cut-{first}-{stop}")
            callbacks = [*whole.watching(), keeping]
            run(rows, tmp_path / "whole", callbacks, max_steps=stop, ckpt_path=former)
            former = keeping.checkpoint(stop)
            promoted.append(report_of(folder)["checkpoint_steps"])
        assert promoted[0].get("start", 99) < window["start"] or first == 3
        assert_same_outcome(folder, whole.outcome, f"ended at {first} and {second}")


def test_going_back_twice_after_the_end(rows: TokenRows, tmp_path: Path) -> None:
    """The second time from a run that ended in the window: the midpoint's file is the only copy."""
    whole = Whole(rows, tmp_path / "whole")
    steps, end = whole.outcome["report"]["checkpoint_steps"], whole.window["end"]
    first, second = end - 6, end - 3
    assert steps["mid"] < first
    whole.keeping.put_back(None)
    keeping = KeepEverything(tmp_path / "nothing", tmp_path / "cut")
    callbacks = [*whole.watching(), keeping]
    at = whole.keeping.checkpoint(first)
    run(rows, tmp_path / "whole", callbacks, max_steps=second, ckpt_path=at)
    assert report_of(whole.folder)["checkpoints"].keys() == {"start"}
    at = keeping.checkpoint(second)
    run(rows, tmp_path / "whole", whole.watching(), ckpt_path=at)
    assert_same_outcome(whole.folder, whole.outcome, "twice")


# -- the same objects again -----------------------------------------------------------------------


def test_the_same_objects_fit_again_from_the_beginning(rows: TokenRows, tmp_path: Path) -> None:
    callbacks = watching(tmp_path / "run", **SMALL)
    run(rows, tmp_path, callbacks)
    expected = outcome(tmp_path / "run")
    with pytest.warns(UserWarning, match="holds a former run's checkpoints"):
        run(rows, tmp_path, callbacks)
    assert_same_outcome(tmp_path / "run", expected, "again")


def test_one_trainer_goes_back(rows: TokenRows, tmp_path: Path) -> None:
    """A second fit of the same Trainer from a checkpoint of before: nothing of later is known."""
    whole = Whole(rows, tmp_path)
    callbacks, window = whole.watching(), whole.window
    trainer = run(rows, tmp_path, callbacks)
    for step in (12, window["start"] + 6, window["end"] - 1, window["end"]):
        whole.keeping.put_back(step)
        trainer.fit(
            trainer.lightning_module,
            datamodule=trainer.datamodule,
            ckpt_path=whole.keeping.checkpoint(step),
        )
        assert_same_outcome(whole.folder, whole.outcome, f"back to {step}")


def test_what_is_announced_is_announced_once(rows: TokenRows, tmp_path: Path) -> None:
    """Before a stop or after it, never in both; the page's lines are those of the whole run."""
    whole = Whole(rows, tmp_path)
    start, end = whole.window["start"], whole.window["end"]
    lines = _lines(whole.outcome["promoted"][f"end-step{end}.ckpt"])
    assert len(lines) == 2 and "opened" in lines[0][1] and "closed" in lines[1][1]
    opened_at = lines[0][0]
    for step in (start, opened_at - 1, opened_at, end - 1, end, N_STEPS - 1):
        whole.keeping.put_back(step)
        callbacks = whole.watching()
        heard: list[Any] = []
        callbacks[2].subscribe(heard.append)
        run(rows, tmp_path, callbacks, ckpt_path=whole.keeping.checkpoint(step))
        kinds = [one.kind for one in heard]
        assert kinds == [k for k, at in (("opened", opened_at), ("closed", end)) if at > step]
        assert [one.step for one in heard] == [at for at in (opened_at, end) if at > step]
        assert _lines({"callbacks": {callbacks[1].state_key: callbacks[1].state_dict()}}) == lines


def _lines(checkpoint: dict[str, Any]) -> list[Any]:
    states = checkpoint["callbacks"].items()
    return next(state["events"] for key, state in states if key.startswith("UnitMonitor"))


def test_a_run_that_was_stopped_by_its_window_stays_stopped(
    rows: TokenRows, tmp_path: Path
) -> None:
    stopping = {"stop_when_closed": True, "margin_steps": 3}
    whole = Whole(rows, tmp_path, **stopping)
    last = whole.window["end"] + 3
    assert whole.keeping.checkpoint(last).exists()
    assert not whole.keeping.checkpoint(last + 1).exists()
    for step in (last - 1, last):
        whole.keeping.put_back(step)
        again = run(rows, tmp_path, whole.watching(), ckpt_path=whole.keeping.checkpoint(step))
        assert again.global_step == last
        assert_same_outcome(whole.folder, whole.outcome, f"from {step}")


def test_training_goes_on_exactly_from_every_step(rows: TokenRows, tmp_path: Path) -> None:
    """What the comparisons above rest on: this small module's own state, at the last step."""
    whole = Whole(rows, tmp_path)
    last = torch.load(whole.keeping.checkpoint(N_STEPS), weights_only=True)
    for step in (7, whole.window["end"]):
        keeping = KeepEverything(whole.folder, tmp_path / f"from-{step}")
        whole.keeping.put_back(step)
        callbacks = [*whole.watching(), keeping]
        run(rows, tmp_path, callbacks, ckpt_path=whole.keeping.checkpoint(step))
        found = torch.load(keeping.checkpoint(N_STEPS), weights_only=True)
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "TokenDataModule"):
            assert_bit_identical(found[key], last[key], f"{step}: {key}")
