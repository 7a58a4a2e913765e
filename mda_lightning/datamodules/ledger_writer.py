"""The ledger of what a run was trained on."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback


class LedgerWriter(Callback):
    """Write down what every step was trained on."""

    def __init__(self, data: Any, folder: str | None) -> None:
        self._data, self._folder = data, folder
