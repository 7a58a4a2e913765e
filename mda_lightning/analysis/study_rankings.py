"""The scores and rankings of one seed of a study, read for comparison sample by sample."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from mda_lightning.analysis.datamodeling import SubsetOutcomes
from mda_lightning.analysis.study import SeedRun, Study
from mda_lightning.store import ScoreTable
from mda_lightning.store.rankings import Rankings

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SUBSETS_SCHEMA = 1
PREFERRED = ("influence", "ekfac")


@dataclass(frozen=True, eq=False)
class SeedScores:
    """Influence scores of one seed's window.

    Attributes:
        ranking: by which they are named; None for the base run's own table.
        estimator: "replay" or "in_run".
        sample_ids: ascending, [N].
        heads: head -> scores [N], NaN where there is none.
        mu: head -> the metric at the window's end; NaN where it was not measured.
    """

    seed: int
    target: str
    ranking: str | None
    estimator: str
    sample_ids: Ints
    heads: Mapping[str, Floats]
    mu: Mapping[str, float]

    @property
    def by_mu(self) -> tuple[str, ...]:
        """Heads, the highest μ first; those without a μ last."""
        lowest = -math.inf

        def place(head: str) -> float:
            value = self.mu.get(head, math.nan)
            return value if math.isfinite(value) else lowest

        return tuple(sorted(self.heads, key=place, reverse=True))

    def leading(self, chance: float | None) -> tuple[str, ...]:
        """Heads whose μ is at least halfway from chance (or 0) to the highest, highest first.

        Empty where no head is above chance by as much as chance itself: nothing has formed.
        """
        floor = chance or 0.0
        known = [head for head in self.by_mu if math.isfinite(self.mu.get(head, math.nan))]
        highest = self.mu[known[0]] if known else floor
        if highest < 2 * floor or highest <= 0:
            return ()
        return tuple(head for head in known if self.mu[head] >= (floor + highest) / 2)


def open_rankings(seed: SeedRun, notes: list[str]) -> Rankings | None:
    """The seed's rankings; a folder that cannot be read is a note."""
    if seed.rankings is None or not seed.rankings.exists():
        return None
    try:
        return Rankings.open(seed.rankings)
    except (ValueError, OSError, KeyError) as error:
        notes.append(f"Seed {seed.seed}: its rankings could not be read: {_reason(error)}.")
        return None


def own_table(seed: SeedRun, notes: list[str]) -> ScoreTable | None:
    """The base run's own score table; one that cannot be read is a note."""
    if seed.scores is None:
        return None
    try:
        table = ScoreTable.open(seed.scores)
    except (ValueError, OSError) as error:
        notes.append(f"Seed {seed.seed}: its scores could not be read: {_reason(error)}.")
        return None
    if not table.complete:
        notes.append(f"Seed {seed.seed}: scoring had not finished.")
        return None
    return table


def primary_of(rankings: Rankings) -> str | None:
    """The influence ranking that stands for the study's: "influence", else EK-FAC, else any."""
    named = [name for name in rankings.names if rankings.units(name)]
    return next((name for name in (*PREFERRED, *named) if name in named), None)


def seed_scores(
    study: Study, seed: SeedRun, rankings: Rankings | None, table: ScoreTable | None
) -> SeedScores | None:
    """Scores of the window's samples, of all heads where all were scored.

    The base run's own table is taken where it has as many heads as the rankings' or more.
    """
    primary = None if rankings is None else primary_of(rankings)
    if rankings is not None and primary is not None:
        ranked = rankings.table(primary)
        if table is None or len(table.units) < len(ranked.units):
            steps = window_of(seed)
            heads = {unit: rankings.values(primary, unit, steps=steps) for unit in ranked.units}
            return _scores(study, seed, primary, ranked, heads)
    if table is None:
        return None
    return _scores(
        study, seed, None, table, {unit: table.mean_scores(unit) for unit in table.units}
    )


def _scores(
    study: Study,
    seed: SeedRun,
    name: str | None,
    table: ScoreTable,
    heads: Mapping[str, tuple[Ints, Floats]],
) -> SeedScores | None:
    kept = {unit: values for unit, (_, values) in heads.items() if np.isfinite(values).any()}
    if not kept:
        return None
    return SeedScores(
        seed=seed.seed,
        target=seed.score_unit or seed.target or next(iter(kept)),
        ranking=name,
        estimator=str(table.estimator),
        sample_ids=next(ids for ids, _ in heads.values()),
        heads=kept,
        mu=mu_of(seed),
    )


def window_of(seed: SeedRun) -> tuple[int, int] | None:
    """[start, end) of the seed's window, where it is closed."""
    start, end = seed.window.start, seed.window.end
    return None if start is None or end is None else (int(start), int(end))


def mu_of(seed: SeedRun) -> dict[str, float]:
    """Head -> the metric in the base run, at its last evaluation up to the window's end."""
    base = seed.base
    if base is None or not base.steps.size:
        return {}
    end = seed.window.end
    rows = np.flatnonzero(base.steps <= end) if end is not None else np.arange(base.steps.size)
    row = rows[-1] if rows.size else -1
    return dict(zip(base.units, base.values[row].tolist(), strict=True))


def ranking_values(
    rankings: Rankings, target: str, *, steps: tuple[int, int] | None
) -> tuple[Ints, dict[str, Floats]]:
    """All rankings of the same samples: ids [N] ascending, and name -> values [N], NaN for none.

    An influence ranking is taken for ``target``; one without that head is left out.
    """
    found = {}
    for name in rankings.names:
        units = rankings.units(name)
        if units and target not in units:
            continue
        found[name] = rankings.values(name, target if units else None, steps=steps)
    if not found:
        return np.zeros(0, dtype=np.int64), {}
    ids = np.unique(np.concatenate([one for one, _ in found.values()]))
    aligned = {}
    for name, (own, values) in found.items():
        row = np.full(ids.size, np.nan)
        row[np.searchsorted(ids, own)] = values
        aligned[name] = row
    return ids, aligned


def score_rows(
    table: ScoreTable, unit: str, *, steps: tuple[int, int] | None
) -> tuple[Ints, Floats]:
    """(step, score) of every row with a finite score, so a sample counts at each of its steps."""
    at = table.columns("step")["step"].astype(np.int64)
    scores = table.row_scores(unit).astype(np.float64)
    kept = np.isfinite(scores)
    if steps is not None:
        kept &= (at >= steps[0]) & (at < steps[1])
    return at[kept], scores[kept]


def read_subsets(path: str | Path) -> SubsetOutcomes:
    """Read ``subsets.npz``: what training on random subsets of a seed's samples gave.

    Raises:
        FileNotFoundError: no such file.
        ValueError: of another schema, or damaged.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file of subsets at {file}")
    try:
        with np.load(file, allow_pickle=False) as stored:
            about = json.loads(str(stored["about"]))
            version = about.get("schema_version")
            if version != SUBSETS_SCHEMA:
                raise ValueError(
                    f"schema_version {version!r}; this version reads {SUBSETS_SCHEMA}: train on "
                    "the subsets again"
                )
            return SubsetOutcomes(
                seed=int(about["seed"]),
                sample_ids=stored["sample_ids"].astype(np.int64),
                kept=stored["kept"].astype(bool),
                outcomes=stored["mu"].astype(np.float64),
                before=float(stored["mu_before"]),
                about=about,
            )
    except (KeyError, OSError, EOFError, ValueError, BadZipFile) as error:
        raise ValueError(f"{file.name} cannot be read ({error})") from error


def _reason(error: Exception) -> str:
    text = str(error.args[0]) if error.args else str(error)
    return text.rstrip(".")
