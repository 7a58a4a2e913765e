"""Rankings on disk: what is written is read, by interval, by head and by sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mda_lightning.store import ScoreTable
from mda_lightning.store.rankings import INDEX, Rankings, write_rankings

IDS = np.array([7, 3, 9, 3, 5])
STEPS = np.array([0, 0, 1, 2, 2])
VALUES = np.array([[1.0, -1.0], [2.0, 0.5], [np.nan, 3.0], [4.0, 1.5], [-6.0, np.nan]])


@pytest.fixture
def rankings(tmp_path: Path) -> Rankings:
    ScoreTable.write(
        tmp_path / "run" / "scores",
        sample_id=IDS,
        step=STEPS,
        units=["L0H0", "L1H1"],
        blocks=["QK"],
        values=VALUES[:, :, None],
        loss=np.ones(5),
        estimator="replay",
        provenance={},
    )
    return write_rankings(
        tmp_path / "rankings",
        tables={"ekfac": tmp_path / "run" / "scores"},
        sample_id=IDS,
        step=STEPS,
        columns={"loss": np.array([0.1, 0.2, 0.3, 0.6, 0.5])},
        provenance={"seed": 4},
    )


def test_values_are_means_over_the_times_a_sample_was_seen(rankings: Rankings) -> None:
    assert rankings.names == ("ekfac", "loss")
    assert rankings.units("ekfac") == ("L0H0", "L1H1") and rankings.units("loss") == ()
    ids, values = rankings.values("ekfac", "L0H0")
    assert ids.tolist() == [3, 5, 7, 9]
    np.testing.assert_array_equal(values, [3.0, -6.0, 1.0, np.nan])
    ids, values = rankings.values("loss")
    assert ids.tolist() == [3, 5, 7, 9]
    np.testing.assert_allclose(values, [0.4, 0.5, 0.1, 0.3])


def test_an_interval_holds_its_own_samples_and_scores(rankings: Rankings) -> None:
    ids, values = rankings.values("ekfac", "L1H1", steps=(0, 2))
    assert ids.tolist() == [3, 7, 9] and values.tolist() == [0.5, -1.0, 3.0]
    ids, values = rankings.values("loss", steps=(2, 3))
    assert ids.tolist() == [3, 5] and values.tolist() == [0.6, 0.5]
    assert len(rankings.values("loss", steps=(5, 9))[0]) == 0


def test_the_folder_may_be_moved_with_its_tables(rankings: Rankings, tmp_path: Path) -> None:
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved)
    again = Rankings.open(moved / "rankings")
    assert again.values("ekfac", "L0H0")[0].tolist() == [3, 5, 7, 9]
    assert again.provenance == {"seed": 4}


def test_what_is_not_there_is_named(rankings: Rankings, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="it has ekfac, loss"):
        rankings.values("kfac", "L0H0")
    with pytest.raises(KeyError, match="no head None; it has L0H0, L1H1"):
        rankings.values("ekfac")
    with pytest.raises(KeyError, match="ranks samples by themselves"):
        rankings.table("loss")
    with pytest.raises(FileNotFoundError, match="no rankings at"):
        Rankings.open(tmp_path / "nowhere")
    path = rankings.folder / INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(ValueError, match="schema_version 99; this version reads 1"):
        Rankings.open(rankings.folder)
