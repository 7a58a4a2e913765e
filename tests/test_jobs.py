"""Parallel jobs: kept when finished, started over when not, stopped together."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mda_lightning.files import write_json
from mda_lightning.recipes.studies import jobs as jobs_module
from mda_lightning.recipes.studies.jobs import Job, JobError, run_jobs

# Stands in for the process of a job: it does what the specification says.
_WORKER = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
if job["spec"].get("fail"):
    print("the reason is here"); sys.exit(3)
time.sleep(job["spec"].get("sleep", 0))
runs = folder.parent / (folder.name + ".runs")
runs.write_text(str(int(runs.read_text()) + 1 if runs.exists() else 1))
result = {"value": job["spec"]["value"]}
(folder / "done.json").write_text(json.dumps({"job_hash": job["hash"], "result": result}))
"""


@pytest.fixture(autouse=True)
def worker(monkeypatch, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    popen = jobs_module.subprocess.Popen

    def start(command, **settings):
        return popen([sys.executable, str(script), command[-1]], **settings)

    monkeypatch.setattr(jobs_module.subprocess, "Popen", start)


def _job(tmp_path: Path, name: str, **spec) -> Job:
    spec = {"value": name, **spec}
    return Job("arm", name, tmp_path / name, spec, identity=spec)


def _runs(job: Job) -> int:
    path = job.folder.parent / f"{job.folder.name}.runs"
    return int(path.read_text()) if path.exists() else 0


def test_a_finished_job_is_kept_and_a_changed_one_runs_again(tmp_path: Path) -> None:
    job, states = _job(tmp_path, "a"), []
    first = run_jobs([job], max_parallel=1, watch=lambda j, p, state: states.append(state))
    again = run_jobs([job], max_parallel=1, watch=lambda j, p, state: states.append(state))
    assert first == again == {job.folder: {"value": "a"}}
    assert _runs(job) == 1 and states[-1] == "kept"
    changed = _job(tmp_path, "a", more=1)
    run_jobs([changed], max_parallel=1)
    assert _runs(job) == 2


def test_what_an_unfinished_job_left_is_not_read_back(tmp_path: Path) -> None:
    job = _job(tmp_path, "a")
    job.folder.mkdir()
    (job.folder / "half.parquet").write_text("half")
    write_json(job.folder / "done.json", {"job_hash": "of something else", "result": {"value": 0}})
    assert run_jobs([job], max_parallel=1)[job.folder] == {"value": "a"}
    assert not (job.folder / "half.parquet").exists()


def test_followers_start_while_others_still_run(tmp_path: Path) -> None:
    order: list[str] = []

    def then(job: Job, result: dict) -> list[Job]:
        order.append(job.title)
        return [_job(tmp_path, "follower")] if job.title == "quick" else []

    jobs = [_job(tmp_path, "slow", sleep=2.5), _job(tmp_path, "quick")]
    assert len(run_jobs(jobs, max_parallel=2, then=then)) == 3
    assert order == ["quick", "follower", "slow"]


def test_followers_come_before_what_waits(tmp_path: Path) -> None:
    """A seed's arms before the next seed's base run: a study cut short is of whole seeds."""
    order: list[str] = []

    def then(job: Job, result: dict) -> list[Job]:
        order.append(job.title)
        return [_job(tmp_path, "arm")] if job.title == "one" else []

    run_jobs([_job(tmp_path, "one"), _job(tmp_path, "two")], max_parallel=1, then=then)
    assert order == ["one", "arm", "two"]


def test_a_failure_stops_the_others_and_shows_the_log(tmp_path: Path) -> None:
    slow = _job(tmp_path, "slow", sleep=60)
    with pytest.raises(JobError, match=r"(?s)bad ended with exit code 3.*the reason is here"):
        run_jobs([slow, _job(tmp_path, "bad", fail=True)], max_parallel=2)
    assert slow.result() is None


def test_an_interrupt_stops_the_processes_and_the_rest_goes_on_later(tmp_path: Path) -> None:
    jobs = [_job(tmp_path, "a"), _job(tmp_path, "b", sleep=1.0)]

    def interrupt(job: Job, progress, state: str) -> None:
        if state == "finished":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, max_parallel=2, watch=interrupt)
    assert jobs[0].result() == {"value": "a"} and jobs[1].result() is None
    assert len(run_jobs(jobs, max_parallel=2)) == 2
    assert (_runs(jobs[0]), _runs(jobs[1])) == (1, 1)


def test_the_hash_covers_kind_and_identity(tmp_path: Path) -> None:
    job = _job(tmp_path, "a")
    other_kind = replace(job, kind="base")
    assert job.content_hash != other_kind.content_hash
    assert job.content_hash != _job(tmp_path, "a", more=1).content_hash
    # Where it lies, what it is called and how it is logged do not make a finished job run again.
    moved = replace(job, title="other", folder=tmp_path / "z", spec=job.spec | {"wandb": "off"})
    assert job.content_hash == moved.content_hash
