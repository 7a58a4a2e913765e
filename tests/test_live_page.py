"""The page that shows a run while it goes on: what is on it, and when it stops reading itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from training import Clock, CurveMechanism, FakeMeasure, Rows, StrangersModule, fit, jump

from mda_lightning.analysis.charts import MOST_POINTS, Track, decimated, line_chart, ticks
from mda_lightning.analysis.live import Cell, Event, HeadsView, LiveView, live_page
from mda_lightning.callbacks import CriticalWindow, UnitMonitor
from mda_lightning.callbacks.allowance import Allowance


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"tags left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        named = {k.rstrip("_"): v for k, v in wanted.items()}
        return [
            a
            for t, a in self.tags
            if t == tag and all(v in (a.get(k) or "").split() for k, v in named.items())
        ]

    @property
    def refreshes(self) -> bool:
        return bool(self.all("meta", **{"http-equiv": "refresh"}))


def view(**changed: Any) -> LiveView:
    steps = np.arange(0, 50, 10)
    grid = np.array([[0.1, 0.2, np.nan], [0.3, 0.41, 0.0]], np.float32)
    settings: dict[str, Any] = {
        "title": "Module <b>",
        "subtitle": "gpt_neox",
        "state": "training",
        "detail": "",
        "step": 40,
        "n_steps": 100,
        "steps_per_second": 4.0,
        "measured_step": 40,
        "written_at": "2026-01-05 10:00:00 UTC",
        "measuring_share": 0.0123,
        "rate": "every 10 steps",
        "refresh_seconds": 10,
        "heads": [
            HeadsView("induction", 40, grid, grid / 10, [Track("L1H1", steps, steps / 100)], 0.05)
        ],
        "scalars": [],
        "events": [Event(7, "a <script>")],
    }
    return LiveView(**(settings | changed))


def test_the_page_needs_nothing_beside_it_and_escapes_text() -> None:
    html = live_page(view())
    page = Page(html)
    assert not page.all("script") and not page.all("link") and not page.all("img")
    assert not re.search(r"url\(|@import|https?://", html)
    assert "Module <b>" in page.text and "a <script>" in page.text and not page.all("b")
    assert page.refreshes


def test_it_says_where_training_is() -> None:
    text = Page(live_page(view())).text
    assert "40 of 100" in text and "1.2%" in text
    assert "15.0 s" in text  # 60 steps left at 4 a second
    assert "time left" not in Page(live_page(view(n_steps=None))).text
    for state, detail in (("finished", ""), ("stopped", "KeyError: 'x'")):
        page = Page(live_page(view(state=state, detail=detail)))
        assert not page.refreshes
        assert state in page.text and detail in page.text
    empty = Page(live_page(view(heads=[], measured_step=None, steps_per_second=None)))
    assert "Nothing has been measured yet" in empty.text


def test_every_head_is_in_the_grid_with_its_number() -> None:
    cells = Page(live_page(view())).all("td")
    titles = [c["title"] for c in cells if c.get("title")]
    assert titles == [
        "L0H0: 0.1 ± 0.01",
        "L0H1: 0.2 ± 0.02",
        "L0H2: not finite",
        "L1H0: 0.3 ± 0.03",
        "L1H1: 0.41 ± 0.041",
        "L1H2: 0 ± 0",
    ]
    best = [c["title"] for c in cells if c.get("class") == "best"]
    assert best == ["L1H1: 0.41 ± 0.041"]
    colour = {c["title"]: (c["style"] or "")[11:18] for c in cells if c.get("title")}
    # Ends of cividis: the highest is yellow, 0 is dark blue.
    assert colour["L1H1: 0.41 ± 0.041"] == "#fee838" and colour["L1H2: 0 ± 0"] == "#00224e"


def test_a_metric_with_negative_values_has_colours_that_diverge_from_0() -> None:
    grid = np.array([[-2.0, 0.0], [1.0, 2.0]], np.float32)
    one = HeadsView("ablation/logit", 0, grid, grid, [])
    assert one.scale == (-2.0, 2.0)
    colours = [cell.style[11:18] for row in one.rows for cell in row]
    assert colours[0] == "#2d004b" and colours[1] == "#f7f7f6" and colours[3] == "#7f3b08"


def test_the_number_in_a_cell_reads_as_its_value() -> None:
    magnitudes = [m * 10.0**e for e in range(-4, 5) for m in (1.0, 2.025, 9.96)]
    for value in [0.0, *magnitudes, *(-m for m in magnitudes)]:
        for top in (0.05, 30.0):
            text = Cell(0, 0, value, 0.1, -top, top, False).short
            if top >= 0.1:
                assert abs(float(text) - value) <= 0.005 + 1e-9, (value, text)
                assert not text.startswith(("0.", "-0."))
            elif value:  # one digit
                digit = 10.0 ** np.floor(np.log10(abs(value)))
                assert abs(float(text) - value) <= 0.5 * digit + 1e-9, (value, text)
    assert [Cell(0, 0, 0.0, 0.1, 0.0, top, False).short for top in (0.05, 1.0)] == ["0", ".00"]
    assert Cell(0, 0, -0.001, 0.1, -1.0, 1.0, False).short == ".00"
    assert Cell(0, 0, float("nan"), 0.1, 0.0, 1.0, False).short == "–"


@pytest.mark.parametrize("n", [1, 2, 399, 400, 401, 5000])
def test_long_curves_keep_their_shape_in_few_points(n: int) -> None:
    generator = np.random.default_rng(n)
    values = generator.normal(size=n)
    values[n // 3] = 50.0  # a peak of one point
    kept = decimated(values)
    assert len(kept) <= MOST_POINTS and (np.diff(kept) > 0).all()
    assert kept[0] == 0 and kept[-1] == n - 1 and n // 3 in kept
    assert values[kept].min() == values.min()
    if n <= MOST_POINTS:
        assert len(kept) == n


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((0.0, 0.212), (0, 12000), (-0.003, 0.0011), (0.05, 0.0501), (3, 4)):
        found = ticks(low, high, 6)
        assert 2 <= len(found) <= 6
        assert low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
        apart = np.diff(found)
        mantissa = apart[0] / 10.0 ** np.floor(np.log10(apart[0]) + 1e-9)
        np.testing.assert_allclose(apart, apart[0], rtol=1e-6)
        assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6


def test_curves_are_drawn_where_their_values_are() -> None:
    """Positions are linear in step and value: checked against the axis' own ticks."""
    track = Track("L0H0", np.array([0, 50, 100, 150, 200]), np.array([0.0, 0.1, np.nan, 0.4, 0.2]))
    svg = str(line_chart([track], label="x", chance=0.1, spans=[(50, 150)], least_top=0.2))
    path = re.search(r'class="curve k0" d="([^"]+)"', svg)
    assert path is not None
    pieces = re.findall(r"([ML])([\d.]+) ([\d.]+)", path[1])
    assert [p[0] for p in pieces] == ["M", "L", "M", "L"]  # a gap where it is not finite
    at = [(float(a), float(b)) for _, a, b in pieces]
    levels = dict(re.findall(r'y="([\d.]+)" text-anchor="end">([\d.,]+)</text>', svg))
    y_of = {float(text): float(y) - 4 for y, text in levels.items()}
    assert at[0][1] == pytest.approx(y_of[0.0], abs=0.2)
    assert at[2][1] == pytest.approx(y_of[0.4], abs=0.2)
    span = re.search(r'class="span" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg)
    assert span is not None
    assert float(span[1]) == pytest.approx(at[1][0], abs=0.2)
    assert float(span[1]) + float(span[2]) == pytest.approx(at[2][0], abs=0.2)
    chance = re.search(r'class="chance" d="M[\d.]+ ([\d.]+)H', svg)
    assert chance is not None and float(chance[1]) == pytest.approx(at[1][1], abs=0.2)


def test_bands_stay_inside_the_plot_and_mean_what_the_axis_says() -> None:
    """Errors wider than the curve's own range; one unknown, one infinite."""
    values = np.array([0.0, 0.02, 0.01, 0.03, 0.02], np.float32)
    errors = np.array([0.5, 0.25, np.nan, np.inf, 1.0], np.float32)
    track = Track("icl/gain", np.array([0, 50, 100, 150, 200]), values, errors)
    svg = str(line_chart([track], label="icl/gain", width=360, height=190, name_ends=False))
    band = re.search(r'class="band" clip-path="url\(#([\w-]+)\)" d="M([^"]+)Z"', svg)
    assert band is not None
    ys = [float(corner.split()[1]) for corner in band[2].split("L")]
    clip = re.search(
        rf'<clipPath id="{band[1]}"><rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" '
        r'height="([\d.]+)"/></clipPath>',
        svg,
    )
    assert clip is not None
    x, y, width, height = map(float, clip.groups())
    axis = re.search(r'class="axis" d="M([\d.]+) ([\d.]+)H([\d.]+)"', svg)
    assert axis is not None
    assert (x, y + height, x + width) == pytest.approx([float(v) for v in axis.groups()], abs=0.2)
    assert y > 0 and y <= min(ys) and max(ys) <= y + height
    at_axis = rf'x="{x - 5:.1f}" y="([\d.]+)" text-anchor="end">(-?[\d.,]+)</text>'
    levels = re.findall(at_axis, svg)
    slope, zero = np.polyfit([float(t) for _, t in levels], [float(v) - 4 for v, _ in levels], 1)
    edges = [0.5, 0.27, 1.02, -0.98, -0.23, -0.5]
    np.testing.assert_allclose(ys, zero + slope * np.array(edges), atol=0.3)

    other = str(line_chart([track], label="icl/olsson", width=360, height=190, name_ends=False))
    assert band[1] not in other  # ids are of the whole page


def test_a_chart_without_curves_has_axes_and_a_page_without_them_its_grid() -> None:
    svg = str(line_chart([], label="x", chance=0.05, least_top=0.2))
    assert 'class="axis"' in svg and 'class="chance"' in svg and 'class="curve' not in svg
    one = HeadsView("induction", 0, np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32), [])
    page = Page(live_page(view(heads=[one])))
    assert "heads that have been highest" not in page.text
    assert len([cell for cell in page.all("td") if cell.get("title")]) == 2


def test_names_at_the_ends_of_curves_do_not_cover_each_other() -> None:
    steps = np.array([0, 10])
    tracks = [Track(f"L0H{i}", steps, np.array([0.1, 0.5 + 1e-4 * i])) for i in range(8)]
    svg = str(line_chart(tracks, label="x"))
    places = sorted(float(y) for y in re.findall(r'y="([\d.]+)">L0H\d', svg))
    assert len(places) == 8 and min(np.diff(places)) >= 12
    assert places[0] > 0 and places[-1] < 250


# -- beside a run ---------------------------------------------------------------------------------


class Reads(pl.Callback):
    """Looks at the page in the middle of training."""

    def __init__(self, path: Path, at: int) -> None:
        self.path, self.at = path, at
        self.seen = ""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            self.seen = self.path.read_text()


class Stops(pl.Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 6:
            raise self.error


def callbacks(folder: Path) -> list[pl.Callback]:
    clock = Clock()
    return [
        clock,
        UnitMonitor(
            [CurveMechanism(clock, jump(3, ramp=2))],
            measures=[FakeMeasure(clock)],
            every_n_steps=1,
            folder=str(folder),
        ),
        CriticalWindow("curve"),
    ]


def test_the_page_is_there_from_the_start_and_tells_of_the_window_at_the_end(
    tmp_path: Path,
) -> None:
    reads = Reads(tmp_path / "live.html", at=1)
    fit(StrangersModule(), [*callbacks(tmp_path), reads], tmp_path, max_steps=14)
    early, late = Page(reads.seen), Page((tmp_path / "live.html").read_text())
    assert early.refreshes and "of 14" in early.text
    assert not late.refreshes and "finished" in late.text and "14 of 14" in late.text
    assert "window of L1H1 opened" in late.text and "window of L1H1 closed" in late.text
    assert re.search(r"Shaded: the window of L1H1, steps 3 to \d+", " ".join(late.text.split()))
    assert "Dashed: chance, 0.050" in " ".join(late.text.split())
    assert "fake/heads" in late.text and "fake/whole@7" in late.text


@pytest.mark.parametrize(
    ("error", "words"),
    [(KeyError("stop here"), "KeyError: 'stop here'"), (KeyboardInterrupt(), "KeyboardInterrupt")],
)
def test_after_an_exception_it_says_what_stopped_the_run(
    tmp_path: Path, error: BaseException, words: str
) -> None:
    run = [*callbacks(tmp_path), Stops(error)]
    with pytest.raises((KeyError, SystemExit, KeyboardInterrupt)):
        fit(StrangersModule(), run, tmp_path)
    page = Page((tmp_path / "live.html").read_text())
    assert not page.refreshes
    assert f"stopped by {words}" in page.text and "6 of 12" in page.text
    assert (tmp_path / "curve.png").exists() and (tmp_path / "unit_metrics.parquet").exists()


class FailsAtSetup(pl.Callback):
    def setup(self, *_: Any, **__: Any) -> None:
        raise KeyError("at setup")


def test_an_exception_before_training_leaves_no_page_and_spoils_none(tmp_path: Path) -> None:
    run = callbacks(tmp_path / "run")
    with pytest.raises(KeyError, match="at setup"):
        fit(StrangersModule(), [*run, FailsAtSetup()], tmp_path)
    assert not (tmp_path / "run" / "live.html").exists()
    fit(StrangersModule(), run, tmp_path, max_steps=3)
    before = (tmp_path / "run" / "live.html").read_text()
    for order in ([*run, FailsAtSetup()], [FailsAtSetup(), *run]):
        with pytest.raises(KeyError, match="at setup"):
            fit(StrangersModule(), order, tmp_path)
        assert (tmp_path / "run" / "live.html").read_text() == before


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        # 16 rows in batches of 4, 3 accumulated: 2 optimizer steps an epoch.
        ({"max_steps": 7, "max_epochs": 2}, 4),
        ({"max_steps": 3, "max_epochs": 2}, 3),
        ({"max_steps": -1, "max_epochs": 2}, 4),
        ({"max_steps": 5}, 5),
    ],
)
def test_the_planned_steps_are_those_that_are_made(
    tmp_path: Path, limits: dict[str, int], expected: int
) -> None:
    clock = Clock()
    monitor = UnitMonitor([CurveMechanism(clock, jump(3))], measures=(), folder=str(tmp_path))
    reads = Reads(tmp_path / "live.html", at=1)
    trainer = fit(
        StrangersModule(),
        [clock, monitor, reads],
        tmp_path,
        data=Rows(16),
        accumulate_grad_batches=3,
        **limits,
    )
    assert trainer.global_step == expected
    assert f"0 of {expected}" in Page(reads.seen).text


def test_live_can_be_switched_off_and_fast_dev_run_writes_none(tmp_path: Path) -> None:
    monitor = UnitMonitor(["induction"], live=False, folder=str(tmp_path / "off"))
    fit(StrangersModule(), [monitor], tmp_path, max_steps=2)
    assert (tmp_path / "off" / "induction.png").exists()
    assert not (tmp_path / "off" / "live.html").exists()
    fit(StrangersModule(), callbacks(tmp_path / "dev"), tmp_path, fast_dev_run=2)
    assert not (tmp_path / "dev").exists()


def test_what_is_written_now_and_then_keeps_within_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("mda_lightning.callbacks.allowance.time.monotonic", lambda: now[0])
    allowance = Allowance(share=0.01, wait=60.0)
    allowance.begin()
    assert not allowance.is_due()
    spent = 0.0
    while now[0] < 10_000:
        now[0] += 1.0
        if allowance.is_due():
            with allowance.spending():
                now[0] += 2.0
                spent += 2.0
    assert allowance.seconds == spent > 0
    assert spent / (now[0] - 100.0) <= 0.01 + 2.0 / 9_900
