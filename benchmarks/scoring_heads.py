"""All heads against one head, and against the paper's procedure one head after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.interleaved import Timing, interleaved, ratio
from benchmarks.models import pythia_14m, random_tokens
from benchmarks.paper_procedure import PaperProcedure
from mda_lightning.architectures import describe
from mda_lightning.influence import fit_and_score
from mda_lightning.mechanisms import InductionHead, Mechanism
from mda_lightning.units import Head

Rows = Iterator[tuple[str, tuple[float, float, float]]]

#: The head that the paper scores in this model (Table 4).
_HEAD = Head(3, 3)
_LENGTH = 512
_SEQUENCES = 12
#: Sequences that the paper's procedure is timed on; its cost grows with their number.
_PAPER_SEQUENCES = 2
_BATCH = 3


def heads(rounds: int) -> Rows:
    """Pythia-14M's shape, sequences of 512, ``copy_logprob`` with its defaults.

    One head is the mean over one head of each layer: a lower one costs more, since the backward
    goes down to it. The paper's procedure is timed on 2 sequences, without the probe's gradient
    (which it has once a head), and taken times 6 for ours of 12, times 24 for all heads.
    """
    model = pythia_14m()
    tokens = random_tokens(_SEQUENCES, _LENGTH, 50_000)
    mechanism = InductionHead(probe_function="copy_logprob", token_ids=tuple(range(2, 50_000)))
    layout = describe(model)
    single = [Head(layer, layout.n_heads - 1) for layer in range(layout.n_layers)]

    def ours(units: list[Head], **settings: Any) -> None:
        fit_and_score(model, {"": mechanism}, units, tokens.split(_BATCH), **settings)

    ways: dict[str, dict[str, Any]] = {
        "curvature of a quarter, sampled": {"n_curvature": _SEQUENCES // 4},
        "curvature of all, sampled": {},
        "curvature of all, empirical": {"fisher": "empirical"},
    }
    for way, settings in ways.items():
        runs = {str(unit): partial(ours, [unit], **settings) for unit in single}
        runs["all"] = partial(ours, layout.heads, **settings)
        timings = interleaved(runs, rounds=rounds, clock=time.process_time)
        each = zip(*(timings[str(unit)].seconds for unit in single), strict=True)
        one = Timing(tuple(sum(seconds) / len(seconds) for seconds in each))
        yield f"{way}: all 24 heads / one head", ratio(timings["all"], one)
        lowest, highest = timings[str(single[0])], timings[str(single[-1])]
        yield f"{way}: all 24 heads / {single[0]}", ratio(timings["all"], lowest)
        yield f"{way}: all 24 heads / {single[-1]}", ratio(timings["all"], highest)
    yield from _paper(model, tokens, mechanism, rounds)


def _paper(model: PreTrainedModel, tokens: Tensor, mechanism: Mechanism, rounds: int) -> Rows:
    three_passes: list[float] = []
    every = describe(model).heads

    def paper() -> None:
        marks = [time.process_time()]
        procedure = PaperProcedure(model, _HEAD, mechanism)
        procedure.scores(
            tokens[:_PAPER_SEQUENCES], after_pass=lambda: marks.append(time.process_time())
        )
        three_passes.append(marks[2] - marks[0] + marks[4] - marks[3])

    def ours(units: list[Head]) -> None:
        fit_and_score(model, {"": mechanism}, units, tokens.split(_BATCH))

    timings = interleaved(
        {"one": partial(ours, [_HEAD]), "all": partial(ours, every), "paper": paper},
        rounds=rounds,
        clock=time.process_time,
    )
    factor = _SEQUENCES / _PAPER_SEQUENCES
    one_head = Timing(tuple(seconds * factor for seconds in three_passes[1:]))
    all_heads = Timing(tuple(seconds * len(every) for seconds in one_head.seconds))
    yield f"the paper's procedure / ours, {_HEAD}", ratio(one_head, timings["one"])
    yield "the paper's procedure / ours, all 24 heads", ratio(all_heads, timings["all"])
    for what, timing in (
        (f"the paper's procedure, {_HEAD}", one_head),
        (f"ours, {_HEAD}, probe included", timings["one"]),
        ("ours, all heads, probe included", timings["all"]),
    ):
        each = sorted(1000 * seconds / _SEQUENCES for seconds in timing.seconds)
        median = 1000 * timing.median / _SEQUENCES
        yield f"{what}, ms a sequence", (median, each[0], each[-1])
