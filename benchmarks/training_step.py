"""The training step of a module of this package, as a Trainer runs it, without the Trainer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from benchmarks.models import random_tokens
from mda_lightning.architectures import HEAD_BLOCKS, BlockName, describe
from mda_lightning.gradients import BlockVector
from mda_lightning.influence.in_run_scores import StepScores, TrainingStepScorer
from mda_lightning.pretraining import PythiaModule
from mda_lightning.pretraining.loss import sequence_losses, weighted_loss
from mda_lightning.pretraining.optimization import parameter_groups
from mda_lightning.units import Head


class TrainingSteps:
    """Steps of fixed random batches: forward, the module's loss, backward, clipping, fused AdamW.

    Args:
        module: what trains.
        n_steps, batch, length: how many steps, of what.
    """

    def __init__(self, module: PythiaModule, n_steps: int, batch: int, length: int) -> None:
        self.model = module.model
        self.optimizer = AdamW(parameter_groups(module, weight_decay=0.1), lr=1e-5, fused=True)
        tokens = random_tokens(n_steps * batch, length, self.model.config.vocab_size - 400)
        self.batches = tokens.split(batch)
        #: Of each call of :meth:`run_scored`, processor time.
        self.scoring_seconds: list[float] = []

    def step(self, tokens: Tensor) -> None:
        """One step."""
        logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = weighted_loss(sequence_losses(logits, tokens[:, 1:]), None, normalize="batch")
        # Only the graph holds them from here on, as after training_step has returned.
        del logits
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self) -> None:
        """All steps."""
        self.model.train()
        for tokens in self.batches:
            self.step(tokens)

    def run_scored(self, ihvp: BlockVector) -> list[Tensor]:
        """All steps, each scoring its own samples; scores [B, U, K] and losses [B] by step.

        What the scorer's own code takes is added to :attr:`scoring_seconds`.
        """
        self.model.train()
        units = tuple(dict.fromkeys(unit for unit, _ in ihvp))
        blocks = tuple(dict.fromkeys(block for _, block in ihvp))
        scorer = _TimedScorer(self.model, units, blocks)
        scorer.set_ihvp(ihvp)
        found = []
        try:
            for tokens in self.batches:
                scorer.start(tokens)
                self.step(tokens)
                scores = scorer.collect_all(float(tokens[:, 1:].numel()))
                assert scores is not None
                found += [*(values.cpu() for values in scores.values.values()), scores.loss.cpu()]
        finally:
            scorer.remove()
        self.scoring_seconds.append(scorer.seconds)
        return found

    def random_vectors(
        self, units: list[Head], blocks: Sequence[BlockName] = HEAD_BLOCKS
    ) -> BlockVector:
        """Random matrices in the place of an IHVP."""
        generator = torch.Generator().manual_seed(0)
        return {
            (block.unit, block.name): torch.randn(block.shape, generator=generator)
            for block in describe(self.model).blocks(units, blocks)
        }

    @property
    def heads(self) -> list[Head]:
        """All heads of the model."""
        return describe(self.model).heads


class _TimedScorer(TrainingStepScorer):
    """Counts the processor time of its own code."""

    seconds = 0.0

    def _count(self, own: Any, *args: Any) -> Any:
        began = time.process_time()
        found = own(*args)
        self.seconds += time.process_time() - began
        return found

    def start(self, tokens: Tensor | None = None, weights: Tensor | None = None) -> None:
        self._count(super().start, tokens, weights)

    def layer(self, name: str, x: Tensor, delta: Tensor) -> None:
        self._count(super().layer, name, x, delta)

    def logits(self, logits: Tensor) -> Tensor:
        found: Tensor = self._count(super().logits, logits)
        return found

    def logit_gradient(self, kept: Tensor, delta: Tensor) -> None:
        self._count(super().logit_gradient, kept, delta)

    def collect_all(self, scale: Tensor | float) -> StepScores | None:
        found: StepScores | None = self._count(super().collect_all, scale)
        return found
