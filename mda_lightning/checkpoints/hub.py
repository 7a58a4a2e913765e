"""A revision of a model on the Hugging Face hub, or on the server that HF_ENDPOINT names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, by the release of huggingface_hub
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers import PreTrainedConfig, PreTrainedModel

from mda_lightning.checkpoints.checkpoint import step_in
from mda_lightning.checkpoints.folder import (
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    first_line,
    load_folder,
    read_config,
)
from mda_lightning.files import read_json

_NEAR = 5
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_RANGE = re.compile(r"(.+?)\.\.(.+)")


class HubRevision:
    """One revision of a hub model; files land in the hub library's own cache.

    Args:
        name: such as ``EleutherAI/pythia-70m``.
        revision: a branch, tag or commit; None is the default branch, ``main``.
    """

    def __init__(self, name: str, revision: str | None = None) -> None:
        self.name = name
        self.revision = revision or constants.DEFAULT_REVISION
        self.label = f"{name}@{self.revision}"
        self.step = step_in(self.revision)
        self.step_from = None if self.step is None else "revision"

    @cached_property
    def _config_file(self) -> Path:
        with _without_bars():  # it is small, and revisions are many
            return self.download(CONFIG)

    @property
    def commit(self) -> str:
        """The commit that the revision stood for when its configuration was read."""
        return self._config_file.parent.name

    def config(self) -> PreTrainedConfig:
        return read_config(self._config_file.parent)

    def load(self, dtype: torch.dtype | None) -> PreTrainedModel:
        return load_folder(self._weights().parent, dtype, self.label)

    def tokenizer(self) -> Path | None:
        try:
            return self.download(TOKENIZER, commit=self.commit)
        except FileNotFoundError:
            return None

    def provenance(self) -> dict[str, Any]:
        return {"kind": "hub", "name": self.name, "revision": self.revision, "commit": self.commit}

    def download(self, file: str, *, commit: str | None = None) -> Path:
        """A file of the revision, from the cache where it is there.

        Raises:
            FileNotFoundError: the file, the revision or the model is not there.
            ConnectionError: the server cannot be reached.
            PermissionError: the model is gated.
        """
        with _hub_errors(self.name, self.revision, file):
            return Path(hf_hub_download(self.name, file, revision=commit or self.revision))

    def _weights(self) -> Path:
        """Fetch the weights; returns a file in the folder where they lie."""
        commit = self.commit  # a branch may move between two files
        for file in WEIGHTS:
            try:
                found = self.download(file, commit=commit)
            except FileNotFoundError as error:
                if isinstance(error.__cause__, EntryNotFoundError):
                    continue
                raise
            if file.endswith(".index.json"):
                for shard in sorted(set(read_json(found)["weight_map"].values())):
                    self.download(shard, commit=commit)
            return found
        raise FileNotFoundError(
            f"{self.label} has no weights that can be loaded: none of {', '.join(WEIGHTS)} is "
            f"there{_offline_note()}"
        )


def is_hub_name(text: str) -> bool:
    """Whether ``text`` could be a model on the hub: ``name`` or ``owner/name``."""
    return _NAME.fullmatch(text) is not None


def is_cached(name: str) -> bool:
    """Whether the hub's cache holds the configuration of the model's default branch."""
    try:
        return isinstance(try_to_load_from_cache(name, CONFIG), str)
    except HFValidationError:
        return False


def hub_revisions(name: str, revisions: str | None) -> list[HubRevision]:
    """The revisions of ``name@rev,rev,first..last``; a range holds all steps from first to last.

    Raises:
        ValueError: a range whose ends name no step, or that holds no revision.
    """
    if revisions is None:
        return [HubRevision(name)]
    found: list[str] = []
    for part in revisions.split(","):
        ends = _RANGE.fullmatch(part.strip())
        found += _range(name, *ends.groups()) if ends else [part.strip()]
    if "" in found:
        raise ValueError(f"{name}@{revisions}: a revision is empty; write for example @step0,step1")
    return [HubRevision(name, revision) for revision in dict.fromkeys(found)]


def _range(name: str, first: str, last: str) -> list[str]:
    low, high = step_in(first), step_in(last)
    if low is None or high is None:
        raise ValueError(
            f"{name}@{first}..{last}: the ends of a range are steps, as step0..step512"
        )
    with _hub_errors(name, first, ""):
        steps = {revision: step_in(revision) for revision in _revisions(name)}
    inside = [r for r, step in steps.items() if step is not None and low <= step <= high]
    if not inside:
        raise ValueError(f"{name} has no revision from {first} to {last}{nearest(steps, first)}")
    return sorted(inside, key=lambda r: (steps[r] or 0, r))


def _revisions(name: str) -> list[str]:
    refs = HfApi().list_repo_refs(name)
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def nearest(names: Iterable[str], wanted: str) -> str:
    """A remark on those names that have a near step or are similar, or nothing."""
    names = list(names)
    step = step_in(wanted)
    numbered = [r for r in names if step_in(r) is not None]
    if step is not None and numbered:
        near = sorted(numbered, key=lambda r: abs((step_in(r) or 0) - step))[:_NEAR]
        near.sort(key=lambda r: step_in(r) or 0)
    else:
        near = difflib.get_close_matches(wanted, names, _NEAR, 0.0)
    return f"; near it: {', '.join(near)}" if near else ""


@contextmanager
def _hub_errors(name: str, revision: str, file: str) -> Iterator[None]:
    """Turn the hub library's errors into one sentence each."""
    try:
        yield
    except GatedRepoError as error:
        raise PermissionError(
            f"{name} is gated: ask for access on its page, then log in or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is no file or folder here, and {constants.ENDPOINT} has no such model that "
            "may be read without a token; a private one needs HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        try:
            near = nearest(_revisions(name), revision)
        except (HfHubHTTPError, HTTPError, OSError):
            near = ""  # a server without this part of the interface
        raise FileNotFoundError(f"{name} has no revision {revision!r}{near}") from error
    except LocalEntryNotFoundError as error:
        # A FileNotFoundError whose cause is an EntryNotFoundError: another file may be cached.
        raise FileNotFoundError(
            f"{file} of {name}@{revision} is not in the hub's cache and {constants.ENDPOINT} "
            f"cannot be reached{_offline_note()}"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{name}@{revision} has no {file}") from error
    except HFValidationError as error:
        raise ValueError(f"{name}@{revision}: {first_line(error)}") from error
    except (HfHubHTTPError, HTTPError) as error:
        raise ConnectionError(
            f"{constants.ENDPOINT} did not give {file or 'the revisions'} of {name}@{revision}: "
            f"{first_line(error)}; what was fetched is kept, call again"
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _offline_note() -> str:
    return " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
