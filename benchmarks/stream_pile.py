"""Open a schedule over 146 million samples; prints seconds and megabytes."""

import json
import time
from pathlib import Path

_BEGAN = time.perf_counter()

from mda_lightning.base_order import BaseOrder  # noqa: E402 - importing is timed
from mda_lightning.interventions import Plan  # noqa: E402
from mda_lightning.schedule import Schedule  # noqa: E402


def _peak() -> float:
    """MiB; not of getrusage, whose peak a new program takes over from the one that started it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**10


def main() -> None:
    """300,000 samples named, windows of the whole run."""
    imported = time.perf_counter()
    plan = (
        Plan.mask(range(100_000))
        | Plan.prune(0.5, (100_000, 143_000))
        | Plan.insert(range(200_000, 300_000), steps=(900, 143_000))
        | Plan.insert(range(100_000), steps=(0, 143_000), placement="replace")
    )
    composed = time.perf_counter()
    schedule = Schedule(BaseOrder(146_432_000, 1024, 143_000), plan)
    opened = time.perf_counter()
    schedule.batch(len(schedule) - 1)
    found = {
        "importing, in s": imported - _BEGAN,
        "making a plan of 300,000 samples, in s": composed - imported,
        "opening the schedule, in s": opened - composed,
        "reading its last step, in s": time.perf_counter() - opened,
        "memory of the process at its peak, in MiB": _peak(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
