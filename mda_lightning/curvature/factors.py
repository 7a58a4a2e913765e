"""Eigenbases and eigenvalues of one block's curvature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from torch import Tensor

Kind: TypeAlias = Literal["ekfac", "kfac"]
DampingRule: TypeAlias = Literal["relative", "absolute"]


class CurvatureError(ValueError):
    """Curvature that cannot be inverted or does not fit what it is asked to act on."""


@dataclass(frozen=True)
class BlockFactors:
    """Eigenbases and corrected eigenvalues of one block, float64.

    Attributes:
        basis_a: U_A [i, i]; basis_s: U_S [o, o].
        eigenvalues: Λ [o, i].
    """

    basis_a: Tensor
    basis_s: Tensor
    eigenvalues: Tensor

    @property
    def is_zero(self) -> bool:
        """Whether no sequence had a gradient here."""
        return not bool(self.eigenvalues.any())

    def rotate(self, vector: Tensor) -> Tensor:
        """U_Sᵀ V U_A, float64 [..., o, i]."""
        return self.basis_s.T @ vector.to(self.basis_a) @ self.basis_a

    def rotate_back(self, rotated: Tensor) -> Tensor:
        """U_S V U_Aᵀ."""
        return self.basis_s @ rotated @ self.basis_a.T


def check_damping(damping: float) -> None:
    """Refuse a damping that is negative or not finite.

    Raises:
        CurvatureError: it is.
    """
    if damping < 0 or not np.isfinite(damping):
        raise CurvatureError(f"damping {damping} must be a finite number >= 0")
