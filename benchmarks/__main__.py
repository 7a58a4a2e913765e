"""``python -m benchmarks [NAME ...]``: print each benchmark's rows for RESULTS.md."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from benchmarks import in_run_costs
from benchmarks.ablation_speed import ablation
from benchmarks.in_run_against_replay import agreement
from benchmarks.in_run_trainer import in_run_trainer
from benchmarks.monitoring_costs import memory, pythia, quickstart
from benchmarks.replay_costs import replay
from benchmarks.scoring_curves import curves
from benchmarks.scoring_heads import heads
from benchmarks.scoring_memory import memory_160m
from benchmarks.scoring_peers import peers, peers_14m
from benchmarks.stream_costs import pile, plans, stream
from benchmarks.window_simulation import cost, simulated

BENCHMARKS = {
    "ablation": ablation,
    "monitoring-pythia": pythia,
    "monitoring-quickstart": quickstart,
    "monitoring-memory": memory,
    "scoring-peers": peers,
    "scoring-peers-14m": peers_14m,
    "scoring-heads": heads,
    "scoring-memory": memory_160m,
    "scoring-curves": curves,
    "replay": replay,
    "in-run": in_run_costs.pythia,
    "in-run-quickstart": in_run_costs.quickstart,
    "in-run-trainer": in_run_trainer,
    "in-run-memory": in_run_costs.memory,
    "in-run-agreement": agreement,
    "stream": stream,
    "stream-plans": plans,
    "stream-pile": pile,
    "window-simulated": simulated,
    "window-cost": cost,
}


def main() -> int:
    """Run the named benchmarks, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds (default: 7)")
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {sorted(unknown)[0]!r}; there are: {', '.join(BENCHMARKS)}")
    torch.set_num_threads(1)
    print(
        f"one thread, {options.rounds} rounds in turn after one uncounted; "
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}"
    )
    print("| benchmark | figure | median | least | greatest |\n|---|---|---|---|---|")
    for name in options.names or BENCHMARKS:
        for what, (median, low, high) in BENCHMARKS[name](options.rounds):
            print(f"| {name} | {what} | {median:.3f} | {low:.3f} | {high:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
