"""Watch every head of a language model while it trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedModel

from mda_lightning.analysis.live import Event, RunState
from mda_lightning.architectures import ModelLayout, describe, find_language_model
from mda_lightning.callbacks.attachment import (
    callbacks_of,
    check_strategy,
    is_rehearsal,
    state_key,
    versions,
)
from mda_lightning.callbacks.live_report import Follower, LiveReport
from mda_lightning.callbacks.loggers import define_metrics, log_scalars, log_summary
from mda_lightning.callbacks.measuring import Measuring, NotFinite, Stopwatch
from mda_lightning.callbacks.metric_keys import ScalarKeys, best_head
from mda_lightning.callbacks.metric_table import Measurement, MetricTable
from mda_lightning.callbacks.monitor_output import TABLE_KEY, TABLE_NAME, MonitorOutput
from mda_lightning.callbacks.pace import Pace
from mda_lightning.measures import Measure
from mda_lightning.mechanisms import Mechanism
from mda_lightning.pretraining.run_folder import run_folder
from mda_lightning.vocabulary import TokenizerLike

__all__ = ["TABLE_NAME", "Measurement", "UnitMonitor"]


class UnitMonitor(pl.Callback):
    """Measure every head before the first step and after every ``every_n_steps`` optimizer steps.

    The monitor needs nothing of the batches: it runs its own probe sequences. It leaves no trace in
    training (:func:`mda_lightning.callbacks.probe_scope.probe_scope`).

    ==============================  ==============================================================
    logged                          meaning
    ==============================  ==============================================================
    ``<key>/max``                   highest head's score
    ``<key>/mean``                  mean over all heads
    ``<key>/L<l>H<h>``              the ``top_k`` heads that have been highest so far
    ``<key>``, ``<key>_se``         a number of the whole model and its standard error
    ``<key>/heads`` (image)         heads by steps and layers by heads
    ``<key>/curve`` (image)         a number of the whole model over steps
    ``unit_metrics`` (W&B table)    all heads: step, layer, head, metric, value, se
    summary (W&B)                   the head that was highest, at the end
    ==============================  ==============================================================

    ``<key>`` is a mechanism's name, or a measure's key, as ``ablation/logit``.

    In the run's folder: ``live.html``, a page that shows the run while it goes on;
    ``unit_metrics.parquet`` (the same columns as the table); a picture of every key.

    Args:
        mechanisms: names, or :class:`~mda_lightning.mechanisms.Mechanism` objects; one or several.
        measures: names, or :class:`~mda_lightning.measures.Measure` objects, one or several: what
            is watched beside the mechanisms. One without a rate of its own is taken at every tenth
            measurement. A mechanism given here is watched, and not followed by others.
        every_n_steps: optimizer steps between measurements.
        quiet_every_n_steps: optimizer steps between measurements while nothing happens: no
            attention score of a head has moved by more than ``tolerance`` within five such
            intervals, and no ``CriticalWindow`` is in a window or warned of one. A multiple of
            ``every_n_steps``; None keeps one rate.
        tolerance: see there, in units of attention probability.
        model: dotted name of the language model inside the LightningModule; None finds the one.
        token_ids: token ids that probe sequences are drawn from; None takes those of the model's
            tokenizer as far as its configuration tells.
        tokenizer: its path, name or object, instead of ``token_ids``: the ids that it uses.
        top_k: heads logged as scalars and drawn on the page, 0 or more; all heads are in the table.
        folder: where to write; None is ``mda/`` in the first logger's folder.
        write_every_n_steps: steps between rewritings of the files at least; they are also written
            at the end and on an exception. Where it would cost more than 0.3% of the time they
            wait, pictures for five minutes at least.
        live: whether to write the page.

    Raises:
        ValueError: an unknown mechanism or measure, or two of one name; a number out of range; at
            ``setup``, sequences longer than the model's context, a tokenizer with ids that the
            model lacks, or another monitor that writes to the same folder.
        UnsupportedModelError, UnsupportedTrainerError: at ``setup``.
    """

    def __init__(
        self,
        mechanisms: str | Mechanism | Sequence[str | Mechanism] = ("induction", "previous_token"),
        *,
        measures: str | Measure | Mechanism | Sequence[str | Measure | Mechanism] = ("ablation",),
        every_n_steps: int = 10,
        quiet_every_n_steps: int | None = None,
        tolerance: float = 0.02,
        model: str | None = None,
        token_ids: Sequence[int] | None = None,
        tokenizer: TokenizerLike | None = None,
        top_k: int = 4,
        folder: str | None = None,
        write_every_n_steps: int = 500,
        live: bool = True,
    ) -> None:
        super().__init__()
        if write_every_n_steps < 1:
            raise ValueError(
                f"write_every_n_steps={write_every_n_steps}: write at most every step, 1"
            )
        self.pace = Pace(every_n_steps, quiet_every_n_steps, tolerance=tolerance)
        self.measuring = Measuring(mechanisms, measures, token_ids=token_ids, tokenizer=tokenizer)
        self.table = MetricTable()
        self.folder: Path | None = None
        self.layout: ModelLayout | None = None
        self._model_name = model
        # Kept: Lightning asks for the key at every hook of every step.
        arguments = {
            "mechanisms": {m.name: m.settings() for m in self.mechanisms},
            "measures": [m.name for m in self.measures],
            "model": model,
        }
        self._state_key = state_key("UnitMonitor", arguments)
        self._model: PreTrainedModel | None = None
        self._wanted_folder = folder
        self._write_every = write_every_n_steps
        self._subscribers: list[Callable[[Measurement], None]] = []
        self._followers: list[Follower] = []
        self._seen_step = -1
        self._has_begun = False
        self._table_key = TABLE_KEY
        self._n_taken = 0
        self._events: list[Event] = []
        self._keys = ScalarKeys(top_k)
        self._not_finite = NotFinite()
        self._stopwatch = Stopwatch()
        self._output = MonitorOutput()
        self._page = LiveReport(write_every_n_steps) if live else None

    # -- for other code -----------------------------------------------------------------------

    @property
    def every_n_steps(self) -> int:
        """Steps between measurements at the dense rate."""
        return self.pace.every_n_steps

    @property
    def mechanisms(self) -> list[Mechanism]:
        return self.measuring.mechanisms

    @property
    def measures(self) -> list[Measure]:
        return self.measuring.measures

    @property
    def measuring_seconds(self) -> float:
        """Wall time spent on measurements since the fit began."""
        return self._stopwatch.seconds

    def latest(self, metric: str) -> Measurement | None:
        """The last measurement under a key, or None before the first."""
        return self.table.latest(metric)

    def subscribe(self, follow: Callable[[Measurement], None]) -> Callable[[], None]:
        """Call ``follow`` with every measurement; returns what ends the subscription."""
        self._subscribers.append(follow)
        return lambda: self._subscribers.remove(follow)

    def mechanism(self, name: str) -> Mechanism | None:
        """The mechanism of that name, if this monitor measures it."""
        return next((m for m in self.mechanisms if m.name == name), None)

    def add_follower(self, follower: Follower) -> None:
        """Measure densely while ``follower`` is warned of a window or in one, and show it."""
        if not any(one is follower for one in self._followers):
            self._followers.append(follower)

    def note(self, step: int, text: str) -> None:
        """Put a line among the page's events."""
        self._events.append(Event(step, text))

    def show_end(self, trainer: pl.Trainer) -> None:
        """Write the page once more, of a run that has ended."""
        self._show(trainer, "finished")

    # -- Lightning ----------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        return {
            "schema_version": 2,
            "table": self.table.state_dict(),
            "n_taken": self._n_taken,
            "pace": self.pace.state_dict(),
            "events": [[one.step, one.text] for one in self._events],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.table.load_state_dict(state_dict["table"])
        self._n_taken = int(state_dict["n_taken"])
        self.pace.load_state_dict(state_dict["pace"])
        self._events = [Event(int(step), str(text)) for step, text in state_dict["events"]]
        self._take_up_table()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_strategy(trainer, "UnitMonitor")
        self._model = find_language_model(pl_module, self._model_name)
        self.layout = describe(self._model)
        self.measuring.attach(self._model)
        self.folder = run_folder(trainer, self._wanted_folder)
        place = self._place(trainer)
        self._table_key = TABLE_KEY if place == 1 else f"{TABLE_KEY}_{place}"
        if trainer.global_step == 0:
            # A checkpoint's table, if there is one, is loaded after this.
            self.table = MetricTable()
            self._n_taken, self._events = 0, []
            self.pace.load_state_dict({"moving": False})
            self._take_up_table()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.layout is not None
        define_metrics(
            trainer,
            [self._table_key, *self.measuring.names],
            {f"{m.name}/max": "max" for m in self.mechanisms},
        )
        self._seen_step = trainer.global_step
        self._stopwatch, self._not_finite = Stopwatch(), NotFinite()
        self._output.begin(self._table_key)
        if self._page is not None:
            about = [
                f"{self.layout.model_type}, {self.layout.n_layers} layers of "
                f"{self.layout.n_heads} heads",
                self.layout.sharing,
                str(self.folder),
            ]
            self._page.begin(
                type(pl_module).__name__,
                " · ".join(part for part in about if part),
                step=trainer.global_step,
            )
        self._has_begun = True
        if self.table.last_step < trainer.global_step:
            self._measure(trainer, pl_module, trainer.global_step, in_batch=False)
        self._show(trainer)
        if self._page is not None and self._may_write(trainer):
            rank_zero_info(f"UnitMonitor: watch this run in {self.folder}/live.html")

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step == self._seen_step:
            return  # a micro-batch of an accumulated step
        self._seen_step = step
        self._measure(trainer, pl_module, step, in_batch=True)
        if step % self._write_every == 0:
            self._write(trainer, final=False)
        if self._page is not None and self._page.is_due(step):
            self._show(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, final=True)
        self.show_end(trainer)
        for metric in self.table.metrics:
            log_summary(trainer, best_head(self.table, metric))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if not self._has_begun:
            return  # nothing of this fit is known yet, and a former one's files are its own
        self._has_begun = False
        words = f"{type(exception).__name__}: {exception}".removesuffix(": ")[:200]
        try:
            self._show(trainer, "stopped", words)
            self._write(trainer, final=True)
        except OSError as error:  # the disk may be what the exception is about
            warnings.warn(f"UnitMonitor could not write its files: {error}", stacklevel=2)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._model = None
        self._followers = []
        self._has_begun = False

    # -- what it does -------------------------------------------------------------------------

    def _place(self, trainer: pl.Trainer) -> int:
        """Which of the Trainer's monitors this is, from 1 on.

        Raises:
            ValueError: one before it writes to the same folder.
        """
        monitors = [one for one in callbacks_of(trainer) if isinstance(one, UnitMonitor)]
        before = list(takewhile(lambda one: one is not self, monitors))
        assert self.folder is not None
        for other in before:
            if other.folder is not None and other.folder.resolve() == self.folder.resolve():
                names = [f"UnitMonitor({one.measuring.names})" for one in (other, self)]
                raise ValueError(
                    f"{' and '.join(names)} would write over each other's files in "
                    f"{self.folder}; let one UnitMonitor measure all of it, or give one of them "
                    "another folder=..."
                )
        return len(before) + 1

    def _take_up_table(self) -> None:
        self._output.take_up(self.table)
        self._keys.take_up(self.table)

    def _measure(
        self, trainer: pl.Trainer, module: pl.LightningModule, step: int, *, in_batch: bool
    ) -> None:
        on_grid = self.pace.is_due(step, asked=self._is_asked())
        wanted = self.measuring.due(step, self._n_taken, on_grid=on_grid)
        if not wanted:
            return
        assert self._model is not None
        with self._stopwatch.running(self._model.device):
            measured = self.measuring.take(self._model, wanted, step=step)
        if trainer.world_size > 1:
            # Decisions follow from these numbers, so every rank has rank 0's.
            measured = trainer.strategy.broadcast(measured)
        scalars: dict[str, float] = {}
        for one in measured:
            self._report_missing(one)
            self.table.append(step, one.metric, one.value, one.se)
            scalars |= self._keys.scalars(one)
        if on_grid:
            self._n_taken += 1
            self.pace.take(self.table.since(m.name, step - self.pace.span) for m in self.mechanisms)
        log_scalars(trainer, module, scalars, step=step, monitorable=in_batch)
        for one in measured:
            for follow in list(self._subscribers):
                follow(one)

    def _is_asked(self) -> bool:
        return any(one.asks for one in self._followers)

    def _report_missing(self, one: Measurement) -> None:
        words = self._not_finite.words(one)
        if words is not None:
            self.note(one.step, words)
            warnings.warn(words, stacklevel=2)

    def _may_write(self, trainer: pl.Trainer) -> bool:
        return trainer.is_global_zero and self.folder is not None and not is_rehearsal(trainer)

    def _write(self, trainer: pl.Trainer, *, final: bool) -> None:
        if self.folder is None or not self._may_write(trainer):
            return
        provenance = {
            "mechanisms": {m.name: m.settings() for m in self.mechanisms},
            "measures": {m.name: m.settings() for m in self.measures},
            "every_n_steps": self.pace.every_n_steps,
            "quiet_every_n_steps": self.pace.quiet_every_n_steps,
            "model_type": self.layout.model_type if self.layout else None,
            "sharing": self.layout.sharing if self.layout else None,
            "versions": versions(),
        }
        self._output.write(
            trainer,
            self.table,
            self.folder,
            step=trainer.global_step,
            provenance=provenance,
            chances=self.measuring.chances(),
            keys=self._keys,
            final=final,
        )

    def _show(self, trainer: pl.Trainer, state: RunState = "training", detail: str = "") -> None:
        if self._page is None or not self._may_write(trainer):
            return
        assert self.folder is not None
        self._page.write(
            trainer,
            self.folder,
            table=self.table,
            keys=self._keys,
            chances=self.measuring.chances(),
            followers=self._followers,
            events=self._events,
            rate=self.pace.words(asked=self._is_asked()),
            measuring_seconds=self._stopwatch.seconds + self._output.seconds + self._page.seconds,
            state=state,
            detail=detail,
        )
