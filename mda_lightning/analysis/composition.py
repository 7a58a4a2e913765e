"""Which domains the top samples come from, against all the samples that were scored.

The yardstick is exact: a random set of the same size, drawn without replacement from the scored
samples, has a hypergeometric number of samples of each domain. Over several seeds, each with its
own scored set, the counts add up and so do the independent draws (by convolution).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom


@dataclass(frozen=True)
class DomainShare:
    """One domain's part of the top set and of all scored samples.

    Attributes:
        domain: its name.
        top, top_total: samples of this domain in the top set; size of the top set.
        base, base_total: the same among all scored samples.
        chance_low, chance_high: central 95% range of the share a random set of the same size has.
        per_seed: the top share of each seed, in the order given.
    """

    domain: str
    top: int
    top_total: int
    base: int
    base_total: int
    chance_low: float
    chance_high: float
    per_seed: tuple[float, ...]

    @property
    def top_share(self) -> float:
        return self.top / self.top_total

    @property
    def base_share(self) -> float:
        return self.base / self.base_total

    @property
    def lift(self) -> float:
        """Top share over base share: 1 means as common as anywhere."""
        return self.top_share / self.base_share

    @property
    def beyond_chance(self) -> bool:
        return not self.chance_low <= self.top_share <= self.chance_high


def composition(
    top: Sequence[Sequence[str]], scored: Sequence[Sequence[str]], *, most: int = 12
) -> list[DomainShare]:
    """Domain shares of the top sets against the scored sets, largest lift first.

    Args:
        top: for each seed, the domain of every sample in its top set.
        scored: for each seed, the domain of every scored sample (the top set included).
        most: keep this many domains (the commonest in either set); the rest become one row.

    Raises:
        ValueError: the lists do not match, one is empty, or a top set is no subset of its scored
            set.
    """
    if len(top) != len(scored) or not top or not all(map(len, top)):
        raise ValueError(
            f"{len(top)} top sets and {len(scored)} scored sets: give one non-empty pair per seed"
        )
    tops = [Counter(names) for names in top]
    bases = [Counter(names) for names in scored]
    for tally, base in zip(tops, bases, strict=True):
        over = sorted(name for name in tally if tally[name] > base[name])
        if over:
            raise ValueError(
                f"domain {over[0]!r} has {tally[over[0]]} samples in the top set and "
                f"{base[over[0]]} scored ones: the top set must come from the scored samples"
            )
    total_top, total_base = sum(tops, Counter()), sum(bases, Counter())
    if len(total_base) > most:
        n_top, n_base = total_top.total(), total_base.total()
        weight = {
            name: max(total_top[name] / n_top, total_base[name] / n_base) for name in total_base
        }
        kept = set(sorted(weight, key=lambda name: (-weight[name], name))[: most - 1])
        rest = f"{len(total_base) - len(kept)} other domains"
        tops = [_folded(tally, kept, rest) for tally in tops]
        bases = [_folded(tally, kept, rest) for tally in bases]
        total_base = sum(bases, Counter())
    rows = [_share(name, tops, bases) for name in total_base]
    return sorted(rows, key=lambda row: (-row.lift, -row.top, row.domain))


def _folded(tally: Counter[str], kept: set[str], rest: str) -> Counter[str]:
    folded: Counter[str] = Counter()
    for name, count in tally.items():
        folded[name if name in kept else rest] += count
    return folded


def _share(name: str, tops: list[Counter[str]], bases: list[Counter[str]]) -> DomainShare:
    low, high = chance_range(
        [base.total() for base in bases],
        [base[name] for base in bases],
        [tally.total() for tally in tops],
    )
    top_total = sum(tally.total() for tally in tops)
    return DomainShare(
        domain=name,
        top=sum(tally[name] for tally in tops),
        top_total=top_total,
        base=sum(base[name] for base in bases),
        base_total=sum(base.total() for base in bases),
        chance_low=low / top_total,
        chance_high=high / top_total,
        per_seed=tuple(tally[name] / tally.total() for tally in tops),
    )


def chance_range(
    population: Sequence[int], members: Sequence[int], drawn: Sequence[int]
) -> tuple[int, int]:
    """Central 95% range of members in random draws without replacement, summed over seeds.

    ``drawn[i]`` samples are taken from ``population[i]``, of which ``members[i]`` belong.
    """
    pmf: NDArray[np.float64] = np.ones(1)
    for size, belonging, taken in zip(population, members, drawn, strict=True):
        counts = np.arange(min(belonging, taken) + 1)
        pmf = np.convolve(pmf, hypergeom.pmf(counts, size, belonging, taken))
    cumulative = np.cumsum(pmf)
    low, high = np.searchsorted(cumulative, [0.025, 0.975])
    return int(low), int(min(high, cumulative.size - 1))
