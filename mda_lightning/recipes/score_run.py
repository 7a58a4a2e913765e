"""One call of ``mda-lightning score``: checkpoint by checkpoint, then the tables."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from mda_lightning.architectures import check_token_ids, describe, modules_of
from mda_lightning.checkpoints import Checkpoint, HubRevision
from mda_lightning.corpora.sources import TokenSource
from mda_lightning.curvature import CurvatureError
from mda_lightning.gradients import BlockVector
from mda_lightning.influence import ReplayScorer, config_hash, weights_hash
from mda_lightning.influence.inverse_probes import inverse_probes, warn_of_unscored
from mda_lightning.mechanisms import Mechanism
from mda_lightning.micro_batch import micro_batch
from mda_lightning.recipes.checkpoint_choice import (
    DTYPES,
    CheckpointProgress,
)
from mda_lightning.recipes.monitor_metrics import versions
from mda_lightning.recipes.score_settings import ScoreSettings, Share, job_hash, parse_units
from mda_lightning.recipes.score_source import fit_to_model, score_of_real
from mda_lightning.recipes.score_tables import (
    chunk_folder,
    kept_weights,
    remove_if_empty,
    write_tables,
    writer_of,
)
from mda_lightning.recipes.score_tokens import TokenParts, token_parts, write_token_parts
from mda_lightning.store import ScoreTable
from mda_lightning.store.chunks import ChunkFolder
from mda_lightning.units import Head

_WORK = ".work"
_HELD_NUMBERS = 2**22
_SHOWN_EVERY = 0.2


class ScoreRun:
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
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; --output names a folder")
        if (folder / "meta.json").exists():
            raise ValueError(f"{folder} is a corpus folder; --output names another one")
        short = [i for i in per_token if source.get([i])[0, 1] < 0]
        if short:
            raise ValueError(
                f"sample {short[0]} has fewer than 2 tokens, so no position has a score"
            )
        self._data = source.digest(*span)
        self._units: list[Head] = []
        self._job = ""
        self._per_token = list(dict.fromkeys(per_token)) if share.index == 0 else []
        self._token_parts: list[TokenParts] = []
        self._kept: list[str] | None = None  # weights of complete tables of the same job
        self._used: list[dict[str, Any]] = []
        self._started: float | None = None
        self._shown = 0.0
        self._done = self._n_new = 0
        self._lock: FileLock | None = None

    def show(
        self, doing: str, number: int, checkpoint: Checkpoint, left: float | None = None
    ) -> None:
        """Tell the progress; ``left`` are the seconds that are left of something but scoring."""
        done = number * (self._own[1] - self._own[0]) + self._done
        if left is None and self._started is not None and self._n_new:
            left = (time.monotonic() - self._started) / self._n_new * (self._total - done)
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
        if self._is_again(checkpoint, sha):
            return
        to: Any = model.to  # its decorator hides its signature
        to(device=self._device, dtype=DTYPES[self._dtype] or model.dtype)
        if not self._job:
            self._begin(model, units, tokenizer)
            self._kept = kept_weights(self._folder, self._mechanisms, self._job, self._span)
            if self._kept is None:
                self._claim()
                for mechanism in self._mechanisms:  # refused now, not once all is scored
                    writer_of(self._folder, mechanism, self._units, self._source, self._share)
        if self._kept is not None:
            if sha not in self._kept:
                raise ValueError(
                    f"{self._folder} holds scores at other checkpoints than {checkpoint.label}; "
                    "give another --output, or remove it"
                )
            self._used.append({"weights_hash": sha, "checkpoint": checkpoint.label})
            if self._per_token:
                ihvps, _ = self._solved(model, sha, lambda n: None)
                self._add_token_parts(model, ihvps)
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
        first, last = self._own
        place = chunk_folder(self._work, sha, self._share)
        chunks = ChunkFolder(place, first=first, most_held=max(1, _HELD_NUMBERS // width))
        self._done = chunks.next - first

        def estimating(n: int) -> None:
            self._n_curvature += n
            so_far = self._n_curvature
            rate = (time.monotonic() - begun) / so_far if so_far else 0.0
            doing = f"curvature ({so_far:,} of at most {most:,} sequences) of"
            self.show(doing, number, checkpoint, rate * (most - so_far) if so_far else None)

        begun = time.monotonic()
        most = len(self._settings.curvature_ids(*self._span))
        self._n_curvature = 0
        estimating(0)
        ihvps, provenance = self._solved(model, sha, estimating)
        self._used[-1] |= provenance
        if chunks.next < last:
            if self._started is None:
                self._started = time.monotonic()
            self._score_rest(number, checkpoint, ReplayScorer(model, ihvps), chunks)
        if self._per_token:
            self._add_token_parts(model, ihvps)

    def _add_token_parts(self, model: PreTrainedModel, ihvps: Mapping[str, BlockVector]) -> None:
        self._token_parts.append(token_parts(model, ihvps, self._source, self._per_token))

    def _is_again(self, checkpoint: Checkpoint, sha: str) -> bool:
        """Whether the weights were scored already in this call, under another name."""
        for one in self._used:
            if one["weights_hash"] == sha:
                label, step = one["checkpoint"], one.get("step", checkpoint.step)
                if step != checkpoint.step:
                    raise ValueError(
                        f"{checkpoint.label} has the very weights of {label}; one of them is not "
                        "what it says. Leave it out"
                    )
                self._say(f"{checkpoint.label} is {label} again; it is scored once")
                self._total -= self._own[1] - self._own[0]
                return True
        return False

    def write(self) -> dict[str, ScoreTable]:
        """Write this share's rows, and the tables once every share has."""
        if self._token_parts:
            write_token_parts(
                self._folder,
                self._token_parts,
                self._source,
                self._per_token,
                self._units,
                {m.name: m.block_names for m in self._mechanisms},
            )
        if self._kept is not None:
            if len(self._kept) != len(self._used):
                raise ValueError(
                    f"{self._folder} holds the mean over {len(self._kept)} checkpoints, not over "
                    f"{len(self._used)}; give another --output, or remove it"
                )
            self._say(f"{self._folder} holds these scores already")
            remove_if_empty(self._work)
            return {m.name: ScoreTable.open(self._folder / m.name) for m in self._mechanisms}
        assert self._lock is not None
        self._lock.release()
        return write_tables(
            self._folder,
            self._work,
            self._mechanisms,
            self._units,
            source=self._source,
            share=self._share,
            span=self._span,
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
            config=config_hash(model),
        )
        self._work = self._folder / _WORK / self._job[:16]
        self._work.mkdir(parents=True, exist_ok=True)

    def _claim(self) -> None:
        """Keep other processes from scoring the same share at the same time."""
        lock = FileLock(str(self._work / f".share-{self._share.index}-of-{self._share.count}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"another process is scoring share {self._share.index} of {self._share.count} into "
                f"{self._folder} already; wait for it, or give another --output"
            ) from error
        self._lock = lock

    def _solved(
        self, model: PreTrainedModel, sha: str, progress: Callable[[int], None]
    ) -> tuple[dict[str, BlockVector], dict[str, Any]]:
        ids = self._settings.curvature_ids(*self._span)
        wanted = self._settings.n_curvature
        if wanted != "auto" and len(ids) < wanted:
            self._say(f"the curvature is estimated on all {len(ids)} samples, not on {wanted}")
        at_once = self._batch(model)
        offered = [self._tokens(ids[i : i + at_once]) for i in range(0, len(ids), at_once)]
        batches = [own for tokens in offered if len(own := tokens[tokens[:, 1] >= 0])]
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
                memory=None if self._memory is None else self._memory // 4,
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
                chunks.add(*score_of_real(scorer, tokens))
                self._n_new += len(tokens)
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
            length = self._source.row_length - 1
            reserved = 0 if self._memory is None else self._memory // 4  # for the curvature
            self._batch_size = micro_batch(
                model, modules_of(parts), length=length, memory=self._memory, reserved=reserved
            )
        return self._batch_size
