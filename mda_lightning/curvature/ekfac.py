"""EK-FAC restricted to a unit's own weights (Eqs. 13, 14; SPEC §4).

For a block W of a linear layer y = Wx, with x the layer's input at a position and δ the gradient of
the sequence's summed loss at the layer's output:

    A = E_positions[x xᵀ] = U_A Σ_A U_Aᵀ,   S = E_positions[δ δᵀ] = U_S Σ_S U_Sᵀ,
    Λ = E_sequences[(U_Sᵀ G_i U_A)²],       G_i = Σ_t δ[t] x[t]ᵀ,
    H V = U_S (Λ ⊙ (U_Sᵀ V U_A)) U_Aᵀ,      damped by λ = damping · mean(Λ).

Q and K form one block, so S_QK holds their cross-covariance (App. A.2). K-FAC has instead of Λ the
product that it would be if positions were independent, T · Σ_S ⊗ Σ_A.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import BlockName
from mda_lightning.curvature.estimate import CurvatureEstimate
from mda_lightning.curvature.factors import (
    BlockFactors,
    CurvatureError,
    DampingRule,
    Kind,
    check_damping,
)
from mda_lightning.curvature.fisher import Fisher
from mda_lightning.gradients import BlockVector
from mda_lightning.units import Head

#: Damping, as a share of mean(Λ), below which it is as good as none.
_LITTLE = 1e-6


@dataclass(frozen=True)
class SubspaceEKFAC:
    """The damped curvature of a set of blocks, block-diagonal across them (App. A.3).

    Attributes:
        factors: per (unit, block name).
        n_sequences, n_positions: what the factors were estimated on.
        kind: "ekfac" or "kfac".
        fisher: "sampled" (labels drawn from the model, seeded) or "empirical" (the data's labels).
        damping, damping_rule: 0.1 · mean(Λ) by default ("relative"), or λ itself ("absolute").
        seed: of the sampled labels.
        n_not_finite: sequences left out because a gradient was not finite.
        convergence: (sequences, least correlation of scores with those of half as many) for each
            size tried, where the size was chosen (:func:`fit_converged`).
    """

    factors: dict[tuple[Head, BlockName], BlockFactors]
    n_sequences: int
    n_positions: int
    kind: Kind = "ekfac"
    fisher: Fisher = "sampled"
    damping: float = 0.1
    damping_rule: DampingRule = "relative"
    seed: int = 0
    n_not_finite: int = 0
    convergence: tuple[tuple[int, float], ...] = field(default=())

    def __post_init__(self) -> None:
        check_damping(self.damping)
        for (unit, name), own in self.factors.items():
            if own.is_zero and self.damping_rule == "relative":
                continue
            if float(own.eigenvalues.min()) + self.damping_of(own) <= 0:
                raise CurvatureError(
                    f"the curvature of {unit} {name} is singular and the damping "
                    f"{self.damping_of(own):g} does not lift it; give a damping above 0, or more "
                    f"curvature sequences than {self.n_sequences}"
                )

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel,
        units: Sequence[Head],
        blocks: Sequence[BlockName],
        batches: Iterable[Tensor],
        *,
        kind: Kind = "ekfac",
        fisher: Fisher = "sampled",
        seed: int = 0,
        damping: float = 0.1,
        damping_rule: DampingRule = "relative",
        memory: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> SubspaceEKFAC:
        """Estimate the factors of every block on ``batches``.

        One pass over them where the per-sequence gradients can be kept in memory, else two.

        Args:
            model: a causal language model, at fixed weights.
            units: the heads.
            blocks: block names, the same for every head.
            batches: token batches int64 [B, T+1]; negative numbers fill up shorter sequences.
            kind: "ekfac", or "kfac" for comparison.
            fisher: whose labels the gradients are of.
            seed: of the sampled labels.
            damping: multiple of mean(Λ) per block, or the value itself.
            damping_rule: which of the two.
            memory: bytes for per-sequence gradients; None for a quarter of what is free.
            progress: called with the number of sequences after each batch of the first pass.

        Raises:
            CurvatureError: no sequence with a finite gradient, or a damping that leaves Λ + λ at 0.
        """
        check_damping(damping)
        estimate = CurvatureEstimate(
            model, units, blocks, kind=kind, fisher=fisher, seed=seed, memory=memory
        )
        for tokens in batches:
            estimate.add(tokens)
            if progress is not None:
                progress(len(tokens))
        return cls.of(estimate, damping=damping, damping_rule=damping_rule)

    @classmethod
    def of(
        cls,
        estimate: CurvatureEstimate,
        *,
        damping: float,
        damping_rule: DampingRule = "relative",
    ) -> SubspaceEKFAC:
        """The factors of what an estimate has seen so far."""
        return cls(
            estimate.factors(),
            estimate.n_sequences,
            estimate.n_positions,
            estimate.kind,
            estimate.fisher,
            damping,
            damping_rule,
            estimate.seed,
            estimate.n_not_finite,
        )

    def damping_of(self, factors: BlockFactors) -> float:
        """λ of one block."""
        if self.damping_rule == "absolute":
            return self.damping
        return self.damping * float(factors.eigenvalues.mean())

    def damped(self, damping: float, rule: DampingRule = "relative") -> SubspaceEKFAC:
        """The same factors under another damping."""
        return replace(self, damping=damping, damping_rule=rule)

    def solve(self, vectors: BlockVector) -> BlockVector:
        """(H + λ)⁻¹ v for each block (IHVP): {(unit, block): [o, i]} in and out.

        A block in which no sequence had a gradient has no curvature and no score: its IHVP is NaN,
        with a warning.
        """
        self._warn_of_zero(vectors)
        self._warn_of_little_damping()
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
        found = {}
        for key, vector in vectors.items():
            own = self.factors[key]
            damped = own.eigenvalues + self.damping_of(own)
            rotated = own.rotate(vector) * spectrum(damped if damped.any() else damped * torch.nan)
            found[key] = own.rotate_back(rotated).to(vector)
        return found

    def _warn_of_little_damping(self) -> None:
        if any(
            self.damping_of(own) < _LITTLE * float(own.eigenvalues.mean())
            for own in self.factors.values()
        ):
            warnings.warn(
                f"a damping of {self.damping:g} ({self.damping_rule}) is next to none: directions "
                "that the curvature's sequences hardly show decide the scores; 0.1 (relative) is "
                "usual",
                stacklevel=3,
            )

    def _warn_of_zero(self, keys: Iterable[tuple[Head, BlockName]]) -> None:
        zero = [
            f"{u} {b}" for u, b in keys if (u, b) in self.factors and self.factors[u, b].is_zero
        ]
        if zero and self.damping_rule == "relative":
            warnings.warn(
                f"no sequence has a gradient in {', '.join(zero)}: there is no curvature and their "
                "scores are NaN; leave these heads out, or damp by a value "
                "(damping_rule='absolute')",
                stacklevel=3,
            )

    def to_provenance(self) -> dict[str, Any]:
        """How the curvature was made, as JSON values."""
        return {
            "curvature": self.kind,
            "fisher": self.fisher,
            "damping": self.damping,
            "damping_rule": self.damping_rule,
            "seed": self.seed,
            "n_sequences": self.n_sequences,
            "n_positions": self.n_positions,
            "n_curvature_not_finite": self.n_not_finite,
            "convergence": [list(one) for one in self.convergence],
        }
