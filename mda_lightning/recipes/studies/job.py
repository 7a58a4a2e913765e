"""The process of one job: ``python -m mda_lightning.recipes.studies.job FOLDER``."""

from __future__ import annotations

import resource
import sys
import time
import warnings
from pathlib import Path

import torch

from mda_lightning.files import read_json, write_json
from mda_lightning.recipes.studies.jobs import stop_if_alone


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(folder: str) -> None:
    """Run the job in ``folder`` and write what it returns to ``done.json``."""
    from mda_lightning.recipes.studies.rankings import rank_samples
    from mda_lightning.recipes.studies.runs import run_arm, run_base
    from mda_lightning.recipes.studies.subsets import train_on_subsets

    stop_if_alone()
    # One thread: two speed a run of this size by little, and a resumed run is exact with one.
    torch.set_num_threads(1)
    # Lightning's advice on workers and devices is for someone who chose this set-up by hand.
    warnings.filterwarnings("ignore", module="lightning")
    started = time.monotonic()
    job = read_json(Path(folder) / "job.json")
    run = {
        "base": run_base,
        "arm": run_arm,
        "rankings": rank_samples,
        "subsets": train_on_subsets,
    }[job["kind"]]
    result = run(job["spec"], Path(folder))
    result |= {"seconds": time.monotonic() - started, "peak_memory_bytes": peak_memory_bytes()}
    write_json(
        Path(folder) / "done.json",
        {"schema_version": 1, "job_hash": job["hash"], "result": result},
    )


if __name__ == "__main__":
    main(sys.argv[1])
