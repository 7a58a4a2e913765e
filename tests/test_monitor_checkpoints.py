"""``mda-lightning monitor`` on checkpoints that differ: without a step, of another context."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from models import random_neox
from PIL import Image
from rich.console import Console
from transformers import OPTConfig

from mda_lightning.architectures import UnsupportedModelError
from mda_lightning.checkpoints import find_checkpoints
from mda_lightning.checkpoints.folder import read_config
from mda_lightning.influence import weights_hash
from mda_lightning.measures import measure
from mda_lightning.recipes.monitor import RepeatedWeightsError, monitor_checkpoints
from mda_lightning.recipes.monitor_display import summary


def monitored(out: Path, *folders: Path, strict: bool = False) -> tuple[pd.DataFrame, str]:
    """The table, and what was said."""
    said: list[str] = []
    table = monitor_checkpoints(
        list(map(str, folders)),
        metrics=["induction"],
        n_sequences=4,
        output=out,
        warn=said.append,
        strict=strict,
    )
    return table, "\n".join(said)


@pytest.mark.parametrize("order", [("step100", "main"), ("main", "step100")])
def test_equal_weights_accuse_nobody_where_a_step_is_not_known(
    tmp_path: Path, order: tuple[str, str]
) -> None:
    """``main`` may well be the step whose weights it has: places in the list are no steps."""
    for name in order:
        random_neox(seed=1).save_pretrained(tmp_path / name)
    folders = [tmp_path / name for name in order]
    table, said = monitored(tmp_path / "out", *folders, strict=True)
    assert f"the step of {tmp_path / 'main'} is not known" in said
    assert "repeated weights" not in said and "(step 0)" not in said and "(step 1)" not in said
    assert table.groupby("checkpoint")["repeats"].first().to_dict() == {
        str(folders[0]): str(folders[1]),
        str(folders[1]): str(folders[0]),
    }


def test_real_steps_are_compared_though_rows_are_numbered_by_place(tmp_path: Path) -> None:
    random_neox(seed=2).save_pretrained(tmp_path / "main")
    for name in ("step100", "step200", "again/step100"):
        random_neox(seed=1).save_pretrained(tmp_path / name)
    main, *others = (tmp_path / name for name in ("main", "step100", "step200", "again/step100"))
    _, said = monitored(tmp_path / "a", main, others[0], others[1])
    assert f"{others[1]} (step 200) has the very weights of {others[0]} (step 100)" in said
    with pytest.raises(RepeatedWeightsError, match=r"\(step 200\).*\(step 100\)"):
        monitored(tmp_path / "b", main, others[0], others[1], strict=True)
    table, said = monitored(tmp_path / "c", main, others[0], others[2], strict=True)
    assert "again; it is measured once" in said
    assert table["checkpoint"].nunique() == 2 and table["repeats"].isna().all()


def test_a_step_that_accuses_is_found_behind_one_without_a_step(tmp_path: Path) -> None:
    for name in ("main", "step100", "step200"):
        random_neox(seed=1).save_pretrained(tmp_path / name)
    folders = [tmp_path / name for name in ("main", "step100", "step200")]
    with pytest.raises(RepeatedWeightsError, match=r"step200 \(step 200\).*step100 \(step 100\)"):
        monitored(tmp_path / "out", *folders, strict=True)


def test_contexts_that_differ_give_each_its_own_keys_and_figures(tmp_path: Path) -> None:
    for step, context in ((1, 64), (2, 64), (3, 32)):
        model = random_neox(seed=step)
        model.config.max_position_embeddings = context
        model.save_pretrained(tmp_path / "run" / f"step{step}")
    icl = measure("icl", text=torch.randint(1, 40, (4000,)), n_rows=8)
    out = tmp_path / "out"
    table = monitor_checkpoints([str(tmp_path / "run")], metrics=[icl], output=out)
    found = {key: sorted(own["step"]) for key, own in table.groupby("metric")}
    assert found == {
        "icl/gain@63": [1, 2],
        "icl/olsson@63": [1, 2],
        "icl/gain@31": [3],
        "icl/olsson@31": [3],
    }
    assert {path.name for path in out.glob("heatmap-*.png")} == {
        f"heatmap-{key.replace('/', '-')}.png" for key in found
    }
    for path in out.glob("heatmap-*.png"):
        assert len(np.unique(np.asarray(Image.open(path)))) > 12
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary(out))
    rows = {line.split()[0]: line.split() for line in console.export_text().splitlines()}
    assert rows["icl/gain@63"][-1] == "–"
    last = table[table["metric"] == "icl/gain@31"].iloc[0]
    assert rows["icl/gain@31"][-3:] == [f"{last['value']:.3f}", "±", f"{last['se']:.3f}"]


@pytest.mark.parametrize("prefix", ["", "net.lm."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_auto_is_that_of_the_models_weights(
    tmp_path: Path, prefix: str, dtype: torch.dtype
) -> None:
    """A counter or an average's decay may stand first in the file, and is no weight."""
    model = random_neox(seed=1).to(dtype)
    model.config.save_pretrained(tmp_path / "config")
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    others = {"seen": torch.tensor(5), "decay": torch.tensor(0.9, dtype=torch.float64)}
    torch.save(others | state, tmp_path / "x-step5.ckpt")
    (found,) = find_checkpoints([str(tmp_path / "x-step5.ckpt")], config=str(tmp_path / "config"))
    loaded = found.load(None)
    assert loaded.dtype == dtype and weights_hash(loaded) == weights_hash(model)
    table = monitor_checkpoints(
        [str(tmp_path / "x-step5.ckpt")],
        config=str(tmp_path / "config"),
        metrics=["induction"],
        n_sequences=4,
        dtype="auto",
        output=tmp_path / "out",
    )
    assert np.isfinite(table["value"].astype(float)).all()


def test_an_unknown_family_is_told_where_a_row_is_added(tmp_path: Path) -> None:
    OPTConfig(hidden_size=8).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"mda_lightning\.families\.FAMILIES"):
        read_config(tmp_path)
