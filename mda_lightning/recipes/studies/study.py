"""A counterfactual study: base run, critical window, scores, plans, arms, report (Section 4).

Per seed one base run finds the window of the head that forms and scores the samples trained on in
it; four arms branch from the window's start and see the same data in the same order, but for the
treated share; each is judged against a random control matched in count. The base run, which goes
on unchanged, is the fifth arm.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from mda_lightning import __version__
from mda_lightning.corpora import TokenRows
from mda_lightning.files import atomic_path, read_json, write_json
from mda_lightning.interventions import Plan
from mda_lightning.mechanisms import mechanism
from mda_lightning.recipes.studies.job import peak_memory_bytes
from mda_lightning.recipes.studies.jobs import Job, Watch, run_jobs
from mda_lightning.recipes.studies.settings import StudySettings
from mda_lightning.schedule import BaseOrder
from mda_lightning.store import ScoreTable
from mda_lightning.window import WindowRule

SCHEMA_VERSION = 1
_BRANCHED = ("mask-top", "mask-random", "insert-top", "insert-random")


class StudyFolderError(ValueError):
    """The folder holds a study of other settings, or cannot hold one."""


@dataclass
class Study:
    """One study folder, and how its runs are made.

    Attributes:
        folder: where everything is written; a finished part is not done again.
        settings: what is run.
        seeds: one base run and its arms each.
        corpus: folder of the :class:`TokenRows` to train on.
        max_parallel: processes at a time, one thread each.
        wandb: "online", "offline" or "off".
        watch: see :func:`run_jobs`.
    """

    folder: Path
    settings: StudySettings
    seeds: tuple[int, ...]
    corpus: Path
    max_parallel: int = 2
    wandb: str = "off"
    title: str = "Counterfactual study"
    watch: Watch | None = None
    timings: dict[str, float] = field(default_factory=dict)

    def run(self) -> Path:
        """Run what has not been run yet; returns the path of ``study.json``.

        Raises:
            StudyFolderError: the folder holds a study of other settings or another corpus.
            JobError: a run failed.
        """
        self.rows = TokenRows.open(self.corpus)
        self._seeds: dict[int, dict[str, Any]] = {}
        self._peaks: list[int] = []
        self._started = time.monotonic()
        with self._alone():
            self._claim_folder()
            run_jobs(
                [self._base_job(seed) for seed in self.seeds],
                max_parallel=self.max_parallel,
                then=self._after,
                watch=self.watch,
            )
            return self._write()

    # -- jobs ---------------------------------------------------------------------------------

    def _base_job(self, seed: int) -> Job:
        return Job(
            "base",
            f"seed {seed}: base run",
            self.folder / f"seed-{seed}" / "base",
            self._spec(seed, "base"),
            self._identity(seed),
        )

    def _identity(self, seed: int) -> dict[str, Any]:
        return {
            "settings": self.settings.to_dict(),
            "seed": seed,
            "corpus_hash": self.rows.content_hash,
            "versions": _versions(),
        }

    def _spec(self, seed: int, name: str) -> dict[str, Any]:
        return {
            "settings": self.settings.to_dict(),
            "seed": seed,
            "corpus": str(self.corpus),
            "wandb": self.wandb,
            "wandb_project": "mda-lightning",
            "group": self.folder.name,
            "name": f"seed-{seed}/{name}",
        }

    def _after(self, job: Job, result: dict[str, Any]) -> Iterable[Job]:
        """The arms that follow a base run; nothing follows an arm."""
        seed = int(job.spec["seed"])
        self._peaks.append(int(result["peak_memory_bytes"]))
        self.timings[job.title] = float(result["seconds"])
        arms: list[Job] = []
        if job.kind == "base":
            former = self._seeds.get(seed, {})
            self._seeds[seed] = self._describe(seed, job, result)
            if former.get("window") == self._seeds[seed]["window"]:
                # Finished arms stay in the study while they are looked up again.
                self._seeds[seed]["arms"] = former["arms"]
            if self._seeds[seed]["status"] == "running":
                arms = self._arm_jobs(seed, job, result["window"])
        else:
            done = self._seeds[seed]
            done["arms"][job.folder.name] = self._relative(job.folder)
            if len(done["arms"]) == len(_BRANCHED) + 1:
                done["status"] = "complete"
        self._write()
        return arms

    def _describe(self, seed: int, job: Job, result: dict[str, Any]) -> dict[str, Any]:
        report = result["window"]
        entry: dict[str, Any] = {
            "seed": seed,
            "base": self._relative(job.folder),
            "target": report["target"],
            "window": report["window"] or {},
            "arms": {},
        }
        if report["status"] != "closed":
            message = f"{report['message']}; training stopped at step {result['stopped_at']}"
            return entry | {"status": "no_window", "message": message}
        if not {"start", *self.settings.scoring.replay_at} <= set(report["checkpoints"]):
            message = (
                f"{report['message']}; but a checkpoint at its edges could not be written (is the "
                "disk full?): only "
                f"{', '.join(report['checkpoints']) or 'none'} was kept, so no arm can branch"
            )
            return entry | {"status": "no_window", "message": message}
        return entry | {
            "status": "running",
            "message": "",
            "scores": self._relative(job.folder / "scores"),
            "score_unit": report["target"],
            "measured_at": self._measured_at(int(report["window"]["end"])),
            "arms": {"baseline": self._relative(job.folder)},
        }

    def _measured_at(self, end: int) -> list[int]:
        """The last evaluations up to the window's end, the same for every arm.

        With ``shift`` the insertion arms are judged there too, having seen less of the window's
        base data by then, as their control has.
        """
        monitor = self.settings.monitor
        last = end - end % monitor.every_n_steps
        return [
            last - i * monitor.every_n_steps for i in reversed(range(monitor.averaged_evaluations))
        ]

    # -- plans --------------------------------------------------------------------------------

    def _arm_jobs(self, seed: int, base: Job, report: dict[str, Any]) -> list[Job]:
        steps = (int(report["window"]["start"]), int(report["window"]["end"]))
        plans = self._plans(seed, base, report["target"], steps)
        jobs = []
        for name, plan in plans.items():
            path = self.folder / f"seed-{seed}" / "plans" / f"{name}.json"
            plan.save(path)
            spec = self._spec(seed, name) | {
                "plan": str(path),
                "checkpoint": str(base.folder / report["checkpoints"]["start"]),
                "end": steps[1],
            }
            identity = self._identity(seed) | {"plan_hash": plan.content_hash, "end": steps[1]}
            folder = self.folder / f"seed-{seed}" / "arms" / name
            jobs.append(Job("arm", f"seed {seed}: {name}", folder, spec, identity))
        return jobs

    def _plans(self, seed: int, base: Job, unit: str, steps: tuple[int, int]) -> dict[str, Plan]:
        """Treated plans and their controls; every id was trained on inside the window."""
        what = self.settings.intervention
        training = self.settings.training
        order = BaseOrder(len(self.rows), training.batch_size, training.max_steps, seed)
        pool = np.unique(np.concatenate([order.ids(step) for step in range(*steps)]))
        table = ScoreTable.open(base.folder / "scores")
        if not table.complete:
            raise StudyFolderError(
                f"the scores in {table.folder} are not complete, so no plan can be made of them: "
                "the base run ended before it had written all; start over with --fresh"
            )
        top = table.top(unit, fraction=what.fraction)
        source = {
            "scores": self._relative(table.folder),
            "unit": unit,
            "estimator": table.estimator,
            "fraction": what.fraction,
        }
        bind: dict[str, Any] = {
            "corpus_hash": self.rows.content_hash,
            "order": order,
            "seed": seed,
            "source": source,
        }
        mask = Plan.mask(top, steps=steps).bound(**bind, name="mask-top")
        insert = Plan.insert(
            top, mode=what.mode, steps=steps, placement=what.placement, copies=what.copies
        ).bound(**bind, name="insert-top")
        insert, insert_control = insert.with_random_control(pool, seed=seed + 2_000_003)
        return {
            "mask-top": mask,
            "mask-random": mask.random_control(pool, seed=seed + 1_000_003),
            "insert-top": insert,
            "insert-random": insert_control,
        }

    # -- the folder ---------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder's lock: jobs empty their folders before they start."""
        with atomic_path(self.folder / ".writable") as probe:
            probe.touch()  # an unwritable folder is an error that names it, not a failing lock
        (self.folder / ".writable").unlink()
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                yield
        except Timeout as error:
            raise StudyFolderError(
                f"another process is working in {self.folder}; wait for it, stop it, or give "
                "another folder"
            ) from error

    # -- study.json ---------------------------------------------------------------------------

    def _claim_folder(self) -> None:
        path = self.folder / "study.json"
        if path.is_file():
            former = read_json(path)
            self._refuse_another(former)
            self._created = str(former["created"])
            self.timings = {k: v for k, v in former["timings"].items() if k != "total"}
            self._seeds = {int(seed["seed"]): seed for seed in former["seeds"]}
        else:
            self._created = datetime.now(UTC).isoformat(timespec="seconds")
        self._write()

    def _refuse_another(self, former: dict[str, Any]) -> None:
        made = former["provenance"]
        for what, theirs, ours in (
            ("settings", former["settings_hash"], self.settings.content_hash),
            ("corpus", made["corpus_hash"], self.rows.content_hash),
            ("package versions", made["versions"], _versions()),
        ):
            if theirs != ours:
                raise StudyFolderError(
                    f"{self.folder} holds a study of other {what} ({_short(theirs)}, these are "
                    f"{_short(ours)}); give another folder, or start over with --fresh"
                )

    def _write(self) -> Path:
        of = mechanism(self.settings.mechanism, token_ids=self.rows.token_ids.tolist())
        peaks = sorted(self._peaks, reverse=True)[: self.max_parallel]
        return write_json(
            self.folder / "study.json",
            {
                "schema_version": SCHEMA_VERSION,
                "kind": "counterfactual",
                "title": self.title,
                "created": self._created,
                "settings_hash": self.settings.content_hash,
                "config": self.settings.to_dict(),
                "provenance": _provenance() | {"corpus_hash": self.rows.content_hash},
                "corpus": self._relative(self.corpus),
                "metric": self.settings.mechanism,
                "chance": of.chance,
                "treated_fraction": self.settings.intervention.fraction,
                "timings": {"total": time.monotonic() - self._started} | self.timings,
                # An upper bound: this process and the largest ones at once, each at its own peak.
                "peak_memory_bytes": peak_memory_bytes() + sum(peaks),
                "window_rule": WindowRule().settings(),
                "seeds": [self._seeds[seed] for seed in sorted(self._seeds)],
            },
        )

    def _relative(self, path: Path) -> str:
        return Path(os.path.relpath(path, self.folder)).as_posix()


def _versions() -> dict[str, str]:
    """The versions that decide what a run computes."""
    names = ("torch", "lightning", "transformers", "numpy")
    return {"mda_lightning": __version__, **{name: version(name) for name in names}}


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in sorted(value.items()))
    return str(value)[:12]


def _provenance() -> dict[str, Any]:
    return {
        "versions": _versions(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
