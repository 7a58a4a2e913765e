"""EK-FAC restricted to a unit's own weights (Eqs. 13, 14; SPEC §4).

For a block W of a linear layer y = Wx, with x the layer's input at a position and δ the gradient of
the sequence's summed loss at the layer's output:

    A = E_positions[x xᵀ] = U_A Σ_A U_Aᵀ,   S = E_positions[δ δᵀ] = U_S Σ_S U_Sᵀ,
    Λ = E_sequences[(U_Sᵀ G_i U_A)²],       G_i = Σ_t δ[t] x[t]ᵀ,
    H V = U_S (Λ ⊙ (U_Sᵀ V U_A)) U_Aᵀ,      damped by λ = damping · mean(Λ).

Q and K form one block, so S_QK holds their cross-covariance (App. A.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import Block, BlockName, describe
from mda_lightning.gradients import (
    BlockVector,
    SequenceBackward,
    sequence_backward,
    sequence_gradients,
)
from mda_lightning.units import Head

Fisher = Literal["sampled", "empirical"]


class CurvatureError(ValueError):
    """Curvature that cannot be inverted or does not fit what it is asked to act on."""


@dataclass(frozen=True)
class BlockFactors:
    """Eigenbases and corrected eigenvalues of one block, float64.

    Attributes:
        basis_a: U_A [i, i]; basis_s: U_S [o, o].
        eigenvalues: Λ [o, i].
        damping: λ, added to Λ.
    """

    basis_a: Tensor
    basis_s: Tensor
    eigenvalues: Tensor
    damping: float

    def apply(self, vector: Tensor, spectrum: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of the damped curvature times a vector [o, i], in the vector's dtype."""
        rotated = self.basis_s.T @ vector.double() @ self.basis_a
        rotated = rotated * spectrum(self.eigenvalues + self.damping)
        return (self.basis_s @ rotated @ self.basis_a.T).to(vector.dtype)


@dataclass(frozen=True)
class SubspaceEKFAC:
    """The damped EK-FAC curvature of a set of blocks, block-diagonal across them (App. A.3).

    Attributes:
        factors: per (unit, block name).
        n_sequences, n_positions: what the factors were estimated on.
        fisher: "sampled" (labels drawn from the model, seeded) or "empirical" (the data's labels).
        damping, damping_rule: 0.1 · mean(Λ) by default ("relative"), or λ itself ("absolute").
        seed: of the sampled labels.
    """

    factors: dict[tuple[Head, BlockName], BlockFactors]
    n_sequences: int
    n_positions: int
    fisher: Fisher
    damping: float
    damping_rule: Literal["relative", "absolute"]
    seed: int

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel,
        units: Sequence[Head],
        blocks: Sequence[BlockName],
        batches: Iterable[Tensor],
        *,
        fisher: Fisher = "sampled",
        seed: int = 0,
        damping: float = 0.1,
        damping_rule: Literal["relative", "absolute"] = "relative",
        progress: Callable[[int], None] | None = None,
    ) -> SubspaceEKFAC:
        """Estimate the factors of every block in two sweeps over ``batches`` held in memory.

        Args:
            model: a causal language model, at fixed weights.
            units: the heads.
            blocks: block names, the same for every head.
            batches: token batches int64 [B, T+1] of real sequences, all of one length.
            fisher: whose labels the gradients are of.
            seed: seed of the sampled labels; the draw depends on a sequence's place in the stream,
                not on how the stream is cut into batches.
            damping: multiple of mean(Λ) per block, or the value itself.
            progress: called with the number of sequences after each batch.

        Raises:
            CurvatureError: no sequence, a non-finite gradient, or a damping that leaves Λ + λ at 0.
        """
        if damping < 0 or not np.isfinite(damping):
            raise CurvatureError(f"damping {damping} must be a finite number >= 0")
        wanted = describe(model).blocks(units, blocks)
        moments = _Moments(wanted)
        held: list[dict[tuple[Head, BlockName], Tensor]] = []
        for tokens in batches:
            uniform = None
            if fisher == "sampled":
                uniform = sampled_uniform(seed, moments.n_sequences, *tokens[:, 1:].shape)
            backward = sequence_backward(model, moments.names, tokens, uniform=uniform)
            held.append(moments.add(backward))
            if progress is not None:
                progress(len(tokens))
        if not moments.n_sequences:
            raise CurvatureError(
                "no sequences to estimate the curvature on; give at least one batch"
            )
        factors = {}
        for block in wanted:
            key = (block.unit, block.name)
            factors[key] = moments.factors(
                block, [gradients[key] for gradients in held], damping, damping_rule
            )
        return cls(
            factors,
            moments.n_sequences,
            moments.n_positions,
            fisher,
            damping,
            damping_rule,
            seed,
        )

    def solve(self, vectors: BlockVector) -> BlockVector:
        """(H + λ)⁻¹ v for each block (IHVP): {(unit, block): [o, i]} in and out."""
        return self._map(vectors, torch.reciprocal)

    def apply(self, vectors: BlockVector) -> BlockVector:
        """(H + λ) v for each block."""
        return self._map(vectors, lambda spectrum: spectrum)

    def _map(self, vectors: BlockVector, spectrum: Callable[[Tensor], Tensor]) -> BlockVector:
        missing = [f"{unit} {name}" for unit, name in vectors if (unit, name) not in self.factors]
        if missing:
            raise CurvatureError(
                f"no curvature for {', '.join(missing)}; it was fitted for "
                f"{', '.join(f'{u} {n}' for u, n in self.factors)}"
            )
        return {key: self.factors[key].apply(vector, spectrum) for key, vector in vectors.items()}

    def to_provenance(self) -> dict[str, Any]:
        """How the curvature was made, as JSON values."""
        return {
            "curvature": "ekfac",
            "fisher": self.fisher,
            "damping": self.damping,
            "damping_rule": self.damping_rule,
            "seed": self.seed,
            "n_sequences": self.n_sequences,
            "n_positions": self.n_positions,
        }


def sampled_uniform(seed: int, first: int, count: int, length: int) -> Tensor:
    """Uniform draws float32 [count, length] that depend on (seed, place in the stream) alone."""
    rows = [
        np.random.default_rng([seed, first + i]).random(length, dtype=np.float32)
        for i in range(count)
    ]
    return torch.from_numpy(np.stack(rows))


class _Moments:
    """Running second moments: A shared by what shares an input, S per block or per layer."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self.names = list(dict.fromkeys(name for block in blocks for name in block.modules))
        self.n_sequences = 0
        self.n_positions = 0
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._bases: dict[tuple[str, str], Tensor] = {}

    def add(self, backward: SequenceBackward) -> dict[tuple[Head, BlockName], Tensor]:
        """Add a batch; returns each block's per-sequence gradients [B, o, i], on the CPU."""
        sequences, length = backward.loss.shape
        self.n_sequences += sequences
        self.n_positions += sequences * length
        done: set[tuple[str, str]] = set()
        gradients = {}
        for block in self.blocks:
            x, delta = block.of_input(backward.inputs), block.of_output(backward.deltas)
            for key, source in ((_a(block), x), (_s(block), delta)):
                if key not in done:
                    done.add(key)
                    flat = source.flatten(0, 1).double()
                    self._sums[key] = self._sums.get(key, 0) + flat.T @ flat
            own = sequence_gradients(block, backward.inputs, backward.deltas)
            if not torch.isfinite(own).all():
                raise CurvatureError(
                    f"the gradient of {block.unit} {block.name} is not finite in the sequences "
                    f"{self.n_sequences - sequences}..{self.n_sequences - 1} of the curvature set; "
                    "the model has diverged or the precision is too low"
                )
            gradients[block.unit, block.name] = own.cpu()
        return gradients

    def factors(self, block: Block, held: list[Tensor], damping: float, rule: str) -> BlockFactors:
        basis_a, basis_s = self._basis(_a(block)), self._basis(_s(block))
        total = torch.zeros(block.shape, dtype=torch.float64, device=basis_a.device)
        for gradients in held:
            rotated = basis_s.T @ gradients.to(basis_a.device).double() @ basis_a
            total += rotated.square().sum(0)
        eigenvalues = total / self.n_sequences
        value = damping * float(eigenvalues.mean()) if rule == "relative" else damping
        if float(eigenvalues.min()) + value <= 0:
            raise CurvatureError(
                f"the curvature of {block.unit} {block.name} is singular and the damping {value:g} "
                "does not lift it; give a damping above 0, or more curvature sequences than "
                f"{self.n_sequences}. A gradient that is zero everywhere has no curvature at all"
            )
        return BlockFactors(basis_a, basis_s, eigenvalues, value)

    def _basis(self, key: tuple[str, str]) -> Tensor:
        cached = self._bases.get(key)
        if cached is None:
            cached = torch.linalg.eigh(self._sums[key] / self.n_positions).eigenvectors
            self._bases[key] = cached
        return cached


def _a(block: Block) -> tuple[str, str]:
    return "A", block.input_key


def _s(block: Block) -> tuple[str, str]:
    return "S", block.output_key
