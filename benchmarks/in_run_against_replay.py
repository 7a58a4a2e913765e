"""In-run and replay scores of the same samples, over a real window: the quickstart's, seed 0.

One base run is scored in four ways at once: in the run and afterwards at three checkpoints, by
``attention`` and by ``copy_logprob``. Takes as long as the quickstart's base run and more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from scipy.stats import spearmanr

from mda_lightning.callbacks import CriticalWindow, InfluenceScoring
from mda_lightning.corpora import TokenRows, embedded_corpus
from mda_lightning.files import read_json
from mda_lightning.mechanisms import mechanism
from mda_lightning.recipes.counterfactual_runs import build_data, build_module, build_monitor
from mda_lightning.recipes.quickstart import QUICKSTART
from mda_lightning.store import ScoreTable

Rows = Iterator[tuple[str, tuple[float, float, float]]]
_TOP = 0.10


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
    probes = ("attention", "copy_logprob")
    ways = ("in_run", "replay")
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
            build_monitor(
                QUICKSTART,
                rows,
                folder,
                quiet_every_n_steps=QUICKSTART.monitor.quiet_every_n_steps,
            ),
            CriticalWindow("induction", folder=str(folder), stop_when_closed=True),
            *(
                InfluenceScoring(
                    mechanism("induction", probe_function=probe, token_ids=rows.token_ids.tolist()),
                    estimator=way,
                    folder=str(folder / f"{way}-{probe}"),
                )
                for way in ways
                for probe in probes
            ),
        ],
    )
    trainer.fit(build_module(QUICKSTART, rows, 0), datamodule=build_data(QUICKSTART, rows, 0))
    target: str = read_json(folder / "window.json")["target"]
    for probe in probes:
        tables = [ScoreTable.open(folder / f"{way}-{probe}" / "scores") for way in ways]
        found = {unit: _compare(*tables, unit) for unit in tables[0].units}
        for i, what in enumerate(("Spearman's rank correlation", "shared of the top tenth")):
            values = sorted(both[i] for both in found.values())
            own = found[target][i]
            yield f"{probe}, {what}, target {target}", (own, own, own)
            yield f"{probe}, {what}, all heads", (float(np.median(values)), values[0], values[-1])


def _compare(in_run: ScoreTable, replay: ScoreTable, unit: str) -> tuple[float, float]:
    own = in_run.frame(unit).set_index(["step", "sample_id"])["score"]
    other = replay.frame(unit).set_index(["step", "sample_id"])["score"]
    both = own.to_frame("in_run").join(other.to_frame("replay"), how="inner").dropna()
    count = round(_TOP * len(both))
    tops = [set(both[way].nlargest(count).index) for way in ("in_run", "replay")]
    correlation = float(spearmanr(both["in_run"], both["replay"])[0])
    return correlation, len(tops[0] & tops[1]) / count
