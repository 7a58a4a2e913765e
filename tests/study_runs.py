"""Studies at the smallest size, their jobs run one after the other in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mda_lightning.files import write_json
from mda_lightning.recipes.studies import job as job_process
from mda_lightning.recipes.studies.arm_settings import ArmSettings
from mda_lightning.recipes.studies.jobs import Job
from mda_lightning.recipes.studies.settings import (
    CorpusSettings,
    ModelSettings,
    MonitorSettings,
    ScoringSettings,
    StudySettings,
    SubsetSettings,
    TrainingSettings,
    WindowSettings,
)

TINY = StudySettings(
    mechanism="previous_token",
    corpus=CorpusSettings(n_rows=2000, sequence_length=64, held_out_rows=40),
    model=ModelSettings(n_layers=2, n_heads=2, d_model=32, d_mlp=32, rotary_fraction=1.0),
    training=TrainingSettings(max_steps=60, warmup_steps=5),
    window=WindowSettings(start=20, end=40),
    scoring=ScoringSettings(units="all", n_curvature=32),
    monitor=MonitorSettings(
        every_n_steps=5,
        companions_every_n_steps=10,
        n_sequences=10,
        text_rows=8,
        averaged_evaluations=2,
        thresholds=(0.05, 0.9),
    ),
    subsets=SubsetSettings(count=3, steps=6, rankings=("influence", "dot", "random")),
    arms={
        "mask-top": ArmSettings(do="mask"),
        "mask-random": ArmSettings(control_of="mask-top"),
        "mask-loss": ArmSettings(do="mask", by="loss", control="mask-random"),
        "mask-ngrams": ArmSettings(do="mask", by="repeated_ngrams", which="bottom"),
        "insert-top": ArmSettings(do="insert"),
        "insert-random": ArmSettings(control_of="insert-top"),
        "insert-second": ArmSettings(do="insert", unit="second", control="insert-random"),
        "generated": ArmSettings(
            do="insert", generator="repeated_tokens", count=7, control="insert-random"
        ),
        "replace": ArmSettings(
            do="replace", steps=("50%", "100%"), from_steps=("-50%", "0%"), fraction=0.2
        ),
        "replace-random": ArmSettings(control_of="replace"),
        "prune": ArmSettings(do="prune", fraction=0.5),
        "suppress": ArmSettings(do="steer", fraction=0.25, refresh_every=10),
        "suppress-random": ArmSettings(control_of="suppress"),
    },
)


def run_here(
    jobs: Iterable[Job],
    *,
    then: Callable[[Job, dict[str, Any]], Iterable[Job]] | None = None,
    watch: Any = None,
    **_: Any,
) -> None:
    """As :func:`mda_lightning.recipes.studies.jobs.run_jobs`, without processes."""
    waiting = list(jobs)
    while waiting:
        job = waiting.pop(0)
        state, result = "kept", job.result()
        if result is None:
            state, result = "finished", run_one(job)
        if watch is not None:
            watch(job, None, state)
        waiting[:0] = then(job, result) if then is not None else ()


def run_one(job: Job) -> dict[str, Any]:
    """Run one job and return what it returned."""
    if not job.resumable:
        shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(
        job.folder / "job.json",
        {"kind": job.kind, "title": job.title, "hash": job.content_hash, "spec": job.spec},
    )
    job_process.main(str(Path(job.folder)))
    result = job.result()
    assert result is not None
    return result
