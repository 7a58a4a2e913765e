"""One head, fit and score on the same data and settings: ours, kronfluence and bergson."""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Iterator

from transformers import PreTrainedModel

from benchmarks.interleaved import interleaved, ratio
from benchmarks.models import pythia_14m, random_tokens, small_neox
from benchmarks.split_head import copy_probe
from mda_lightning.influence import fit_and_score
from mda_lightning.mechanisms import InductionHead
from mda_lightning.units import Head

Rows = Iterator[tuple[str, tuple[float, float, float]]]


def peers(rounds: int) -> Rows:
    """Time of the peer over ours: empirical Fisher, damping 0.1 · mean(Λ), EK-FAC, float32.

    Ours works on the model, the peers on its copy with the head split out; all take the probe's
    gradient, fit the curvature and score, 2,048 tokens at once (bergson's default), on one thread,
    in the process's own time.
    """
    yield from _compare(
        "6 layers of 128, vocabulary 8,192, 128 x 128", small_neox, 128, 128, rounds
    )


def peers_14m(rounds: int) -> Rows:
    """The same at Pythia-14M's shape, whose unembedding outweighs its layers."""
    yield from _compare("Pythia-14M, 8 x 512", pythia_14m, 8, 512, rounds)


def _compare(
    shape: str, build: Callable[[], PreTrainedModel], n: int, length: int, rounds: int
) -> Rows:
    missing = [n for n in ("kronfluence", "bergson") if importlib.util.find_spec(n) is None]
    if missing:
        print(f"(left out: {' and '.join(missing)} not installed)", file=sys.stderr)
        return
    from benchmarks.peer_bergson import BergsonRun
    from benchmarks.peer_kronfluence import KronfluenceRun

    warnings.simplefilter("ignore", FutureWarning)
    model, unit = build(), Head(3, 3)
    vocabulary = model.config.vocab_size - 400
    tokens = random_tokens(n, length, vocabulary)
    mechanism = InductionHead(
        probe_function="copy_logprob", token_ids=tuple(range(2, vocabulary)), length=(14, 14)
    )
    batch = 2048 // length

    def ours() -> None:
        fit_and_score(model, {"": mechanism}, [unit], tokens.split(batch), fisher="empirical")

    arguments = (model, unit, copy_probe(mechanism), tokens, batch)
    timings = interleaved(
        {
            "ours": ours,
            "kronfluence": KronfluenceRun(*arguments).run,  # type: ignore[arg-type]
            "bergson": BergsonRun(*arguments).run,  # type: ignore[arg-type]
        },
        rounds=rounds,
        clock=time.process_time,
    )
    for peer in ("kronfluence", "bergson"):
        yield f"{shape}: {peer} / ours", ratio(timings[peer], timings["ours"])
    own = sorted(timings["ours"].seconds)
    yield f"{shape}: ours, in s", (timings["ours"].median, own[0], own[-1])
