"""One head's scores by bergson, on a model whose head is split out.

Its score is g_queryᵀ(H + λ)⁻¹g for losses, and a query's loss is −f / weight; ours is weight times
its. It leaves each sequence's last position out of A and S, where a sequence includes its last
label: the positions are then ours.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector, Scorer
from bergson.config.config import HessianConfig, InversionConfig, PreprocessConfig
from bergson.data import allocate_batches
from bergson.hessians.hessian_approximations import fit_factored_hessians
from bergson.hessians.preconditioner import FactoredPreconditioner
from bergson.score.score_writer import InMemorySequenceScoreWriter
from datasets import Dataset
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from benchmarks.split_head import CopyProbe, split_head, split_names
from mda_lightning.architectures import BlockName
from mda_lightning.units import Head


@dataclass
class BergsonRun:
    """Fit and score with bergson's defaults, but for the settings that are to be the same.

    Those are: empirical Fisher, EK-FAC, and the batch size (its default is 2,048 tokens). Its own
    functions are called on a model in memory, and gradients are not written to files; of the model,
    as in bergson's own set-up, only the embedding requires a gradient.

    Args:
        model: the model, not split.
        unit: the head.
        probe: what is asked.
        tokens: int64 [N, T+1], for curvature and scores alike.
        batch_size: sequences at once.
        strategy: of the curvature.
    """

    model: GPTNeoXForCausalLM
    unit: Head
    probe: CopyProbe
    tokens: Tensor
    batch_size: int
    strategy: Literal["ekfac", "kfac", "identity"] = "ekfac"

    def __post_init__(self) -> None:
        split = split_head(self.model, self.unit)
        split.requires_grad_(False)
        split.get_input_embeddings().requires_grad_(True)
        self._split = split
        # bergson names layers from the base model on.
        self._names = {
            block: name.removeprefix("gpt_neox.") for block, name in split_names(self.unit).items()
        }

    def run(self) -> dict[BlockName, Tensor]:
        """bergson's scores by block, [N]."""
        quiet = contextlib.redirect_stderr(io.StringIO())
        with tempfile.TemporaryDirectory() as folder, quiet:
            for name in ("CollectorComputer", "HookCollectorBase"):
                logging.getLogger(name).setLevel(logging.WARNING)
            return self._run(Path(folder))

    def _run(self, folder: Path) -> dict[BlockName, Tensor]:
        data = Dataset.from_dict({"input_ids": self.tokens.tolist()})
        length = self.tokens.shape[1]
        config = IndexConfig(
            str(folder / "run"), token_batch_size=self.batch_size * length, loss_reduction="sum"
        )
        config.partial_run_path.mkdir(parents=True)
        batches = allocate_batches([length] * len(data), config.token_batch_size)
        names = set(self._names.values())
        query = self._query(config)
        if self.strategy != "identity":
            hessian = HessianConfig(
                method="kfac", ev_correction=self.strategy == "ekfac", use_dataset_labels=True
            )
            fit_factored_hessians(
                self._split,
                data,
                config,
                hessian,
                target_modules=names,
                attention_cfgs={},
                batches=batches,
                path=str(folder / "hessian"),
                do_eigendecomposition=True,
            )
            preconditioner = FactoredPreconditioner.from_path(
                folder / "hessian",
                inversion_cfg=InversionConfig("damped_inverse", 0.1),
                ev_correction=self.strategy == "ekfac",
            )
            query = preconditioner.apply(query)
        # A row of queries per block, zero elsewhere: the scores then come apart by block.
        separate = {
            name: torch.stack(
                [vector[0] if own == name else torch.zeros_like(vector[0]) for own in query]
            )
            for name, vector in query.items()
        }
        writer = InMemorySequenceScoreWriter(len(data), len(separate))
        scorer = Scorer(separate, list(separate), writer, torch.device("cpu"), torch.float32)
        self._collect(config, data, batches, scorer=scorer)
        columns = {name: i for i, name in enumerate(query)}
        return {block: writer.scores[:, columns[name]] for block, name in self._names.items()}

    def _query(self, config: IndexConfig) -> dict[str, Tensor]:
        """Gradient of the probe's summed loss by layer, flat, [1, out · in]."""
        labels = torch.where(self.probe.is_target, self.probe.tokens, -100)
        data = Dataset.from_dict(
            {"input_ids": self.probe.tokens.tolist(), "labels": labels.tolist()}
        )
        collector = self._collect(
            config,
            data,
            [list(range(len(data)))],
            preprocess_cfg=PreprocessConfig(aggregation="sum"),
        )
        return {name: gradient[:1] for name, gradient in collector.gradients.items()}

    def _collect(
        self, config: IndexConfig, data: Dataset, batches: list[list[int]], **settings: Any
    ) -> InMemoryCollector:
        collector = InMemoryCollector(
            model=self._split.base_model,
            data=data,
            cfg=config,
            processor=GradientProcessor(),
            target_modules=set(self._names.values()),
            **settings,
        )
        CollectorComputer(
            self._split, data, collector=collector, batches=batches, cfg=config
        ).run_with_collector_hooks()
        return collector


def as_ours(run: BergsonRun, scores: dict[BlockName, Tensor]) -> dict[BlockName, Tensor]:
    """The scores in this project's conventions: f is the weighted log-probability, not the loss."""
    return {block: run.probe.weight * values for block, values in scores.items()}
