"""Replay of a window: interrupted, shared among ranks, and with samples that come twice."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import random_neox

from mda_lightning.callbacks import window_replay
from mda_lightning.callbacks.window_replay import WindowData, replay_window
from mda_lightning.influence import ReplayScorer
from mda_lightning.influence.inverse_probes import CurvatureSettings
from mda_lightning.mechanisms import mechanism
from mda_lightning.units import Head

COPYING = mechanism("induction", token_ids=range(1, 40), probe_function="copy_logprob")


class _Tokens:
    tokens = np.random.default_rng(0).integers(1, 40, (30, 13))

    def get(self, ids):
        return self.tokens[ids]


class _Owner(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm = random_neox()


@pytest.fixture
def replay(tmp_path):
    owner, checkpoints = _Owner(), {}
    for edge, seed in (("start", 1), ("end", 2)):
        state = {f"lm.{k}": v for k, v in random_neox(seed=seed).state_dict().items()}
        torch.save({"state_dict": state}, tmp_path / f"{edge}.ckpt")
        checkpoints[edge] = (100 * seed, tmp_path / f"{edge}.ckpt")
    ids = np.array([7, 3, 28, 11, 3, 0, 19, 25, 7, 14, 2])  # 3 and 7 are trained on twice
    data = WindowData(_Tokens(), ids, np.arange(len(ids)) // 2)

    def run(folder: str, **settings):
        return replay_window(
            owner.lm,
            owner,
            checkpoints,
            data,
            mechanism=COPYING,
            units=[Head(0, 1), Head(1, 0)],
            n_curvature=settings.pop("n_curvature", 6),
            batch_size=settings.pop("batch_size", 2),
            settings=settings.pop("settings", CurvatureSettings()),
            work=tmp_path / folder,
            **settings,
        )

    return run


def test_a_sample_that_comes_twice_is_scored_once_and_has_two_rows(replay, monkeypatch) -> None:
    scored, score = [], ReplayScorer.score
    monkeypatch.setattr(
        ReplayScorer, "score", lambda self, t: scored.append(len(t)) or score(self, t)
    )
    rows, facts = replay("work")
    assert sum(scored) == 2 * 9
    assert rows.sample_id.tolist() == [7, 3, 28, 11, 3, 0, 19, 25, 7, 14, 2]
    assert rows.step.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    np.testing.assert_array_equal(rows.values[0], rows.values[8])
    assert np.abs(rows.values[0] - rows.values[1]).max() > 0
    assert [one["step"] for one in facts["checkpoints"]] == [100, 200]


def test_interrupted_it_goes_on_with_the_next_sample(replay, monkeypatch) -> None:
    whole, _ = replay("whole")
    score, calls, seen = ReplayScorer.score, [0], []

    def stopping(self, tokens):
        calls[0] += 1
        if calls[0] % 3 == 0:
            raise KeyboardInterrupt
        seen.append(len(tokens))
        return score(self, tokens)

    monkeypatch.setattr(ReplayScorer, "score", stopping)
    for _ in range(20):
        try:
            rows, _ = replay("work", progress=lambda *_: None)
        except KeyboardInterrupt:
            continue
        break
    assert sum(seen) == 2 * 9 and calls[0] > len(seen)
    np.testing.assert_array_equal(rows.values, whole.values)


def test_the_ranks_share_the_samples(replay) -> None:
    whole, _ = replay("whole")
    parts = [replay("shared", rank=rank, world_size=3, batch_size=4)[0] for rank in range(3)]
    key = np.concatenate([part.step * 100 + part.sample_id for part in parts])
    values = np.concatenate([part.values for part in parts])
    assert len(key) == len(whole.sample_id)
    order = np.argsort(key), np.argsort(whole.step * 100 + whole.sample_id)
    scale = np.abs(whole.values).max()
    np.testing.assert_allclose(values[order[0]], whole.values[order[1]], atol=1e-5 * scale)


def test_progress_counts_every_checkpoint(replay) -> None:
    told = []
    replay("work", progress=lambda where, done, total: told.append((where, done, total)))
    assert told[0] == ("step 100", 2, 18) and told[-1] == ("step 200", 18, 18)


def test_masked_samples_are_no_part_of_the_window() -> None:
    class Stream:
        def batch(self, step):
            ids = np.arange(3) + 10 * step
            return SimpleNamespace(sample_ids=ids, weights=np.array([1.0, 0.0, 0.5]))

    data = WindowData.read(_Tokens(), Stream(), start=1, end=3)
    assert data.sample_id.tolist() == [10, 12, 20, 22]
    assert data.step.tolist() == [1, 1, 2, 2]


def test_as_many_curvature_sequences_as_it_takes(replay, monkeypatch) -> None:
    """Offered in a random order, which is the same for every checkpoint, rank and call."""
    offered = []
    whole = window_replay.inverse_probes

    def told(model, mechanisms, units, batches, settings):
        offered.append(torch.cat(list(batches)))
        return whole(model, mechanisms, units, batches, settings)

    monkeypatch.setattr(window_replay, "inverse_probes", told)
    settings = CurvatureSettings(tolerance=0.5, seed=3)
    with pytest.warns(UserWarning, match="all 9 sequences given and has not converged"):
        replay("work", settings=settings, n_curvature=1024)
        replay("again", settings=settings, n_curvature=1024, rank=1, world_size=2)
    assert len(offered) == 4 and all(torch.equal(one, offered[0]) for one in offered)
    unshuffled = torch.from_numpy(_Tokens.tokens[[7, 3, 28, 11, 0, 19, 25, 14, 2]])
    assert not torch.equal(offered[0], unshuffled)
    assert sorted(offered[0].tolist()) == sorted(unshuffled.tolist())
