"""``mda-lightning score``: which samples promote which heads, at saved or hub checkpoints."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import check_token_ids, describe
from mda_lightning.checkpoints import Checkpoint, HubRevision, find_checkpoints
from mda_lightning.corpora.sources import TokenSource
from mda_lightning.curvature import CurvatureError
from mda_lightning.gradients import BlockVector
from mda_lightning.influence import ReplayScorer, weights_hash
from mda_lightning.inverse_probes import inverse_probes, warn_of_unscored
from mda_lightning.mechanisms import Mechanism
from mda_lightning.micro_batch import micro_batch
from mda_lightning.recipes.checkpoint_choice import (
    DTYPES,
    CheckpointProgress,
    check_dtype,
    check_same_shape,
    device_named,
    pythia_config,
)
from mda_lightning.recipes.monitor_metrics import versions
from mda_lightning.recipes.score_settings import ScoreSettings, Share, job_hash, parse_units
from mda_lightning.recipes.score_source import fit_to_model
from mda_lightning.recipes.score_tables import kept_weights, write_tables
from mda_lightning.recipes.score_tokens import TokenParts, token_parts, write_token_parts
from mda_lightning.store import ScoreTable
from mda_lightning.store.chunks import ChunkFolder
from mda_lightning.units import Head

_WORK = ".work"
_HELD_NUMBERS = 2**22
_SHOWN_EVERY = 0.2


def score_checkpoints(
    checkpoints: Sequence[str],
    source: TokenSource,
    mechanisms: Sequence[Mechanism],
    *,
    units: str | Sequence[str] = "all",
    output: str | Path = "runs/score",
    settings: ScoreSettings | None = None,
    first: int = 0,
    last: int | None = None,
    samples_per_step: int | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
    share: Share | None = None,
    per_token: Sequence[int] = (),
    config: str | None = None,
    prefix: str | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    trust: bool = False,
    warn: Callable[[str], None] | None = None,
    watch: Callable[[CheckpointProgress], None] | None = None,
) -> dict[str, ScoreTable]:
    """Score samples for all units and mechanisms, averaged over checkpoints (Algorithm 1).

    Each sample has one forward and one backward a checkpoint, whatever the number of units and
    mechanisms. Writes to ``output`` a score table for each mechanism, the curvature's factors, and
    while it runs the scores so far: interrupted at any time, the same call goes on with the sample
    that comes next.

    Args:
        checkpoints: see :func:`mda_lightning.checkpoints.find_checkpoints`.
        source: the samples (:func:`mda_lightning.corpora.sources.open_tokens`).
        mechanisms: whose f is scored.
        units: heads such as "L1H2,L3H0", a sequence of names, or "all".
        output: the folder to write.
        settings: of the curvature.
        first, last: samples [first, last); None is the end.
        samples_per_step: a training step's samples, if the samples are in the order of training:
            ``step`` in the table is then the update that trained on a sample, else -1.
        batch_size: sequences at once; None finds it within ``memory``.
        memory: bytes beside the model; None takes half of what is free.
        share: which part of the samples this process scores; the last one to end writes the table.
        per_token: samples whose scores are also written position by position, to
            ``per-token-<mechanism>.parquet``; by share 0.
        config, prefix, trust: for ``.ckpt`` files.
        tokenizer: of the token ids that random sequences are drawn from; None takes the ids that
            the data uses, or else the model's configuration tells.
        device, dtype: as for :func:`mda_lightning.recipes.monitor.monitor_checkpoints`.
        warn: told what the user should know; None is :func:`warnings.warn`.
        watch: told of the progress.

    Returns:
        The tables by mechanism; empty where other shares have not ended.

    Raises:
        ValueError, OSError: something that cannot be; most are raised before anything is loaded.
    """
    say = warn or (lambda message: warnings.warn(message, stacklevel=3))
    check_dtype(dtype)
    where = device_named(device)
    end = len(source) if last is None else last
    if not 0 <= first < end <= len(source):
        raise ValueError(
            f"samples [{first}, {end}) do not exist: the data has {len(source)}, at least 1 is "
            "needed"
        )
    wrong = [i for i in per_token if not 0 <= i < len(source)]
    if wrong:
        raise ValueError(f"sample {wrong[0]} does not exist: there are 0..{len(source) - 1}")
    if len({m.name for m in mechanisms}) != len(mechanisms) or not mechanisms:
        raise ValueError("give one or more mechanisms, each once")
    found = find_checkpoints(
        checkpoints, config=config, prefix=prefix, config_of=pythia_config, trust=trust
    )
    for checkpoint in found:
        check_same_shape(found[0], checkpoint)
    run = _Run(
        source,
        list(mechanisms),
        settings or ScoreSettings(),
        Path(output),
        span=(first, end),
        share=share or Share(),
        per_token=[int(i) for i in per_token],
        samples_per_step=samples_per_step,
        batch_size=batch_size,
        memory=memory,
        dtype=dtype,
        device=where,
        say=say,
        show=watch or (lambda progress: None),
        n_checkpoints=len(found),
    )
    for number, checkpoint in enumerate(found):
        run.show("loading", number, checkpoint)
        model = checkpoint.load(None if dtype == "auto" else torch.float32)
        run.score(number, checkpoint, model, units=units, tokenizer=tokenizer)
        del model
    return run.write()


class _Run:
    """One call: what every checkpoint's scores have in common, and the scores so far."""

    def __init__(
        self,
        source: TokenSource,
        mechanisms: list[Mechanism],
        settings: ScoreSettings,
        folder: Path,
        *,
        span: tuple[int, int],
        share: Share,
        per_token: list[int],
        samples_per_step: int | None,
        batch_size: int | None,
        memory: int | None,
        dtype: str,
        device: torch.device,
        say: Callable[[str], None],
        show: Callable[[CheckpointProgress], None],
        n_checkpoints: int,
    ) -> None:
        self._source, self._mechanisms, self._settings = source, mechanisms, settings
        self._folder, self._span, self._share = folder, span, share
        self._per_step, self._batch_size, self._memory = samples_per_step, batch_size, memory
        self._dtype, self._device, self._say, self._show = dtype, device, say, show
        self._own = share.of(*span)
        self._total = n_checkpoints * (self._own[1] - self._own[0])
        self._data = source.digest(*span)
        self._units: list[Head] = []
        self._job = ""
        self._chunks: list[ChunkFolder] = []
        self._per_token = per_token if share.index == 0 else []
        self._token_parts: list[TokenParts] = []
        self._kept: list[str] | None = None  # weights of complete tables of the same job
        self._used: list[dict[str, Any]] = []
        self._started: float | None = None
        self._n_before = self._shown = 0.0
        self._done = 0

    def show(self, doing: str, number: int, checkpoint: Checkpoint) -> None:
        """Tell the progress."""
        done = number * (self._own[1] - self._own[0]) + self._done
        left = None
        if self._started is not None and done > self._n_before:
            rate = (time.monotonic() - self._started) / (done - self._n_before)
            left = rate * (self._total - done)
        remote = isinstance(checkpoint, HubRevision)
        self._show(CheckpointProgress(doing, done, self._total, checkpoint.label, remote, left))

    def score(
        self,
        number: int,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        *,
        units: str | Sequence[str],
        tokenizer: str | None,
    ) -> None:
        """Score this share's samples at one checkpoint."""
        sha = weights_hash(model)
        if any(one["weights_hash"] == sha for one in self._used):
            raise ValueError(
                f"{checkpoint.label} has the weights of an earlier checkpoint of this call; name "
                "each once"
            )
        to: Any = model.to  # its decorator hides its signature
        to(device=self._device, dtype=DTYPES[self._dtype] or model.dtype)
        if not self._job:
            self._begin(model, units, tokenizer)
            self._kept = kept_weights(self._folder, self._mechanisms, self._job)
        if self._kept is not None:
            if sha not in self._kept:
                raise ValueError(
                    f"{self._folder} holds scores at other checkpoints than {checkpoint.label}; "
                    "give another --output, or remove it"
                )
            self._used.append({"weights_hash": sha})
            return
        self._used.append(
            {
                "checkpoint": checkpoint.label,
                "step": checkpoint.step,
                "weights_hash": sha,
                **checkpoint.provenance(),
            }
        )
        width = len(self._units) * sum(len(m.block_names) for m in self._mechanisms)
        work = self._work / f"{sha[:16]}-share-{self._share.index}-of-{self._share.count}"
        first, last = self._own
        chunks = ChunkFolder(work, first=first, most_held=max(1, _HELD_NUMBERS // width))
        self._chunks.append(chunks)
        self._done = chunks.next - first

        def estimating(n: int) -> None:
            self._n_curvature += n
            self.show(f"curvature ({self._n_curvature:,} sequences) of", number, checkpoint)

        self._n_curvature = 0
        estimating(0)
        ihvps, provenance = self._solved(model, sha, estimating)
        self._used[-1] |= provenance
        if chunks.next < last:
            if self._started is None:
                self._started = time.monotonic()
                self._n_before = number * (last - first) + self._done
            self._score_rest(number, checkpoint, ReplayScorer(model, ihvps), chunks)
        if self._per_token:
            self._token_parts.append(token_parts(model, ihvps, self._source, self._per_token))

    def write(self) -> dict[str, ScoreTable]:
        """Write this share's rows, and the tables once every share has."""
        if self._kept is not None:
            if len(self._kept) != len(self._used):
                raise ValueError(
                    f"{self._folder} holds the mean over {len(self._kept)} checkpoints, not over "
                    f"{len(self._used)}; give another --output, or remove it"
                )
            self._say(f"{self._folder} holds these scores already")
            return {m.name: ScoreTable.open(self._folder / m.name) for m in self._mechanisms}
        if self._token_parts:
            write_token_parts(
                self._folder,
                self._token_parts,
                self._source,
                self._per_token,
                self._units,
                {m.name: m.block_names for m in self._mechanisms},
            )
        return write_tables(
            self._folder,
            self._work,
            self._chunks,
            self._mechanisms,
            self._units,
            source=self._source,
            share=self._share,
            span=self._own,
            samples_per_step=self._per_step,
            ihvp_step=self._used[0]["step"] if len(self._used) == 1 else None,
            provenance={
                "checkpoints": self._used,
                "settings": asdict(self._settings),
                "data": {
                    "sha256": self._data,
                    "samples": list(self._span),
                    "row_length": self._source.row_length,
                    "samples_per_step": self._per_step,
                },
                "dtype": self._dtype,
                "device": self._device.type,
                "job": self._job,
                "versions": versions(),
            },
            say=self._say,
        )

    # -- one checkpoint -----------------------------------------------------------------------

    def _begin(
        self, model: PreTrainedModel, units: str | Sequence[str], tokenizer: str | None
    ) -> None:
        """What is known once there is a model."""
        layout = describe(model)
        self._units = parse_units(units, layout)
        self._mechanisms = fit_to_model(self._mechanisms, model, self._source, tokenizer)
        if layout.sharing:
            self._say(layout.sharing)
        self._job = job_hash(
            self._settings,
            mechanisms=self._mechanisms,
            units=self._units,
            data=self._data,
            dtype=str(model.dtype),
            span=list(self._span),
            samples_per_step=self._per_step,
        )
        self._work = self._folder / _WORK / self._job[:16]
        self._work.mkdir(parents=True, exist_ok=True)

    def _solved(
        self, model: PreTrainedModel, sha: str, progress: Callable[[int], None]
    ) -> tuple[dict[str, BlockVector], dict[str, Any]]:
        ids = self._settings.curvature_ids(*self._span)
        at_once = self._batch(model)
        batches = [self._tokens(ids[i : i + at_once]) for i in range(0, len(ids), at_once)]
        for tokens in batches:
            check_token_ids(model, tokens.clamp_min(0))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = inverse_probes(
                model,
                {m.name: m for m in self._mechanisms},
                self._units,
                batches,
                self._settings.curvature_settings,
                memory=None if self._memory is None else self._memory // 2,
                progress=progress,
                kept_in=self._folder / "factors",
                weights=sha,
            )
            warn_of_unscored(found)
        for one in caught:
            self._say(str(one.message))
        for name, units in found.broken.items():
            if len(units) == len(self._units):
                raise CurvatureError(
                    f"the gradient of {name}'s f is not finite in any of the heads: the model has "
                    "diverged, or its precision is too low"
                )
        return found.ihvps, found.provenance

    def _score_rest(
        self, number: int, checkpoint: Checkpoint, scorer: ReplayScorer, chunks: ChunkFolder
    ) -> None:
        first, last = self._own
        at_once = self._batch(scorer.model)
        try:
            for tokens in self._batches(chunks.next, last, at_once):
                check_token_ids(scorer.model, tokens.clamp_min(0))
                values, loss = scorer.score(tokens)
                chunks.add({name: own.numpy() for name, own in values.items()}, loss.numpy())
                self._done = chunks.next - first
                if time.monotonic() - self._shown > _SHOWN_EVERY:
                    self._shown = time.monotonic()
                    self.show("scoring at", number, checkpoint)
        finally:
            chunks.flush()

    def _batches(self, first: int, last: int, at_once: int) -> Iterator[Tensor]:
        for start in range(first, last, at_once):
            yield self._tokens(np.arange(start, min(start + at_once, last)))

    def _tokens(self, ids: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self._source.get(ids))

    def _batch(self, model: PreTrainedModel) -> int:
        if self._batch_size is None:
            blocks = list(dict.fromkeys(b for m in self._mechanisms for b in m.block_names))
            parts = describe(model).blocks(self._units, blocks)
            names = list(dict.fromkeys(name for block in parts for name in block.modules))
            length = self._source.row_length - 1
            self._batch_size = micro_batch(model, names, length=length, memory=self._memory)
        return self._batch_size
