"""How the cost of fit and score grows: with samples, heads, length and model. A table, a figure."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from benchmarks.interleaved import interleaved
from benchmarks.models import random_tokens, small_neox
from mda_lightning.architectures import describe
from mda_lightning.files import atomic_path
from mda_lightning.influence import fit_and_score
from mda_lightning.mechanisms import InductionHead
from mda_lightning.units import Head

Rows = Iterator[tuple[str, tuple[float, float, float]]]

_TABLE = Path(__file__).with_name("scoring_curves.csv")
_FIGURE = Path(__file__).parent.parent / "docs" / "images" / "scoring-cost.png"
#: Tokens of a batch.
_BATCH_TOKENS = 2048
_AXES = {
    "samples": "sequences of 128",
    "heads": "heads, from the lowest layer up, 32 sequences of 128",
    "length": "length of a sequence, 4 of them",
    "parameters": "million parameters (12 to 96 heads), 16 of 128",
}


def curves(rounds: int) -> Rows:
    """GPT-NeoX of 6 layers, heads 32 wide, vocabulary 8,192; sampled Fisher, ``copy_logprob``.

    The process's own time of fit and score together, the probe's gradient included. Writes
    ``benchmarks/scoring_curves.csv`` and ``docs/images/scoring-cost.png``.
    """
    model = small_neox()
    every = describe(model).heads
    middle = Head(3, 3)
    spread = [every[i] for i in sorted(range(len(every)), key=lambda i: (i % 4, i // 4))]
    cases: dict[tuple[str, float, str], Callable[[], object]] = {}
    for n in (8, 16, 32, 64, 128):
        cases["samples", n, "one head"] = partial(_score, model, [middle], n, 128)
        cases["samples", n, "all heads"] = partial(_score, model, every, n, 128)
    for n in (1, 2, 4, 8, 16, 24):
        cases["heads", n, "heads"] = partial(_score, model, spread[:n], 32, 128)
    for length in (128, 256, 512, 1024, 2047):
        cases["length", length, "one head"] = partial(_score, model, [middle], 4, length)
        cases["length", length, "all heads"] = partial(_score, model, every, 4, length)
    for width in (64, 128, 256, 512):
        sized = small_neox(n_heads=width // 32, d_model=width)
        millions = sum(p.numel() for p in sized.parameters()) / 1e6
        own = describe(sized).heads
        cases["parameters", millions, "one head"] = partial(_score, sized, [Head(3, 1)], 16, 128)
        cases["parameters", millions, "all heads"] = partial(_score, sized, own, 16, 128)
    timings = interleaved(
        {str(key): run for key, run in cases.items()}, rounds=rounds, clock=time.process_time
    )
    found = []
    for key in cases:
        seconds = sorted(timings[str(key)].seconds)
        figures = (timings[str(key)].median, seconds[0], seconds[-1])
        found.append((*key, *figures))
        axis, at, what = key
        yield f"{_AXES[axis]}: {at:g}, {what}, in s", figures
    with atomic_path(_TABLE) as path, path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["axis", "at", "what", "median_s", "least_s", "greatest_s"])
        writer.writerows(
            (axis, f"{at:g}", what, *(f"{value:.4f}" for value in values))
            for axis, at, what, *values in found
        )
    _draw(found)


def _score(model: PreTrainedModel, units: list[Head], n: int, length: int) -> None:
    vocabulary = model.config.vocab_size
    mechanism = InductionHead(
        probe_function="copy_logprob", token_ids=tuple(range(2, vocabulary)), n_probe_sequences=50
    )
    tokens = random_tokens(n, length, vocabulary).split(max(1, _BATCH_TOKENS // length))
    fit_and_score(model, {"": mechanism}, units, tokens)


def _draw(found: list[tuple[str, float, str, float, float, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.6), layout="constrained")
    axes = figure.subplots(2, 2)
    styles = {"one head": ("o", "#2a6f97"), "all heads": ("s", "#c0562f")}
    for place, (axis, label) in zip(axes.flat, _AXES.items(), strict=True):
        lines: dict[str, list[tuple[float, float, float, float]]] = {}
        for name, at, what, *values in found:
            if name == axis:
                lines.setdefault(what, []).append((at, *values))
        for what, points in lines.items():
            x, median, low, high = zip(*points, strict=True)
            marker, colour = styles.get(what, ("s", "#c0562f"))
            place.plot(x, median, marker=marker, color=colour, label=what, markersize=4)
            place.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        place.set_xlim(left=0)
        place.set_ylim(bottom=0)
        place.set_xlabel(label)
        place.set_ylabel("fit and score, CPU s")
        if len(lines) > 1:
            place.legend(frameon=False)
        place.spines[["top", "right"]].set_visible(False)
    with atomic_path(_FIGURE) as path:
        figure.savefig(path, dpi=150, format="png")
