"""How many sequences the curvature needs: as many as leave the scores as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import BlockName
from mda_lightning.curvature.ekfac import SubspaceEKFAC
from mda_lightning.curvature.estimate import CurvatureEstimate
from mda_lightning.curvature.factors import DampingRule, Kind, check_damping
from mda_lightning.curvature.fisher import Fisher
from mda_lightning.gradients import BlockVector
from mda_lightning.units import Head


def score_correlation(
    curvature: SubspaceEKFAC, first: BlockVector, second: BlockVector
) -> dict[Head, float]:
    """The correlation, per unit, of the scores that two IHVPs give.

    Over sequences whose gradients have the curvature H as their second moment it is
    v₁ᵀHv₂ / √(v₁ᵀHv₁ · v₂ᵀHv₂), and needs no sequence. A unit without scores (zero or NaN) is
    left out.

    Args:
        curvature: H, taken without damping.
        first, second: vectors [o, i] of the same blocks.
    """
    sums: dict[Head, Tensor] = {}
    for (unit, name), vector in first.items():
        own = curvature.factors[unit, name]
        a, b = own.rotate(vector), own.rotate(second[unit, name])
        products = [(own.eigenvalues * x * y).sum() for x, y in ((a, b), (a, a), (b, b))]
        sums[unit] = sums.get(unit, 0) + torch.stack(products)
    found = {unit: float(s[0] / (s[1] * s[2]).sqrt()) for unit, s in sums.items()}
    return {unit: value for unit, value in found.items() if value == value}


def fit_converged(
    model: PreTrainedModel,
    units: Sequence[Head],
    blocks: Sequence[BlockName],
    batches: Iterable[Tensor],
    probes: Sequence[BlockVector],
    *,
    tolerance: float = 0.98,
    first: int = 32,
    kind: Kind = "ekfac",
    fisher: Fisher = "sampled",
    seed: int = 0,
    damping: float = 0.1,
    damping_rule: DampingRule = "relative",
    memory: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> SubspaceEKFAC:
    """Curvature on as many sequences as it takes: twice as many until the scores stay.

    After ``first``, 2·``first``, 4·``first``, ... sequences the probes are solved for; it ends when
    the scores of every unit correlate to ``tolerance`` with those of half as many sequences
    (:func:`score_correlation`). What was tried is in :attr:`SubspaceEKFAC.convergence`.

    Args:
        batches: token batches int64 [B, T+1], in an order that represents the data from its
            beginning; those not needed are not read.
        probes: ∇f of the mechanisms that will be scored.
        tolerance: correlation, in (0, 1).
        first: sequences that are tried first.
        model, units, blocks, kind, fisher, seed, damping, damping_rule, memory, progress: as for
            :meth:`SubspaceEKFAC.fit`.

    Warns:
        UserWarning: the batches ended before it converged.
    """
    check_damping(damping)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; it is a correlation, in (0, 1)")
    estimate = CurvatureEstimate(
        model, units, blocks, kind=kind, fisher=fisher, seed=seed, memory=memory
    )
    source, rest = iter(batches), None
    tried: list[tuple[int, float]] = []
    former: list[BlockVector] | None = None
    size, found = max(first, 1), None
    while True:
        ended = False
        while estimate.n_sequences < size:
            tokens = next(source, None) if rest is None else rest
            if tokens is None:
                ended = True
                break
            room = size - estimate.n_sequences
            tokens, rest = tokens[:room], (tokens[room:] if len(tokens) > room else None)
            estimate.add(tokens)
            if progress is not None:
                progress(len(tokens))
        if found is not None and estimate.n_sequences == found.n_sequences:
            break  # nothing more to add
        found = SubspaceEKFAC.of(estimate, damping=damping, damping_rule=damping_rule)
        solved = [found.solve(probe) for probe in probes]
        # What is left at the end may be less than as much again, which says little.
        if former is not None and found.n_sequences >= size:
            values = [
                value
                for a, b in zip(former, solved, strict=True)
                for value in score_correlation(found, a, b).values()
            ]
            least = min(values, default=1.0)
            tried.append((found.n_sequences, least))
            if least >= tolerance:
                return replace(found, convergence=tuple(tried))
        if ended:
            break
        former, size = solved, 2 * estimate.n_sequences
    so_far = (
        f"the least correlation of scores with those of half as many is {tried[-1][1]:.3f}, the "
        f"tolerance {tolerance}"
        if tried
        else "so few that it cannot be told whether that is enough"
    )
    warnings.warn(
        f"the curvature is estimated on all {found.n_sequences} sequences given and has not "
        f"converged: {so_far}; give more sequences, or a number of them to have it without this",
        stacklevel=2,
    )
    return replace(found, convergence=tuple(tried))
