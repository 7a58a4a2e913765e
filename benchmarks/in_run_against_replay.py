"""In-run and replay scores of the same samples, over a real window: the quickstart's, seed 0.

One base run is scored as it trains, by ``attention`` and by ``copy_logprob``, with IHVPs refreshed
every 200 steps (the default) and every 25; then its window is replayed at each of its three
checkpoints. Takes as long as the quickstart's base run and more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from mda_lightning.architectures import describe
from mda_lightning.callbacks import CriticalWindow, InfluenceScoring
from mda_lightning.callbacks.window_replay import WindowData, replay_window
from mda_lightning.corpora import TokenRows, embedded_corpus
from mda_lightning.influence.inverse_probes import CurvatureSettings
from mda_lightning.mechanisms import Mechanism, mechanism
from mda_lightning.recipes.studies.building import build_data, build_module, build_monitor
from mda_lightning.recipes.studies.quickstart import QUICKSTART
from mda_lightning.store import ScoreTable

Rows = Iterator[tuple[str, tuple[float, float, float]]]
_TOP = 0.10
_NEAR = 25  # steps either side of a checkpoint
_REFRESHES = (200, 25)


def agreement(rounds: int) -> Rows:
    """Rank correlation and overlap of the top tenth; over heads where there are three figures."""
    del rounds  # one run
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = QUICKSTART.corpus
        rows = embedded_corpus(
            folder / "corpus", row_length=corpus.sequence_length + 1, vocab_size=corpus.vocab_size
        )
        yield from _agreement(rows, folder)


def _agreement(rows: TokenRows, folder: Path) -> Rows:
    ids = rows.token_ids.tolist()
    probes = {
        name: mechanism("induction", probe_function=name, token_ids=ids)
        for name in ("attention", "copy_logprob")
    }
    module, data = build_module(QUICKSTART, rows, 0), build_data(QUICKSTART, rows, 0)
    heads = [str(unit) for unit in describe(module.model).heads]
    quiet = QUICKSTART.monitor.quiet_every_n_steps
    window = CriticalWindow("induction", folder=str(folder), stop_when_closed=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=QUICKSTART.training.max_steps,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[
            build_monitor(QUICKSTART, rows, folder, quiet_every_n_steps=quiet),
            window,
            *(
                InfluenceScoring(
                    one,
                    refresh_every=every,
                    # The same heads by name: two callbacks must differ in more than their rate.
                    units="all" if every == _REFRESHES[0] else heads,
                    folder=str(folder / f"{name}-{every}"),
                )
                for name, one in probes.items()
                for every in _REFRESHES
            ),
        ],
    )
    trainer.fit(module, datamodule=data)
    assert window.window is not None and window.window[1].end is not None
    target, found = str(window.window[0]), window.window[1]
    samples = WindowData.read(rows, data.schedule, start=found.start, end=window.window[1].end)
    for name, one in probes.items():
        tables = {n: ScoreTable.open(folder / f"{name}-{n}" / "scores") for n in _REFRESHES}
        replays = {
            edge: _replayed(module, one, {edge: kept}, samples, folder / "work")
            for edge, kept in window.checkpoints.items()
        }
        mean = sum(replays.values()) / len(replays)
        steps = {edge: step for edge, (step, _) in window.checkpoints.items()}
        per_unit: dict[str, dict[str, tuple[float, float]]] = {}
        for unit in heads:
            own = per_unit.setdefault(unit, {})
            own["replay at start and at end"] = _compare(
                replays["start"][unit], replays["end"][unit]
            )
            for every, table in tables.items():
                frame = table.frame(unit).set_index(["step", "sample_id"])["score"].dropna()
                way = f"in-run, refreshed every {every}"
                own[f"{way}, and mean of three replays"] = _compare(frame, mean[unit])
                at = frame.index.get_level_values("step")
                near = frame[(at >= steps["mid"] - _NEAR) & (at < steps["mid"] + _NEAR)]
                own[f"{way}, within {_NEAR} steps of mid, and replay at mid"] = _compare(
                    near, replays["mid"][unit]
                )
        for pair in per_unit[target]:
            for i, what in enumerate(("rank correlation", "shared of the top tenth")):
                values = sorted(both[pair][i] for both in per_unit.values())
                value = per_unit[target][pair][i]
                yield f"{name}, {pair}: {what}, target {target}", (value, value, value)
                spread = (float(np.median(values)), values[0], values[-1])
                yield f"{name}, {pair}: {what}, all heads", spread


def _replayed(
    module: pl.LightningModule,
    one: Mechanism,
    checkpoints: dict[str, tuple[int, Path]],
    samples: WindowData,
    work: Path,
) -> pd.DataFrame:
    """Scores by (step, sample), a column a unit."""
    units = describe(module.model).heads
    found, _ = replay_window(
        module.model,
        module,
        checkpoints,
        samples,
        mechanism=one,
        units=units,
        n_curvature=128,
        batch_size=None,
        settings=CurvatureSettings(),
        work=work,
    )
    index = pd.MultiIndex.from_arrays([found.step, found.sample_id], names=["step", "sample_id"])
    return pd.DataFrame(found.values.sum(2), index=index, columns=[str(unit) for unit in units])


def _compare(first: pd.Series, second: pd.Series) -> tuple[float, float]:
    both = first.rename("first").to_frame().join(second.rename("second"), how="inner")
    count = max(1, round(_TOP * len(both)))
    tops = [set(both[way].nlargest(count).index) for way in ("first", "second")]
    correlation = float(spearmanr(both["first"], both["second"])[0])
    return correlation, len(tops[0] & tops[1]) / count
