"""What scoring costs beside training, at the quickstart's own shape."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import AdamW

from benchmarks.interleaved import interleaved, ratio
from benchmarks.models import quickstart_module
from mda_lightning.architectures import describe
from mda_lightning.influence import (
    SubspaceEKFAC,
    TrainingStepScorer,
    probe_gradients,
    replay_scores,
)
from mda_lightning.mechanisms import mechanism
from mda_lightning.pretraining.loss import sequence_losses, weighted_loss
from mda_lightning.pretraining.optimization import parameter_groups
from mda_lightning.recipes.quickstart import QUICKSTART

Rows = Iterator[tuple[str, tuple[float, float, float]]]
_STEPS = 20


class _Training:
    """Plain training steps of the quickstart's model on random tokens, without Lightning."""

    def __init__(self) -> None:
        vocab = QUICKSTART.corpus.vocab_size
        self.length = QUICKSTART.corpus.sequence_length
        self.batch = QUICKSTART.training.batch_size
        module = quickstart_module()
        self.model = module.model
        self.optimizer = AdamW(parameter_groups(module, weight_decay=0.1), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(0)
        shape = (_STEPS * self.batch, self.length + 1)
        self.tokens = torch.randint(1, vocab, shape, generator=generator)

    def step(self, tokens: Tensor) -> None:
        logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        weighted_loss(sequence_losses(logits, tokens[:, 1:]), None, normalize="batch").backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self) -> None:
        for tokens in self.tokens.split(self.batch):
            self.step(tokens)


def replay(rounds: int) -> Rows:
    """Replay scoring against training on the same samples: sequences per second."""
    training = _Training()
    units = describe(training.model).heads
    for probe_function in ("attention", "copy_logprob"):
        mech = mechanism(
            "induction",
            token_ids=range(1, QUICKSTART.corpus.vocab_size),
            probe_function=probe_function,
        )
        for label, own in (("one head", units[-1:]), ("all heads", units)):
            ihvp = probe_gradients(training.model, mech, own)

            def score(ihvp=ihvp) -> None:
                replay_scores(training.model, ihvp, training.tokens.split(32))

            timings = interleaved({"steps": training.steps, "score": score}, rounds=rounds)
            yield (
                f"replay throughput / training throughput, {probe_function}, {label}",
                ratio(timings["steps"], timings["score"]),
            )


def in_run(rounds: int) -> Rows:
    """A training step that scores its own samples against one that does not."""
    training = _Training()
    induction = mechanism("induction", token_ids=range(1, QUICKSTART.corpus.vocab_size))
    units = describe(training.model).heads
    for label, own in (("one head", units[-1:]), ("all heads", units)):
        scorer = TrainingStepScorer(training.model, own, induction.block_names)
        ihvp = SubspaceEKFAC.fit(
            training.model, own, induction.block_names, training.tokens.split(32)
        ).solve(probe_gradients(training.model, induction, own))
        scorer.set_ihvp(ihvp)

        def scored_steps(scorer=scorer) -> None:
            for tokens in training.tokens.split(training.batch):
                scorer.start()
                training.step(tokens)
                scorer.collect(float(tokens[:, 1:].numel()))

        timings = interleaved({"plain": training.steps, "scored": scored_steps}, rounds=rounds)
        scorer.remove()
        yield (f"scored step / plain step, {label}", ratio(timings["scored"], timings["plain"]))
