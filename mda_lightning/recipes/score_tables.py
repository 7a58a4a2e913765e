"""The score tables that a scoring ends with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from mda_lightning.corpora.sources import TokenSource
from mda_lightning.mechanisms import Mechanism
from mda_lightning.recipes.score_settings import Share
from mda_lightning.store import ScoreRows, ScoreTable, ScoreWriter
from mda_lightning.store.chunks import ChunkFolder, mean_chunk
from mda_lightning.units import Head

_AT_ONCE = 2**14


def kept_weights(folder: Path, mechanisms: Sequence[Mechanism], job: str) -> list[str] | None:
    """Hashes of the weights that complete tables of the same job are of; None without such tables.

    Raises:
        ValueError: there is a complete table of another job: other samples or settings.
    """
    kept: list[str] = []
    n_complete = 0
    for mechanism in mechanisms:
        place = folder / mechanism.name
        try:
            table = ScoreTable.open(place)
        except FileNotFoundError:
            continue
        if table.complete:
            if table.provenance.get("job") != job:
                raise ValueError(
                    f"{place} holds scores of other samples or settings; give another --output, "
                    "or remove it"
                )
            n_complete += 1
            kept = [one["weights_hash"] for one in table.provenance["checkpoints"]]
    return kept if n_complete == len(mechanisms) else None


def writer_of(
    folder: Path,
    mechanism: Mechanism,
    units: Sequence[Head],
    source: TokenSource,
    share: Share,
) -> ScoreWriter:
    """A writer of one share's part of a mechanism's table.

    Raises:
        ValueError: something else is in the table's place.
    """
    return ScoreWriter(
        folder / mechanism.name,
        units=[str(unit) for unit in units],
        blocks=list(mechanism.block_names),
        estimator="replay",
        rank=share.index,
        world_size=share.count,
        domains=source.domains([0]) is not None,
    )


def remove_if_empty(work: Path) -> None:
    """Take away a call's working folder, and the folder of all of them, unless they are in use."""
    for place in (work, work.parent):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def write_tables(
    folder: Path,
    work: Path,
    chunks: Sequence[ChunkFolder],
    mechanisms: Sequence[Mechanism],
    units: Sequence[Head],
    *,
    source: TokenSource,
    share: Share,
    span: tuple[int, int],
    samples_per_step: int | None,
    ihvp_step: int | None,
    provenance: Mapping[str, Any],
    say: Callable[[str], None],
) -> dict[str, ScoreTable]:
    """Write one share's rows; the last share to end completes the tables and removes ``work``.

    Args:
        folder: of the tables, one a mechanism.
        work: of the chunks, and of marks of the shares that have ended.
        chunks: each checkpoint's; their mean is written.
        source: says the samples' domains.
        span: this share's samples.
        samples_per_step, ihvp_step: for the columns ``step`` and ``ihvp_step``; None is -1.
        provenance: of the tables, but for the mechanism.
        mechanisms, units, share, say: of the call.

    Returns:
        The tables by mechanism, or none where other shares have not ended.
    """
    has_domains = source.domains([0]) is not None
    writers = {m.name: writer_of(folder, m, units, source, share) for m in mechanisms}
    for own in writers.values():
        own.discard_from(-1)
    broken: list[int] = []
    for start in range(*span, _AT_ONCE):
        stop = min(start + _AT_ONCE, span[1])
        mean = mean_chunk([one.read(start, stop) for one in chunks])
        ids = np.arange(start, stop, dtype=np.int64)
        names = source.domains(ids) if has_domains else None
        there = source.get(ids)[:, 1] >= 0  # a document of one token has no score either
        broken += ids[np.isnan(mean.loss) & there].tolist()
        for name, own in writers.items():
            own.add(
                ScoreRows(
                    ids,
                    np.full(len(ids), -1) if samples_per_step is None else ids // samples_per_step,
                    mean.values[name],
                    mean.loss,
                    np.full(len(ids), -1 if ihvp_step is None else ihvp_step),
                    None if names is None else np.asarray(names, dtype=np.str_),
                )
            )
    for own in writers.values():
        own.flush()
    if broken:
        say(
            f"{len(broken)} of {span[1] - span[0]} samples have a gradient that is not finite at "
            f"some checkpoint and no score (NaN): {', '.join(map(str, broken[:5]))}"
            f"{' ...' if len(broken) > 5 else ''}"
        )
    with FileLock(str(work / ".lock")):
        marks = [work / f"share-{i}-of-{share.count}.done" for i in range(share.count)]
        marks[share.index].touch()
        done = [mark.exists() for mark in marks]
        if not all(done):
            waiting = ", ".join(str(i) for i, ended in enumerate(done) if not ended)
            say(
                f"share {share.index} of {share.count} is done; the tables are complete once "
                f"share {waiting} is"
            )
            return {}
        tables = {
            m.name: writer_of(folder, m, units, source, Share(0, share.count)).finish(
                {
                    "mechanism": m.name,
                    "mechanism_settings": m.settings(),
                    "sign": "positive: training on the sample promotes the unit",
                    **provenance,
                }
            )
            for m in mechanisms
        }
    shutil.rmtree(work)
    remove_if_empty(work)
    return tables
