"""Find a mechanism's critical window while it happens, and keep the checkpoints around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from mda_lightning.callbacks.attachment import (
    is_rehearsal,
    state_key,
    versions,
    warn_of_other_folder,
)
from mda_lightning.callbacks.checkpoint_writing import check_checkpointing
from mda_lightning.callbacks.loggers import log_scalars, log_summary, run_folder
from mda_lightning.callbacks.unit_monitor import UnitMonitor
from mda_lightning.callbacks.window_checkpoints import PROMOTED, WindowCheckpoints
from mda_lightning.callbacks.window_news import Announcement, WindowNews, tell
from mda_lightning.callbacks.window_source import (
    LoggedSource,
    MonitorSource,
    On,
    WindowSource,
    monitor_of,
)
from mda_lightning.files import write_json
from mda_lightning.mechanisms import MECHANISMS
from mda_lightning.units import parse_unit
from mda_lightning.window import (
    WINDOW_NAME,
    Edge,
    MechanismWindow,
    Phase,
    Window,
    WindowRule,
    message_of,
    window_report,
)


class CriticalWindow(pl.Callback):
    """Find the window in which a unit of a mechanism forms, and keep the checkpoints around it.

    It follows a :class:`UnitMonitor`'s mechanism or measure, or any number that is logged. The
    mechanism's window is that of its target: in retrospect the unit that is highest when its own
    window has closed, or the units named. Because a start is known only afterwards, full
    checkpoints are kept in a bounded ring: one every ``ring_every`` evaluations while a unit is
    about to rise or rises (five times as seldom before), and one whenever a unit first passes its
    threshold and when it has formed. Those at the window's start (step <= start), midpoint and end
    are promoted to ``window/``; training resumes from any of them exactly.

    Place it after its :class:`UnitMonitor`, and last among callbacks that change training state on
    ``on_train_batch_end``, so that its checkpoints hold what those did.

    ==============================  ==============================================================
    logged, per mechanism           meaning
    ==============================  ==============================================================
    ``<mechanism>/ema_max``         highest smoothed score of the units watched
    ``<mechanism>/n_rising``        units watched that are inside a window
    ``<mechanism>/n_formed``        units watched whose window has closed
    ``<mechanism>/window_open``     1 while the mechanism's window is open, else 0
    alert (W&B)                     a window opened, closed or lapsed, or was handed over
    summary (W&B)                   ``<mechanism>/window_{status,target,start,end}``, at the end
    ==============================  ==============================================================

    In the run's folder: ``window.json`` (rewritten whenever a window opens or closes, and at the
    end), ``window/*.ckpt``, and ``ring/`` until the window has closed.

    Args:
        mechanism: name of a mechanism that a monitor measures; or a metric: a key of one of its
            measures, as ``"ablation/logit"``, or a name under which the module logs a number.
        targets: how many of the highest units; or their names, such as ``["L1H2"]``.
        chance: the metric's value before anything has formed. Known of mechanisms.
        rule: thresholds of the detector. The default is meant for attention probabilities.
        falls: a metric whose formation is a fall, such as a loss: it is followed with its sign
            turned, and ``rule`` is in turned values too; ``chance`` is not turned.
        on: where a logged number is read: every ``every_n_steps`` steps of training, or after each
            validation.
        every_n_steps: see there.
        ring: checkpoints in the ring at most.
        ring_every: evaluations between two of them.
        folder: where to write; None is the monitor's folder, or ``mda/`` in the logger's.
        stop_when_closed: stop the training ``margin_steps`` after the window has closed.
        margin_steps: see there.

    Raises:
        ValueError: a number out of range; at ``setup``, a unit that the model lacks, a monitor that
            acts later, or no monitor for a mechanism; in training, a metric that nobody logs.
    """

    def __init__(
        self,
        mechanism: str = "induction",
        *,
        targets: int | str | Sequence[str] = 1,
        chance: float | None = None,
        rule: WindowRule | None = None,
        falls: bool = False,
        on: On = "train",
        every_n_steps: int = 10,
        ring: int = 8,
        ring_every: int = 5,
        folder: str | None = None,
        stop_when_closed: bool = False,
        margin_steps: int = 0,
    ) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: read at most every step, 1")
        if margin_steps < 0:
            raise ValueError(f"margin_steps={margin_steps}: 0 or more steps after the close")
        if on not in ("train", "validation"):
            raise ValueError(f"on={on!r}: 'train' or 'validation'")
        if isinstance(targets, int) and targets < 1:
            raise ValueError(f"targets={targets}: at least one unit, by number or by name")
        self.mechanism = mechanism
        self.targets = [targets] if isinstance(targets, str) else targets
        self.rule = rule
        arguments = {
            "mechanism": mechanism,
            "targets": self.targets if isinstance(self.targets, int) else list(self.targets),
            "chance": chance,
            "rule": (rule or WindowRule()).settings(),
            "falls": falls,
            "on": on,
        }
        # Kept: Lightning asks for the key at every hook of every step.
        self._state_key = state_key("CriticalWindow", arguments)
        self.folder: Path | None = None
        self.follower: MechanismWindow[Any] | None = None
        self._chance = chance
        self._sign = -1.0 if falls else 1.0
        self._on: On = on
        self._every_n_steps = every_n_steps
        self._checkpoints = WindowCheckpoints(ring, ring_every)
        self._news = WindowNews(mechanism)
        self._wanted_folder = folder
        self._stop_when_closed = stop_when_closed
        self._margin_steps = margin_steps
        self._monitor: UnitMonitor | None = None
        self._source: WindowSource | None = None
        self._saved: dict[str, Any] | None = None  # a state that has not been taken up

    # -- for other code -----------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """Where training is: "warned" is a first value above a threshold, perhaps a start."""
        return "before" if self.follower is None else self.follower.phase

    @property
    def asks(self) -> bool:
        """Whether the monitor is to measure at its dense rate."""
        return self.follower is not None and self.follower.asks

    @property
    def window(self) -> tuple[Any, Window] | None:
        """The leading target and the window: closed, else open, else the last that lapsed, else
        None."""
        return None if self.follower is None else self.follower.window

    @property
    def target_windows(self) -> list[tuple[Any, Window]]:
        """All targets that have risen, the leading one first, each with its own window."""
        return [] if self.follower is None else self.follower.targets

    @property
    def status(self) -> str:
        """The window in a sentence."""
        return "" if self.follower is None else message_of(self.follower)

    @property
    def checkpoints(self) -> dict[Edge, tuple[int, Path]]:
        """Promoted checkpoints: edge -> (step, path)."""
        return self._checkpoints.paths

    def subscribe(self, follow: Callable[[Announcement], None]) -> Callable[[], None]:
        """Call ``follow`` when a unit's window opens, closes or lapses, or is handed over; returns
        what ends it."""
        return self._news.subscribe(follow)

    # -- Lightning ----------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        """A monitor's values are in the monitor's own state, from which the detector is rebuilt."""
        if self.follower is None or self._source is None:
            return dict(self._saved or {})
        return {
            "schema_version": 2,
            "folder": str(self.folder),
            "last_step": self.follower.last_step,
            "checkpoints": self._checkpoints.state_dict(),
            "source": self._source.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self._saved = dict(state_dict)
        if self._source is not None:  # else at setup
            warn_of_other_folder("CriticalWindow", state_dict["folder"], self.folder)
            self._source.load_state_dict(state_dict["source"])
            if self.follower is not None:
                self._take_up()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_checkpointing(trainer, "CriticalWindow")
        self._monitor = monitor_of(trainer, self, self.mechanism)
        measured = None if self._monitor is None else self._monitor.mechanism(self.mechanism)
        self._check_metric(is_mechanism=measured is not None)
        if self._monitor is not None:
            self._source = MonitorSource(self._monitor, self.mechanism)
            self._monitor.add_follower(self)
        else:
            self._source = LoggedSource(
                self.mechanism, on=self._on, every_n_steps=self._every_n_steps
            )
        if self._wanted_folder is None and self._monitor is not None:
            self.folder = self._monitor.folder
        else:
            self.folder = run_folder(trainer, self._wanted_folder)
        assert self.folder is not None
        self._checkpoints.attach(self.folder)
        if self.follower is not None and trainer.global_step != 0:
            return  # a second fit that goes on with the first
        self.follower = None
        self._checkpoints.begin()
        if measured is not None:
            # A Trainer's checkpoint, if there is one, is loaded after this.
            self._begin(self._chance if self._chance is not None else measured.chance)
        if self._saved is not None:
            self.load_state_dict(self._saved)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._source is not None
        if self.follower is None:  # its units are known once the metric has been measured
            assert self._chance is not None
            self._begin(self._chance)
            if self._saved is not None:
                self._take_up()
        if trainer.global_step == 0 and not is_rehearsal(trainer):
            self._checkpoints.clear(trainer)  # a former run's, in the same folder
        self._source.read(trainer, "train")
        self._catch_up()
        self._follow(trainer, pl_module, in_batch=False)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert self._source is not None
        self._source.read(trainer, "train")
        self._follow(trainer, pl_module, in_batch=True)
        if self._stop_when_closed and self.follower is not None:
            closed_at = self.follower.closed_at
            if closed_at is not None and trainer.global_step >= closed_at + self._margin_steps:
                trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._source is not None and self.follower is not None:
            self._source.read(trainer, "validation")
            self._follow(trainer, pl_module, in_batch=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.follower is not None
        if is_rehearsal(trainer):
            return
        if self.follower.phase != "closed":
            self._checkpoints.promote(trainer, self.follower)
        if self.follower.phase == "before":
            self._checkpoints.clear(trainer)  # no window has begun that could need one of them
        self._write(trainer)
        self._summarise(trainer)
        if self.follower.phase != "closed":
            tell(self._monitor, trainer.global_step, self.status)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._monitor = None

    # -- what it does -------------------------------------------------------------------------

    def _check_metric(self, *, is_mechanism: bool) -> None:
        if is_mechanism:
            return
        if self.mechanism in MECHANISMS:
            raise ValueError(
                f"CriticalWindow({self.mechanism!r}) follows a UnitMonitor that measures "
                f"{self.mechanism!r} as a mechanism, and there is none; put UnitMonitor("
                f"mechanisms=({self.mechanism!r},)) before it in callbacks=[...]"
            )
        if self._chance is None or self.rule is None:
            raise ValueError(
                f"CriticalWindow({self.mechanism!r}): no mechanism of a UnitMonitor has that name. "
                "Of another metric say where it begins and what a rise is: chance=..., and "
                "rule=WindowRule(minimum_up=..., level=None), which closes on a plateau. Or put "
                f"UnitMonitor(mechanisms=({self.mechanism!r},)) before it in callbacks=[...]"
            )

    def _begin(self, chance: float) -> None:
        assert self._source is not None
        units = self._source.units
        targets: int | list[Any]
        if isinstance(self.targets, int):
            targets = self.targets
        else:
            named = {str(unit): unit for unit in units}
            targets = [named.get(str(name), name) for name in self.targets]
            if (unknown := [name for name in targets if name not in units]) and self._monitor:
                assert self._monitor.layout is not None
                try:
                    self._monitor.layout.check(parse_unit(unknown[0]))
                except ValueError as error:
                    raise ValueError(f"CriticalWindow(targets={self.targets}): {error}") from error
        self.follower = MechanismWindow(
            units, chance=self._sign * chance, targets=targets, rule=self.rule
        )

    def _take_up(self) -> None:
        """Go on from a saved state."""
        assert self.follower is not None and self._saved is not None
        state, self._saved = self._saved, None
        now = int(state["last_step"])
        self._catch_up(until=now)
        self._checkpoints.load_state_dict(state["checkpoints"], now=now)

    def _catch_up(self, until: int | None = None) -> None:
        """Take evaluations that this callback was not there for: up to ``until``, or all but the
        last one, which is followed."""
        assert self._source is not None and self.follower is not None
        new = list(self._source.since(self.follower.last_step))
        for step, value in new[:-1] if until is None else new:
            if until is None or step <= until:
                self.follower.update(step, self._sign * value)

    def _follow(self, trainer: pl.Trainer, module: pl.LightningModule, *, in_batch: bool) -> None:
        assert self._source is not None and self.follower is not None
        for step, value in self._source.since(self.follower.last_step):
            was_closed = self.follower.phase == "closed"
            events = self.follower.update(step, self._sign * value)
            if not was_closed and not is_rehearsal(trainer):
                self._checkpoints.keep(trainer, step, self.follower, events)
            scalars = self._news.scalars(self.follower, sign=self._sign)
            log_scalars(trainer, module, scalars, step=step, monitorable=in_batch)
            turns = [event for event in events if event.kind not in ("warning", "calm")]
            for event in turns:
                self._news.announce(trainer, self._monitor, self.follower, event, value)
            if turns and not is_rehearsal(trainer):
                self._write(trainer)

    def report(self) -> dict[str, Any]:
        """What ``window.json`` holds: see :mod:`mda_lightning.window.report`."""
        assert self.follower is not None
        return window_report(
            mechanism=self.mechanism,
            follower=self.follower,
            kept={
                edge: (step, f"{PROMOTED}/{path.name}")
                for edge, (step, path) in self._checkpoints.paths.items()
            },
            n_lost=self._checkpoints.n_lost,
            versions=versions(),
        )

    def _summarise(self, trainer: pl.Trainer) -> None:
        report, found = self.report(), self.window
        log_summary(
            trainer,
            {
                f"{self.mechanism}/window_status": report["status"],
                f"{self.mechanism}/window_target": report["target"],
                f"{self.mechanism}/window_start": None if found is None else found[1].start,
                f"{self.mechanism}/window_end": None if found is None else found[1].end,
            },
        )

    def _write(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and self.folder is not None:
            write_json(self.folder / WINDOW_NAME, self.report())
