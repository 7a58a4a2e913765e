"""Recipes: studies as YAML files, those that come with the package and a user's own.

A recipe has a comment header, ``title``, ``seeds`` and the fields of
:class:`~mda_lightning.recipes.studies.settings.StudySettings`; ``extends`` names another recipe
that it changes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mda_lightning.recipes.studies.contradictions import (
    ContradictionError,
    refuse_contradictions,
    remarks_on,
)
from mda_lightning.recipes.studies.recipe_yaml import (
    MAPPINGS,
    RecipeError,
    load_yaml,
    nearest,
    settings_of,
)
from mda_lightning.recipes.studies.settings import STANDARD_ARMS, StudySettings

__all__ = ["BundledRecipe", "Recipe", "RecipeError", "bundled_recipes", "read_recipe"]

_BUNDLED = Path(__file__).parents[1] / "paper"


@dataclass(frozen=True)
class Recipe:
    """A study as a file describes it.

    Attributes:
        title: of the report.
        seeds: one base run and its arms each.
        settings: everything else that determines the study.
        path: of the file.
        header: the comment that the file begins with, without its ``#``.
        remarks: what a reader should know before running it, such as arms without a control.
    """

    title: str
    seeds: tuple[int, ...]
    settings: StudySettings
    path: Path
    header: str
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class BundledRecipe:
    """A recipe that comes with the package: its name, and the first line of its header."""

    name: str
    summary: str


def bundled_recipes() -> list[BundledRecipe]:
    """The recipes that come with the package, by name."""
    return [
        BundledRecipe(path.stem, _header(path.read_text("utf-8")).split("\n")[0])
        for path in _bundled_files()
    ]


def read_recipe(path_or_name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides, and refuse what cannot be run.

    A recipe that ``extends`` another (a name of :func:`bundled_recipes`, or a file beside it) is
    merged into it key by key: mappings recursively, everything else replaced; ``null`` for an arm
    or a ranking removes it. A recipe that names no arms has the standard four.

    Args:
        path_or_name: a YAML file, or the name of a bundled recipe.
        overrides: ``KEY=VALUE`` each, such as ``training.max_steps=200``, ``seeds=3`` (0, 1, 2),
            ``seeds=[4,7]``, ``arms.mask-top.fraction=0.2`` or ``arms.mask-top=null``; the value is
            YAML.

    Raises:
        FileNotFoundError: no such file or name.
        RecipeError: no YAML, a cycle of ``extends``, an unknown key, a value of the wrong type, or
            settings that contradict each other. The message names the file.
    """
    path = _find(path_or_name, None)
    if path.name.startswith("_"):
        raise RecipeError(f"{path.name} is only there to be extended: extends: {path.stem}")
    try:
        values = _merged_with_bases(path, ())
        values.setdefault("arms", {name: _changed(arm) for name, arm in STANDARD_ARMS.items()})
        for override in overrides:
            _apply(values, override)
        title, seeds = values.pop("title", path.stem), _seeds(values.pop("seeds", [0]))
        if not isinstance(title, str) or not title.strip():
            raise RecipeError(f"title is {title!r}; it is a line of text")
        settings = settings_of(values)
        refuse_contradictions(settings)
    except (RecipeError, ContradictionError) as error:
        raise RecipeError(f"{path}: {error}") from error
    header = _header(path.read_text("utf-8"))
    return Recipe(title, seeds, settings, path, header, remarks_on(settings, seeds))


# -- files ------------------------------------------------------------------------------------


def _bundled_files() -> list[Path]:
    """Recipes whose name begins with ``_`` are only there to be extended."""
    return sorted(path for path in _BUNDLED.glob("*.yaml") if not path.name.startswith("_"))


def _find(path_or_name: str | os.PathLike[str], beside: Path | None) -> Path:
    text = os.path.expanduser(os.fspath(path_or_name))
    names = [text] if text.endswith((".yaml", ".yml")) else [text, f"{text}.yaml"]
    folders = [_BUNDLED] if beside is None else [beside, _BUNDLED]
    places = [Path(text)] if beside is None else []
    places += [folder / name for folder in folders for name in names]
    for place in places:
        if place.is_file():
            return place
    stem = Path(text).name.removesuffix(".yaml").removesuffix(".yml")
    known = [path.stem for path in _bundled_files()]
    raise FileNotFoundError(
        f"there is no recipe {text!r}: no file of that name, and none that comes with the "
        f"package{nearest(stem, known)}; those are: {', '.join(known)}"
    )


def _merged_with_bases(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe's values over those of the recipes that it extends."""
    if path.resolve() in above:
        chain = " -> ".join(one.name for one in (*above, path.resolve()))
        raise RecipeError(f"recipes extend each other in a circle ({chain}); end it somewhere")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error}") from error
    values = load_yaml(text, path.name)
    if not isinstance(values, dict):
        raise RecipeError(f"{path.name} holds no settings; a recipe has title, seeds and settings")
    base = values.pop("extends", None)
    if base is None:
        return _merge({}, values, "")
    if not isinstance(base, str):
        raise RecipeError(f"extends is {base!r}; it names one recipe")
    try:
        found = _find(base, path.parent)
    except FileNotFoundError as error:
        raise RecipeError(f"extends: {error}") from error
    return _merge(_merged_with_bases(found, (*above, path.resolve())), values, "")


def _changed(arm: Any) -> dict[str, Any]:
    """An arm's settings other than the defaults, as a recipe would give them."""
    plain = type(arm)()
    return {k: v for k, v in vars(arm).items() if v != getattr(plain, k) or k == "do"}


def _merge(base: dict[str, Any], over: dict[str, Any], above: str) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if value is None and above in MAPPINGS:
            if key not in base and base:
                raise RecipeError(
                    f"{above}.{key} is null, which removes it, and there is none"
                    f"{nearest(key, base)}"
                )
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value, str(key) if not above else f"{above}.{key}")
        elif isinstance(value, dict) and key in MAPPINGS and not above:
            merged[key] = _merge({}, value, str(key))
        else:
            merged[key] = value
    return merged


def _header(text: str) -> str:
    lines = []
    for line in text.split("\n"):
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return "\n".join(lines).strip("\n")


# -- values -----------------------------------------------------------------------------------


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise RecipeError(
            f"the override {override!r} is not KEY=VALUE, such as training.max_steps=200"
        )
    if names[0] == "extends":
        raise RecipeError("extends cannot be overridden; name the other recipe instead")
    value = load_yaml(text, f"the value of {key.strip()}")
    if names[0] in MAPPINGS and len(names) > 1:
        known = values.get(names[0]) or {}
        if names[1] not in known:
            raise RecipeError(
                f"the override {override!r} names no entry of {names[0]}"
                f"{nearest(names[1], known)}; there are: {', '.join(known) or 'none'}"
            )
        if len(names) == 2 and value is None:
            values[names[0]] = {k: v for k, v in known.items() if k != names[1]}
            return
    at = values
    for name in names[:-1]:
        inner = at.get(name)
        if inner is not None and not isinstance(inner, dict):
            raise RecipeError(f"the override {override!r}: {name} is {inner!r}, no settings")
        at[name] = dict(inner or {})
        at = at[name]
    at[names[-1]] = value


def _seeds(value: Any) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return tuple(range(value))
    numbers = isinstance(value, list) and all(
        isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in value
    )
    if not numbers or not value or len(set(value)) < len(value):
        raise RecipeError(
            f"seeds is {value!r}; allowed is how many (3 means 0, 1, 2), or a list of different "
            "whole numbers from 0 on, such as [4, 7]"
        )
    return tuple(value)
