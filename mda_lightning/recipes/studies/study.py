"""A counterfactual study: base runs, critical windows, rankings, plans, arms (Section 4).

Per seed one base run finds the window of the head that forms (or passes through the one that the
recipe names) and scores the samples trained on in it; every arm branches from one checkpoint of it
and sees the same data in the same order, but for what its plan changes; each is judged against a
random control matched in count. The base run, which goes on unchanged, is the arm ``baseline``.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mda_lightning.corpora import TokenRows
from mda_lightning.files import atomic_path, sha256_of
from mda_lightning.interventions import Plan
from mda_lightning.recipes.studies.arms import (
    SeedFacts,
    first_step,
    fraction_of,
    generated_rows,
    n_treated,
    plans_of,
    steered_control,
    steps_of,
)
from mda_lightning.recipes.studies.building import study_order
from mda_lightning.recipes.studies.changes import files_key, is_complete, subsets_key
from mda_lightning.recipes.studies.jobs import Job, Watch, run_jobs
from mda_lightning.recipes.studies.rankings import (
    intervals_of,
    names_needed,
    own_rankings,
    rankings_hash,
)
from mda_lightning.recipes.studies.runs import base_end
from mda_lightning.recipes.studies.settings import StudySettings
from mda_lightning.recipes.studies.study_file import (
    StudyFile,
    StudyFolderError,
    measured_at,
    package_versions,
)
from mda_lightning.store import ScoreTable
from mda_lightning.store.rankings import Rankings

__all__ = ["Study", "StudyFolderError"]


@dataclass
class Study:
    """One study folder, and how its runs are made.

    Attributes:
        folder: where everything is written; a finished part is not done again.
        settings: what is run.
        seeds: one base run and its arms each.
        corpus: folder of the :class:`TokenRows` to train on.
        held_out: of those that in-context learning and held-out loss are measured on.
        max_parallel: processes at a time, one thread each.
        wandb: "online", "offline" or "off".
        shared: a folder for runs instead of ``folder``, in which studies find each other's: base
            runs of equal settings, arms of equal plans.
        watch: see :func:`run_jobs`.
    """

    folder: Path
    settings: StudySettings
    seeds: tuple[int, ...]
    corpus: Path
    held_out: Path | None = None
    max_parallel: int = 2
    wandb: str = "off"
    title: str = "Counterfactual study"
    shared: Path | None = None
    watch: Watch | None = None
    timings: dict[str, float] = field(default_factory=dict)
    rows: TokenRows = field(init=False)

    def run(self) -> Path:
        """Run what has not been run yet; returns the path of ``study.json``.

        Raises:
            StudyFolderError: the folder holds a study of other settings or another corpus.
            JobError: a run failed.
        """
        self.rows = TokenRows.open(self.corpus)
        self._own_held_out = None if self.held_out is None else TokenRows.open(self.held_out)
        self._peaks: list[int] = []
        self._started = time.monotonic()
        self._reports: dict[int, dict[str, Any]] = {}
        self._names: dict[Path, list[str]] = {}
        with self._alone():
            self._file = StudyFile.claim(self)
            self._seeds = self._file.seeds
            self._write()
            run_jobs(
                [self._base_job(seed) for seed in self.seeds],
                max_parallel=self.max_parallel,
                then=self._after,
                watch=self.watch,
            )
            return self._write()

    @property
    def runs_folder(self) -> Path:
        """Where the runs are: the study's own folder, or one shared by equal base runs."""
        if self.shared is None:
            return self.folder
        return self.shared / sha256_of(repr(sorted(self._base_identity(-1).items())))[:12]

    def relative(self, path: Path) -> str:
        """As ``study.json`` names a path."""
        return Path(os.path.relpath(path, self.folder)).as_posix()

    # -- jobs ---------------------------------------------------------------------------------

    def _base_identity(self, seed: int) -> dict[str, Any]:
        held_out = self._own_held_out
        window = self.settings.window
        branch = None
        if window.start is not None and window.end is not None:
            branch = first_step(self.settings, (window.start, window.end))
        return {
            "settings": self.settings.base_dict(),
            "branch": branch,
            "seed": seed,
            "corpus_hash": self.rows.content_hash,
            "held_out_hash": None if held_out is None else held_out.content_hash,
            "versions": package_versions(),
            **files_key(self.settings),
        }

    def _spec(self, seed: int, name: str, **more: Any) -> dict[str, Any]:
        return {
            "settings": self.settings.to_dict(),
            "seed": seed,
            "corpus": str(self.corpus),
            "held_out": None if self.held_out is None else str(self.held_out),
            "wandb": self.wandb,
            "wandb_project": "mda-lightning",
            "group": self.folder.name,
            "name": f"seed-{seed}/{name}",
            **more,
        }

    def _base_job(self, seed: int) -> Job:
        identity = self._base_identity(seed)
        return Job(
            "base",
            f"seed {seed}: base run",
            self.runs_folder / f"seed-{seed}" / "base",
            self._spec(seed, "base", branch=identity["branch"]),
            identity,
            resumable=self.settings.training.checkpoint_every_n_steps > 0,
        )

    def _job(
        self, kind: str, seed: int, name: str, place: str, identity: dict[str, Any], **about: Any
    ) -> Job:
        """A job that follows a seed's base run, and knows what is ``about`` it."""
        return Job(
            kind,
            f"seed {seed}: {name}",
            self.runs_folder / f"seed-{seed}" / place,
            self._spec(seed, name, **about),
            self._base_identity(seed) | identity,
            resumable=kind != "arm" or self.settings.training.checkpoint_every_n_steps > 0,
        )

    def _after(self, job: Job, result: dict[str, Any]) -> Iterable[Job]:
        """The jobs that follow one: base run, rankings, arms, the controls of steered arms."""
        seed = int(job.spec["seed"])
        self._peaks.append(int(result["peak_memory_bytes"]))
        self.timings[job.title] = float(result["seconds"])
        follow, entry = list[Job](), self._seeds.get(seed, {})
        if job.kind == "base":
            follow = self._after_base(seed, job, result)
        elif job.kind == "rankings":
            entry["rankings"] = self.relative(job.folder)
            if entry["scores"] is None and "influence" in result["names"]:
                scores = Rankings.open(job.folder).table("influence").folder
                entry["scores"] = self.relative(scores)
            follow = self._arm_jobs(seed, job.folder)
        elif job.kind == "subsets":
            entry["subsets"] = self.relative(job.folder / "subsets.npz")
        else:
            for name in self._names[job.folder]:
                entry["arms"][name] = self.relative(job.folder)
                if job.spec.get("steer"):
                    follow += self._steered_controls(seed, name, job.folder)
        entry = self._seeds[seed]
        if entry["status"] == "running" and is_complete(entry, self.settings):
            entry["status"] = "complete"
        self._write()
        return follow

    def _after_base(self, seed: int, job: Job, result: dict[str, Any]) -> list[Job]:
        report, former = result["window"], self._seeds.get(seed, {})
        self._reports[seed] = report
        entry = self._seeds[seed] = self._describe(seed, job, result)
        if entry["status"] != "running":
            return []
        if former.get("window") == entry["window"]:
            # Finished parts stay in the study while they are looked up again.
            entry["arms"] = former["arms"] | entry["arms"]
            entry |= {name: former.get(name) for name in ("rankings", "subsets")}
        window = (int(report["window"]["start"]), int(report["window"]["end"]))
        branch = first_step(self.settings, window)
        if branch < report["checkpoint_steps"]["branch"]:
            raise StudyFolderError(
                f"an arm begins at step {branch}, before the window that was found (step "
                f"{window[0]}), where all arms branch; begin it at 0% or later, or name the window "
                "in the recipe (window.start, window.end)"
            )
        own = job.folder / "scores"
        scored = own if own.is_dir() else None
        if scored is not None and not ScoreTable.open(scored).complete:
            raise StudyFolderError(
                f"the scores in {scored} are not complete, so no plan can be made of them: its "
                "base run was interrupted; start over with --fresh"
            )
        is_own = names_needed(self.settings) == ("influence",) and (
            self.settings.scoring.units == "all"
            or {arm.unit for arm in self.settings.arms.values()} <= {"target", report["target"]}
        )
        middle = int(report["checkpoint_steps"].get("mid", window[0]))
        if scored and is_own and intervals_of(self.settings, window, middle) == [window]:
            return self._arm_jobs(seed, self._own_ranking(seed, scored))
        identity = {"rankings": rankings_hash(self.settings)}
        return [
            self._job(
                "rankings",
                seed,
                "rankings",
                place=f"rankings-{identity['rankings'][:8]}" if self.shared else "rankings",
                identity=identity,
                base=str(job.folder),
                window=report,
                scores=None if scored is None else str(scored),
            )
        ]

    def _own_ranking(self, seed: int, scores: Path) -> Path:
        """Rankings that need no job: the base run's own scores."""
        folder = self.runs_folder / f"seed-{seed}" / "rankings-own"
        own_rankings(folder, scores, seed=seed, corpus_hash=self.rows.content_hash)
        self._seeds[seed]["rankings"] = self.relative(folder)
        return folder

    def _describe(self, seed: int, job: Job, result: dict[str, Any]) -> dict[str, Any]:
        report = result["window"]
        entry: dict[str, Any] = {
            "seed": seed,
            "base": self.relative(job.folder),
            "target": report["target"],
            "units": result["units"],
            "window": report["window"] or {},
            "arms": {},
            "rankings": None,
            "subsets": None,
        }
        if report["status"] != "closed":
            message = f"{report['message']}; training stopped at step {result['stopped_at']}"
            return entry | {"status": "no_window", "message": message}
        needed = {"branch", *self.settings.scoring.replay_at}
        needed |= {"mid"} if self.settings.subsets.count else set()
        if lost := sorted(needed - set(report["checkpoints"])):
            message = (
                f"{report['message']}; but a checkpoint could not be written (is the disk full?): "
                f"{', '.join(lost)} is missing, so no arm can branch"
            )
            return entry | {"status": "no_window", "message": message}
        scores = job.folder / "scores"
        end = int(report["window"]["end"])
        return entry | {
            "status": "running",
            "message": "",
            "scores": self.relative(scores) if scores.is_dir() else None,
            "score_unit": report["target"],
            "measured_at": measured_at(self.settings, end),
            "branch": int(report["checkpoint_steps"]["branch"]),
            "end": self._last_step(end),
            "arms": {"baseline": self.relative(job.folder)},
        }

    def _last_step(self, window_end: int) -> int:
        return min(window_end + self.settings.training.margin_steps, base_end(self.settings))

    # -- arms ---------------------------------------------------------------------------------

    def _arm_jobs(self, seed: int, rankings: Path) -> list[Job]:
        facts = self._facts(seed, rankings)
        plans = plans_of(self.settings, facts)
        self._seeds[seed]["treated"] = {name: n_treated(plan) for name, plan in plans.items()}
        jobs = []
        for name, arm in self.settings.arms.items():
            if name in plans:
                jobs.append(self._plan_job(seed, name, plans[name]))
            elif arm.control_of is None:
                steps = steps_of(arm.steps, facts.window)
                how = {
                    "arm": dataclasses.asdict(arm),
                    "steps": list(steps),
                    "share": fraction_of(arm, self.settings),
                }
                about = {"steer": how, "unit": facts.unit(arm.unit)}
                jobs.append(self._arm_job(seed, name, identity=about, **about))
        if self.settings.subsets.count:
            identity = {"subsets": subsets_key(self.settings)}
            key = sha256_of(repr((identity, self._base_identity(seed))))
            jobs.append(
                self._job(
                    "subsets",
                    seed,
                    "random subsets",
                    place=f"subsets-{key[:8]}" if self.shared else "subsets",
                    identity=identity,
                    base=str(self._base_job(seed).folder),
                    window=self._reports[seed],
                    key=key,
                )
            )
        # Two arms may turn out to be the same run.
        return list({job.folder: job for job in reversed(jobs)}.values())[::-1]

    def _plan_job(self, seed: int, name: str, plan: Plan) -> Job:
        path = self.folder / f"seed-{seed}" / "plans" / f"{name}.json"
        plan.save(path)
        identity = {"plan_hash": plan.content_hash}
        return self._arm_job(seed, name, identity=identity, plan=str(path))

    def _arm_job(self, seed: int, name: str, *, identity: dict[str, Any], **about: Any) -> Job:
        entry, base = self._seeds[seed], self._base_job(seed).folder
        end = int(entry["end"])
        identity = identity | {"end": end, "branch_step": entry["branch"]}
        place = f"arms/{name}"
        if self.shared:
            place = f"arms/{sha256_of(repr(sorted(identity.items())))[:12]}"
        job = self._job(
            "arm",
            seed,
            name,
            place=place,
            identity=identity,
            arm=name,
            checkpoint=str(base / self._reports[seed]["checkpoints"]["branch"]),
            end=end,
            **about,
        )
        self._names.setdefault(job.folder, []).append(name)
        return job

    def _steered_controls(self, seed: int, owner: str, folder: Path) -> list[Job]:
        """Random counterparts of what a steered arm turned out to do."""
        decided = Plan.load(folder / "steering" / "plan.json")
        facts = self._facts(seed, self.folder / self._seeds[seed]["rankings"])
        jobs = []
        for name, arm in self.settings.arms.items():
            if arm.control_of == owner:
                plan = steered_control(decided, self.settings.arms[owner], arm.draw, facts)
                jobs.append(self._plan_job(seed, name, plan.bound(name=name)))
        return jobs

    def _facts(self, seed: int, rankings: Path) -> SeedFacts:
        entry = self._seeds[seed]
        window = (int(entry["window"]["start"]), int(entry["window"]["end"]))
        order = study_order(self.settings, self.rows, seed)
        place = self.folder / f"seed-{seed}" / "generated"
        return SeedFacts(
            seed=seed,
            window=window,
            units=entry["units"],
            corpus_hash=self.rows.content_hash,
            order=order,
            rankings=Rankings.open(rankings),
            generated=generated_rows(self.settings, self.rows, order, window, place),
        )

    # -- the folder ---------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the locks: jobs empty their folders before they start."""
        with ExitStack() as stack:
            for folder in dict.fromkeys([self.folder, self.runs_folder]):
                with atomic_path(folder / ".writable") as probe:
                    probe.touch()  # an unwritable folder is an error that names it
                (folder / ".writable").unlink()
                stack.enter_context(StudyFile.lock(folder))
            yield

    def _write(self) -> Path:
        return self._file.write(self._peaks, time.monotonic() - self._started)
