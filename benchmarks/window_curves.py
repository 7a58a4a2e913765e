"""Record whole curves of our own runs: ``python -m benchmarks.window_curves FOLDER [NAME ...]``.

One Parquet file a run, every head of both kinds every 10 steps, from before the first step until
1,500 steps after some head's induction score has passed 0.35. A run that is there is not made
again. About four minutes a run on one thread. ``--keep FILE`` then gathers all of them in one file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mda_lightning.callbacks import UnitMonitor
from mda_lightning.callbacks.attachment import versions
from mda_lightning.callbacks.monitor_output import TABLE_NAME
from mda_lightning.files import atomic_path
from mda_lightning.recipes.studies.building import build_data, build_module
from mda_lightning.recipes.studies.quickstart import QUICKSTART, quickstart_corpus
from mda_lightning.recipes.studies.settings import StudySettings
from mda_lightning.recipes.window_table import chance_values, read_table

_FORMED, _AFTER = 0.35, 1500


def _settings(
    *, corpus: dict[str, Any] | None = None, max_steps: int = 7000, **changed: Any
) -> StudySettings:
    """The quickstart's settings, with values of its model and training by name."""
    of_model = {k: v for k, v in changed.items() if hasattr(QUICKSTART.model, k)}
    of_training = {k: v for k, v in changed.items() if k not in of_model}
    return dataclasses.replace(
        QUICKSTART,
        corpus=dataclasses.replace(QUICKSTART.corpus, **(corpus or {})),
        model=dataclasses.replace(QUICKSTART.model, **of_model),
        training=dataclasses.replace(QUICKSTART.training, max_steps=max_steps, **of_training),
    )


_RECORDS = {
    "corpus": {"records_share": 0.4},
    "batch_size": 16,
    "learning_rate": 8e-3,
    "rotary_fraction": 1.0,
    "max_steps": 4500,
}
RUNS: dict[str, tuple[StudySettings, int]] = {
    "seed-0": (_settings(), 0),
    "records-seed-0": (_settings(**_RECORDS), 0),
    "rate-0.02": (_settings(learning_rate=2e-2), 0),
    "width-96": (_settings(d_model=96, d_mlp=96), 0),
    "layers-4": (_settings(n_layers=4), 0),
    "rate-0.005": (_settings(learning_rate=5e-3), 0),
    "records-seed-1": (_settings(**_RECORDS), 1),
    "seed-1": (_settings(max_steps=8000), 1),
    "heads-8": (_settings(n_heads=8), 0),
    "width-128-decay": (_settings(d_model=128, d_mlp=128, schedule="wsd", max_steps=5000), 1),
    "rotary-0.25": (_settings(rotary_fraction=0.25), 2),
    "layers-2": (_settings(n_layers=2, rotary_fraction=0.25, corpus={"records_share": 0.3}), 1),
    "width-48": (_settings(d_model=48, d_mlp=48), 3),
    "records-rate-0.015": (_settings(**{**_RECORDS, "learning_rate": 1.5e-2}), 2),
}


class _StopAfterFormed(pl.Callback):
    def __init__(self) -> None:
        self._formed_at: int | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        highest = trainer.callback_metrics.get("induction/max")
        if self._formed_at is None and highest is not None and float(highest) > _FORMED:
            self._formed_at = trainer.global_step
        if self._formed_at is not None and trainer.global_step >= self._formed_at + _AFTER:
            trainer.should_stop = True


def record(name: str, folder: Path) -> Path:
    """Train the run of that name and keep its metric table as ``<folder>/<name>.parquet``."""
    settings, seed = RUNS[name]
    rows = quickstart_corpus(folder / "corpora", settings)
    there = folder / f"{name}.run"
    token_ids = [int(i) for i in rows.token_ids]
    monitor = UnitMonitor(
        measures=(), every_n_steps=10, folder=str(there), token_ids=token_ids, live=False
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=settings.training.max_steps,
        logger=False,
        callbacks=[monitor, _StopAfterFormed()],
        enable_checkpointing=False,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(build_module(settings, rows, seed), datamodule=build_data(settings, rows, seed))
    found = folder / f"{name}.parquet"
    shutil.move(there / TABLE_NAME, found)
    shutil.rmtree(there)
    return found


def keep(folder: Path, path: Path) -> Path:
    """Gather every head of both kinds of every run in one Parquet file.

    Columns: run, metric, chance, unit, step, value (to three places).
    """
    parts = []
    for name in RUNS:
        table = read_table(folder / f"{name}.parquet")
        for metric, chance in chance_values(table).items():
            curves = table.curves(metric)
            for unit in range(len(curves.units)):
                part = {
                    "run": name,
                    "metric": metric,
                    "chance": chance,
                    "unit": curves.units[unit],
                    "step": curves.steps.astype(np.int32),
                    "value": curves.values[:, unit].round(3).astype(np.float32),
                }
                parts.append(pd.DataFrame(part))
    note = {
        "schema_version": 1,
        "kind": "recorded_curves",
        "provenance": {
            "runs": {name: {"seed": seed, **one.to_dict()} for name, (one, seed) in RUNS.items()},
            "versions": versions(),
        },
    }
    whole = pa.Table.from_pandas(pd.concat(parts), preserve_index=False)
    whole = whole.replace_schema_metadata({b"mda_lightning": json.dumps(note).encode()})
    with atomic_path(path) as part_path:
        pq.write_table(whole, part_path, compression="zstd", compression_level=19)
    return path


def main() -> int:
    """Record the named runs, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.window_curves", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="gather the curves there")
    options = parser.parse_args()
    if unknown := set(options.names) - set(RUNS):
        parser.error(f"no run {sorted(unknown)[0]!r}; there are: {', '.join(RUNS)}")
    torch.set_num_threads(1)
    for name in options.names or RUNS:
        if not (options.folder / f"{name}.parquet").exists():
            print(record(name, options.folder), flush=True)
    if options.keep is not None:
        print(keep(options.folder, options.keep))
    return 0


if __name__ == "__main__":
    sys.exit(main())
