"""``mda-lightning score``: which samples promote which heads, at saved or hub checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mda_lightning.checkpoints import find_checkpoints
from mda_lightning.corpora.sources import TokenSource
from mda_lightning.mechanisms import Mechanism
from mda_lightning.recipes.checkpoint_choice import (
    CheckpointProgress,
    check_dtype,
    check_same_shape,
    device_named,
    pythia_config,
)
from mda_lightning.recipes.score_run import ScoreRun
from mda_lightning.recipes.score_settings import ScoreSettings, Share
from mda_lightning.store import ScoreTable


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
        per = samples_per_step
        steps = "" if per is None else f" (steps [{first // per}, {end // per}))"
        raise ValueError(
            f"samples [{first}, {end}){steps} do not exist: the data has {len(source)}, at least 1 "
            "is needed"
        )
    if (n_short := getattr(source, "n_too_short", 0)) > 0:
        say(f"{n_short} documents have fewer than 2 tokens and no score (NaN)")
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
    run = ScoreRun(
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
