"""W&B's long table: how often rows are sent, and which of a table that grows too long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mda_lightning.callbacks import monitor_output
from mda_lightning.callbacks.metric_keys import ScalarKeys
from mda_lightning.callbacks.metric_table import Measurement, MetricTable, Row
from mda_lightning.callbacks.monitor_output import MonitorOutput

LAYERS, HEADS = 3, 4
SIZE = LAYERS * HEADS
CHOSEN = {(0, 1), (2, 3)}  # highest at every step


class Watched:
    """A monitor's output without a run: time is counted by hand, W&B's rows are kept."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, row: float = 0.0) -> None:
        self.now = 1000.0
        self.sent: list[list[Row]] = []
        self.n_drawn = 0
        self.table, self.keys = MetricTable(), ScalarKeys(len(CHOSEN))
        self._folder = folder

        def send(_: Any, trainer: Any, new: Callable[[], list[Row]], *, step: int) -> None:
            self.sent.append(new())
            self.now += row * len(self.sent[-1])

        def draw(*_: Any, **__: Any) -> None:
            self.n_drawn += 1
            self.now += 0.1

        monkeypatch.setattr("mda_lightning.callbacks.allowance.time.monotonic", lambda: self.now)
        monkeypatch.setattr(monitor_output.LiveTable, "send", send)
        monkeypatch.setattr(MonitorOutput, "_draw", draw)
        monkeypatch.setattr(MetricTable, "write", lambda *_, **__: None)
        self.output = MonitorOutput()
        self.output.begin()

    def measure(self, step: int) -> None:
        value = np.full((LAYERS, HEADS), 0.1, np.float32)
        for place in CHOSEN:
            value[place] = 0.5
        for metric, grid in (("heads", value), ("whole", np.float32(7.0))):
            self.table.append(step, metric, grid, grid / 10)
            self.keys.scalars(Measurement(step, metric, np.asarray(grid), np.asarray(grid)))

    def write(self, step: int, *, final: bool = False) -> None:
        self.output.write(
            None,  # type: ignore[arg-type]
            self.table,
            self._folder,
            step=step,
            provenance={},
            chances={},
            keys=self.keys,
            final=final,
        )

    def steps(self) -> dict[int, set[tuple[int, int]]]:
        """Heads that were sent of each step; a repeated row is an error."""
        rows = [row for part in self.sent for row in part]
        assert len(rows) == len({row[:4] for row in rows})
        return {
            step: {row[1:3] for row in rows if row[0] == step and row[3] == "heads"}  # type: ignore[misc]
            for step in self.table.curves("heads")[0].tolist()
        }


def test_pictures_do_not_wait_for_wandbs_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 hours, in which rows of all heads would cost twice what is allowed."""
    monkeypatch.setattr(monitor_output, "MOST_ROWS_AT_ONCE", 200)

    def drawn(row: float) -> tuple[int, float]:
        watched = Watched(tmp_path, monkeypatch, row=row)
        step, began = 0, watched.now
        while watched.now < began + 72_000:
            watched.now += 20.0
            step += 1
            watched.measure(step)
            watched.write(step)
        return watched.n_drawn, watched.output.seconds / (watched.now - began)

    without, _ = drawn(0.0)
    with_rows, share = drawn(0.01)
    assert with_rows >= 0.98 * without > 200
    assert share < 2 * 0.003


def test_all_heads_are_sent_while_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(tmp_path, monkeypatch)
    for step in range(30):
        watched.measure(step)
        if step % 10 == 9:
            watched.write(step, final=True)
    assert [len(part) for part in watched.sent] == [10 * (SIZE + 1)] * 3
    assert {len(heads) for heads in watched.steps().values()} == {SIZE}


def test_of_more_rows_at_once_every_second_or_third_measurement_has_all_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_output, "MOST_ROWS_AT_ONCE", 10 * (SIZE + 1))
    watched = Watched(tmp_path, monkeypatch)
    for step in range(60):
        watched.measure(step)
        if step in (9, 29, 59):  # 10, 20 and 30 measurements
            watched.write(step, final=True)
    full = [step for step, heads in watched.steps().items() if len(heads) == SIZE]
    assert full == [*range(10), *range(10, 30, 2), *range(30, 60, 3)]
    assert all(heads == CHOSEN for s, heads in watched.steps().items() if s not in full)
    whole = [row for part in watched.sent for row in part if row[3] == "whole"]
    assert [row[0] for row in whole] == list(range(60))  # never left out
    for part, n in zip(watched.sent, (10, 20, 30), strict=True):
        assert len(part) <= 10 * (SIZE + 1) + n * (len(CHOSEN) + 1)


@pytest.mark.parametrize("resumed", [False, True])
def test_beyond_the_most_in_all_only_the_highest_heads_are_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    monkeypatch.setattr(monitor_output, "MOST_ROWS", 20 * (SIZE + 1))
    watched = Watched(tmp_path, monkeypatch)
    for step in range(40):
        watched.measure(step)
        if step % 10 == 9:
            watched.write(step, final=True)
        if resumed and step == 19:
            watched.output = MonitorOutput()
            watched.output.take_up(watched.table)
    heads = watched.steps()
    assert [step for step in heads if len(heads[step]) == SIZE] == list(range(20))
    assert all(heads[step] == CHOSEN for step in range(20, 40))
