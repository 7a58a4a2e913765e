"""One head's scores by kronfluence, on a model whose head is split out.

Its score is +∇fᵀ(H + λ)⁻¹∇L; ours is its negative. Its K-FAC curvature is that of one position,
ours that of a sequence.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor
from torch.utils.data import Dataset, StackDataset
from transformers import GPTNeoXForCausalLM

from benchmarks.split_head import CopyProbe, split_head, split_names
from mda_lightning.architectures import BlockName
from mda_lightning.units import Head


class _CopyTask(Task):
    """Summed next-token loss; f of a copy probe."""

    def __init__(self, names: Sequence[str], weight: float) -> None:
        self._names, self._weight = list(names), weight

    def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
        assert not sample, "the empirical Fisher is compared"
        tokens = batch["tokens"]
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")

    def compute_measurement(self, batch: Any, model: Any) -> Tensor:
        tokens, wanted = batch["tokens"], batch["is_target"][:, 1:]
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        logprob = -F.cross_entropy(logits[wanted], tokens[:, 1:][wanted], reduction="sum")
        return self._weight * logprob

    def get_influence_tracked_modules(self) -> list[str]:
        return self._names


@dataclass
class KronfluenceRun:
    """Fit and score with kronfluence's defaults, but for the settings that are to be the same.

    Those are: empirical Fisher, damping of a tenth of the mean eigenvalue, and batch sizes. The
    probe's gradients are summed over its sequences, as its documentation advises for one query.

    Args:
        model: the model, not split.
        unit: the head.
        probe: what is asked.
        tokens: int64 [N, T+1], for curvature and scores alike.
        batch_size: sequences at once.
        strategy: of the curvature.
        per_token: scores by position.
    """

    model: GPTNeoXForCausalLM
    unit: Head
    probe: CopyProbe
    tokens: Tensor
    batch_size: int
    strategy: Literal["ekfac", "kfac", "identity"] = "ekfac"
    per_token: bool = False

    def __post_init__(self) -> None:
        self._names = split_names(self.unit)
        self._task = _CopyTask(list(self._names.values()), self.probe.weight)
        self._prepared = prepare_model(split_head(self.model, self.unit), self._task)

    def run(self) -> dict[BlockName, Tensor]:
        """kronfluence's scores by block, [N] or [N, T]."""
        train: Dataset[Any] = StackDataset(tokens=self.tokens)
        query: Dataset[Any] = StackDataset(tokens=self.probe.tokens, is_target=self.probe.is_target)
        with tempfile.TemporaryDirectory() as folder:
            analyzer = Analyzer(
                "head", self._prepared, self._task, cpu=True, disable_tqdm=True, output_dir=folder
            )
            analyzer.fit_all_factors(
                "factors",
                train,
                per_device_batch_size=self.batch_size,
                factor_args=FactorArguments(strategy=self.strategy, use_empirical_fisher=True),
            )
            analyzer.compute_pairwise_scores(
                "scores",
                "factors",
                query,
                train,
                per_device_query_batch_size=len(self.probe.tokens),
                per_device_train_batch_size=self.batch_size,
                score_args=ScoreArguments(
                    damping_factor=None,
                    aggregate_query_gradients=True,
                    compute_per_module_scores=True,
                    compute_per_token_scores=self.per_token,
                ),
            )
            found = analyzer.load_pairwise_scores("scores")
        return {block: found[name][0] for block, name in self._names.items()}


def as_ours(run: KronfluenceRun, scores: dict[BlockName, Tensor]) -> dict[BlockName, Tensor]:
    """The scores in this project's conventions: the sign, and for K-FAC a curvature a sequence."""
    factor = -1.0
    if run.strategy == "kfac":
        factor /= run.tokens.shape[1] - 1
    return {block: factor * values for block, values in scores.items()}
