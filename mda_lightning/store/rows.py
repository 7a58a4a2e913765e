"""Rows of scores in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class ScoreRows(NamedTuple):
    """Scores of N samples on U units, by K blocks; positive means training promotes the unit.

    Attributes:
        sample_id: int64 [N].
        step: int64 [N], the update that trained on the sample; -1 where none did.
        values: float32 [N, U, K].
        loss: float32 [N], of the sample, mean over its positions.
        ihvp_step: int64 [N], step of the weights at which curvature and probe gradient were taken;
            -1 where several checkpoints are averaged.
        domain: names [N], or None in a table without domains.
    """

    sample_id: NDArray[np.int64]
    step: NDArray[np.int64]
    values: NDArray[np.float32]
    loss: NDArray[np.float32]
    ihvp_step: NDArray[np.int64]
    domain: NDArray[np.str_] | None = None

    def where(self, kept: NDArray[np.bool_] | NDArray[np.int64]) -> ScoreRows:
        """The chosen rows, by a mask or by their places."""
        columns: list[Any] = [None if one is None else one[kept] for one in self]
        return ScoreRows(*columns)

    def in_order(self) -> ScoreRows:
        """By step, then sample id; otherwise as they came."""
        return self.where(np.lexsort((self.sample_id, self.step)))

    @property
    def n_not_finite(self) -> int:
        """Rows with a score that is not finite."""
        return int((~np.isfinite(self.values)).any(axis=(1, 2)).sum())


def joined(blocks: Sequence[ScoreRows]) -> ScoreRows:
    """Rows of several blocks, one after another; all have domains or none has."""
    together: Any = zip(*blocks, strict=True)
    columns: list[Any] = [None if c[0] is None else np.concatenate(c) for c in together]
    return ScoreRows(*columns)


def checked(rows: ScoreRows, *, n_units: int, n_blocks: int, domains: bool) -> ScoreRows:
    """A copy in the documented types, with NaN for every score that is not finite.

    Raises:
        ValueError: shapes that do not fit, a step out of range, or domains where ``domains`` is
            false, or the other way round.
    """
    n = len(rows.sample_id)
    with np.errstate(over="ignore"):
        values = np.array(rows.values, np.float32)
    if values.shape != (n, n_units, n_blocks):
        raise ValueError(
            f"values {values.shape} do not fit {n} samples, {n_units} units and {n_blocks} blocks"
        )
    values[~np.isfinite(values)] = np.nan
    rows = ScoreRows(
        np.array(rows.sample_id, np.int64),
        np.array(rows.step, np.int64),
        values,
        np.array(rows.loss, np.float32),
        np.array(rows.ihvp_step, np.int64),
        None if rows.domain is None else np.array(rows.domain, np.str_),
    )
    for name in ("step", "loss", "ihvp_step", "domain"):
        column = getattr(rows, name)
        if column is not None and column.shape != (n,):
            raise ValueError(f"{name} {column.shape} does not fit {n} samples")
    for name in ("step", "ihvp_step"):
        steps = getattr(rows, name)
        if n and not -1 <= steps.min() <= steps.max() < 2**31:
            raise ValueError(
                f"{name} is {steps.min()} to {steps.max()}; it is -1, or 0 to 2^31 - 1"
            )
    if (rows.domain is not None) != domains:
        has = "has" if domains else "has no"
        raise ValueError(
            f"the table {has} domains; ScoreWriter(domains=...) says whether rows come with theirs"
        )
    return rows
