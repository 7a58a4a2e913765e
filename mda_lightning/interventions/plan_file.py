"""Plans as JSON files."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mda_lightning.base_order import BaseOrder
from mda_lightning.files import atomic_path, read_json
from mda_lightning.interventions.operations import operation_from
from mda_lightning.interventions.sources import Source

SCHEMA_VERSION = 2  # also: how operations are turned into places


def write_plan_file(path: Path, value: dict[str, Any], sources: Sequence[Source]) -> Path:
    """Write the JSON values of a plan, with its sources' folders relative to the file."""
    listed = [_relative(source, path).describe() for source in sources]
    whole = {"kind": "plan", "schema_version": SCHEMA_VERSION, **value, "sources": listed}
    with atomic_path(path) as part:
        part.write_text(json.dumps(whole, allow_nan=False) + "\n", "utf-8")
    return path


def read_plan_file(path: Path) -> tuple[dict[str, Any], str]:
    """The fields of a plan, and the content hash that the file says it has.

    Raises:
        FileNotFoundError, ValueError: as for :meth:`Plan.load`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no plan file at {path}; Plan.save writes one")
    value = read_json(path)
    if not isinstance(value, dict) or value.get("kind") != "plan":
        raise ValueError(f"{path} is not a plan file; Plan.save writes one")
    _check_version(path, value.get("schema_version"))
    try:
        fields = {
            "operations": tuple(operation_from(item) for item in value["operations"]),
            "seed": value["seed"],
            "corpus_hash": value["corpus_hash"],
            "order": None if value["order"] is None else BaseOrder(**value["order"]),
            "spared": np.asarray(value["spared"], dtype=np.int64),
            "sources": tuple(_absolute(Source(**item), path) for item in value["sources"]),
            "source": value["source"],
            "name": value["name"],
        }
        return fields, value["content_hash"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a whole plan ({error}); it was edited or damaged: build it again"
        ) from error


def _check_version(path: Path, version: Any) -> None:
    if version == SCHEMA_VERSION:
        return
    if isinstance(version, int) and version < SCHEMA_VERSION:
        raise ValueError(
            f"{path} has plan schema {version}, by which insertions took other places than by "
            f"{SCHEMA_VERSION}, this version's; build the plan again"
        )
    raise ValueError(
        f"{path} has plan schema {version}, this version reads {SCHEMA_VERSION}; "
        "update mda-lightning"
    )


def _relative(source: Source, plan_path: Path) -> Source:
    if source.path is None:
        return source
    path = os.path.relpath(source.path, plan_path.absolute().parent)
    return dataclasses.replace(source, path=Path(path).as_posix())


def _absolute(source: Source, plan_path: Path) -> Source:
    if source.path is None:
        return source
    path = os.path.normpath(plan_path.absolute().parent / source.path)
    return dataclasses.replace(source, path=path)
