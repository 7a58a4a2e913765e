"""Parts of OnlineSteering one by one, against cases worked out by hand."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from in_run_fits import INDUCTION, UNITS, scoring
from steered_runs import amplify, corpus, earlier_scores, steered, suppress

from mda_lightning.callbacks.steering import Decisions, FromScores, coming_scores
from mda_lightning.callbacks.steering.places import that_fit
from mda_lightning.interventions import Insert, Plan
from mda_lightning.mechanisms import mechanism
from mda_lightning.schedule import BaseOrder, Schedule
from mda_lightning.store import ScoreTable
from mda_lightning.units import Head


def run_of(schedule: Schedule, **more: Any) -> Any:
    rows = range(schedule.order.n_rows)
    return SimpleNamespace(schedule=schedule, end=len(schedule), rows=rows, corpus_hash="", **more)


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.2])
def test_a_push_scales_the_share_of_a_mask_from_scores(tmp_path: Path, strength: float) -> None:
    table = ScoreTable.open(earlier_scores(tmp_path, least=0.1))
    total = sum(table.mean_scores(unit)[1] for unit in table.units)
    policy = FromScores(table, "mask", share=0.4, unit=[str(unit) for unit in UNITS])
    run = run_of(Schedule(BaseOrder(300, 100, 3)))
    policy.begin(run, [])
    top = np.argsort(-total)[: round(0.4 * 300 * strength)]
    for step in range(3):
        found = policy.decide(run, step, strength, [])
        assert found is not None
        expected = np.intersect1d(run.schedule.order.ids(step), top)
        assert found.operation.sample_ids.tolist() == expected.tolist()
        assert found.operation.steps == (step, step + 1)


def test_a_sample_scored_twice_is_recorded_with_its_latest_score() -> None:
    """With the mean of both, and the weights and the IHVP of the later one."""
    policy = amplify(share=0.5, recent_steps=4)
    rows = (
        np.array([7, 9, 7, 5]),
        np.array([4.0, 1.0, 2.0, -1.0]),
        np.array([0, 0, 2, 3]),
        np.array([0, 0, 1, 1]),
    )
    policy.follow([Head(0, 0)], 0)
    policy.recent = SimpleNamespace(rows=lambda _: rows, oldest=0)  # type: ignore[assignment]
    found = policy.decide(run_of(Schedule(BaseOrder(60, 5, 12))), 4, 1.0, [Head(0, 0)])
    assert found is not None and found.operation.sample_ids.tolist() == [7, 9]
    assert found.scores.tolist() == [3.0, 1.0]
    assert found.score_steps.tolist() == [2, 0] and found.ihvp_steps.tolist() == [1, 0]


def test_scores_of_another_mechanism_are_not_heard(tmp_path: Path) -> None:
    """Two are scored in one run; what is inserted is by the one that is steered."""
    rows = corpus(tmp_path)
    alone, both = [], []
    for found, mechanisms in (
        (alone, [INDUCTION]),
        (both, [mechanism("previous_token", n_sequences=4), INDUCTION]),
    ):
        own = tmp_path / str(len(mechanisms))
        first = [scoring(mechanisms, folder=str(own), refresh_every=5)]
        steered(own, rows, amplify(), first=first, in_run=False)
        frame = Decisions.open(own).frame
        found += list(zip(frame["decision"], frame["sample_id"], frame["score"], strict=True))
    assert len(alone) > 4
    np.testing.assert_allclose(np.array(both), np.array(alone), rtol=1e-4)


@pytest.mark.parametrize("lost", [["L0H0"], ["L0H0", "L1H1"]])
def test_a_head_without_a_score_does_not_take_it_from_the_others(
    monkeypatch: pytest.MonkeyPatch, lost: list[str]
) -> None:
    heads = [Head(0, 0), Head(1, 1)]
    gone = [head for head in heads if str(head) in lost]
    ihvps = {(head, "QK"): torch.full((2,), float("nan")) for head in heads}
    if len(gone) == 1:
        ihvps[heads[1], "QK"] = torch.ones(2)
    solved = SimpleNamespace(zero={"f": gone}, broken={"f": []}, ihvps={"f": ihvps})
    monkeypatch.setattr(coming_scores, "probe_scope", lambda _: nullcontext())
    monkeypatch.setattr(coming_scores, "inverse_probes", lambda *_: solved)
    monkeypatch.setattr(coming_scores, "warn_of_unscored", lambda *_, **__: None)
    monkeypatch.setattr(coming_scores, "_tokens", lambda *_: torch.zeros(1))
    coming = suppress()._coming
    run = run_of(Schedule(BaseOrder(60, 5, 12)), model=None, mechanism=None)
    coming._refresh(run, 3, heads)
    assert coming.taken_at == 3
    first, other = (coming._ihvp[head, "QK"] for head in heads)
    if len(gone) == 1:
        assert first.tolist() == [0, 0] and other.tolist() == [1, 1]
    else:
        assert first.isnan().all() and other.isnan().all()  # no score is no score


def test_how_many_fit_is_what_the_schedule_takes() -> None:
    """Against trying: one more is refused."""
    rng = np.random.default_rng(0)
    for seed in range(20):
        order = BaseOrder(40, 5, 12, seed=seed)
        plan = Plan.mask(rng.choice(40, 3, replace=False), (2, 5)) | Plan.insert(
            rng.choice(40, 2, replace=False), steps=(5, 7), placement="replace"
        )
        schedule = Schedule(order, plan)
        ids, copies = rng.permutation(40), int(rng.integers(1, 3))
        fit = that_fit(schedule, 4, (4, 7), ids, copies)

        def extended(n: int, schedule: Schedule = schedule, ids: Any = ids, k: int = copies) -> Any:
            insert = Insert(ids[:n], (4, 7), "dispersed", "replace", k, online=True)
            return schedule.extended([insert], 4)

        assert fit > 0
        extended(fit)
        with pytest.raises(ValueError, match="do not fit"):
            extended(fit + 1)
