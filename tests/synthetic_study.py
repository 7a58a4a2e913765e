"""A study folder such as quickstart leaves behind, made up: curves, scores and text with a seed.

The numbers are drawn so that every part of a report has something to say: two domains of which one
repeats itself, heavy-tailed scores that favour it, a head that rises, arms with known shifts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tokenizers import Tokenizer

from mda_lightning.corpora import TokenRows, train_bpe
from mda_lightning.files import write_json
from mda_lightning.store import ScoreTable

ARMS = ("baseline", "mask-top", "mask-random", "insert-top", "insert-random")
SHIFTS = {
    "baseline": 0.0,
    "mask-top": -0.085,
    "mask-random": -0.005,
    "insert-top": 0.045,
    "insert-random": 0.004,
}
DECLARED = {
    "baseline": {"do": "nothing", "control": None, "phrase": "leaving the data alone"},
    "mask-top": {
        "do": "mask",
        "by": "influence",
        "control": "mask-random",
        "phrase": "masking the top 10% by EK-FAC influence",
    },
    "mask-random": {
        "do": "mask",
        "control": None,
        "control_of": "mask-top",
        "phrase": "masking as many random samples",
    },
    "insert-top": {
        "do": "insert",
        "by": "influence",
        "control": "insert-random",
        "phrase": "inserting copies of the top 10% by EK-FAC influence",
    },
    "insert-random": {
        "do": "insert",
        "control": None,
        "control_of": "insert-top",
        "phrase": "inserting copies of as many random samples",
    },
}
N_HEADS = 4
ROW_LENGTH = 97
WORDS = ("the", "value", "of", "return", "self", "import", "list", "index", "name", "result", "key")
UNSAFE = "</pre><script>alert('x')</script> & \"quoted\" \u202eevil\x00"


def write_corpus(folder: Path, *, n_rows: int = 400, seed: int = 0) -> TokenRows:
    """Rows of three made-up domains; the first record holds text that must be escaped."""
    rng = np.random.default_rng(seed)
    texts, domains = [], []
    for row in range(n_rows):
        kind = ("library", "records/log", "records/table")[int(rng.choice(3, p=[0.7, 0.2, 0.1]))]
        if kind == "library":
            text = " ".join(rng.choice(WORDS, 220)) + "\n"
        else:
            keys = [f"{rng.integers(1 << 24):06x}" for _ in range(4)]
            separator = " | " if kind == "records/table" else "\n"
            text = separator.join(
                f"<b>{rng.choice(keys)}</b> user={rng.choice(keys)}" for _ in range(60)
            )
        texts.append((UNSAFE if row == 0 else "") + text)
        domains.append(kind)
    tokenizer_json = train_bpe(texts, vocab_size=400, seed=seed)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    rows = np.stack([tokenizer.encode(text).ids[:ROW_LENGTH] for text in texts])
    return TokenRows.write(
        folder,
        rows.astype(np.int64),
        domains=domains,
        tokenizer_json=tokenizer_json,
        provenance={"kind": "synthetic"},
    )


def rise(steps: np.ndarray, *, low: float, high: float, middle: float, width: float) -> np.ndarray:
    """A logistic curve from ``low`` to ``high``."""
    return low + (high - low) / (1 + np.exp(-(steps - middle) / width))


def write_metrics(
    folder: Path, steps: np.ndarray, *, seed: int, target: str | None, shift: float, middle: float
) -> None:
    """``unit_metrics.parquet`` of one run: 2 layers of heads, one of which rises."""
    rng = np.random.default_rng(seed)
    parts = []
    for layer in range(2):
        for head in range(N_HEADS):
            name = f"L{layer}H{head}"
            high = 0.42 + shift if name == target else 0.052 + 0.02 * layer * head
            values = rise(steps, low=0.052, high=high, middle=middle, width=90.0)
            values = values + rng.normal(0, 0.004 if name == target else 0.002, len(steps))
            for metric, offset in (("induction", 0.0), ("previous_token", 0.2)):
                parts.append(
                    pd.DataFrame(
                        {
                            "step": steps.astype(np.int32),
                            "layer": np.int16(layer),
                            "head": np.int16(head),
                            "metric": metric,
                            "value": (values + offset).astype(np.float32),
                            "se": np.float32(0.003),
                        }
                    )
                )
    folder.mkdir(parents=True, exist_ok=True)
    pd.concat(parts).to_parquet(folder / "unit_metrics.parquet", index=False)


def write_scores(path: Path, rows: TokenRows, *, seed: int, unit: str, start: int) -> ScoreTable:
    """Student-t scores, shifted up for records; the unsafe row comes first, the last is NaN."""
    rng = np.random.default_rng(seed)
    ids = np.arange(len(rows))
    favoured = np.array([name != "library" for name in rows.domains(ids) or []])
    scores = rng.standard_t(3, len(rows)) + np.where(favoured, 1.6, 0.0)
    scores[0] = scores.max() + 2.0
    scores[-1] = np.nan
    values = np.stack([0.5 * scores, 0.3 * scores, 0.2 * scores], axis=1)[:, None, :]
    return ScoreTable.write(
        path,
        sample_id=ids.astype(np.int64),
        step=(start + ids // 8).astype(np.int32),
        units=[unit],
        blocks=["QK", "V", "O"],
        values=values.astype(np.float32),
        loss=rng.normal(4, 0.3, len(rows)).astype(np.float32),
        estimator="in_run",
        provenance={"damping": 0.1, "fisher": "sampled"},
    )


def write_study(
    folder: Path,
    *,
    n_seeds: int = 2,
    without_window: Collection[int] = (),
    missing: Mapping[int, Collection[str]] | None = None,
    n_rows: int = 400,
) -> Path:
    """A study folder.

    Args:
        without_window: seeds that end with status "no_window".
        missing: arms of a seed that left no metrics, as after an interruption.
    """
    rows = write_corpus(folder / "corpus", n_rows=n_rows)
    seeds: list[dict[str, Any]] = []
    for seed in range(n_seeds):
        root = folder / f"seed-{seed}"
        start, end = 1600 + 40 * seed, 2200 + 40 * seed
        found = seed not in without_window
        target = "L1H2" if seed % 3 else "L1H1"
        middle = (start + end) / 2
        write_metrics(
            root / "base",
            np.arange(0, end + 110, 20),
            seed=seed,
            target=target if found else None,
            shift=0.0,
            middle=middle,
        )
        if not found:
            seeds.append(
                {
                    "seed": seed,
                    "status": "no_window",
                    "message": "No head stayed above 0.10 for 5 evaluations; train longer.",
                    "target": None,
                    "window": None,
                    "base": f"seed-{seed}/base",
                    "scores": None,
                    "arms": {},
                }
            )
            continue
        write_scores(root / "scores", rows, seed=seed, unit=target, start=start)
        rng = np.random.default_rng(100 + seed)
        for number, arm in enumerate(ARMS):
            if arm in (missing or {}).get(seed, ()):
                continue
            write_metrics(
                root / "arms" / arm,
                np.arange(start, end + 110, 20),
                seed=1000 * seed + number,
                target=target,
                shift=SHIFTS[arm] + rng.normal(0, 0.008),
                middle=middle - 900 * SHIFTS[arm],
            )
        seeds.append(
            {
                "seed": seed,
                "status": "complete" if not (missing or {}).get(seed) else "interrupted",
                "message": "",
                "target": target,
                "window": {
                    "start": start,
                    "end": end,
                    "midpoint": middle,
                    "refined_start": start + 80.0,
                    "refined_end": end - 70.0,
                    "end_reason": "plateau",
                    "censored": False,
                },
                "base": f"seed-{seed}/base",
                "scores": f"seed-{seed}/scores",
                "score_unit": target,
                "arms": {arm: f"seed-{seed}/arms/{arm}" for arm in ARMS},
                "units": {"target": target, "second": "L1H3", "lowest": "L0H0"},
                "branch": start,
                "end": end + 100,
                "measured_at": [end, end + 20, end + 40],
            }
        )
    write_json(
        folder / "study.json",
        {
            "schema_version": 2,
            "kind": "counterfactual",
            "title": "Quickstart: which data made the induction head?",
            "created": "2026-01-05T10:00:00+00:00",
            "config": {"model": {"layers": 2, "width": 64, "heads": N_HEADS}, "batch_size": 16},
            "provenance": {"versions": {"mda_lightning": "0.1.0"}, "platform": "synthetic"},
            "corpus": "corpus",
            "metric": "induction",
            "chance": 0.052,
            "treated_fraction": 0.10,
            "thresholds": [0.2, 0.3],
            "held_out": None,
            "arms": DECLARED,
            "window_rule": {"up": 0.1, "consecutive": 5},
            "timings": {"corpus": 12.3, "base runs": 140.0, "arms": 225.5, "report": 6.1},
            "peak_memory_bytes": 2 * 2**30,
            "seeds": seeds,
        },
    )
    return folder
