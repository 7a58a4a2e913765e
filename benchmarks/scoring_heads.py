"""All heads against one head, and against the paper's procedure one head after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

from benchmarks.interleaved import Timing, interleaved, ratio
from benchmarks.models import pythia_14m, random_tokens
from benchmarks.paper_procedure import PaperProcedure
from mda_lightning.architectures import describe
from mda_lightning.influence import fit_and_score
from mda_lightning.mechanisms import InductionHead
from mda_lightning.units import Head

Rows = Iterator[tuple[str, tuple[float, float, float]]]

#: The head that the paper scores in this model (Table 4).
_HEAD = Head(3, 3)
_LENGTH = 512
_SEQUENCES = 24
#: Sequences that the paper's procedure is timed on; its cost grows with their number.
_PAPER_SEQUENCES = 2
_BATCH = 4


def heads(rounds: int) -> Rows:
    """Pythia-14M's shape, sequences of 512, sampled Fisher, ``copy_logprob`` with its defaults.

    The paper's procedure is timed on 2 sequences, without the probe's gradient (which it has once a
    head), and taken times 12 for ours of 24, times 24 for all heads.
    """
    model = pythia_14m()
    tokens = random_tokens(_SEQUENCES, _LENGTH, 50_000)
    mechanism = InductionHead(probe_function="copy_logprob", token_ids=tuple(range(2, 50_000)))
    every = describe(model).heads

    def ours(units: list[Head]) -> None:
        fit_and_score(model, {"": mechanism}, units, tokens.split(_BATCH))

    three_passes: list[float] = []

    def paper() -> None:
        marks = [time.process_time()]
        procedure = PaperProcedure(model, _HEAD, mechanism)
        procedure.scores(
            tokens[:_PAPER_SEQUENCES], after_pass=lambda: marks.append(time.process_time())
        )
        three_passes.append(marks[2] - marks[0] + marks[4] - marks[3])

    timings = interleaved(
        {"one": partial(ours, [_HEAD]), "all": partial(ours, every), "paper": paper},
        rounds=rounds,
        clock=time.process_time,
    )
    yield "24 x 512: all 24 heads / one head", ratio(timings["all"], timings["one"])
    factor = _SEQUENCES / _PAPER_SEQUENCES
    one_head = Timing(tuple(seconds * factor for seconds in three_passes[1:]))
    all_heads = Timing(tuple(seconds * len(every) for seconds in one_head.seconds))
    yield "the paper's procedure / ours, one head", ratio(one_head, timings["one"])
    yield "the paper's procedure / ours, all 24 heads", ratio(all_heads, timings["all"])
    each = sorted(1000 * seconds / _SEQUENCES for seconds in one_head.seconds)
    yield (
        "the paper's procedure, one head, ms a sequence",
        (
            1000 * one_head.median / _SEQUENCES,
            each[0],
            each[-1],
        ),
    )
    for name in ("one", "all"):
        each = sorted(1000 * seconds / _SEQUENCES for seconds in timings[name].seconds)
        what = "one head" if name == "one" else "all heads"
        median = 1000 * timings[name].median / _SEQUENCES
        yield f"ours, {what}, probe included, ms a sequence", (median, each[0], each[-1])
