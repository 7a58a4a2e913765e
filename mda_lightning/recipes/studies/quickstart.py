"""The quickstart: the whole experiment on the embedded corpus, in minutes on two cores."""

from __future__ import annotations

import importlib.util
import netrc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mda_lightning.analysis.report import build_report
from mda_lightning.corpora import TokenRows
from mda_lightning.recipes.studies.jobs import Watch
from mda_lightning.recipes.studies.settings import StudySettings
from mda_lightning.recipes.studies.study import Study
from mda_lightning.recipes.studies.study_corpus import study_corpus

WandbMode = Literal["online", "offline", "off"]
QUICKSTART = StudySettings()
"""The recipe that docs/results/quickstart.md found surest over seeds."""


@dataclass(frozen=True)
class QuickstartResult:
    """Where the outcome lies, and how long it took in this call, in seconds."""

    study: Path
    report: Path
    seconds: float


def run_quickstart(
    folder: Path,
    *,
    seeds: tuple[int, ...] = (0,),
    settings: StudySettings = QUICKSTART,
    max_parallel: int = 2,
    wandb: WandbMode = "off",
    watch: Watch | None = None,
    preparing: Callable[[str, float], None] | None = None,
) -> QuickstartResult:
    """Corpus, base runs, windows, scores, plans, arms, report; what is done is kept.

    Args:
        folder: where all of it goes.
        seeds: one base run and four arms each.
        settings: the study; the default is the documented one.
        max_parallel: processes at a time, one thread each.
        wandb: W&B runs online, offline, or none.
        watch: told how each run is doing.
        preparing: told how the corpus is doing, as (what, share done).

    Raises:
        StudyFolderError: the folder holds a study of other settings.
        JobError: a run failed.
    """
    started = time.monotonic()
    corpus = quickstart_corpus(folder.parent / "corpora", settings, preparing)
    study = Study(
        folder,
        settings,
        seeds,
        corpus.folder,
        max_parallel=max_parallel,
        wandb=wandb,
        title="Quickstart: which data made this induction head?",
        watch=watch,
    ).run()
    report = build_report(folder)
    return QuickstartResult(study, report, time.monotonic() - started)


def quickstart_corpus(
    cache_dir: Path,
    settings: StudySettings = QUICKSTART,
    preparing: Callable[[str, float], None] | None = None,
) -> TokenRows:
    """The embedded corpus of these settings, built once and kept in ``cache_dir``."""
    return study_corpus(settings.corpus, cache_dir, preparing).rows


def wandb_mode() -> WandbMode:
    """ "online" where wandb has a key, "offline" where it has none, "off" where it is absent.

    ``WANDB_MODE`` decides where it is set.
    """
    if importlib.util.find_spec("wandb") is None:
        return "off"
    asked = os.environ.get("WANDB_MODE", "").lower()
    if asked in ("online", "offline"):
        return "online" if asked == "online" else "offline"
    if asked in ("disabled", "dryrun"):
        return "off" if asked == "disabled" else "offline"
    return "online" if _has_wandb_key() else "offline"


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    for name in (".netrc", "_netrc"):
        path = Path.home() / name
        try:
            if path.is_file() and netrc.netrc(path).authenticators(host):
                return True
        except (netrc.NetrcParseError, OSError):
            continue
    return False
