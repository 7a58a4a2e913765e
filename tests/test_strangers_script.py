"""The three lines of the README in a training script that knows nothing of this package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("wandb")

from wandb_run import OfflineRun

SCRIPT = """
import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from mda_lightning.callbacks import CriticalWindow, InfluenceScoring, UnitMonitor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.lm = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=64,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=64,
            )
        )

    def training_step(self, batch, batch_idx):
        loss = self.lm(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


L.seed_everything(0)
rows = [{"input_ids": torch.randint(2, 60, (24,)), "sample_id": i} for i in range(200)]
trainer = L.Trainer(
    max_steps=30,
    accelerator="cpu",
    enable_checkpointing=False,
    logger=WandbLogger(project="theirs", offline=True, save_dir="."),
    callbacks=[
        UnitMonitor(every_n_steps=10),
        CriticalWindow("induction"),
        InfluenceScoring("induction", estimator="in_run", active="always"),
    ],
)
trainer.fit(Net(), torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True))
"""


def test_three_lines_in_someone_elses_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"},
        check=True,
        capture_output=True,
        timeout=600,
    )
    run = OfflineRun(tmp_path)
    rows = [row for row in run.rows if "induction/max" in row]
    assert [row["trainer/global_step"] for row in rows] == [0, 10, 20, 30]
    assert all(0 < row["previous_token/mean"] < 1 for row in rows)
    assert run.summary["induction/best_head"] in {"L0H0", "L0H1", "L1H0", "L1H1"}
    assert run.summary["induction/window_status"] == "none"
    assert len(run.images("induction/heads")) == 1

    (folder,) = tmp_path.glob("theirs/*/mda")
    table = pd.read_parquet(folder / "unit_metrics.parquet")
    sent = run.table_rows("unit_metrics")
    assert len(sent) == len(table)
    induction = table[table["metric"] == "induction"].groupby("step")["value"].max()
    assert [row["induction/max"] for row in rows] == pytest.approx(induction.tolist())
    assert len(pd.read_parquet(folder / "scores")) == 30 * 4  # steps, rows
    assert "finished" in (folder / "live.html").read_text()
