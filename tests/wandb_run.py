"""Read an offline W&B run back from the files it left, with W&B's own reader."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


class OfflineRun:
    """Rows, definitions, summary, alerts and tables of the one run under ``folder/wandb``."""

    def __init__(self, folder: Path) -> None:
        (self.folder,) = (folder / "wandb").glob("offline-run-*")
        (log,) = self.folder.glob("*.wandb")
        reader = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        done = subprocess.run(reader, capture_output=True, text=True, check=True)
        self.records: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What ``log`` was given, in order."""
        return [record["item"] for record in self.of_type("history")]

    @property
    def step_metrics(self) -> dict[str, str | None]:
        """Defined key or family -> the key it goes by."""
        return {
            record.get("name") or record["glob_name"]: record.get("step_metric")
            for record in self.of_type("metric")
        }

    @property
    def summary(self) -> dict[str, Any]:
        """The run's summary as it stood at the end."""
        values: dict[str, Any] = {}
        for record in self.of_type("summary"):
            values |= record.get("update", {})
        return values

    def table_rows(self, key: str) -> list[list[Any]]:
        """All rows of an incremental table, in the order they were sent."""
        name = re.compile(rf"{key}_(\d+)_[0-9a-f]+\.table\.json")  # not of key_2
        files = (self.folder / "files" / "media" / "table").iterdir()
        found = [(int(m[1]), path) for path in files if (m := name.fullmatch(path.name))]
        parts = [path for _, path in sorted(found)]
        return [row for part in parts for row in json.loads(part.read_text())["data"]]

    def images(self, key: str) -> list[Path]:
        return list((self.folder / "files" / "media" / "images").glob(f"{key}_*.png"))
