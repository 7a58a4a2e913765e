"""Files that are either whole or absent.

Every file this package writes is written beside its destination and renamed over it, so a reader
never meets half of one, and an interrupted run leaves only what was finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path in the folder of ``path``; on success what was written there becomes ``path``.

    The yielded path may be made a file or a folder. On an exception it is removed and ``path``
    stays as it was. The folder is created when absent.

    Raises:
        PermissionError: the folder cannot be written to; the message names it.
    """
    destination = Path(path)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(destination.parent, os.W_OK):
            raise PermissionError
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise PermissionError(
            f"cannot write {destination.name!r}: {destination.parent} is not a folder that this "
            "user can write to; choose another output folder"
        ) from error
    # The suffix stays last: several writers (torch, pyarrow, matplotlib) read the format off it.
    part = destination.with_name(
        f".{destination.stem}.part-{secrets.token_hex(4)}{destination.suffix}"
    )
    try:
        yield part
        if part.is_dir() and destination.is_dir():
            former = part.with_name(f"{part.name}.former")
            os.replace(destination, former)
            os.replace(part, destination)
            shutil.rmtree(former, ignore_errors=True)
        else:
            os.replace(part, destination)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write ``value`` as indented JSON, aside and then renamed."""
    with atomic_path(path) as part:
        part.write_text(
            json.dumps(value, indent=2, sort_keys=False, allow_nan=False) + "\n", "utf-8"
        )
    return Path(path)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is not JSON; the message names the file and the position.
    """
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it was damaged or edited") from error


def sha256_of(*parts: bytes | str | np.ndarray[Any, Any]) -> str:
    """SHA-256 over parts in order, as hex; each part is preceded by its length and kind.

    Arrays count with their dtype and shape, so that equal bytes of another shape differ.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            array = np.ascontiguousarray(part)
            digest.update(f"array:{array.dtype.str}:{array.shape}:".encode())
            digest.update(array.view(np.uint8).data if array.size else b"")
        else:
            data = part.encode() if isinstance(part, str) else part
            digest.update(f"bytes:{len(data)}:".encode())
            digest.update(data)
    return digest.hexdigest()
