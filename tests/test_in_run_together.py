"""Several InfluenceScoring callbacks in one run."""

from __future__ import annotations

from in_run_fits import INDUCTION as COPYING
from in_run_fits import StillModule, scoring
from training import fit

from mda_lightning.mechanisms import mechanism
from mda_lightning.store import ScoreTable


def test_two_callbacks_do_not_hear_each_others_probes(tmp_path) -> None:
    """One refreshes, with batches of its own size, while the other already listens."""
    attention = mechanism("induction", n_sequences=4, n_probe_sequences=6)
    settings = {"refresh_every": 2, "n_curvature": 7}
    found = {}
    for name, own in (("both", (COPYING, attention)), ("copy", (COPYING,)), ("att", (attention,))):
        callbacks = [
            scoring(one, folder=str(tmp_path / name / one.probe_function), **settings)
            for one in own
        ]
        fit(StillModule(), callbacks, tmp_path / name)
        for one in own:
            folder = tmp_path / name / one.probe_function / "scores"
            found[name, one.probe_function] = ScoreTable.open(folder).frame("L1H1")
    for name, probe in (("copy", "copy_logprob"), ("att", "attention")):
        alone, together = found[name, probe], found["both", probe]
        assert alone["score"].abs().max() > 0 and alone.equals(together)
