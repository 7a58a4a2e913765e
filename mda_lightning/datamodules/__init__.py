"""Data modules for Lightning."""

from mda_lightning.datamodules.token_datamodule import TokenDataModule

__all__ = ["TokenDataModule"]
