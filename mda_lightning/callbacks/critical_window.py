"""Find a mechanism's critical window while it happens, and keep the checkpoints around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from mda_lightning.callbacks.attachment import (
    callbacks_before,
    check_strategy,
    is_rehearsal,
    state_key,
    versions,
    warn_of_other_folder,
)
from mda_lightning.callbacks.checkpoint_ring import CheckpointRing
from mda_lightning.callbacks.loggers import alert, log_scalars, log_summary, run_folder
from mda_lightning.callbacks.unit_monitor import Measurement, UnitMonitor
from mda_lightning.files import write_json
from mda_lightning.units import Head, parse_unit
from mda_lightning.window import (
    WINDOW_NAME,
    Edge,
    MechanismWindow,
    Phase,
    Window,
    WindowEvent,
    WindowRule,
    window_report,
)


@dataclass(frozen=True)
class Announcement:
    """A window of one head opened, closed or lapsed."""

    kind: Literal["opened", "closed", "lapsed"]
    mechanism: str
    unit: Head
    step: int
    start: int
    reason: str | None


class CriticalWindow(pl.Callback):
    """Follow a :class:`UnitMonitor` and find the window in which a head of a mechanism forms.

    The mechanism's window is that of its target head: the one named, or in retrospect the one that
    is highest when its own window closes. Because a start is known only afterwards, full
    checkpoints are kept in a bounded ring: one every ``ring_every`` measurements, and one whenever
    a head first passes its threshold. Those at the window's start (step <= start), midpoint and end
    are promoted to ``window/``; training resumes from any of them exactly.

    Place it after its :class:`UnitMonitor`, and last among callbacks that change training state on
    ``on_train_batch_end``, so that its checkpoints hold what those did.

    ==============================  ==============================================================
    logged, per mechanism           meaning
    ==============================  ==============================================================
    ``<mechanism>/ema_max``         highest smoothed score of the watched heads
    ``<mechanism>/n_rising``        watched heads inside their window
    ``<mechanism>/n_formed``        watched heads whose window has closed
    alert (W&B)                     a window opened, closed or lapsed
    summary (W&B)                   ``<mechanism>/window_{status,target,start,end}``, at the end
    ==============================  ==============================================================

    In the run's folder: ``window.json`` (rewritten whenever a window opens or closes, and at the
    end), ``window/*.ckpt``, and ``ring/`` until the window has closed.

    Args:
        mechanism: name of a mechanism that the monitor measures.
        target: a head such as ``"L1H2"``, or None for the retrospective choice.
        rule: thresholds of the detector.
        ring: checkpoints in the ring at most.
        ring_every: measurements between two of them.
        folder: where to write; None is the monitor's folder.
        stop_when_closed: stop the training ``margin_steps`` after the window has closed.
        margin_steps: see there.
    """

    def __init__(
        self,
        mechanism: str = "induction",
        *,
        target: str | None = None,
        rule: WindowRule | None = None,
        ring: int = 8,
        ring_every: int = 5,
        folder: str | None = None,
        stop_when_closed: bool = False,
        margin_steps: int = 0,
    ) -> None:
        super().__init__()
        if ring_every < 1:
            raise ValueError(f"ring_every={ring_every}: at most every measurement, 1")
        if margin_steps < 0:
            raise ValueError(f"margin_steps={margin_steps}: 0 or more steps after the close")
        self.mechanism = mechanism
        self.target = None if target is None else parse_unit(target)
        self.rule = rule or WindowRule()
        arguments = {"mechanism": mechanism, "target": target, "rule": self.rule.settings()}
        # Kept: Lightning asks for the key at every hook of every step.
        self._state_key = state_key("CriticalWindow", arguments)
        self.folder: Path | None = None
        self.follower: MechanismWindow | None = None
        self._ring = CheckpointRing(ring)
        self._ring_every = ring_every
        self._wanted_folder = folder
        self._stop_when_closed = stop_when_closed
        self._margin_steps = margin_steps
        self._monitor: UnitMonitor | None = None
        self._kept: dict[Edge, int] = {}  # steps of the promoted checkpoints
        self._saved: Mapping[str, Any] | None = None  # a state that came before setup
        self._subscribers: list[Callable[[Announcement], None]] = []

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
    def window(self) -> tuple[Head, Window] | None:
        """The target and its window: closed, else open, else the last that lapsed, else None."""
        return None if self.follower is None else self.follower.window

    @property
    def checkpoints(self) -> dict[Edge, tuple[int, Path]]:
        """Promoted checkpoints: edge -> (step, path)."""
        return {edge: (step, self._checkpoint(edge)) for edge, step in self._kept.items()}

    def subscribe(self, follow: Callable[[Announcement], None]) -> Callable[[], None]:
        """Call ``follow`` when a head's window opens, closes or lapses; returns what ends it."""
        self._subscribers.append(follow)
        return lambda: self._subscribers.remove(follow)

    # -- Lightning ----------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        if self.follower is None:
            return dict(self._saved or {})
        return {
            "schema_version": 1,
            "folder": str(self.folder),
            "ring": list(self._ring.steps),
            "kept": {str(edge): step for edge, step in self._kept.items()},
            **self.follower.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.follower is None:
            self._saved = state_dict
        elif state_dict:
            warn_of_other_folder("CriticalWindow", state_dict["folder"], self.folder)
            self.follower.load_state_dict(state_dict)
            self._ring.restore(state_dict["ring"], now=self.follower.last_step)
            self._kept = {
                edge: step for edge, step in state_dict["kept"].items() if self._has(edge, step)
            }

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_strategy(trainer, "CriticalWindow")
        self._monitor = self._find_monitor(trainer)
        self._monitor.add_follower(self)
        measured, layout = self._monitor.mechanism(self.mechanism), self._monitor.layout
        assert measured is not None and layout is not None
        if self.target is not None:
            try:
                layout.check(self.target)
            except ValueError as error:
                raise ValueError(f"CriticalWindow(target={str(self.target)!r}): {error}") from error
        if self._wanted_folder is None:
            self.folder = self._monitor.folder
        else:
            self.folder = run_folder(trainer, self._wanted_folder)
        assert self.folder is not None
        self._ring.attach(self.folder / "ring")
        if self.follower is None or trainer.global_step == 0:
            # A Trainer's checkpoint, if there is one, is loaded after this.
            self.follower = MechanismWindow(
                layout.heads, chance=measured.chance, target=self.target, rule=self.rule
            )
            self._kept, self._ring.steps = {}, []
            if self._saved is not None:
                self.load_state_dict(dict(self._saved))
                self._saved = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
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
        self._follow(trainer, pl_module, in_batch=True)
        if self._stop_when_closed and self.follower is not None:
            closed_at = self.follower.closed_at
            if closed_at is not None and trainer.global_step >= closed_at + self._margin_steps:
                trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.follower is not None
        if is_rehearsal(trainer):
            return
        if self.follower.phase != "closed":
            self._promote(trainer)
        self._write(trainer)
        self._summarise(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._monitor = None

    # -- what it does -------------------------------------------------------------------------

    def _find_monitor(self, trainer: pl.Trainer) -> UnitMonitor:
        before, after = callbacks_before(trainer, self, UnitMonitor)
        for monitor in before:
            if monitor.mechanism(self.mechanism) is not None:
                return monitor
        if any(monitor.mechanism(self.mechanism) is not None for monitor in after):
            raise ValueError(
                f"CriticalWindow({self.mechanism!r}) stands before the UnitMonitor it follows; put "
                "it after that one in callbacks=[...]"
            )
        raise ValueError(
            f"CriticalWindow({self.mechanism!r}) follows a UnitMonitor that measures "
            f"{self.mechanism!r}, and there is none; put UnitMonitor(mechanisms="
            f"({self.mechanism!r},)) before it in callbacks=[...]"
        )

    def _catch_up(self) -> None:
        """Take from the monitor's table what this callback was not there for."""
        assert self._monitor is not None and self.follower is not None
        steps, values = self._monitor.table.curves(self.mechanism)
        for step, value in zip(steps[:-1], values[:-1], strict=True):  # the last is followed
            if step > self.follower.last_step:
                self.follower.update(int(step), value)

    def _follow(self, trainer: pl.Trainer, module: pl.LightningModule, *, in_batch: bool) -> None:
        assert self._monitor is not None and self.follower is not None
        new = self._monitor.latest(self.mechanism)
        if new is None or new.step <= self.follower.last_step:
            return
        was_closed = self.follower.phase == "closed"
        events = self.follower.update(new.step, new.value)
        if not was_closed and not is_rehearsal(trainer):
            self._keep_checkpoints(trainer, new.step, events)
        log_scalars(trainer, module, self._scalars(), step=new.step, monitorable=in_batch)
        turns = [event for event in events if event.kind in ("opened", "closed", "lapsed")]
        for event in turns:
            self._announce(trainer, event, new)
        if turns and not is_rehearsal(trainer):
            self._write(trainer)

    def _keep_checkpoints(self, trainer: pl.Trainer, step: int, events: list[WindowEvent]) -> None:
        assert self.follower is not None
        closed = self.follower.phase == "closed"
        due = (self.follower.detector.n_evaluations - 1) % self._ring_every == 0
        if not (due or closed or any(event.kind == "warning" for event in events)):
            return
        if closed:
            # Known before it is saved, so that the end's own checkpoint lists all three.
            self._kept = self.follower.edges([*self._ring.steps, step])
        self._ring.save(trainer, step, starts=self.follower.starts())
        if closed:
            self._promote(trainer)
            self._ring.clear(trainer)

    def _promote(self, trainer: pl.Trainer) -> None:
        assert self.follower is not None
        self._kept = self.follower.edges(self._ring.steps)
        for edge, step in self._kept.items():
            self._ring.promote(trainer, step, self._checkpoint(edge))

    def _checkpoint(self, edge: Edge) -> Path:
        assert self.folder is not None
        return self.folder / "window" / f"{edge}-step{self._kept[edge]}.ckpt"

    def _has(self, edge: str, step: int) -> bool:
        return bool(self.folder and (self.folder / "window" / f"{edge}-step{step}.ckpt").exists())

    def _scalars(self) -> dict[str, float]:
        assert self.follower is not None
        detector, watched = self.follower.detector, self.follower.watched
        states = detector.states
        values = {
            f"{self.mechanism}/n_rising": float(sum(states[i] == "RISING" for i in watched)),
            f"{self.mechanism}/n_formed": float(sum(states[i] == "FORMED" for i in watched)),
        }
        ema = detector.ema[watched]
        if np.isfinite(ema).any():
            values[f"{self.mechanism}/ema_max"] = float(np.nanmax(ema))
        return values

    def _announce(self, trainer: pl.Trainer, event: WindowEvent, new: Measurement) -> None:
        assert self.follower is not None
        unit = self.follower.heads[event.unit_index]
        kind: Literal["opened", "closed", "lapsed"] = event.kind  # type: ignore[assignment]
        one = Announcement(kind, self.mechanism, unit, event.step, event.start, event.reason)
        score = float(new.value.reshape(-1)[event.unit_index])
        reason = "" if event.reason is None else f", {event.reason}"
        title = f"{self.mechanism}: window of {unit} {kind}"
        text = f"window from step {event.start}, score {score:.3f}{reason}"
        alert(trainer, title, f"step {event.step}, {text}")
        assert self._monitor is not None
        self._monitor.note(event.step, f"{title} ({text})")
        rank_zero_info(f"step {event.step}: {title} ({text})")
        for follow in list(self._subscribers):
            follow(one)

    def report(self) -> dict[str, Any]:
        """What ``window.json`` holds: see :mod:`mda_lightning.window.report`."""
        assert self.follower is not None
        return window_report(
            mechanism=self.mechanism,
            follower=self.follower,
            kept={
                edge: (step, f"window/{path.name}")
                for edge, (step, path) in self.checkpoints.items()
            },
            n_lost=self._ring.n_failed,
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
