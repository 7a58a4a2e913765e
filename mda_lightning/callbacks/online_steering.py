"""Steer a unit while it forms: decide on the coming samples from the present run's own numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from mda_lightning.architectures import describe, find_language_model
from mda_lightning.callbacks.attachment import (
    build_mechanism,
    check_strategy,
    is_rehearsal,
    state_key,
    warn_of_other_folder,
)
from mda_lightning.callbacks.critical_window import CriticalWindow
from mda_lightning.callbacks.loggers import define_metrics, log_file, log_scalars
from mda_lightning.callbacks.scoring.scored import ScoredSamples
from mda_lightning.callbacks.steering.aiming import Aiming
from mda_lightning.callbacks.steering.amplify import Amplify
from mda_lightning.callbacks.steering.decisions import FOLDER, DecisionWriter
from mda_lightning.callbacks.steering.idle import Outcome, Outcomes
from mda_lightning.callbacks.steering.needs import (
    Units,
    check_directions,
    check_trainer,
    folder_of,
    monitor_of,
    named,
    named_units,
    scoring_of,
    window_of,
)
from mda_lightning.callbacks.steering.output import n_decided, provenance_of, write_all
from mda_lightning.callbacks.steering.places import places_of
from mda_lightning.callbacks.steering.policies import Decision, Policy, SteeredRun
from mda_lightning.callbacks.steering.recent_scores import StepRows
from mda_lightning.callbacks.steering.reference_curve import Over
from mda_lightning.callbacks.steering.targets import Target
from mda_lightning.callbacks.unit_monitor import UnitMonitor
from mda_lightning.interventions import Mask
from mda_lightning.mechanisms import Mechanism
from mda_lightning.units import Head, parse_unit


class OnlineSteering(pl.Callback):
    """Change the coming samples of a run so that a unit forms earlier, later, or along a curve.

    Before every optimizer step the policies are asked in their order; what they decide holds from
    that step on, for any number of workers, ranks and micro-batches. Without a target they act
    whenever they are active. A target decides at every evaluation of μ which of them act, and how
    strongly: those that promote the unit when it is to rise, the others when it is to fall. The
    training step must weigh its loss by the batch's ``weight`` for a mask to have an effect.

    Put it after the callbacks it reads: :class:`UnitMonitor` (targets), :class:`InfluenceScoring`
    (Amplify) and :class:`CriticalWindow` (policies with ``active="window"``, ``units="target"``).

    ================================  ============================================================
    logged                            meaning
    ================================  ============================================================
    ``<mechanism>/steering/push``     what the target asks for, in [-1, 1]
    ``<mechanism>/steering/reference``  the value that it aims at
    ``<mechanism>/steering/masked``   places masked so far
    ``<mechanism>/steering/inserted``  places given to inserted samples so far
    artifact (W&B)                    the plan, at the end
    ================================  ============================================================

    In the run's folder, under ``steering/``: the audit table ``decisions/`` with one row a place
    that a decision changed (:class:`~mda_lightning.callbacks.steering.Decisions` reads it,
    ``steering.json`` says what its columns are), and ``plan.json``, an ordinary plan: a run of a
    TokenDataModule with it, without steering, trains bit for bit the same.

    Args:
        mechanism: a name, or a Mechanism with its settings; whose f samples are scored by and whose
            μ a target follows. A name takes the monitor's, if it measures that one.
        policy: a :class:`~mda_lightning.callbacks.steering.Policy`, or several.
        target: a :class:`~mda_lightning.callbacks.steering.Target`, or None.
        units: heads such as ``["L1H2"]``, "all", or "target": those that CriticalWindow has as its
            targets at the time; before it has any, nothing is done. Scores of several heads are
            added up.
        over: how μ of several heads becomes one number: their "mean", or their "max".
        model: dotted name of the language model inside the LightningModule; None finds the one.
        token_ids: as for UnitMonitor.
        folder: where to write; None is that of a monitor before it, else the data module's, else
            ``mda/`` in the logger's.

    Raises:
        ValueError: arguments that mean nothing; at ``setup``, another data module, nobody who
            measures or scores what is needed; before the first step, a reference curve that does
            not cover the steps, or scores of another corpus.
        UnsupportedTrainerError: at ``setup``.
    """

    def __init__(
        self,
        mechanism: str | Mechanism = "induction",
        *,
        policy: Policy | Sequence[Policy],
        target: Target | None = None,
        units: Units = "all",
        over: Over = "mean",
        model: str | None = None,
        token_ids: Sequence[int] | None = None,
        folder: str | None = None,
    ) -> None:
        super().__init__()
        self.policies = named(policy)
        if over not in ("mean", "max"):
            raise ValueError(f"over={over!r}: 'mean' or 'max'")
        if target is not None and not isinstance(target, Target):
            raise ValueError(f"target={target!r}: HoldCurve(...), ReachLevel(...), DelayLevel(...)")
        check_directions(self.policies, target)
        self.folder: Path | None = None
        self._unit_names = named_units(units)
        self._only_targets = units == "target"
        self._over: Over = over
        self._aiming = Aiming(target, over)
        self._outcomes = Outcomes(self.policies)
        self._given, self._token_ids = mechanism, token_ids
        self.mechanism = build_mechanism(mechanism, token_ids)
        self._model_name, self._wanted_folder = model, folder
        self._state_key = state_key("OnlineSteering", {"mechanism": self.mechanism.name})
        self._run: SteeredRun | None = None
        self._units: list[Head] = []
        self._monitor: UnitMonitor | None = None
        self._window: CriticalWindow | None = None
        self._writer: DecisionWriter | None = None
        self._unsubscribe: list[Callable[[], None]] = []
        self._former_folder = "None"
        self._forget()

    # -- Lightning ----------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "decided_step": self._decided_step,
            "counts": dict(self._counts),
            "aiming": self._aiming.state_dict(),
            "acted": self._outcomes.state_dict(),
            "policies": {policy.name: policy.state_dict() for policy in self.policies},
            "folder": str(self.folder or self._former_folder),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._decided_step = int(state_dict["decided_step"])
        self._counts = dict(state_dict["counts"])
        self._aiming.load_state_dict(state_dict["aiming"])
        self._outcomes.load_state_dict(state_dict.get("acted", {}))
        for policy in self.policies:
            if policy.name in state_dict["policies"]:
                policy.load_state_dict(state_dict["policies"][policy.name])
        self._former_folder = state_dict["folder"]
        warn_of_other_folder("OnlineSteering", self._former_folder, self.folder)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_strategy(trainer, "OnlineSteering")
        check_trainer(trainer, pl_module, self, self.policies)
        model = find_language_model(pl_module, self._model_name)
        layout = describe(model)
        names = self._unit_names
        self._units = layout.heads if names is None else [parse_unit(one) for one in names]
        for unit in self._units:
            layout.check(unit)
        name = self.mechanism.name
        target = self._aiming.target
        self._monitor = None if target is None else monitor_of(trainer, self, name)
        if self._monitor is not None and isinstance(self._given, str) and self._token_ids is None:
            self.mechanism = self._monitor.mechanism(name) or self.mechanism
        why = {
            "units='target'": self._only_targets,
            "a policy with active='window'": any(policy.by_window for policy in self.policies),
        }
        reasons = [reason for reason, holds in why.items() if holds]
        self._window = window_of(trainer, self, name, reasons[0]) if reasons else None
        for policy in self.policies:
            if policy.needs_in_run_scores:
                scoring_of(trainer, self, name, self._units)
            else:
                self.mechanism.check(model)
        self.folder = folder_of(trainer, self, self._wanted_folder)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._run = SteeredRun(
            trainer,
            model,
            self.mechanism,
            rows=data.rows,
            corpus_hash=data.rows.content_hash,
            end=len(data.schedule),
            schedule=data.schedule,
        )
        if trainer.global_step == 0:
            # A checkpoint's state, if there is one, is loaded after this.
            self._forget()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        run = self._run
        assert run is not None and self.folder is not None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        run.schedule = data.schedule
        define_metrics(trainer, [f"{self.mechanism.name}/steering"], {})
        known = [] if self._only_targets else self._units
        first, last = self._steps(run.end)
        if trainer.max_steps >= 0:
            last = min(last, trainer.max_steps - 1)
        self._aiming.prepare(self.mechanism.name, known, max(first, trainer.global_step), last)
        self._outcomes.begin()
        self._end_subscriptions()
        for policy in self.policies:
            policy.begin(run, known)
            if isinstance(policy, Amplify):
                self._follow(trainer, policy)
        self._writer = None
        if trainer.is_global_zero and not is_rehearsal(trainer):
            self._writer = DecisionWriter(self.folder / FOLDER)
            self._writer.discard_from(n_decided(trainer))
            facts: dict[str, Any] = {"decided_before": n_decided(trainer)}
            facts["units"] = "target" if self._only_targets else list(map(str, self._units))
            self._writer.describe(
                provenance_of(
                    trainer,
                    self.mechanism,
                    self.policies,
                    self._aiming.target,
                    over=self._over,
                    **facts,
                )
            )
        trainer.strategy.barrier("OnlineSteering")
        self._seen_step = trainer.global_step
        self._steer(trainer, pl_module, in_batch=False)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """The step's scores are complete here, before any callback may save a checkpoint of it."""
        for policy in self.policies:
            if isinstance(policy, Amplify):
                policy.recent.close(trainer, trainer.global_step)

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
        self._steer(trainer, pl_module, in_batch=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._writer is not None:
            self._writer.flush()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_subscriptions()
        if self._writer is not None:
            for told in self._outcomes.idle(self._aiming):
                warnings.warn(told, stacklevel=2)
            path = write_all(trainer, self._writer)
            log_file(trainer, path, name=f"{self.mechanism.name}-steered-plan", kind="plan")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._end_subscriptions()
        try:
            if self._writer is not None:
                write_all(trainer, self._writer)
        except OSError as error:  # the disk may be what the exception is about
            warnings.warn(f"OnlineSteering could not write its files: {error}", stacklevel=2)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end_subscriptions()
        self._run = self._monitor = self._window = self._writer = None

    # -- what it does -------------------------------------------------------------------------

    def _steer(self, trainer: pl.Trainer, module: pl.LightningModule, *, in_batch: bool) -> None:
        """Decide on the step that comes, once."""
        run, step = self._run, trainer.global_step
        assert run is not None
        is_last = step >= run.end or 0 <= trainer.max_steps <= step
        if is_last or step == self._decided_step:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        run.schedule = data.schedule
        units = self._present_units()
        first, last = self._steps(run.end)
        latest = None if self._monitor is None else self._monitor.latest(self.mechanism.name)
        evaluated = first <= step <= last and self._aiming.take(latest, units)
        decided: list[tuple[Decision, Any]] = []
        for policy in self.policies:
            found, outcome = self._asked(policy, step, units)
            self._outcomes.note(policy, outcome)
            if found is None:
                continue
            after = run.schedule.extended([found.operation], step)
            places = places_of(found.operation, run.schedule, after, step)
            decided.append((found, places))
            run.schedule = after
        number = n_decided(trainer)
        if decided:
            data.steer([one.operation for one, _ in decided], from_step=step)
        self._decided_step = step
        for i, (one, places) in enumerate(decided):
            count = len(places[0]) if places else getattr(one.operation, "count", 0)
            self._counts["masked" if isinstance(one.operation, Mask) else "inserted"] += count
            if self._writer is not None:
                self._writer.add(number + i, step, one, places, self._aiming.aim)
        if evaluated or step % max(int(trainer.log_every_n_steps), 1) == 0:  # type: ignore[attr-defined]
            self._log(trainer, module, step, in_batch=in_batch)

    def _asked(
        self, policy: Policy, step: int, units: Sequence[Head]
    ) -> tuple[Decision | None, Outcome]:
        """What a policy decides, the same on all ranks; and what came of asking it."""
        run = self._run
        assert run is not None
        if not policy.is_on(step, "before" if self._window is None else self._window.phase):
            return None, "not active"
        if not units:
            return None, "no unit"
        strength = self._aiming.strength(policy.direction, step)
        if strength <= 0:
            return None, "no push"
        found = policy.decide(run, step, strength, units)
        if run.trainer.world_size > 1:
            found = run.trainer.strategy.broadcast(found)  # scores may differ in their last bits
        return found, "nothing" if found is None else "acted"

    def _present_units(self) -> list[Head]:
        if not self._only_targets:
            return self._units
        assert self._window is not None
        return [unit for unit, _ in self._window.target_windows]

    def _steps(self, end: int) -> tuple[int, int]:
        """The first and the last step at which some policy may act."""
        spans = [policy.steps(end) for policy in self.policies]
        return min(first for first, _ in spans), max(last for _, last in spans)

    def _follow(self, trainer: pl.Trainer, policy: Amplify) -> None:
        scoring = scoring_of(trainer, self, self.mechanism.name, self._units)
        columns = [scoring.units.index(unit) for unit in self._units]
        policy.follow(self._units, trainer.global_step)

        def hear(one: ScoredSamples) -> None:
            if one.mechanism == self.mechanism.name:
                values = one.values[:, columns].float().sum(2)
                policy.hear(StepRows(one.step, one.ihvp_step, one.sample_ids.clone(), values))

        self._unsubscribe.append(scoring.subscribe(hear))

    def _end_subscriptions(self) -> None:
        while self._unsubscribe:
            self._unsubscribe.pop()()

    def _log(
        self, trainer: pl.Trainer, module: pl.LightningModule, step: int, *, in_batch: bool
    ) -> None:
        values = {name: float(count) for name, count in self._counts.items()}
        aim = self._aiming.aim
        for name, value in (("push", aim.push), ("reference", aim.reference)):
            if value is not None:
                values[name] = value
        scalars = {f"{self.mechanism.name}/steering/{name}": v for name, v in values.items()}
        log_scalars(trainer, module, scalars, step=step, monitorable=in_batch)

    def _forget(self) -> None:
        """Begin a new run."""
        self._decided_step = self._seen_step = -1
        self._counts = {"masked": 0, "inserted": 0}
        self._aiming.forget()
        self._outcomes.forget()
        for policy in self.policies:
            policy.forget()
