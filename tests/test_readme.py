"""What the README shows is what runs."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import lightning as L
import pandas as pd
import pytest
from torch.utils.data import DataLoader
from training import Rows, StrangersModule

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")


def test_the_three_lines_run_in_a_strangers_script(tmp_path: Path, monkeypatch) -> None:
    """The README's own code block, with a short run in place of a long one."""
    block = re.search(r"## Three lines in your own script\s+```python\n(.*?)```", README, re.S)
    assert block is not None
    code = block.group(1).replace("max_steps=20_000", "max_steps=12")
    assert "max_steps=12" in code
    quiet = partial(
        L.Trainer,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    monkeypatch.setattr(L, "Trainer", quiet)
    names: dict[str, object] = {}
    exec(code, names)
    with pytest.warns(UserWarning, match="no window opened"):
        names["trainer"].fit(StrangersModule(), DataLoader(Rows(64), batch_size=4))
    table = pd.read_parquet(next(tmp_path.rglob("unit_metrics.parquet")))
    assert set(table["metric"]) >= {"induction", "previous_token", "ablation/logit"}
    assert table["step"].max() == 10
    assert next(tmp_path.rglob("window.json")).is_file()


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text("utf-8")
    for command in ("quickstart", "test"):
        assert f"make {command}" in README
        assert re.search(rf"^{command}:", makefile, re.M)


def test_links_lead_somewhere() -> None:
    root = Path(__file__).parents[1]
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (root / link).exists()] == []
