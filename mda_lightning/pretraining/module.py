"""Pretraining of Pythia, or of any causal language model of transformers, as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedConfig

from mda_lightning.pretraining.initialisation import build_model
from mda_lightning.pretraining.loss import Normalize, sequence_losses, weighted_loss
from mda_lightning.pretraining.optimization import (
    ScheduleName,
    learning_rate_schedule,
    parameter_groups,
)
from mda_lightning.pretraining.sizes import (
    BETAS,
    EPSILON,
    GRADIENT_CLIP,
    MIN_LEARNING_RATE_RATIO,
    PYTHIA_SIZES,
    WARMUP_FRACTION,
    WEIGHT_DECAY,
    Initialisation,
    model_config,
    pythia_size,
)

DEFAULT_DECAY_FRACTION = 0.2
"""Share of a ``"wsd"`` run spent decaying when ``decay_steps`` is not given."""


class PythiaModule(LightningModule):
    """A causal language model with Pythia's initialisation, optimizer, schedule and loss.

    A batch is a dict with ``tokens`` [B, T+1] int64 and, optionally, ``weight`` [B]; or the tokens
    alone. ``tokens[:, :-1]`` predict ``tokens[:, 1:]``. Precision, devices and gradient
    accumulation are the Trainer's.

    Logged, each at the step of the update it belongs to: ``train/loss`` (the loss minimised),
    ``lr``, ``tokens`` (trained on so far, masked samples included); in validation ``val/loss``.

    Args:
        size: ``"14m"`` .. ``"12b"``; a dict of GPT-NeoX dimensions by transformers' names; or a
            configuration of any causal language model of transformers.
        init_seed: determines the weights; the global random generators are not used.
        initialisation: ``None`` for what the size was trained from, else see
            :mod:`mda_lightning.pretraining.initialisation`. Only for GPT-NeoX.
        learning_rate: the peak; ``None`` for the size's own (1e-3 where there is no named size).
        schedule: see :mod:`mda_lightning.pretraining.optimization`.
        warmup_steps: ``None`` for 1% of ``total_steps``.
        total_steps: the schedule's end in optimizer steps; ``None`` for the Trainer's.
        decay_steps: of ``"wsd"``; ``None`` for 20% of ``total_steps``.
        gradient_clip: largest gradient norm, where the Trainer names none; ``None`` for no clip.
        normalize: what the weighted loss is divided by: ``"batch"``, the samples in the step, or
            ``"kept"``, the sum of their weights over every rank and accumulated micro-batch
            (micro-batches of one step must then be equally large).
        compile: compile the language model in place.

    Raises:
        ValueError: an unknown size or schedule, or dimensions that do not fit.
    """

    def __init__(
        self,
        size: str | dict[str, Any] | PreTrainedConfig = "14m",
        *,
        init_seed: int = 0,
        initialisation: Initialisation | None = None,
        learning_rate: float | None = None,
        schedule: ScheduleName = "pythia",
        warmup_steps: int | None = None,
        total_steps: int | None = None,
        decay_steps: int | None = None,
        min_lr_ratio: float = MIN_LEARNING_RATE_RATIO,
        betas: tuple[float, float] = BETAS,
        eps: float = EPSILON,
        weight_decay: float = WEIGHT_DECAY,
        gradient_clip: float | None = GRADIENT_CLIP,
        normalize: Normalize = "batch",
        vocab_size: int | None = None,
        seq_len: int | None = None,
        attn_implementation: str = "sdpa",
        compile: bool = False,
    ) -> None:
        super().__init__()
        config = model_config(size, vocab_size=vocab_size, seq_len=seq_len)
        named = pythia_size(size) if isinstance(size, str) else None
        if isinstance(size, PreTrainedConfig):
            # Checkpoints hold primitives only, and a dict builds the same model again.
            size = size.to_dict()
        self.save_hyperparameters()
        if normalize not in ("batch", "kept"):
            raise ValueError(f"normalize={normalize!r}: choose 'batch' or 'kept'")
        # A schedule that cannot be is an error here and not after the data has been prepared.
        if total_steps is not None:
            learning_rate_schedule(schedule, **self._schedule_steps(total_steps))
        if learning_rate is None:
            learning_rate = (named or PYTHIA_SIZES["14m"]).learning_rate
        self.learning_rate = learning_rate
        self.normalize: Normalize = normalize
        self.model = build_model(
            config,
            seed=init_seed,
            initialisation=initialisation or (named.initialisation if named else "small_wang"),
            attn_implementation=attn_implementation,
        )
        self.model.train()
        if compile:
            # In place: wrapping would add `_orig_mod.` to the names in every checkpoint.
            self.model.compile()
        self._tokens_seen = 0
        self._kept = _KeptWeight()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocab] of ``tokens`` [B, T]; position t predicts token t+1."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits

    def training_step(self, batch: Mapping[str, Tensor] | Tensor, batch_idx: int) -> Tensor:
        tokens, weights = _tokens_and_weights(batch)
        if batch_idx == 0:
            self._check_tokens(tokens)
        losses = sequence_losses(self(tokens[:, :-1]), tokens[:, 1:])
        loss = weighted_loss(losses, weights, normalize="batch")
        self._tokens_seen += losses.numel() * (tokens.shape[1] - 1) * self.trainer.world_size
        logged = loss.detach()
        if self.normalize == "kept":
            self._kept.add(weights if weights is not None else torch.ones_like(losses))
            logged = weighted_loss(losses.detach(), weights, normalize="kept")
        self.log("train/loss", logged, prog_bar=True, batch_size=len(tokens))
        if self._row_is_due():
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.log("lr", rate, batch_size=len(tokens))
            self.log("tokens", float(self._tokens_seen), batch_size=len(tokens))
        return loss

    def validation_step(self, batch: Mapping[str, Tensor] | Tensor, batch_idx: int) -> Tensor:
        tokens, _ = _tokens_and_weights(batch)
        loss = sequence_losses(self(tokens[:, :-1]), tokens[:, 1:]).mean()
        self.log("val/loss", loss, prog_bar=True, batch_size=len(tokens), sync_dist=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        total_steps = self.hparams["total_steps"] or self._trainer_steps()
        schedule = learning_rate_schedule(
            self.hparams["schedule"], **self._schedule_steps(total_steps)
        )
        optimizer = AdamW(
            parameter_groups(self, weight_decay=self.hparams["weight_decay"]),
            lr=self.learning_rate,
            betas=tuple(self.hparams["betas"]),
            eps=self.hparams["eps"],
            fused=self._may_fuse(),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, schedule), "interval": "step"},
        }

    def on_train_start(self) -> None:
        self._kept = _KeptWeight()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the gradient of L_batch into that of L_kept, once every sample's weight is known.

        Only here, after accumulation and the reduction over ranks, can the kept weight of the whole
        step be known; before clipping, so that the norm clipped is that of the step taken.
        """
        if self.normalize == "kept":
            factor, self._kept = self._kept.factor(self), _KeptWeight()
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, factor)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val is None:
            gradient_clip_val = self.hparams["gradient_clip"]
        self.clip_gradients(
            optimizer,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens_seen"] = self._tokens_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._tokens_seen = checkpoint.get("tokens_seen", 0)

    def _schedule_steps(self, total_steps: int) -> dict[str, Any]:
        warmup, decay = self.hparams["warmup_steps"], self.hparams["decay_steps"]
        if warmup is None:
            warmup = int(WARMUP_FRACTION * total_steps)
        if decay is None:
            decay = int(DEFAULT_DECAY_FRACTION * total_steps)
        return {
            "total_steps": total_steps,
            "warmup_steps": warmup,
            "decay_steps": decay if self.hparams["schedule"] == "wsd" else 0,
            "min_lr_ratio": self.hparams["min_lr_ratio"],
        }

    def _trainer_steps(self) -> int:
        if self.trainer.max_steps > 0:
            # The loader need not be opened to be counted.
            return self.trainer.max_steps
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < float("inf"):
            raise ValueError(
                "the length of this run is not known, so its learning-rate schedule has no end: "
                "give PythiaModule(total_steps=...) or Trainer(max_steps=...)"
            )
        return int(steps)

    def _may_fuse(self) -> bool:
        """Fused AdamW is faster, but Lightning clips no fused optimizer under mixed precision."""
        try:
            mixed = str(self.trainer.precision).endswith("-mixed")
        except RuntimeError:  # not attached to a Trainer
            mixed = False
        return not mixed and all(p.device.type in ("cpu", "cuda") for p in self.parameters())

    def _row_is_due(self) -> bool:
        """Whether loggers write this step; each `log` takes a share of a small model's step."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set unannounced
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    def _check_tokens(self, tokens: Tensor) -> None:
        """Read once per epoch, on the host: on a GPU a bad id is an assertion without a name."""
        embedding: Any = self.model.get_input_embeddings()
        vocab_size = embedding.weight.shape[0]
        largest = int(tokens.max())
        if largest >= vocab_size:
            raise ValueError(
                f"the batch holds token id {largest} and the model's vocabulary has {vocab_size} "
                "rows: give PythiaModule(vocab_size=...) that of the data's tokenizer"
            )


class _KeptWeight:
    """Samples and their weights since the last optimizer step, on this rank."""

    def __init__(self) -> None:
        self.weight: Tensor | None = None
        self.samples = 0
        self.micro_batches = 0

    def add(self, weights: Tensor) -> None:
        total = weights.sum()
        self.weight = total if self.weight is None else self.weight + total
        self.samples += len(weights)
        self.micro_batches += 1

    def factor(self, module: LightningModule) -> Tensor:
        """What the step's gradient of L_batch is multiplied by; 0 where no weight is left.

        The gradient so far is a sum over samples / (B A R), with B samples in each of A
        accumulated micro-batches on R ranks; it becomes that sum / (kept weight on all ranks).
        """
        if self.weight is None:
            raise RuntimeError("an optimizer step without a training_step before it")
        kept: Any = module.trainer.strategy.reduce(self.weight, reduce_op="sum")
        per_micro_batch = self.samples / self.micro_batches * module.trainer.world_size
        summands = per_micro_batch * module.trainer.accumulate_grad_batches
        return torch.where(kept > 0, summands / torch.where(kept > 0, kept, 1.0), 0.0)


def _tokens_and_weights(batch: Mapping[str, Tensor] | Tensor) -> tuple[Tensor, Tensor | None]:
    """``tokens`` [B, T+1] and ``weight`` [B] of a batch.

    Raises:
        TypeError, ValueError: the batch is neither a dict with ``tokens`` nor tokens themselves.
    """
    if isinstance(batch, Tensor):
        tokens, weights = batch, None
    elif isinstance(batch, Mapping) and "tokens" in batch:
        tokens, weights = batch["tokens"], batch.get("weight")
    else:
        found = f"keys {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(
            f"a batch is a dict with 'tokens' [B, T+1] and, optionally, 'weight' [B], or the "
            f"tokens alone; this one has {found}"
        )
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; they must be [B, T+1] with T at least 1"
        )
    return tokens, weights
