"""``study.json``: what a study is, and what of it has been run."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from mda_lightning import __version__
from mda_lightning.corpora import TokenRows
from mda_lightning.files import read_json, write_json
from mda_lightning.mechanisms import mechanism
from mda_lightning.recipes.studies.arms import phrase_of
from mda_lightning.recipes.studies.changes import kept_entry
from mda_lightning.recipes.studies.job import peak_memory_bytes
from mda_lightning.recipes.studies.settings import StudySettings
from mda_lightning.window import WindowRule

SCHEMA_VERSION = 2  # 1 knew five arms and no declared controls
FILE = "study.json"


class StudyFolderError(ValueError):
    """The folder holds a study of other settings, or cannot hold one."""


class Described(Protocol):
    """What the file says of a study; see :class:`~mda_lightning.recipes.studies.study.Study`."""

    folder: Path
    settings: StudySettings
    corpus: Path
    held_out: Path | None
    title: str
    max_parallel: int
    seeds: tuple[int, ...]
    shared: Path | None
    timings: dict[str, float]
    rows: TokenRows

    def relative(self, path: Path) -> str:
        """As the file names a path."""
        ...


@dataclass
class StudyFile:
    """The file of one study.

    Attributes:
        seeds: seed -> its entry, kept by the study while it runs.
    """

    study: Described
    created: str
    seeds: dict[int, dict[str, Any]]

    @classmethod
    def claim(cls, study: Described) -> StudyFile:
        """Take up what the folder holds of the same study.

        Arms may have been added, changed or left out since; base run, corpus and versions not.

        Raises:
            StudyFolderError: it holds another study.
        """
        path = study.folder / FILE
        if not path.is_file():
            return cls(study, datetime.now(UTC).isoformat(timespec="seconds"), {})
        former = read_json(path)
        if former.get("schema_version") != SCHEMA_VERSION:
            raise StudyFolderError(
                f"{path} has schema_version {former.get('schema_version')!r}, this version writes "
                f"{SCHEMA_VERSION}; give another folder, or start over with --fresh"
            )
        theirs = StudySettings.from_dict(former["config"])
        made = former["provenance"]
        for what, before, now in (
            ("settings", theirs.base_dict(), study.settings.base_dict()),
            ("corpus", made["corpus_hash"], study.rows.content_hash),
            ("package versions", made["versions"], package_versions()),
        ):
            if before != now:
                raise StudyFolderError(
                    f"{study.folder} holds a study of other {what} ({_difference(before, now)}); "
                    "give another folder, or start over with --fresh"
                )
        study.timings = {k: v for k, v in former["timings"].items() if k != "total"}
        seeds = {
            int(seed["seed"]): kept_entry(seed, theirs, study.settings) for seed in former["seeds"]
        }
        return cls(study, str(former["created"]), seeds)

    @staticmethod
    @contextmanager
    def lock(folder: Path) -> Iterator[None]:
        """Keep other processes out of a folder.

        Raises:
            StudyFolderError: one works there already.
        """
        try:
            with FileLock(folder / ".lock", timeout=0):
                yield
        except Timeout as error:
            raise StudyFolderError(
                f"another process is working in {folder}; wait for it, stop it, or give another "
                "folder"
            ) from error

    def write(self, peaks: list[int], seconds: float) -> Path:
        """Write the file as things are now."""
        study = self.study
        settings = study.settings
        of = mechanism(settings.mechanism, token_ids=study.rows.token_ids.tolist())
        largest = sorted(peaks, reverse=True)[: study.max_parallel]
        return write_json(
            study.folder / FILE,
            {
                "schema_version": SCHEMA_VERSION,
                "kind": "counterfactual",
                "title": study.title,
                "created": self.created,
                "settings_hash": settings.content_hash,
                "config": settings.to_dict(),
                "provenance": _provenance() | {"corpus_hash": study.rows.content_hash},
                "corpus": study.relative(study.corpus),
                "asked_seeds": list(study.seeds),
                "shared": None if study.shared is None else study.relative(study.shared),
                "held_out": None if study.held_out is None else study.relative(study.held_out),
                "metric": settings.mechanism,
                "chance": of.chance,
                "treated_fraction": settings.intervention.fraction,
                "thresholds": list(settings.monitor.thresholds),
                "arms": _arms(settings),
                "timings": {"total": seconds} | study.timings,
                # An upper bound: this process and the largest ones at once, each at its own peak.
                "peak_memory_bytes": peak_memory_bytes() + sum(largest),
                "window_rule": None if settings.window.is_fixed else WindowRule().settings(),
                "seeds": [self.seeds[seed] for seed in sorted(self.seeds)],
            },
        )


def measured_at(settings: StudySettings, end: int) -> list[int]:
    """The last evaluations up to the window's end, the same for every arm.

    With ``shift`` the insertion arms are judged there too, having seen less of the window's base
    data by then, as their control has.
    """
    monitor = settings.monitor
    last = end - end % monitor.every_n_steps
    return [last - i * monitor.every_n_steps for i in reversed(range(monitor.averaged_evaluations))]


def package_versions() -> dict[str, str]:
    """The versions that decide what a run computes."""
    names = ("torch", "lightning", "transformers", "numpy")
    return {"mda_lightning": __version__, **{name: version(name) for name in names}}


def _arms(settings: StudySettings) -> dict[str, Any]:
    """What each arm is, the base run first."""
    arms: dict[str, Any] = {
        "baseline": {"do": "nothing", "control": None, "phrase": "leaving the data alone"}
    }
    for name, arm in settings.arms.items():
        owner = settings.arms[arm.control_of] if arm.control_of is not None else arm
        arms[name] = {
            "do": owner.do,
            "control": None if arm.control_of is not None else settings.control_of(name),
            "control_of": arm.control_of,
            "by": None if arm.control_of is not None else arm.by,
            "unit": arm.unit,
            "which": arm.which,
            "phrase": phrase_of(name, settings),
        }
    return arms


def _difference(before: Any, now: Any, path: str = "") -> str:
    """The first value in which two settings differ, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                return _difference(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    name = f"{path} " if path else ""
    return f"{name}{_short(before)}, here {_short(now)}"


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _provenance() -> dict[str, Any]:
    return {
        "versions": package_versions(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
