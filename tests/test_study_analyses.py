"""The analyses of a whole study: made-up seeds whose heads, rankings and subsets are related."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from synthetic_study import write_study

from mda_lightning.analysis.overlap import set_overlap
from mda_lightning.analysis.page import page_environment
from mda_lightning.analysis.study import HeadCurves, SeedRun, Study, load_study
from mda_lightning.analysis.study_analyses import StudyAnalyses, study_analyses
from mda_lightning.analysis.study_rankings import read_subsets
from mda_lightning.store import ScoreTable
from mda_lightning.store.rankings import Rankings, write_rankings

UNITS = tuple(f"L{layer}H{head}" for layer in range(2) for head in range(4))
LEADING = ("L1H1", "L1H2", "L1H3")
N = 1200


def rank(folder: Path, seed: int, start: int) -> tuple[Rankings, np.ndarray]:
    """EK-FAC scores in which the leading heads share a taste, and worse ways to rank."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_t(4, N)
    scores = np.stack(
        [rng.standard_t(4, N) + 2.0 * truth * (unit in LEADING) for unit in UNITS], axis=1
    )
    scores[5] = np.nan  # a sample without scores
    ids = np.arange(7, 7 + N)
    step = start + np.arange(N) // 2
    worse = scores + rng.normal(0, 3.0, scores.shape)
    tables = {"influence": scores, "ekfac": scores, "dot": worse}
    paths = {"influence": folder / "ekfac", "ekfac": folder / "ekfac", "dot": folder / "dot"}
    for name, values in tables.items():
        if not paths[name].exists():
            ScoreTable.write(
                paths[name],
                sample_id=ids,
                step=step.astype(np.int32),
                units=list(UNITS),
                blocks=["QK"],
                values=values[:, :, None].astype(np.float32),
                loss=np.ones(N, np.float32),
                estimator="replay",
                provenance={},
            )
    counts = np.clip(np.round(truth + rng.normal(0, 1.0, N)), 0, None)
    rankings = write_rankings(
        folder / "all",
        tables=paths,
        sample_id=ids,
        step=step,
        columns={"repeated_ngrams": counts, "random": rng.random(N)},
        provenance={},
    )
    return rankings, truth


def write_subsets(path: Path, seed: int, truth: np.ndarray, *, count: int = 24) -> None:
    rng = np.random.default_rng([1, seed])
    kept = np.zeros((count, N), dtype=bool)
    for row in kept:
        row[rng.choice(N, N // 2, replace=False)] = True
    signal = kept @ truth
    about = {"schema_version": 1, "kind": "subsets", "seed": seed, "unit": "L1H2"}
    np.savez_compressed(
        path,
        sample_ids=np.arange(7, 7 + N),
        kept=kept,
        mu=0.2 + 0.001 * (signal + rng.normal(0, 0.3 * signal.std(), count)),
        mu_before=0.1,
        about=json.dumps(about),
    )


def full_seed(seed: SeedRun, folder: Path) -> SeedRun:
    start, end = seed.window.start, seed.window.end
    assert start is not None and end is not None
    rankings, truth = rank(folder, seed.seed, start)
    write_subsets(folder / "subsets.npz", seed.seed, truth)
    rise = [0.4, 0.38, 0.3]
    last = [rise[LEADING.index(unit)] if unit in LEADING else 0.06 for unit in UNITS]
    base = HeadCurves(
        UNITS,
        np.array([0, end, end + 50]),
        np.array([[0.05] * 8, last, [0.05] * 8]),
        np.full((3, 8), 0.01),
    )
    return dataclasses.replace(
        seed,
        base=base,
        rankings=rankings.folder,
        subsets=folder / "subsets.npz",
        target="L1H2",
        score_unit="L1H2",
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("study")
    found = load_study(write_study(root / "study", n_seeds=3, n_rows=60))
    seeds = tuple(full_seed(seed, root / f"made-{seed.seed}") for seed in found.seeds)
    return dataclasses.replace(found, seeds=seeds)


@pytest.fixture(scope="module")
def analyses(study: Study) -> StudyAnalyses:
    return study_analyses(study)


def test_leading_heads_are_a_block(study: Study, analyses: StudyAnalyses) -> None:
    assert len(analyses.heads) == 3
    for one, seed in zip(analyses.heads, study.seeds, strict=True):
        assert one.leading == LEADING and one.matrix.names[:3] == LEADING
        assert one.mu[:3] == pytest.approx((0.4, 0.38, 0.3))  # at the window's end, not later
        assert one.matrix.n_excluded == 1 and one.matrix.pool == N - 1
        assert seed.rankings is not None
        table = Rankings.open(seed.rankings).table("ekfac")
        pair = one.matrix.of("L1H1", "L0H2")
        with pytest.warns(UserWarning, match="1 of 1200"):
            tops = [table.top(unit, fraction=0.1) for unit in ("L1H1", "L0H2")]
        assert pair == set_overlap(*tops, pool=N - 1)
        blocks = one.jaccard_blocks
        assert blocks is not None and blocks.p_value == pytest.approx(1 / math.comb(8, 3))
        mean = np.mean([one.matrix.of(a, b).jaccard for a in LEADING for b in LEADING if a < b])
        assert blocks.within == pytest.approx(mean)
        others = [unit for unit in UNITS if unit != "L1H2"]
        shared = [one.matrix.of("L1H2", unit).jaccard for unit in others]
        mu = dict(zip(one.matrix.names, one.mu, strict=True))
        reference = stats.spearmanr([mu[unit] for unit in others], shared).statistic
        assert one.kinship == pytest.approx(reference) and one.kinship > 0.5
    sentence = analyses.sections[0].sentences[0]
    assert "a block of their own" in sentence and "3 seeds" in sentence
    assert analyses.sections[0].sentences[-1].startswith("The higher a head's μ, the more")


def test_rankings_are_compared_once_each(study: Study, analyses: StudyAnalyses) -> None:
    one = analyses.selections[0]
    assert one.matrix.names == ("influence", "dot", "repeated_ngrams", "random")
    assert dict(one.aliases) == {"ekfac": "influence"}
    assert study.seeds[0].rankings is not None
    rankings = Rankings.open(study.seeds[0].rankings)
    first, second = rankings.values("dot", "L1H2")[1], rankings.values("random")[1]
    kept = np.isfinite(first)
    expected = stats.spearmanr(first[kept], second[kept]).statistic
    assert one.matrix.spearman[1, 3] == pytest.approx(expected)
    assert one.matrix.jaccard[0, 1] > one.matrix.jaccard[0, 3]


def test_time_is_that_of_the_targets_scores(study: Study, analyses: StudyAnalyses) -> None:
    """The base run's own table has the target's scores; it is preferred to the rankings'."""
    assert study.seeds[0].scores is not None and study.seeds[1].scores is not None
    own = [ScoreTable.open(seed.scores) for seed in study.seeds[:2] if seed.scores is not None]
    assert ["L1H2" in table.units for table in own] == [False, True]
    assert [one.estimator for one in analyses.times[:2]] == ["replay", own[1].estimator]
    assert own[1].estimator == "in_run"
    without = dataclasses.replace(
        study, seeds=tuple(dataclasses.replace(s, scores=None) for s in study.seeds)
    )
    replayed = study_analyses(without)
    time = replayed.times[0]
    assert time.estimator == "replay" and time.unit == "L1H2"
    assert sum(b.n for b in time.bins) == N - 1
    assert (time.bins[0].start, time.width) == (study.seeds[0].window.start, 100)
    assert [test.width for test in time.uniformities] == [25, 50, 100, 200]
    section = next(s for s in replayed.sections if "evenly" in s.title)
    assert "fixed weights" in section.sentences[0]


def test_tails_are_those_of_the_same_scores(study: Study, analyses: StudyAnalyses) -> None:
    one = analyses.tails[0]
    assert study.seeds[0].rankings is not None
    scores = Rankings.open(study.seeds[0].rankings).values("ekfac", "L1H2")[1]
    scores = scores[np.isfinite(scores)]
    assert one.n == scores.size == N - 1
    positive = np.sort(np.clip(scores, 0, None))[::-1]
    assert one.share == pytest.approx(positive[:120].sum() / positive.sum())
    assert one.fit is not None and len(one.bin_exponents) == len(analyses.times[0].bins)
    assert {ratio.law for ratio in one.alternatives} == {"exponential", "log-normal"}
    section = next(s for s in analyses.sections if "concentrated" in s.title)
    assert section.sentences[0].startswith("The top 10% of the samples hold")


def test_scores_predict_subsets(study: Study, analyses: StudyAnalyses) -> None:
    table = analyses.datamodeling
    assert table is not None
    by_name = {one.ranking: one for one in table.rankings}
    assert set(by_name) == {"ekfac", "dot", "repeated_ngrams", "random"}
    assert by_name["ekfac"].mean > by_name["dot"].mean > 0.2
    assert by_name["ekfac"].p_value < 0.01
    assert {one.other for one in table.differences} == {"dot", "repeated_ngrams", "random"}
    assert all(one.ranking == "ekfac" for one in table.differences)
    seed = study.seeds[1]
    assert seed.rankings is not None and seed.subsets is not None
    subsets = read_subsets(seed.subsets)
    _, values = Rankings.open(seed.rankings).values("dot", "L1H2")
    values = np.where(np.isfinite(values), values, np.nanmean(values))
    expected = stats.spearmanr(subsets.kept @ values, subsets.outcomes).statistic
    assert by_name["dot"].per_seed[1].value == pytest.approx(expected)
    assert by_name["dot"].per_seed[1].n_missing == 1


def test_everything_can_be_stored_and_shown(analyses: StudyAnalyses) -> None:
    stored = json.loads(json.dumps(analyses.to_dict(), allow_nan=False))
    assert stored["kind"] == "study_analyses" and stored["provenance"]["title"]
    assert stored["head_overlap"][0]["matrix"]["jaccard"][0][0] == 1.0
    assert "scores" not in stored["time"][0] and stored["time"][0]["bins"]
    assert stored["datamodeling"]["rankings"][0]["per_seed"][0]["n_subsets"] == 24
    names = [figure.name for figure in analyses.figures]
    assert len(names) == len(set(names)) == 3 + 1 + 3 + 1
    page = page_environment().get_template("analyses.html.j2").render(analyses=analyses)
    for section in analyses.sections:
        assert section.title in page
        assert all(len(row) == len(t.columns) for t in section.tables for row in t.rows)
    assert page.count("<img") == len(names)
    assert "nan" not in page.lower().replace("finance", "").split("base64")[0]


def test_a_study_of_one_scored_head_has_its_time_alone(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path / "study", n_seeds=2, without_window=[1], n_rows=60))
    analyses = study_analyses(study)
    assert (len(analyses.heads), len(analyses.selections), len(analyses.times)) == (0, 0, 1)
    assert analyses.datamodeling is None
    assert "several heads" in analyses.notes[-1]
    assert [section.title for section in analyses.sections] == [
        "How concentrated is influence?",
        "Does influence come evenly over training?",
    ]
    assert page_environment().get_template("analyses.html.j2").render(analyses=analyses)


def test_a_study_without_scores_says_so(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path / "study", n_seeds=1, without_window=[0], n_rows=60))
    analyses = study_analyses(study)
    assert analyses.figures == [] and "nothing to analyse" in analyses.notes[-1]
    page = page_environment().get_template("analyses.html.j2").render(analyses=analyses)
    assert "nothing to analyse" in page


def test_damaged_parts_are_notes(study: Study, tmp_path: Path) -> None:
    (tmp_path / "rankings").mkdir()
    (tmp_path / "rankings" / "rankings.json").write_text('{"schema_version": 9}')
    (tmp_path / "bad.npz").write_bytes(b"not an archive")
    first, second, third = study.seeds
    damaged = dataclasses.replace(
        study,
        seeds=(
            dataclasses.replace(first, rankings=tmp_path / "rankings"),
            dataclasses.replace(second, subsets=tmp_path / "bad.npz"),
            dataclasses.replace(third, base=None),
        ),
    )
    analyses = study_analyses(damaged)
    text = " ".join(analyses.notes)
    assert "Seed 0: its rankings could not be read" in text
    assert "Seed 0: its subsets have no rankings" in text
    assert "Seed 1: bad.npz cannot be read" in text
    assert "Seed 2: no head has formed" in text
    assert [one.seed for one in analyses.heads] == [1, 2]
    assert analyses.datamodeling is not None
    assert len(analyses.datamodeling.rankings[0].per_seed) == 1
    assert analyses.sections


def test_subsets_of_another_schema_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", about=json.dumps({"schema_version": 5}))
    with pytest.raises(ValueError, match="schema_version 5"):
        read_subsets(tmp_path / "s.npz")
    with pytest.raises(FileNotFoundError, match="subsets"):
        read_subsets(tmp_path / "absent.npz")
