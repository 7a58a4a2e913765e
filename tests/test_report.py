"""The report from whole, unfinished and damaged studies; the study folder is synthetic."""

from __future__ import annotations

import json
import re
import shutil
import struct
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rcParams
from synthetic_study import ARMS, SHIFTS, UNSAFE, write_corpus, write_scores, write_study

from mda_lightning.analysis.comparison import compare_study
from mda_lightning.analysis.influences import seed_influence
from mda_lightning.analysis.report import build_report, flattened
from mda_lightning.analysis.study import StudyError, load_study
from mda_lightning.store import ScoreTable, ScoreWriter


class Page(HTMLParser):
    """Tags with their attributes, and the text outside ``style``."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def read(path: Path) -> Page:
    page = Page(path.read_text("utf-8"))
    assert page.open == []
    return page


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    folder = write_study(tmp_path_factory.mktemp("study") / "two", n_seeds=2)
    return folder, read(build_report(folder))


@pytest.fixture(scope="module")
def one_seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_study(tmp_path_factory.mktemp("study") / "one", n_seeds=1, n_rows=120)
    build_report(folder)
    return folder


def test_report_is_self_contained_and_accessible(two_seeds: tuple[Path, Page]) -> None:
    folder, page = two_seeds
    html = (folder / "report.html").read_text("utf-8")
    assert not re.search(r"(src|href|srcset)=\"(?!data:)", html)
    assert "url(" not in html and "@import" not in html and "<script" not in html
    assert not page.all("script") and not page.all("link")
    identifiers = [a["id"] for _, a in page.tags if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    images = page.all("img")
    assert len(images) == len(list((folder / "figures").glob("*-dark.png"))) >= 2 + 2 + 2 + 1
    for image in images:
        assert image["alt"]
        assert image["aria-describedby"] in identifiers
    assert len(page.all("source")) == len(images)
    assert str(folder) not in html


def test_text_of_samples_is_escaped(two_seeds: tuple[Path, Page]) -> None:
    """The best sample holds markup, a direction override and a NUL: all show, none acts."""
    _, page = two_seeds
    assert not page.all("script")
    assert UNSAFE.split("\u202e")[0] in page.text
    assert "<U+202E>" in page.text and "<U+0000>" in page.text
    assert "\u202e" not in page.text and "\x00" not in page.text
    assert len(page.all("article")) == 10 + 3
    assert page.all("mark")


def test_figures_are_written_light_and_dark(two_seeds: tuple[Path, Page]) -> None:
    folder, _ = two_seeds
    names = sorted(path.name for path in (folder / "figures").iterdir())
    light = [name for name in names if not name.endswith("-dark.png")]
    per_seed = {f"{name}-seed-{seed}.png" for name in ("heads", "scores") for seed in (0, 1)}
    assert {"comparison.png", "other-heads.png", "domains.png", *per_seed} <= set(light)
    assert len(names) == 2 * len(light)
    # Figures of the arms are wider: two panels side by side.
    assert {png_size(folder / "figures" / name)[0] for name in names} == {1120, 1680}


def test_report_says_what_the_arms_did(two_seeds: tuple[Path, Page]) -> None:
    folder, page = two_seeds
    study = load_study(folder)
    compared = compare_study(study)
    assert [(c.arm, c.other, c.against) for c in compared.arms] == [
        ("mask-top", "mask-random", "matched"),
        ("insert-top", "insert-random", "matched"),
    ]
    controls = [c for c in compared.against_baseline if c.arm.endswith("random")]
    assert len(controls) == 2
    for one in (*compared.arms, *controls):
        assert one.final.effect is not None and one.final.effect.n == 2
        assert one.final.effect.verdict in page.text
    for seed in study.seeds:
        for arm in ARMS:
            value = seed.arms[arm].value
            assert value == pytest.approx(0.42 + SHIFTS[arm], abs=0.05)
            assert f"{value:.3f}" in page.text
    assert "Only 2 seeds" in page.text


def test_arm_value_is_the_mean_over_the_measured_steps(two_seeds: tuple[Path, Page]) -> None:
    folder, _ = two_seeds
    seed = load_study(folder).seeds[0]
    curves = seed.arms["mask-top"].curves
    assert curves is not None and seed.target is not None
    steps, values = curves.of(seed.target)
    chosen = [
        v for s, v in zip(steps.tolist(), values.tolist(), strict=True) if s in seed.measured_at
    ]
    assert len(chosen) == len(seed.measured_at) == 3
    assert seed.arms["mask-top"].value == pytest.approx(np.mean(chosen))
    with pytest.raises(StudyError, match=r"head L9H9 was not evaluated"):
        curves.of("L9H9")


def test_the_same_study_gives_the_same_bytes_and_no_global_state(one_seed: Path) -> None:
    before = dict(rcParams)
    first = (one_seed / "report.html").read_bytes()
    assert build_report(one_seed).read_bytes() == first
    assert dict(rcParams) == before
    assert not list(one_seed.glob(".*"))


def test_one_seed_says_that_it_gives_no_interval(one_seed: Path) -> None:
    page = read(one_seed / "report.html")
    assert "One seed gives no interval" in page.text
    assert "From step 1900 on" in page.text
    assert "proves nothing" in page.text


def test_no_window_at_all_still_gives_a_report(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", n_seeds=1, without_window={0}, n_rows=120)
    page = read(build_report(folder))
    assert "Seed 0: no critical window was found." in page.text
    assert "train longer" in page.text
    assert "no data changed" in page.text
    assert sorted(p.name for p in (folder / "figures").iterdir()) == [
        "heads-seed-0-dark.png",
        "heads-seed-0.png",
    ]


def test_five_seeds_with_one_lost_and_arms_missing(tmp_path: Path) -> None:
    folder = write_study(
        tmp_path / "study",
        n_seeds=5,
        without_window={1},
        missing={2: {"insert-top", "insert-random"}},
        n_rows=120,
    )
    shutil.rmtree(folder / "seed-4" / "scores")
    (folder / "seed-3" / "arms" / "mask-top" / "unit_metrics.parquet").write_bytes(b"PAR1 no")
    page = read(build_report(folder))
    assert "Seed 1: no critical window was found." in page.text
    assert "Seed 2: arm insert-top left no metrics" in page.text
    assert "Seed 3: arm mask-top could not be read" in page.text
    assert "Seed 4: the score table is absent" in page.text
    assert str(folder) not in page.text
    assert [len(one.final.seeds) for one in compare_study(folder).arms] == [3, 3]
    assert "count in no comparison" in page.text
    assert (folder / "figures" / "comparison.png").is_file()
    assert "1 sample without a finite score left out" in page.text


def test_a_study_that_barely_began(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", n_seeds=0, n_rows=60)
    assert "No seed is recorded" in read(build_report(folder)).text


def test_an_arm_that_stopped_early_has_a_curve_and_no_value(tmp_path: Path) -> None:
    folder = write_study(
        tmp_path / "study", n_seeds=1, n_rows=60, missing={0: {"insert-top", "insert-random"}}
    )
    shutil.rmtree(folder / "seed-0" / "scores")
    raw = json.loads((folder / "study.json").read_text())
    raw["seeds"][0]["measured_at"] = 99_999
    (folder / "study.json").write_text(json.dumps(raw))
    page = read(build_report(folder))
    assert "not measured where the arms are compared" in page.text
    assert "nothing can be said yet" in page.text
    assert not load_study(folder).seeds[0].arms["mask-top"].value
    assert (folder / "figures" / "comparison.png").is_file()


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"holds no study\.json"):
        build_report(tmp_path)
    (tmp_path / "study.json").write_text('{"schema_version": 1}')
    with pytest.raises(StudyError, match=r"schema_version 1; this version reads 2: run the study"):
        build_report(tmp_path)
    (tmp_path / "study.json").write_text('{"schema_version": 2, "kind": "other"}')
    with pytest.raises(StudyError, match="'other'"):
        build_report(tmp_path)


def test_scores_that_are_still_written_are_not_reported(tmp_path: Path) -> None:
    rows = write_corpus(tmp_path / "corpus", n_rows=60)
    table = write_scores(tmp_path / "scores", rows, seed=0, unit="L1H1", start=100)
    again = ScoreWriter(
        table.folder, units=table.units, blocks=table.blocks, estimator=table.estimator
    )
    again.discard_from(105)
    with pytest.raises(ValueError, match="not complete"):
        seed_influence(table.folder, seed=0, unit="L1H1", fraction=0.1)


def test_samples_trained_on_twice_count_once_and_nan_never(tmp_path: Path) -> None:
    rows = write_corpus(tmp_path / "corpus", n_rows=60)
    table = write_scores(tmp_path / "scores", rows, seed=0, unit="L1H1", start=100)
    once = seed_influence(table.folder, seed=0, unit="L1H1", fraction=0.1)
    assert (len(once.scores), once.n_excluded, len(once.top)) == (59, 1, 6)
    frame = table.frame("L1H1")
    twice = ScoreTable.write(
        tmp_path / "twice",
        sample_id=np.tile(frame["sample_id"], 2),
        step=np.concatenate([frame["step"], frame["step"] + 1000]),
        units=["L1H1"],
        blocks=["QK"],
        values=np.concatenate([frame["score"] - 1, frame["score"] + 1])[:, None, None],
        loss=np.tile(frame["loss"], 2),
        estimator="in_run",
        provenance={},
    )
    again = seed_influence(twice.folder, seed=0, unit="L1H1", fraction=0.1)
    assert np.array_equal(again.top, once.top)
    assert again.share == pytest.approx(once.share, rel=1e-5)
    assert again.of(0) == (pytest.approx(once.of(0)[0], rel=1e-5), 100)
    with pytest.raises(ValueError, match="no unit L0H0"):
        seed_influence(table.folder, seed=0, unit="L0H0", fraction=0.1)


def test_flattened_settings() -> None:
    nested = {"a": {"b": 1, "c": [1, 2]}, "d": [{"e": None}]}
    assert list(flattened(nested)) == [("a.b", "1"), ("a.c", "1, 2"), ("d.0.e", "none")]
