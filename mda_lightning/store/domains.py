"""Scores by the domain of the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Domains: TypeAlias = (
    Mapping[int, str]
    | Sequence[str]
    | NDArray[Any]
    | Callable[[NDArray[np.int64]], Sequence[str] | None]
)
"""Names of samples: a mapping from ids, a sequence by id, or a function of ids."""


def names_of(ids: NDArray[np.int64], domains: Domains) -> list[str]:
    """The name of each sample's domain.

    Raises:
        KeyError: a sample is not among those given.
        ValueError: the function knows no domains.
    """
    if callable(domains):
        names = domains(ids)
        if names is None:
            raise ValueError("the corpus has no domains; give a mapping from sample ids to names")
        return [str(name) for name in names]
    known = domains if isinstance(domains, Mapping) else range(len(domains))
    missing = [int(one) for one in ids if int(one) not in known]
    if missing:
        raise KeyError(
            f"{len(missing)} of {len(ids)} samples have no domain among those given, first "
            f"{missing[0]}; give one for each"
        )
    return [str(domains[int(one)]) for one in ids]


def summary_by(names: Sequence[str] | NDArray[Any], scores: NDArray[np.float64]) -> pd.DataFrame:
    """See :meth:`ScoreTable.by_domain`; names and scores [M] of samples."""
    finite = np.isfinite(scores)
    positive = np.where(finite, scores > 0, np.nan)
    frame = pd.DataFrame(
        {
            "domain": np.asarray(names, dtype=object),
            "score": np.where(finite, scores, np.nan),
            "positive": positive,
        }
    )
    by = frame.groupby("domain")
    return pd.DataFrame(
        {
            "n": by["score"].count(),
            "n_not_finite": by.size() - by["score"].count(),
            "mean": by["score"].mean(),
            "std": by["score"].std(ddof=0),
            "sum": by["score"].sum(min_count=1),
            "share_positive": by["positive"].mean(),
        }
    )
