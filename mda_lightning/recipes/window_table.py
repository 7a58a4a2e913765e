"""Recorded metric tables, read as curves: what ``mda-lightning window`` follows.

Three forms are known: the long Parquet tables of ``UnitMonitor`` and ``mda-lightning monitor``, the
latter's long CSV, and wide tables with a step column and one column a metric, as Lightning's
``CSVLogger`` and an export from W&B have them.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

#: Newest ``schema_version`` of the metric tables that is understood.
SCHEMA_VERSION = 1
TABLE_NAMES = ("unit_metrics.parquet", "metrics.parquet", "metrics.csv")
#: Names of a step column, the most telling first. W&B's ``_step`` counts log calls.
STEP_COLUMNS = ("trainer/global_step", "global_step", "step", "_step")
_NOT_METRICS = {*STEP_COLUMNS, "epoch", "_timestamp", "_runtime"}

_HEAD_COLUMN = re.compile(r"(?P<metric>.+)/(?P<unit>L\d+H\d+)")
_EXTREME = re.compile(r"__(MIN|MAX)$")
_GAP = 3.0
"""An interval this many times as long as both its neighbours is a gap."""
_SHOWN = 12


@dataclass(frozen=True)
class Curves:
    """One metric of a table.

    Attributes:
        units: heads, or the metric's own name where it is a number of the whole model.
        steps: [n] int64, ascending.
        values: [n, units] float64; NaN where a unit has no finite value at a step.
        notes: what was mended or is missing, in sentences.
    """

    metric: str
    units: tuple[str, ...]
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class RecordedTable:
    """A table of metrics over steps.

    Attributes:
        sha256: of the file.
        columns: metric -> unit -> column of a wide table; empty for a long one.
        provenance: what the file says of its making; empty for CSV.
    """

    path: Path
    sha256: str
    step_column: str
    metrics: tuple[str, ...]
    columns: Mapping[str, Mapping[str, str]]
    provenance: Mapping[str, Any]
    _frame: pd.DataFrame = field(repr=False)

    @property
    def _usual_interval(self) -> int:
        """The longest interval of a ``UnitMonitor``, whose rate goes up where something happens."""
        return int(self.provenance.get("quiet_every_n_steps") or 0)

    @property
    def listed(self) -> str:
        """The metrics' names, for messages."""
        return _some(self.metrics, 40)

    def check_has(self, metric: str) -> None:
        """Raise ValueError where there is no such metric, naming those that there are."""
        # A single head's column of a wide table may be named in full.
        if metric not in self.metrics and not (self.columns and metric in self._frame):
            raise ValueError(f"{self.path} has no metric {metric!r}; there are: {self.listed}")

    def curves(self, metric: str) -> Curves:
        """The curves of one metric.

        Of rows with the same step the later one counts: a table may be put together from a run and
        its resumption.

        Raises:
            ValueError: no such metric, or values or steps that are not numbers.
        """
        long = self._rows(metric)
        notes = []
        step = _numbers(long["step"], f"step column {self.step_column!r}", self.path)
        n_stepless = int(step.isna().sum())
        if n_stepless:
            notes.append(f"{_count(n_stepless, 'value')} left out that no step is given for")
        long = long.assign(step=step, value=_numbers(long["value"], repr(metric), self.path))
        long = long[step.notna()]
        if long.empty:
            raise ValueError(f"{self.path} holds no value of {metric!r}")
        odd = long["step"][(long["step"] % 1 != 0) | ~np.isfinite(long["step"])]
        if len(odd):
            raise ValueError(
                f"{self.path}: {odd.iloc[0]:g} in {self.step_column!r} is not a whole number of "
                "steps; name another column with --step-column"
            )
        long = long.astype({"step": np.int64})
        repeated = long.duplicated(["step", "unit"], keep="last")
        if repeated.any():
            n = int(long["step"][repeated].nunique())
            notes.append(f"{_count(n, 'step')} occurred in more than one row: the later one counts")
        elif (long.groupby("unit", sort=False)["step"].diff() < 0).any():
            notes.append("the rows were not in the order of their steps: sorted")
        units = tuple(dict.fromkeys(long["unit"]))
        grid = long[~repeated].pivot(index="step", columns="unit", values="value")
        grid = grid.sort_index()[list(units)]
        steps, values = grid.index.to_numpy(np.int64), grid.to_numpy(np.float64)
        notes += _gaps(steps, self._usual_interval) + _missing(units, values)
        return Curves(
            metric, units, steps, np.where(np.isfinite(values), values, np.nan), (*notes,)
        )

    def _rows(self, metric: str) -> pd.DataFrame:
        """Columns step, unit, value; one row a value, in the order of the table."""
        self.check_has(metric)
        step = self._frame[self.step_column]
        if not self.columns:
            own = self._frame[self._frame["metric"] == metric]
            return pd.DataFrame(
                {"step": own[self.step_column], "unit": _units(own, metric), "value": own["value"]}
            )
        columns = self.columns.get(metric) or {metric.rpartition("/")[2]: metric}
        parts = [
            pd.DataFrame({"step": step, "unit": unit, "value": self._frame[column]})
            for unit, column in columns.items()
        ]
        # An empty cell of a wide table says that another metric was logged then.
        return pd.concat(parts).dropna(subset="value")


def read_table(path: str | Path, *, step_column: str | None = None) -> RecordedTable:
    """Read a table's rows and what it says of itself.

    Args:
        path: a Parquet or CSV file, or a folder that holds exactly one table of metrics.
        step_column: of the step; None takes the first of :data:`STEP_COLUMNS` that is there.

    Raises:
        OSError: nothing lies there.
        ValueError: no table of metrics, an empty one, or one of a newer version.
    """
    file = _find(Path(path))
    content, provenance = _read(file)
    content.columns = content.columns.map(str)
    if not {"metric", "value"} <= set(content):
        content = _as_logged(content, step_column)
    if content.empty or not len(content.columns):
        raise ValueError(f"{file} holds no rows: nothing has been measured yet")
    step = _step_column(file, list(content), step_column)
    if {"metric", "value"} <= set(content):
        if "layer" in content and "head" in content:
            for name in ("layer", "head"):
                content[name] = _numbers(content[name], repr(name), file)
        metrics = tuple(str(name) for name in dict.fromkeys(content["metric"].dropna()))
        columns: dict[str, dict[str, str]] = {}
    else:
        columns = _wide_columns([name for name in content if name != step])
        metrics = tuple(columns)
    if not metrics:
        raise ValueError(f"{file} has no column of a metric beside {step!r}")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return RecordedTable(file, digest, step, metrics, columns, provenance, content)


def chance_values(table: RecordedTable) -> dict[str, float]:
    """The chance values that a table tells, by metric: those of its mechanisms.

    Where token ids are those of the model's configuration, they are not in the table, and the
    lengths of the probe sequences, so the value, may differ by a hundredth of it.
    """
    told = table.provenance.get("chance")
    if told is not None:
        return {name: float(value) for name, value in told.items() if name in table.metrics}
    settings: dict[str, Any] = {}
    for part in ("measures", "mechanisms"):
        settings |= table.provenance.get(part) or {}
    settings = {name: own for name, own in settings.items() if name in table.metrics}
    if not settings:
        return {}
    from mda_lightning.mechanisms import MECHANISMS, mechanism  # torch takes seconds to import

    found = {}
    for name in table.metrics:
        if name in settings and name in MECHANISMS:
            try:
                found[name] = mechanism(name, **_restored(settings[name])).chance
            except (TypeError, ValueError):
                continue  # settings of another version: its floor has to be given
    return found


def _restored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a mechanism from their JSON values; its chance depends on how many ids it has."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    ids = values.get("token_ids")
    if isinstance(ids, Mapping):
        count = ids["count"] if "count" in ids else ids["last"] - ids["first"] + 1
        values["token_ids"] = tuple(range(int(count)))
    return values


def _find(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_dir():
        return path
    found = [path / name for name in TABLE_NAMES if (path / name).is_file()]
    found = found or sorted(p for name in TABLE_NAMES for p in path.rglob(name) if p.is_file())
    # The monitor command writes the same rows as Parquet and as CSV.
    found = [p for p in found if p.suffix != ".csv" or p.with_suffix(".parquet") not in found]
    if not found:
        raise FileNotFoundError(
            f"{path} holds no {', '.join(TABLE_NAMES[:-1])} or {TABLE_NAMES[-1]}; name the table's "
            "file itself"
        )
    if len(found) > 1:
        raise ValueError(f"{path} holds several tables; name one of {_some(map(str, found))}")
    return found[0]


def _read(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    with path.open("rb") as stream:
        is_parquet = stream.read(4) == b"PAR1"
    try:
        if is_parquet:
            table = pq.read_table(path)
            note = json.loads((table.schema.metadata or {}).get(b"mda_lightning", b"{}"))
            frame: pd.DataFrame = table.to_pandas()
            frame = frame.reset_index(drop=frame.index.name is None)
        else:
            # As text, so that an empty cell and a NaN that was written are told apart.
            note = {}
            frame = pd.read_csv(
                path, sep=_separator(path), dtype=str, keep_default_na=False, na_values=[""]
            )
    except pd.errors.EmptyDataError as error:
        raise ValueError(f"{path} is empty: nothing has been measured yet") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is neither a Parquet nor a CSV table: {error}") from error
    version = note.get("schema_version", SCHEMA_VERSION)
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {version}, and this version of mda_lightning knows up to "
            f"{SCHEMA_VERSION}: install the one that wrote it, or a newer one"
        )
    if note.get("kind", "checkpoint_metrics") != "checkpoint_metrics":
        raise ValueError(f"{path} is a table of {note['kind']}, not of metrics over steps")
    return frame, note.get("provenance", {})


def _separator(path: Path) -> str:
    """The comma, unless the header has none and a semicolon or tab divides it."""
    with path.open(encoding="utf-8", errors="replace", newline="") as lines:
        header = next((line for line in lines if line.strip()), "")
    fields = {one: len(next(csv.reader([header], delimiter=one), [])) for one in ",;\t"}
    return "," if fields[","] > 1 else max(fields, key=lambda one: fields[one])


def _as_logged(frame: pd.DataFrame, step_column: str | None) -> pd.DataFrame:
    """The columns of a W&B chart's export under the names that were logged.

    There a metric of a run is ``run - metric``, with ``run - metric__MIN`` and ``__MAX`` beside.
    Of several runs the names stay whole.
    """
    columns = set(frame)
    extremes = [c for c in frame if _EXTREME.search(c) and _EXTREME.sub("", c) in columns]
    frame = frame.drop(columns=extremes)
    metrics = [c for c in frame if c.casefold() not in _NOT_METRICS and c != step_column]
    runs = {column: column.rpartition(" - ")[0] for column in metrics}
    if len(set(runs.values())) != 1 or not all(runs.values()):
        return frame
    logged = {column: column.rpartition(" - ")[2] for column in runs}
    # Of two columns of steps the chart's own axis is the whole one.
    twice = [column for column, name in logged.items() if name in columns]
    return frame.drop(columns=twice).rename(columns=logged)


def _step_column(path: Path, columns: Sequence[str], wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"{path} has no column {wanted!r}; there are: {_some(columns)}")
        return wanted
    for name in STEP_COLUMNS:
        for column in columns:
            if column.casefold() == name:
                return column
    raise ValueError(
        f"{path} has no column of steps ({', '.join(STEP_COLUMNS)}); name it with --step-column, "
        f"among: {_some(columns)}"
    )


def _wide_columns(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Metric -> unit -> column; ``induction/L1H2`` is unit L1H2 of the metric ``induction``."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if name.casefold() in _NOT_METRICS:
            continue
        match = _HEAD_COLUMN.fullmatch(name)
        metric, unit = (match["metric"], match["unit"]) if match else (name, name)
        found.setdefault(metric, {})[unit] = name
    return found


def _units(rows: pd.DataFrame, metric: str) -> pd.Series[str]:
    if not {"layer", "head"} <= set(rows):
        return pd.Series(metric, rows.index)
    of_model = rows["layer"].isna() | rows["head"].isna()
    layer, head = (rows[n].fillna(-1).astype(int).astype(str) for n in ("layer", "head"))
    return ("L" + layer + "H" + head).mask(of_model, metric)


def _numbers(column: pd.Series[Any], what: str, path: Path) -> pd.Series[float]:
    numbers = pd.to_numeric(column, errors="coerce").astype(np.float64)
    text = column[numbers.isna() & column.notna()].astype(str)
    wrong = text[text.str.strip().str.casefold() != "nan"]
    if len(wrong):
        raise ValueError(
            f"{path}: {what} is not numeric: it holds {wrong.iloc[0]!r} in row {wrong.index[0] + 1}"
        )
    return numbers


def _gaps(steps: NDArray[np.int64], usual: int) -> list[str]:
    length = np.diff(steps)
    if len(length) < 3:
        return []
    beside = np.maximum(length[:-2], length[2:])
    gaps = np.flatnonzero(length[1:-1] > np.maximum(_GAP * beside, usual)) + 1
    if len(gaps) == 0:
        return []
    widest = gaps[np.argmax(length[gaps])]
    return [
        f"{_count(len(gaps), 'gap')} between evaluations, the widest from step {steps[widest]} to "
        f"{steps[widest + 1]}: an edge of a window that falls there is dated to its ends"
    ]


def _missing(units: Sequence[str], values: NDArray[np.float64]) -> list[str]:
    broken = ~np.isfinite(values)
    if not broken.any():
        return []
    having = [units[int(i)] for i in np.flatnonzero(broken.any(axis=0))]
    return [
        f"{_count(int(broken.sum()), 'value')} missing or not finite ({_some(having, 4)}): such an "
        "evaluation leaves its unit as it was"
    ]


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _some(names: Any, most: int = _SHOWN) -> str:
    listed = [str(name) for name in names]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
