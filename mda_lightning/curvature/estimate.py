"""Estimating curvature: second moments as sequences come by, then Λ in their eigenbases."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import Block, BlockName, describe
from mda_lightning.curvature.factors import BlockFactors, CurvatureError, Kind
from mda_lightning.curvature.fisher import Fisher, sampled_uniform
from mda_lightning.free_memory import free_memory
from mda_lightning.gradients import GradientRegions, sequence_backward
from mda_lightning.units import Head

_Key = tuple[str, str]
#: Bytes held at once while Λ is taken.
_ROTATED = 2**28


class CurvatureEstimate:
    """Factors that sharpen as sequences are added; see :meth:`SubspaceEKFAC.fit`.

    Λ needs the gradients of the same sequences once more, after the eigenbases are known. They are
    kept while they fit into ``memory``, else the sequences are gone through a second time.

    Args:
        model: at fixed weights, also between calls.
        units, blocks, kind, fisher, seed, memory: as for :meth:`SubspaceEKFAC.fit`.
        keep_data: with ``fisher="sampled"``, keep the gradients under the data's labels too
            (:attr:`data_gradients`), from the same forward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        units: Sequence[Head],
        blocks: Sequence[BlockName],
        *,
        kind: Kind = "ekfac",
        fisher: Fisher = "sampled",
        seed: int = 0,
        memory: int | None = None,
        keep_data: bool = False,
    ) -> None:
        self.model = model
        self.blocks = describe(model).blocks(units, blocks)
        self.regions = GradientRegions(self.blocks)
        self.n_sequences = self.n_positions = self.n_not_finite = 0
        #: Per batch, G [B, rows, columns] by layer with the data's labels, and the mean loss [B];
        #: None once they did not fit.
        self.data_gradients: list[tuple[dict[str, Tensor], Tensor]] | None = (
            [] if keep_data else None
        )
        self.kind: Kind = kind
        self.fisher: Fisher = fisher
        self.seed = seed
        self._memory = free_memory(model.device) // 4 if memory is None else memory
        self._used = 0
        self._tokens: list[Tensor] = []
        self._gradients: list[dict[str, Tensor]] | None = [] if kind == "ekfac" else None
        self._sums: dict[_Key, Tensor] = {}

    def add(self, tokens: Tensor) -> None:
        """Take up a batch int64 [B, T+1]. Sequences with a non-finite gradient are left out."""
        sampled = self.fisher == "sampled"
        keep_data = self.data_gradients is not None
        backward = sequence_backward(
            self.model,
            self.regions.names,
            tokens,
            uniform=sampled_uniform(self.seed, tokens) if sampled else None,
            data=not sampled or keep_data,
        )
        own = backward.sampled if sampled else backward.deltas
        finite = backward.is_finite()
        formed = None
        if keep_data:
            formed = self.regions.form(backward.inputs, backward.deltas)
            self._keep_data(formed, backward.mean_loss, finite)
        inputs, positions = backward.inputs, int(backward.real[finite].sum())
        if not bool(finite.all()):
            self._warn_of_broken(finite)
            inputs = {name: x[finite] for name, x in inputs.items()}
            own = {name: delta[finite] for name, delta in own.items()}
            tokens, formed = tokens[finite.cpu()], None
        if len(tokens):
            self.n_sequences += len(tokens)
            self.n_positions += positions
            real = backward.real[finite]
            self._add_moments(inputs, own, None if bool(real.all()) else real)
            if self.kind == "ekfac":
                self._keep(tokens, inputs, own, None if sampled else formed)

    def factors(self) -> dict[tuple[Head, BlockName], BlockFactors]:
        """The factors of what was added so far; more may be added afterwards.

        Raises:
            CurvatureError: nothing was added.
        """
        if not self.n_sequences:
            raise CurvatureError(
                f"no sequences to estimate the curvature on ({self.n_not_finite} were left out: "
                "their gradients are not finite)"
                if self.n_not_finite
                else "no sequences to estimate the curvature on; give at least one batch"
            )
        spectra = {
            key: torch.linalg.eigh(total / self.n_positions) for key, total in self._sums.items()
        }
        self._warn_of_rank(spectra)
        bases = {key: found.eigenvectors for key, found in spectra.items()}
        if self.kind == "kfac":
            length = self.n_positions / self.n_sequences
            eigenvalues = [
                length
                * torch.outer(
                    spectra[_s(block)].eigenvalues.clamp_min(0),
                    spectra[_a(block)].eigenvalues.clamp_min(0),
                )
                for block in self.blocks
            ]
        else:
            eigenvalues = self._corrected(bases)
        return {
            (block.unit, block.name): BlockFactors(bases[_a(block)], bases[_s(block)], own)
            for block, own in zip(self.blocks, eigenvalues, strict=True)
        }

    def _add_moments(
        self, inputs: dict[str, Tensor], deltas: dict[str, Tensor], real: Tensor | None
    ) -> None:
        done: set[_Key] = set()
        for block in self.blocks:
            for key, source, values in (
                (_a(block), block.of_input, inputs),
                (_s(block), block.of_output, deltas),
            ):
                if key not in done:
                    done.add(key)
                    found = source(values)
                    flat = found.flatten(0, 1) if real is None else found[real]
                    if flat.dtype != torch.float64:
                        flat = flat.float()
                    # A batch's product as exact as its factors, the sum over batches in float64.
                    own = (flat.T @ flat).double()
                    self._sums[key] = own.add_(self._sums[key]) if key in self._sums else own

    def _keep(
        self,
        tokens: Tensor,
        inputs: dict[str, Tensor],
        own: dict[str, Tensor],
        formed: dict[str, Tensor] | None,
    ) -> None:
        self._tokens.append(tokens)
        if self._gradients is None:
            return
        if formed is None:
            formed = self.regions.form(inputs, own)
            if not self._has_room(formed):
                self._gradients = None
                return
        self._gradients.append(formed)

    def _keep_data(self, formed: dict[str, Tensor], loss: Tensor, finite: Tensor) -> None:
        assert self.data_gradients is not None
        if not self._has_room(formed):
            self.data_gradients = None
            return
        if not bool(finite.all()):
            for gradients in formed.values():
                gradients[~finite] = torch.nan
            loss = torch.where(finite, loss, torch.nan)
        self.data_gradients.append((formed, loss))

    def _has_room(self, formed: dict[str, Tensor]) -> bool:
        self._used += sum(gradients.nbytes for gradients in formed.values())
        return self._used <= self._memory

    def _corrected(self, bases: dict[_Key, Tensor]) -> list[Tensor]:
        """Λ of each block."""
        totals = [
            torch.zeros(block.shape, dtype=torch.float64, device=self.model.device)
            for block in self.blocks
        ]

        # In the gradients' own precision, as they are; the sum over sequences in float64.
        narrow: dict[tuple[_Key, torch.dtype], Tensor] = {}

        def basis(key: _Key, dtype: torch.dtype) -> Tensor:
            return narrow.setdefault((key, dtype), bases[key].to(dtype))

        def add(formed: dict[str, Tensor]) -> None:
            for block, total in zip(self.blocks, totals, strict=True):
                own = self.regions.of_block(block, formed)
                u_s, u_a = basis(_s(block), own.dtype), basis(_a(block), own.dtype)
                at_once = max(1, _ROTATED // (own.element_size() * own[0].numel()))
                for first in range(0, len(own), at_once):
                    rotated = u_s.T @ own[first : first + at_once] @ u_a
                    total += rotated.square_().sum(0, dtype=torch.float64)

        if self._gradients is not None:
            for formed in self._gradients:
                add(formed)
        else:
            self._again(add)
        return [total / self.n_sequences for total in totals]

    def _again(self, add: Callable[[dict[str, Tensor]], None]) -> None:
        sampled = self.fisher == "sampled"
        for tokens in self._tokens:
            backward = sequence_backward(
                self.model,
                self.regions.names,
                tokens,
                uniform=sampled_uniform(self.seed, tokens) if sampled else None,
                data=not sampled,
            )
            own = backward.sampled if sampled else backward.deltas
            add(self.regions.form(backward.inputs, own))

    def _warn_of_broken(self, finite: Tensor) -> None:
        first = self.n_sequences + self.n_not_finite
        broken = (first + (~finite).nonzero()[:, 0]).tolist()
        self.n_not_finite += len(broken)
        warnings.warn(
            f"curvature sequences {', '.join(map(str, broken[:5]))}"
            f"{', ...' if len(broken) > 5 else ''} have a gradient that is not finite and are left "
            f"out ({self.n_not_finite} so far)",
            stacklevel=3,
        )

    def _warn_of_rank(self, spectra: dict[_Key, tuple[Tensor, Tensor]]) -> None:
        short = sorted(
            {len(values) for values, _ in spectra.values() if self.n_positions < len(values)}
        )
        if short:
            warnings.warn(
                f"the curvature is estimated on {self.n_positions} positions, fewer than the "
                f"{short[-1]} directions of a block: in the others the damping alone decides; give "
                "more sequences",
                stacklevel=4,
            )


def _a(block: Block) -> _Key:
    return "A", block.input_key


def _s(block: Block) -> _Key:
    return "S", block.output_key
