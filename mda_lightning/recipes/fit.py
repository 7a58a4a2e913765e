"""``mda-lightning fit``: one training run by a Lightning configuration file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from lightning.pytorch.cli import LightningCLI

from mda_lightning.datamodules import TokenDataModule
from mda_lightning.pretraining import PythiaModule


class FitCLI(LightningCLI):
    """LightningCLI over :class:`PythiaModule` and :class:`TokenDataModule`.

    The model's vocabulary and context follow from the corpus where the configuration leaves them
    out, so that one file fits every corpus.
    """

    def before_instantiate_classes(self) -> None:
        from mda_lightning.corpora import TokenRows

        settings = self.config.get("fit", self.config)
        model = settings["model"]
        rows = TokenRows.open(settings["data"]["rows"])
        if model["vocab_size"] is None and not isinstance(model["size"], str):
            model["vocab_size"] = rows.vocab_size
        if model["seq_len"] is None:
            model["seq_len"] = rows.row_length - 1


def fit(arguments: Sequence[str]) -> None:
    """Train; ``arguments`` are LightningCLI's, for example ``["--config", "run.yaml"]``.

    Callbacks are given in the file: ``trainer.callbacks`` takes their class paths, and a further
    file appends to the list with ``callbacks+``.
    """
    # The command hands over its own arguments, which LightningCLI takes for a mistake.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    FitCLI(
        PythiaModule,
        TokenDataModule,
        args=["fit", *arguments],
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
    )
