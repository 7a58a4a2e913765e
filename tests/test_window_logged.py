"""Any metric can drive a window: a measure's keys, what the module logs, what validation finds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from test_scheduled_checkpoints import file_size_limit  # noqa: F401
from training import (
    Clock,
    FakeMeasure,
    assert_bit_identical,
    jump,
)
from window_runs import (
    CURVE,
    N_STEPS,
    KeepEverything,
    TinyModule,
    assert_same_outcome,
    outcome,
    report_of,
    run,
    watching,
)

from mda_lightning.callbacks import CriticalWindow
from mda_lightning.corpora import TokenRows
from mda_lightning.window import WindowDetector, WindowRule

RULE = WindowRule(minimum_up=0.2, level=0.5)
GIVEN: dict[str, Any] = {"chance": 0.05, "rule": RULE}


def curve(step: int) -> float:
    """From 0.05 to 0.6 in steps 25 to 45."""
    return float(CURVE(step)[1, 1])


pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


class LogsModule(TinyModule):
    """Logs numbers that follow from the step: those of ``every`` steps in training, and one in
    validation."""

    def __init__(
        self, value: Callable[[int], float] = curve, *, name: str = "made", every: int = 1
    ) -> None:
        super().__init__()
        self.value, self.name, self.every = value, name, every

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        # After this step the weights have had one more update: the value is that one's.
        step = self.global_step + 1
        if step % self.every == 0:
            self.log(f"{self.name}/train", self.value(step))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log(f"{self.name}/val", self.value(self.global_step))


def expected_window(steps: list[int], rule: WindowRule = RULE) -> Any:
    """That of the same numbers, fed to the detector by hand."""
    detector = WindowDetector(1, floor=0.05, rule=rule)
    for step in steps:
        detector.update(step, [curve(step)])
    (found,) = detector.windows()
    return found


# -- every kind of metric -------------------------------------------------------------------------


def heads(step: int) -> np.ndarray:
    return np.asarray(CURVE(step))


KINDS: dict[str, dict[str, Any]] = {
    "heads of a measure": {"metric": "fake/heads", "every": 2},
    "number of a measure": {"metric": "fake/whole@7", "every": 2},
    "logged in training": {"metric": "made/train", "every_n_steps": 2},
    "logged in validation": {"metric": "made/val", "on": "validation"},
}


class KeepAfterValidation(KeepEverything):
    """Where a step is validated, what was kept of it is that of after the validation.

    Lightning leaves a validation out when it goes on from a checkpoint of just before it.
    """

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            shutil.rmtree(self.to / f"folder-{trainer.global_step}", ignore_errors=True)
            self._seen = -1
            self.on_train_batch_end(trainer)


class Followed:
    """Runs of one kind of metric, in one folder."""

    def __init__(self, rows: TokenRows, folder: Path, kind: str, **settings: Any) -> None:
        self.rows, self.folder, self.kind = rows, folder / "run", kind
        self.settings = {"ring": 4, "ring_every": 2} | GIVEN | KINDS[kind] | settings
        keep = KeepAfterValidation if self.settings.get("on") == "validation" else KeepEverything
        self.keeping = keep(self.folder, folder / "kept")

    def callbacks(self) -> list[Any]:
        clock = Clock()
        measure = FakeMeasure(clock, every_n_steps=2, heads=heads, whole=curve)
        settings = dict(self.settings)
        settings.setdefault("every", 8)
        found = watching(
            self.folder, curve=jump(99), measures=[measure], clock=clock, quiet=8, **settings
        )
        return found

    def run(self, *more: Any, **settings: Any) -> pl.Trainer:
        if self.settings.get("on") == "validation":
            settings = {"val_rows": self.rows, "val_check_interval": 2} | settings
            settings |= {"limit_val_batches": 1, "num_sanity_val_steps": 1}
        return run(
            self.rows,
            self.folder.parent,
            [*self.callbacks(), *more],
            module=LogsModule(),
            **settings,
        )


@pytest.fixture(scope="module", params=list(KINDS))
def followed(request: Any, rows: TokenRows, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A whole run, everything of it kept, and its outcome."""
    one = Followed(rows, tmp_path_factory.mktemp("run"), request.param)
    one.run(one.keeping)
    found = outcome(one.folder)
    one.keeping.put_back(None)
    return one, found


def test_the_window_is_that_of_the_numbers(followed: Any) -> None:
    one, found = followed
    report = found["report"]
    first = 0 if "measure" in one.kind else 2
    want = expected_window(list(range(first, N_STEPS + 1, 2)))
    assert report["status"] == "closed"
    assert report["target"] == ("L1H1" if "heads" in one.kind else one.settings["metric"])
    window = report["window"]
    assert (window["start"], window["end"]) == (want.start, want.end)
    assert window["midpoint"] == want.midpoint
    steps = report["checkpoint_steps"]
    assert steps["start"] <= window["start"] <= steps["mid"] < steps["end"] == window["end"]
    for name, checkpoint in found["promoted"].items():
        assert name.endswith(f"-step{checkpoint['global_step']}.ckpt")


def test_resumed_at_any_step_it_is_identical(followed: Any) -> None:
    one, found = followed
    window = found["report"]["window"]
    for step in [3, *range(window["start"] - 1, window["end"] + 2, 3), N_STEPS - 1]:
        one.keeping.put_back(None if step % 2 else step)
        one.run(ckpt_path=one.keeping.checkpoint(step))
        assert_same_outcome(one.folder, found, f"from {step}")


def test_resumed_from_its_own_checkpoints_training_is_identical(followed: Any) -> None:
    """Also from those that were saved at the end of a validation: the last state of the run."""
    one, found = followed
    last = torch.load(one.keeping.checkpoint(N_STEPS), weights_only=True)
    for name, step in found["report"]["checkpoint_steps"].items():
        one.keeping.put_back(None)
        path = one.folder / found["report"]["checkpoints"][name]
        keeping = KeepEverything(one.folder, one.folder.parent / f"from-{name}")
        trainer = one.run(keeping, ckpt_path=path)
        assert trainer.global_step == N_STEPS
        again = torch.load(keeping.checkpoint(N_STEPS), weights_only=True)
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "TokenDataModule"):
            assert_bit_identical(again[key], last[key], f"{name} ({step}): {key}")
        assert_same_outcome(one.folder, found, f"from {name}")


# -- how a logged number is read ------------------------------------------------------------------


def logged(folder: Path, metric: str = "made/train", **settings: Any) -> CriticalWindow:
    return CriticalWindow(metric, folder=str(folder), **(GIVEN | {"every_n_steps": 2} | settings))


def values_of(window: CriticalWindow) -> tuple[list[int], np.ndarray]:
    state = window.state_dict()["source"]
    return state["steps"], np.array(state["values"])


def test_it_needs_no_monitor(rows: TokenRows, tmp_path: Path) -> None:
    """Nor a folder: that is then ``mda/`` in the run's own."""
    window = CriticalWindow("made/train", every_n_steps=2, **GIVEN)
    run(rows, tmp_path, [window], module=LogsModule())
    found = report_of(tmp_path / "mda")
    want = expected_window(list(range(2, N_STEPS + 1, 2)))
    assert (found["window"]["start"], found["window"]["end"]) == (want.start, want.end)
    assert found["mechanism"] == found["target"] == "made/train"
    assert (found["floor"], found["follows"]) == (0.05, "value")


def test_it_is_read_at_its_steps_only(rows: TokenRows, tmp_path: Path) -> None:
    """Not in a sanity check, not before the first update, once a step of several micro-batches."""
    train = logged(tmp_path / "a", every_n_steps=3)
    val = logged(tmp_path / "b", "made/val", on="validation")
    module = LogsModule()
    trainer = run(
        rows,
        tmp_path,
        [train, val],
        module=module,
        max_steps=11,
        val_rows=rows,
        val_check_interval=8,
        limit_val_batches=1,
        num_sanity_val_steps=1,
        accumulate_grad_batches=2,
    )
    # Of the two micro-batches of a step the second one's value is the last; it is that of the step.
    steps, values = values_of(train)
    assert steps == [3, 6, 9]
    np.testing.assert_allclose(values, [curve(step) for step in steps], rtol=1e-6)
    steps, values = values_of(val)
    assert steps == [4, 8]
    np.testing.assert_allclose(values, [curve(step) for step in steps], rtol=1e-6)
    trainer.validate(module, datamodule=trainer.datamodule, verbose=False)
    assert values_of(val)[0] == [4, 8], "a validation for its own sake is no evaluation"


def test_what_is_not_logged_anew_is_read_again(rows: TokenRows, tmp_path: Path) -> None:
    """As Lightning shows it, also after a resume between the logging and the reading."""
    whole = logged(tmp_path / "a", every_n_steps=4)
    keeping = KeepEverything(tmp_path / "a", tmp_path / "kept")
    module = LogsModule(float, every=7)
    run(rows, tmp_path, [whole, keeping], module=module, max_steps=40)
    steps, values = values_of(whole)
    assert steps == list(range(4, 41, 4))
    assert np.isnan(values[0]) and values[1:].tolist() == [step // 7 * 7 for step in steps[1:]]
    for stop in (5, 15, 22):
        again = logged(tmp_path / "a", every_n_steps=4)
        run(
            rows,
            tmp_path,
            [again],
            module=LogsModule(float, every=7),
            max_steps=40,
            ckpt_path=keeping.checkpoint(stop),
        )
        np.testing.assert_array_equal(values_of(again)[1], values)


@pytest.mark.parametrize("on", ["train", "validation"])
def test_a_name_that_nobody_logs_is_told_while_training(
    rows: TokenRows, tmp_path: Path, on: Any
) -> None:
    window = logged(tmp_path, "train/los", on=on, every_n_steps=1)
    words = r"CriticalWindow\('train/los'\).* nothing was logged .* are: .*train/loss"
    with pytest.raises(ValueError, match=words):
        run(
            rows,
            tmp_path,
            [window],
            module=LogsModule(),
            val_rows=rows,
            val_check_interval=4,
            limit_val_batches=1,
        )
    assert len(values_of(window)[0]) == (20 if on == "train" else 2)


def test_one_that_is_logged_late_or_is_not_finite_is_no_mistake(
    rows: TokenRows, tmp_path: Path
) -> None:
    def late(step: int) -> float:
        return curve(step) if step % 3 else float("nan")

    window = logged(tmp_path, every_n_steps=1)
    run(rows, tmp_path, [window], module=LogsModule(late, every=1))
    found = report_of(tmp_path)
    assert found["status"] == "closed" and abs(found["window"]["start"] - 30) <= 2
    always = logged(tmp_path / "nan", every_n_steps=1)
    run(rows, tmp_path, [always], module=LogsModule(lambda step: float("nan")))
    assert report_of(tmp_path / "nan")["message"] == "no finite score was measured"


def test_a_measure_without_such_a_key_is_told(rows: TokenRows, tmp_path: Path) -> None:
    clock = Clock()
    callbacks = watching(
        tmp_path, clock=clock, measures=[FakeMeasure(clock)], metric="fake/tails", **GIVEN
    )
    with pytest.raises(ValueError, match="'fake' has no such key; it gives 'fake/heads', 'fake/wh"):
        run(rows, tmp_path, callbacks)


def test_a_measure_that_is_taken_later_is_followed_from_then_on(
    rows: TokenRows, tmp_path: Path
) -> None:
    """The run goes on from a checkpoint that knows nothing of either, off the measure's grid."""
    keeping = KeepEverything(tmp_path / "none", tmp_path / "kept")
    run(rows, tmp_path, [keeping], max_steps=7)
    clock = Clock()
    measure = FakeMeasure(clock, every_n_steps=5, whole=curve)
    callbacks = watching(
        tmp_path / "run", clock=clock, measures=[measure], metric="fake/whole@7", **GIVEN
    )
    run(rows, tmp_path, callbacks, ckpt_path=keeping.checkpoint(7))
    window = callbacks[2]
    assert window.follower.detector.state_dict()["steps"] == list(range(10, N_STEPS + 1, 5))


# -- a metric that falls --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("falls", "turned", "follows"),
    [
        (True, lambda x: 10.8 - 6 * (x - 0.05), "floor - value"),
        (False, lambda x: -10.8 + 6 * (x - 0.05), "value - floor"),
    ],
    ids=["a loss", "a log-likelihood"],
)
def test_a_metric_is_followed_by_its_distance(
    rows: TokenRows, tmp_path: Path, falls: bool, turned: Any, follows: str
) -> None:
    """A loss that begins at 10.8, and of which a fall below 9 counts; and what rises from -10.8."""
    chance = turned(0.05)
    window = logged(
        tmp_path,
        falls=falls,
        chance=chance,
        rule=WindowRule(minimum_up=1.8, level=3.0),
        stop_when_closed=True,
    )
    seen = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            value = trainer.callback_metrics.get("made/train/ema_max")
            seen.append(None if value is None else float(value))

    run(rows, tmp_path, [window, Looks()], module=LogsModule(lambda k: turned(curve(k))))
    found = report_of(tmp_path)
    first = next(k for k in range(2, N_STEPS, 2) if 6 * (curve(k) - 0.05) > 1.8)
    assert found["window"]["start"] == first and found["status"] == "closed"
    assert found["window"]["threshold"] == pytest.approx(1.8) and found["window"]["floor"] == 0.0
    assert (found["floor"], found["follows"]) == (pytest.approx(chance), follows)
    way = "below 10.8" if falls else "above -10.8"
    assert f"(scores are how far made/train is {way})" in found["message"]
    numbers = [x for x in seen if x is not None]
    assert numbers[0] == pytest.approx(chance, abs=0.1), "what is logged is in the metric's units"
    assert abs(numbers[-1] - chance) > 3.0 - 1e-6


def test_too_little_is_known_of_a_metric(rows: TokenRows, tmp_path: Path) -> None:
    for settings in ({"chance": 10.8}, {"rule": RULE}, {}):
        with pytest.raises(
            ValueError, match=r"chance=\.\.\., .*minimum_up is how far it must fall"
        ):
            run(rows, tmp_path, [CriticalWindow("train/loss", falls=True, **settings)])
