"""What a checkpoint argument means: a folder, a hub name with revisions, a file, or many."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from mda_lightning.checkpoints.checkpoint import Checkpoint, step_in
from mda_lightning.checkpoints.folder import CONFIG, WEIGHTS, ModelFolder, read_config
from mda_lightning.checkpoints.hub import (
    HubRevision,
    hub_revisions,
    is_cached,
    is_hub_name,
    nearest,
)
from mda_lightning.checkpoints.state_file import ConfigOf, StateFile

# Of difflib: ckss is taken for a misspelt cks, gpt2 not for a misspelt gpt2-out.
_MISSPELT = 0.8


def find_checkpoints(
    arguments: Sequence[str],
    *,
    config: str | None = None,
    prefix: str | None = None,
    config_of: ConfigOf | None = None,
    trust: bool = False,
) -> list[Checkpoint]:
    """The checkpoints that arguments name, in the order given; within a folder by step.

    An argument is a Hugging Face model folder; a ``.ckpt`` file; a folder of such files or folders;
    or a hub name, perhaps with revisions: ``EleutherAI/pythia-70m@step512,step1000`` or
    ``@step0..step512``. What exists here is meant before what the hub has. A name without a
    revision that is not in the hub's cache is refused, not asked for, where it looks like a
    misspelt path: in a folder that exists, or one word much like an entry of the present folder.

    Args:
        config: for ``.ckpt`` files, the language model's configuration: a folder, a config.json or
            a hub name, perhaps with one revision.
        prefix, config_of, trust: for ``.ckpt`` files, see :class:`StateFile`.

    Raises:
        ValueError, OSError: an argument names nothing; the message says what was expected.
    """
    given = None if config is None else _config(config)

    def file(path: Path) -> StateFile:
        return StateFile(path, config=given, prefix=prefix, config_of=config_of, trust=trust)

    found: list[Checkpoint] = []
    for argument in arguments:
        path = Path(argument).expanduser()
        if (path / CONFIG).is_file():
            found.append(ModelFolder(path))
        elif path.is_file() or path.suffix == ".ckpt":
            if not path.exists():
                raise FileNotFoundError(f"there is no file {path}")
            if path.name in (CONFIG, *WEIGHTS) or path.suffix == ".safetensors":
                raise ValueError(f"{path} is a part of a model: name its folder, {path.parent}")
            found.append(file(path))
        elif path.is_dir():
            found += [
                file(entry) if entry.suffix == ".ckpt" else ModelFolder(entry)
                for entry in _entries(path)
            ]
        else:
            found += _on_hub(argument)
    if (config is not None or prefix is not None) and not any(
        isinstance(checkpoint, StateFile) for checkpoint in found
    ):
        raise ValueError("--config and --prefix are for .ckpt files, and no argument is one")
    unique: dict[str, Checkpoint] = {}
    for checkpoint in found:
        unique.setdefault(checkpoint.label, checkpoint)
    return list(unique.values())


def _entries(folder: Path) -> list[Path]:
    """The checkpoints in a folder; a link to another of them, such as last.ckpt, is left out."""
    entries = [
        entry
        for entry in sorted(folder.iterdir())
        if not entry.name.startswith(".")
        and (
            entry.suffix == ".ckpt"
            or (entry / CONFIG).is_file()
            or (entry.is_dir() and step_in(entry.name) is not None)
        )
    ]
    if not entries:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint: neither {CONFIG} with weights, nor *.ckpt files, nor "
            f"folders with a {CONFIG}"
        )
    places = {entry.resolve() for entry in entries if not entry.is_symlink()}
    kept = [e for e in entries if not e.is_symlink() or e.resolve() not in places]

    def by_step(entry: Path) -> tuple[int, str]:
        step = step_in(entry.name)
        return (-1 if step is None else step), entry.name

    return sorted(kept, key=by_step)


def _on_hub(argument: str) -> list[HubRevision]:
    name, at, revisions = argument.partition("@")
    if at and Path(name).expanduser().exists():
        raise ValueError(f"{argument}: {name} is a folder here; only hub names have revisions")
    if not is_hub_name(name):
        raise FileNotFoundError(
            f"{argument!r} is no file or folder here, and no hub name such as "
            f"EleutherAI/pythia-70m@step512{_near(name)}"
        )
    if not at and _looks_misspelt(name) and not is_cached(name):
        raise FileNotFoundError(
            f"{argument!r} is no file or folder here{_near(name)}; if a model on the hub is meant, "
            f"write {name}@main"
        )
    return hub_revisions(name, revisions if at else None)


def _looks_misspelt(name: str) -> bool:
    """Whether a name of nothing here is rather a path than a hub name."""
    if "/" in name or os.sep in name:
        return Path(name).expanduser().parent.is_dir()
    return bool(difflib.get_close_matches(name, _beside(name), 1, _MISSPELT))


def _near(name: str) -> str:
    return nearest(_beside(name), Path(name).name)


def _beside(name: str) -> list[str]:
    """The entries of the folder that a path would be in, if it can be read."""
    try:
        entries = list(Path(name).expanduser().parent.iterdir())
    except OSError:
        return []
    return sorted(entry.name for entry in entries if not entry.name.startswith("."))


def _config(argument: str) -> PreTrainedConfig:
    path = Path(argument).expanduser()
    if path.is_file() and path.name == CONFIG:
        path = path.parent
    if path.is_dir():
        return read_config(path)
    found = _on_hub(argument)
    if len(found) != 1:
        raise ValueError(f"--config {argument}: name one revision")
    return found[0].config()
