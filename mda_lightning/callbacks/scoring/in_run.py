"""Scores from training steps' own forward and backward: the part that knows no Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import describe
from mda_lightning.curvature import CurvatureError
from mda_lightning.gradients import BlockVector
from mda_lightning.influence.in_run_scores import StepScores, TrainingStepScorer
from mda_lightning.influence.inverse_probes import (
    CurvatureSettings,
    InverseProbes,
    inverse_probes,
    warn_of_unscored,
)
from mda_lightning.mechanisms import Mechanism
from mda_lightning.units import Head, parse_unit


class BatchScores(NamedTuple):
    """Scores of a batch, on the CPU.

    Attributes:
        values: by mechanism, float32 [B, U, K]; NaN where they are not finite, and for samples of
            weight 0.
        loss: float32 [B].
        scale: what became of the loss's scale.
    """

    values: dict[str, Tensor]
    loss: Tensor
    scale: LossScale


class LossScale(NamedTuple):
    """By how much more a position was weighted in the loss than was expected.

    Attributes:
        ratio: median over the samples; NaN where none could be read.
        kind: "expected" where that is what was read, or nothing was to be scored; "measured" where
            it was something else, by which scores are then divided; "unread".
    """

    ratio: float
    kind: Literal["expected", "measured", "unread"]


class InRunScorer:
    """Score training batches for all units and several mechanisms at once.

    Hooks are on the model from the beginning until :meth:`remove`, and do something between
    :meth:`start` and :meth:`collect` only.

    Args:
        model: the language model that trains.
        mechanisms: whose f are scored, by name.
        units: heads.
    """

    def __init__(
        self, model: PreTrainedModel, mechanisms: Mapping[str, Mechanism], units: Sequence[Head]
    ) -> None:
        self._model = model
        self._mechanisms = dict(mechanisms)
        self._units = list(units)
        blocks = dict.fromkeys(b for one in mechanisms.values() for b in one.block_names)
        self._step = TrainingStepScorer(model, units, list(blocks))
        self._ihvps: dict[str, BlockVector] = {}
        self._listened_for: tuple[str, ...] = ()
        #: Step of the weights at which each mechanism's IHVP was taken.
        self.taken_at: dict[str, int] = {}
        #: Units that no sample has a score of, since the last refresh.
        self.unscored: dict[str, set[Head]] = {}

    def refresh(
        self,
        names: Sequence[str],
        batches: Sequence[Tensor],
        settings: CurvatureSettings,
        *,
        step: int,
    ) -> dict[str, Any]:
        """Take the curvature once, and each named mechanism's probe gradient, at these weights.

        Returns the curvature's provenance; units that cannot be scored are named in a warning.
        Where there is no curvature, samples have no score until the next refresh, with a warning:
        a run that has diverged is not for its watcher to stop.
        """
        own = {name: self._mechanisms[name] for name in names}
        try:
            solved = inverse_probes(self._model, own, self._units, batches, settings)
        except CurvatureError as error:
            warnings.warn(
                f"step {step}: {error}. Samples have no score (NaN) until the next refresh",
                stacklevel=2,
            )
            solved = self._without_scores(own)
        warn_of_unscored(solved, at=f" at step {step}")
        self._ihvps |= solved.ihvps
        self.taken_at |= dict.fromkeys(names, step)
        for name, ihvp in solved.ihvps.items():
            self.unscored[name] = _unscored(ihvp)
        self._listened_for = ()
        return solved.provenance

    def _without_scores(self, mechanisms: Mapping[str, Mechanism]) -> InverseProbes:
        layout = describe(self._model)
        ihvps = {
            name: {
                (block.unit, block.name): torch.full(
                    block.shape, torch.nan, device=self._model.device
                )
                for block in layout.blocks(self._units, own.block_names)
            }
            for name, own in mechanisms.items()
        }
        none: dict[str, list[Head]] = {name: [] for name in ihvps}
        return InverseProbes(ihvps, {"curvature": None}, none, none)

    def state(self) -> dict[str, Any]:
        """The IHVPs, by which a run that goes on scores as this one would have; on the CPU."""
        return {
            "taken_at": dict(self.taken_at),
            "ihvps": {
                name: [[str(unit), block, v.cpu()] for (unit, block), v in own.items()]
                for name, own in self._ihvps.items()
            },
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` gave."""
        self._ihvps = {
            name: {(parse_unit(u), block): v.to(self._model.device) for u, block, v in own}
            for name, own in state["ihvps"].items()
        }
        self.taken_at = dict(state["taken_at"])
        self.unscored = {name: _unscored(own) for name, own in self._ihvps.items()}
        self._listened_for = ()

    def start(
        self, names: Collection[str], tokens: Tensor, weights: Tensor | None
    ) -> tuple[str, ...]:
        """Before a batch's forward; returns the mechanisms that it will be scored for.

        Args:
            names: mechanisms; those without a refresh are left out.
            tokens: [B, T+1].
            weights: [B] of the samples in the loss, or None.
        """
        ready = tuple(name for name in self._mechanisms if name in names and name in self._ihvps)
        if ready:
            if ready != self._listened_for:
                self._step.set_ihvp({name: self._ihvps[name] for name in ready})
                self._listened_for = ready
            self._step.start(tokens, weights)
        return ready

    def listen(self) -> None:
        """Before a batch's forward that is not scored: hear whether its backward comes by."""
        self._step.listen()

    def heard(self) -> bool:
        """After that batch's backward."""
        return self._step.heard()

    def collect(
        self, tokens: Tensor, weights: Tensor | None, *, factor: float
    ) -> BatchScores | None:
        """After the batch's backward; None where none passed through the model.

        Args:
            tokens, weights: as given to :meth:`start`; a sample of weight 0 left no gradient, so
                its score is NaN.
            factor: what the loss is expected to have to be multiplied by to become the sum over all
                positions that count. Where the gradient says otherwise, that is what is used.
        """
        scale = torch.full((len(tokens),), factor, device=tokens.device)
        if weights is not None:
            own = weights.to(scale)
            scale = torch.where(own > 0, scale / own, torch.nan)
        found = self._step.collect_all(scale)
        if found is None:
            return None
        ratio, loss_scale = _ratio(found, scale)
        # An overflow under fp16 leaves inf, which would be sorted to the top.
        values = {
            name: torch.where(torch.isfinite(one), one, torch.nan).cpu()
            for name, one in (found.values if ratio is None else found.scaled(1 / ratio)).items()
        }
        return BatchScores(values, found.loss.cpu(), loss_scale)

    def remove(self) -> None:
        """Take every hook off; may be called more than once."""
        self._step.remove()


def _unscored(ihvp: BlockVector) -> set[Head]:
    return {unit for (unit, _), v in ihvp.items() if bool(v.isnan().any())}


def _ratio(found: StepScores, expected: Tensor) -> tuple[Tensor | None, LossScale]:
    """Each sample's scale over the expected one [B], or None where scores stay as they are.

    Args:
        expected: [B], one over the scale; NaN for samples of weight 0.
    """
    finite = [torch.isfinite(one).flatten(1).any(1) for one in found.values.values()]
    trained = torch.isfinite(expected) & (found.counted != 0) & torch.stack(finite).any(0)
    each = torch.where(trained, found.scale * expected.to(found.scale), torch.nan)
    read = each[torch.isfinite(each)].cpu()
    n_trained = int(trained.sum())
    if (
        not n_trained or 2 * len(read) < n_trained
    ):  # another loss may pass for this one now and then
        return None, LossScale(float("nan"), "unread" if n_trained else "expected")
    ratio, limit = float(read.median()), found.uncertainty
    if bool(((read - 1).abs() <= limit).all()):
        return None, LossScale(ratio, "expected")
    if bool(((read / ratio - 1).abs() <= limit).all()):
        return torch.full_like(each, ratio), LossScale(ratio, "measured")
    # Of a sample whose own cannot be read, the batch's.
    return torch.where(torch.isfinite(each), each, ratio), LossScale(ratio, "measured")
