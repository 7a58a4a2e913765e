"""What of a study stays when its recipe has changed since: seeds and arms as they were run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mda_lightning.files import sha256_of
from mda_lightning.recipes.studies.arms import fraction_of, is_placed_among_others
from mda_lightning.recipes.studies.rankings import rankings_hash, resolved
from mda_lightning.recipes.studies.settings import StudySettings
from mda_lightning.recipes.studies.study_corpus import filled_in


def kept_entry(entry: dict[str, Any], before: StudySettings, now: StudySettings) -> dict[str, Any]:
    """A seed's entry of ``study.json`` without what another recipe than the present one made."""
    same = [
        name
        for name in now.arms
        if name in before.arms and arm_key(name, before) == arm_key(name, now)
    ]
    arms = {name: at for name, at in entry["arms"].items() if name in ("baseline", *same)}
    kept = entry | {"arms": arms}
    if subsets_key(before) != subsets_key(now):
        kept["subsets"] = None
    if rankings_hash(before) != rankings_hash(now):
        kept["rankings"] = None
    if entry["status"] == "complete" and not is_complete(kept, now):
        kept["status"] = "running"
    return kept


def is_complete(entry: dict[str, Any], settings: StudySettings) -> bool:
    """Whether all that the recipe asks for of a seed is there."""
    has_subsets = not settings.subsets.count or entry.get("subsets") is not None
    return {"baseline", *settings.arms} <= set(entry["arms"]) and has_subsets


def arm_key(name: str, settings: StudySettings) -> str:
    """Of everything in a recipe that decides an arm's plan, the base run apart."""
    arm = settings.arms[name]
    owner = arm.control_of or name
    parts: list[Any] = [_filled(name, settings), _filled(owner, settings)]
    if is_placed_among_others(owner, settings):
        # Insertions that are compared spare what any of them treats.
        control = settings.control_of(owner)
        parts += sorted(
            _filled(one, settings)
            for one, other in settings.arms.items()
            if is_placed_among_others(other.control_of or one, settings)
            and settings.control_of(other.control_of or one) == control
        )
    return sha256_of(repr(parts))


def subsets_key(settings: StudySettings) -> str:
    """Of what decides the training on random subsets, the base run apart."""
    what = settings.subsets
    return repr((what.count, what.keep, what.steps) if what.count else None)


def files_key(settings: StudySettings) -> dict[str, str]:
    """Content hashes of files that settings name and that decide what a base run computes."""
    named = {"corpus.icl_text": settings.corpus.icl_text, "model.weights": settings.model.weights}
    return {
        setting: _content_hash(Path(filled_in(text, setting)), text)
        for setting, text in named.items()
        if text is not None
    }


def _content_hash(path: Path, text: str) -> str:
    if path.is_file():
        return sha256_of(path.read_bytes())
    if not path.is_dir():
        return text  # a name on the hub
    files = sorted(one for one in path.rglob("*") if one.is_file())
    return sha256_of(*(f"{one.relative_to(path)}:{sha256_of(one.read_bytes())}" for one in files))


def _filled(name: str, settings: StudySettings) -> str:
    """An arm's own settings, with those that it leaves to the study."""
    arm, what = settings.arms[name], settings.intervention
    filled = dataclasses.replace(
        arm,
        control=None,
        control_of="" if arm.control_of else None,
        fraction=fraction_of(arm, settings),
        mode=arm.mode or what.mode,
        placement=arm.placement or what.placement,
        copies=arm.copies or what.copies,
    )
    return repr((filled, resolved(settings, arm.by)))
