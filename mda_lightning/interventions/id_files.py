"""Sample ids in files: what people write down, and what other programs give."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mda_lightning.files import read_json
from mda_lightning.interventions.operations import as_ids
from mda_lightning.interventions.plan import Plan

COLUMN = "sample_id"


def read_ids(path: str | os.PathLike[str]) -> NDArray[np.int64]:
    """The sample ids in a file, in its order, each once; int64 [n].

    ``.txt`` holds integers between spaces, commas or line breaks, ``.npy`` an array, ``.csv``
    (``.tsv``, ``.parquet``) a column ``sample_id`` or one column alone, ``.json`` a list, an object
    with ``sample_ids``, or a plan, whose ids are those that its operations name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or something in it that is no sample id.
    """
    place = Path(path)
    if not place.is_file():
        raise FileNotFoundError(f"no file of sample ids at {place}")
    try:
        found = as_ids(_read(place))
    except (ValueError, OverflowError, EOFError) as error:
        raise ValueError(f"{place} cannot be read as sample ids: {error}") from error
    if not len(found):
        raise ValueError(f"{place} holds no sample id; give at least one")
    if found.min() < 0:
        raise ValueError(f"{place} holds sample id {found.min()}; ids count from 0")
    return found[np.sort(np.unique(found, return_index=True)[1])]


def _read(place: Path) -> Any:
    kind = place.suffix.lower()
    if kind == ".txt":
        return np.array(
            [int(word) for word in place.read_text("utf-8").replace(",", " ").split()], np.int64
        )
    if kind == ".npy":
        return np.load(place, allow_pickle=False)
    if kind == ".json":
        value = read_json(place)
        if isinstance(value, dict) and value.get("kind") == "plan":
            return Plan.load(place).treated_ids
        return _integers(value.get("sample_ids", []) if isinstance(value, dict) else value)
    if kind in (".csv", ".tsv", ".parquet"):
        return _column(place, kind)
    raise ValueError("its name ends in none of .txt, .npy, .json, .csv, .tsv, .parquet")


def _integers(value: Any) -> Any:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is no list of integers")
    wrong = [one for one in value if isinstance(one, bool) or not isinstance(one, int)]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not an integer")
    return np.array(value, np.int64)


def _column(place: Path, kind: str) -> Any:
    import pandas as pd

    frame = (
        pd.read_parquet(place)
        if kind == ".parquet"
        else pd.read_csv(place, sep="\t" if kind == ".tsv" else ",")
    )
    if COLUMN in frame.columns:
        return frame[COLUMN].to_numpy()
    if len(frame.columns) == 1:
        return frame.iloc[:, 0].to_numpy()
    raise ValueError(f"it has no column {COLUMN!r}: {', '.join(map(str, frame.columns))}")
