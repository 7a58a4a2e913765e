"""Find a mechanism's critical window while it happens, and keep the checkpoints around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from mda_lightning.callbacks.attachment import (
    callbacks_of,
    is_rehearsal,
    state_key,
    versions,
    warn_of_other_folder,
)
from mda_lightning.callbacks.checkpoint_writing import check_checkpointing
from mda_lightning.callbacks.loggers import log_scalars
from mda_lightning.callbacks.unit_monitor import UnitMonitor
from mda_lightning.callbacks.window_checkpoints import PROMOTED, WindowCheckpoints
from mda_lightning.callbacks.window_needs import (
    check_arguments,
    check_metric,
    monitor_of,
    named_units,
    own_folder,
)
from mda_lightning.callbacks.window_news import Announcement, WindowNews
from mda_lightning.callbacks.window_output import WindowOutput
from mda_lightning.callbacks.window_source import (
    LoggedSource,
    MonitorSource,
    On,
    Values,
    WindowSource,
)
from mda_lightning.pretraining.run_folder import run_folder
from mda_lightning.window import (
    Edge,
    Followed,
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
    end), ``window/*.ckpt``, and ``ring/`` until the window has closed. Where several windows of a
    Trainer have one folder, each has these in a folder in there, named as its metric. What cannot
    be written is left out, told once and counted in ``window.json``; training goes on.

    Args:
        mechanism: name of a mechanism that a monitor measures; or a metric: a key of one of its
            measures, as ``"ablation/logit"``, or a name under which the module logs a number.
        targets: how many of the highest units; or their names, such as ``["L1H2"]``.
        chance: the metric's value before anything has formed. Known of mechanisms.
        rule: thresholds of the detector. The default is meant for attention probabilities.
        falls: a metric whose formation is a fall, such as a loss. What is followed then is how far
            it has fallen below ``chance``, and ``rule`` is about that: of a loss that begins at
            10.8, and of which a fall below 9 counts, ``chance=10.8, falls=True,
            rule=WindowRule(minimum_up=1.8, level=None)``. Likewise of a metric that rises from a
            ``chance`` below 0 it is how far it has risen above that.
        on: where a logged number is read: every ``every_n_steps`` steps of training, or after each
            validation.
        every_n_steps: see there; no oftener than the number is logged, since the last one is read
            again where there is no new one.
        ring: checkpoints in the ring at most.
        ring_every: evaluations between two of them.
        folder: where to write; None is the monitor's folder, or ``mda/`` in the logger's.
        stop_when_closed: stop the training ``margin_steps`` after the window has closed.
        margin_steps: see there.

    Raises:
        ValueError: a number out of range; at ``setup``, a unit that the model lacks, a monitor that
            acts later, no monitor for a mechanism, or two windows of one metric in one folder; in
            training, a metric that no measure gives or that nobody has logged in 20 readings (2 of
            validations).
        UnsupportedTrainerError: at ``setup``, weights in shards or checkpoints in the background.
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
        check_arguments(
            targets=targets, on=on, every_n_steps=every_n_steps, margin_steps=margin_steps
        )
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
        self._falls = falls
        self._followed = Followed("value", 0.0)
        self._on: On = on
        self._every_n_steps = every_n_steps
        self._checkpoints = WindowCheckpoints(ring, ring_every)
        self._news = WindowNews(mechanism)
        self._output = WindowOutput()
        self._wanted_folder = folder
        self._base: Path | None = None  # what other windows may have too
        self._stop_when_closed = stop_when_closed
        self._margin_steps = margin_steps
        self._monitor: UnitMonitor | None = None
        self._source: WindowSource | None = None
        self._saved: dict[str, Any] | None = None  # a state that has not been taken up
        self._former_folder = "None"

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
        if self.follower is None:
            return ""
        text, followed = message_of(self.follower), self._followed
        if followed.follows == "value":
            return text
        way = "below" if followed.falls else "above"
        return f"{text} (scores are how far {self.mechanism} is {way} {followed.floor:g})"

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
        self._saved, self._former_folder = dict(state_dict), state_dict["folder"]
        if self._source is not None:  # else at setup
            self._source.load_state_dict(state_dict["source"])
            self.follower = None
            self._begin()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_checkpointing(trainer, "CriticalWindow")
        self._monitor = monitor_of(trainer, self, self.mechanism)
        measured = None if self._monitor is None else self._monitor.mechanism(self.mechanism)
        if measured is None:
            check_metric(self.mechanism, chance=self._chance, rule=self.rule)
        floor = measured.chance if measured and self._chance is None else self._chance
        assert floor is not None
        self._followed = Followed.of(floor, falls=self._falls)
        if self._wanted_folder is None and self._monitor is not None:
            self._base = self._monitor.folder
        else:
            self._base = run_folder(trainer, self._wanted_folder)
        self._place(trainer)
        if self._monitor is not None:
            self._monitor.add_follower(self)
        if self.follower is not None and trainer.global_step != 0:
            return  # a second fit that goes on with the first
        self._source = (
            LoggedSource(self.mechanism, on=self._on, every_n_steps=self._every_n_steps)
            if self._monitor is None
            else MonitorSource(self._monitor, self.mechanism)
        )
        self.follower = None
        self._output.begin()
        self._checkpoints.begin()
        # A Trainer's checkpoint, if there is one, is loaded after this.
        if self._saved is None:
            self._begin()
        else:
            self.load_state_dict(self._saved)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Only now all windows of the Trainer have been set up.
        self._place(trainer)
        warn_of_other_folder("CriticalWindow", self._former_folder, self.folder)
        self._former_folder = "None"
        if not is_rehearsal(trainer):
            self._checkpoints.start(trainer, self.follower)
        self._follow(trainer, pl_module, in_batch=False)
        self._stop_if_over(trainer)

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
        self._stop_if_over(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if self._source is not None and fitting and not trainer.sanity_checking:
            self._source.read(trainer, "validation")
            self._follow(trainer, pl_module, in_batch=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_rehearsal(trainer) or self.follower is None:
            return
        if self.follower.phase != "closed":
            self._checkpoints.promote(trainer, self.follower)
        if self.follower.phase == "before":
            self._checkpoints.clear(trainer)  # no window has begun that could need one of them
        report = self.report()
        self._output.write(trainer, self.folder, report)
        self._output.summarise(trainer, report)
        if self.follower.phase != "closed":
            words = f"{self.mechanism}: {self.status}"
            self._news.tell(self._monitor, trainer.global_step, words)
            if self._monitor is not None:
                self._monitor.show_end(trainer)  # its last page was written before this

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._monitor = self._base = None

    # -- what it does -------------------------------------------------------------------------

    def _place(self, trainer: pl.Trainer) -> None:
        assert self._base is not None
        windows = [one for one in callbacks_of(trainer) if isinstance(one, CriticalWindow)]
        others = [(w.mechanism, w._base) for w in windows if w is not self and w._base is not None]
        self.folder = own_folder(self.mechanism, self._base, others)
        self._checkpoints.attach(self.folder)

    def _begin(self) -> None:
        """Follow the units once they are known, from where a saved state was."""
        assert self._source is not None
        if self.follower is not None or not (units := self._source.units):
            return
        given = self.targets
        targets = given if isinstance(given, int) else named_units(given, units, self._monitor)
        self.follower = MechanismWindow(
            units, chance=self._followed.chance, targets=targets, rule=self.rule
        )
        if self._saved is not None:
            state, self._saved = self._saved, None
            for step, values in self._source.since(-1):
                if step <= state["last_step"]:
                    self.follower.update(step, self._followed.seen(values))
            self._checkpoints.load_state_dict(state["checkpoints"])

    def _follow(self, trainer: pl.Trainer, module: pl.LightningModule, *, in_batch: bool) -> None:
        assert self._source is not None
        self._begin()
        if self.follower is None:
            return
        for step, values in self._source.since(self.follower.last_step):
            if step == trainer.global_step:
                self._take(trainer, module, step, values, in_batch=in_batch)
            else:  # of before this callback was there
                self.follower.update(step, self._followed.seen(values))

    def _take(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        step: int,
        values: Values,
        *,
        in_batch: bool,
    ) -> None:
        """Take an evaluation of the training's present state."""
        assert self.follower is not None
        was_closed = self.follower.phase == "closed"
        events = self.follower.update(step, self._followed.seen(values))
        turns = self._news.turns(self.follower, events, values)
        for turn in turns:
            self._news.note(self._monitor, turn)  # before saving: checkpoints hold the page's lines
        if not was_closed and not is_rehearsal(trainer):
            self._checkpoints.keep(trainer, step, self.follower, events)
        scalars = self._news.scalars(self.follower, own=self._followed.own)
        log_scalars(trainer, module, scalars, step=step, monitorable=in_batch)
        if turns and not is_rehearsal(trainer):
            self._output.write(trainer, self.folder, self.report())
        for turn in turns:
            self._news.announce(trainer, turn)

    def _stop_if_over(self, trainer: pl.Trainer) -> None:
        if not self._stop_when_closed or self.follower is None:
            return
        closed_at = self.follower.closed_at
        if closed_at is not None and trainer.global_step >= closed_at + self._margin_steps:
            trainer.should_stop = True

    def report(self) -> dict[str, Any]:
        """What ``window.json`` holds: see :mod:`mda_lightning.window.report`. ``follows`` is what
        its values are: the metric's ``value``, or a distance from ``floor``."""
        assert self.follower is not None
        found = window_report(
            mechanism=self.mechanism,
            follower=self.follower,
            kept={
                edge: (step, f"{PROMOTED}/{path.name}")
                for edge, (step, path) in self._checkpoints.paths.items()
            },
            n_lost=self._checkpoints.n_lost,
            versions=versions(),
        )
        followed = {"floor": self._followed.floor, "follows": self._followed.follows}
        return found | {"message": self.status} | followed
