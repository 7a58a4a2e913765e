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
from mda_lightning.store.chunks import Chunk, ChunkFolder, mean_chunk
from mda_lightning.units import Head

_AT_ONCE = 2**14


def chunk_folder(work: Path, weights: str, share: Share) -> Path:
    """Where a share's scores at one checkpoint are kept until the tables are written."""
    return work / f"{weights[:32]}-share-{share.index}-of-{share.count}"


def kept_weights(
    folder: Path, mechanisms: Sequence[Mechanism], job: str, span: tuple[int, int]
) -> list[str] | None:
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
            n_complete += len(table) == span[1] - span[0]
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
    """The tables, once every share has scored its samples at every checkpoint of this call.

    They are put together from the shares' chunks, which lie under the job and the weights that made
    them: nothing else can get in.

    Args:
        folder: of the tables, one a mechanism.
        work: of the chunks; removed when the tables are complete.
        source: says the samples' domains.
        span: the samples of all shares.
        samples_per_step, ihvp_step: for the columns ``step`` and ``ihvp_step``; None is -1.
        provenance: of the tables, but for the mechanism; its ``checkpoints`` are averaged.
        mechanisms, units, share, say: of the call.

    Returns:
        The tables by mechanism, or none where other shares have not ended.
    """
    weights = [one["weights_hash"] for one in provenance["checkpoints"]]
    shares = [Share(i, share.count) for i in range(share.count)]
    work.mkdir(parents=True, exist_ok=True)
    with FileLock(str(work / ".lock")):
        kept = kept_weights(folder, mechanisms, provenance["job"], span)
        if kept is not None and sorted(kept) == sorted(weights):  # another process was quicker
            return {m.name: ScoreTable.open(folder / m.name) for m in mechanisms}
        chunks = {
            one: [
                ChunkFolder(chunk_folder(work, sha, one), first=one.of(*span)[0], most_held=1)
                for sha in weights
            ]
            for one in shares
        }
        waiting = [
            str(one.index)
            for one, own in chunks.items()
            if any(at.next < one.of(*span)[1] for at in own)
        ]
        if waiting:
            say(
                f"share {share.index} of {share.count} is done; the tables are written once "
                f"share {', '.join(waiting)} is"
            )
            return {}
        writers = {m.name: writer_of(folder, m, units, source, Share()) for m in mechanisms}
        for writer in writers.values():
            writer.discard_from(-1)  # of a call that was interrupted here
        broken: list[list[int]] = [[] for _ in weights]
        for one, own in chunks.items():
            first, last = one.of(*span)
            for start in range(first, last, _AT_ONCE):
                found = [at.read(start, min(start + _AT_ONCE, last)) for at in own]
                _add(writers, mean_chunk(found), source, samples_per_step, ihvp_step)
                for ids, chunk in zip(broken, found, strict=True):
                    ids += _broken(chunk, source)
        for checkpoint, ids in zip(provenance["checkpoints"], broken, strict=True):
            if ids:
                say(
                    f"{len(ids)} of {span[1] - span[0]} samples have a gradient that is not finite "
                    f"at {checkpoint['checkpoint']} (step {checkpoint['step']}) and no score for "
                    f"any head (NaN): {', '.join(map(str, ids[:5]))}"
                    f"{' ...' if len(ids) > 5 else ''}"
                )
        tables = {
            m.name: writers[m.name].finish(
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


def _add(
    writers: Mapping[str, ScoreWriter],
    mean: Chunk,
    source: TokenSource,
    samples_per_step: int | None,
    ihvp_step: int | None,
) -> None:
    """Add samples to every mechanism's table."""
    ids = np.arange(mean.first, mean.last, dtype=np.int64)
    names = source.domains(ids)
    for name, writer in writers.items():
        writer.add(
            ScoreRows(
                ids,
                np.full(len(ids), -1) if samples_per_step is None else ids // samples_per_step,
                mean.values[name],
                mean.loss,
                np.full(len(ids), -1 if ihvp_step is None else ihvp_step),
                None if names is None else np.asarray(names, dtype=np.str_),
            )
        )


def _broken(chunk: Chunk, source: TokenSource) -> list[int]:
    """Samples with a gradient that is not finite; a document of one token has none at all."""
    ids = np.arange(chunk.first, chunk.last, dtype=np.int64)[np.isnan(chunk.loss)]
    found: list[int] = ids[source.get(ids)[:, 1] >= 0].tolist() if len(ids) else []
    return found
