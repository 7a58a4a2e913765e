"""YAML into settings: keys that exist, values of their type, or a message that says which not."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import jsonargparse
import yaml  # type: ignore[import-untyped]

from mda_lightning.recipes.studies.settings import StudySettings

MAPPINGS = ("arms", "rankings")
"""Settings whose keys are names that a recipe chooses."""


class RecipeError(ValueError):
    """A recipe cannot be read, or contradicts itself; the message says where and the way out."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which a key that is given twice is an error, not the last one's word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(getattr(key, "value", key))
            if name in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{name!r} is given twice; leave one of the two out",
                    problem_mark=key.start_mark,
                )
            seen.add(name)
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return found


def load_yaml(text: str, what: str) -> Any:
    """The value of a YAML text.

    Raises:
        RecipeError: it is no YAML, or gives a key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from error


def settings_of(values: Mapping[str, Any]) -> StudySettings:
    """Settings of nested values as YAML gives them.

    Raises:
        RecipeError: a key that no setting has, or a value of another type than its setting's; the
            message names the key with all that is above it, the value and what is allowed.
    """
    built: StudySettings = _built(StudySettings, values, "")
    return built


def _built(kind: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        above = prefix.rstrip(".")
        raise RecipeError(
            f"{above} is {_shown(values)}; it holds settings: {', '.join(_fields(kind))}"
        )
    hints = get_type_hints(kind)
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in _fields(kind):
            raise RecipeError(_unknown(str(name), kind, prefix))
        given[name] = _value(hints[name], value, f"{prefix}{name}")
    return kind(**given)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _built(hint, value, f"{where}.")
    if get_origin(hint) is dict:
        kind = get_args(hint)[1]
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where} is {_shown(value)}; it holds settings by name")
        return {str(name): _built(kind, one, f"{where}.{name}.") for name, one in value.items()}
    if isinstance(value, bool) and hint is not bool:  # which is an int to Python
        raise RecipeError(f"{where} is {_shown(value)}; allowed is {allowed(hint)}")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        return parser.parse_object({"value": value}).value
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise RecipeError(f"{where} is {_shown(value)}; allowed is {allowed(hint)}") from error


def allowed(hint: Any) -> str:
    """A type in words: "a number or null"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return " or ".join(allowed(part) for part in parts)
    if origin is tuple:
        if parts[-1] is Ellipsis:
            return f"a list, of each {allowed(parts[0])}"
        return f"a list of {len(parts)}, of each {allowed(parts[0])}"
    words: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
        typing.Any: "anything",
    }
    return words.get(hint, str(hint))


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """``(did you mean 'x'?)`` where a known name is close, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _fields(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _unknown(name: str, kind: Any, prefix: str) -> str:
    known = _fields(kind)
    return f"no setting {prefix}{name}{nearest(name, known)}; there are: {', '.join(known)}"


def _shown(value: Any) -> str:
    if value is None:
        return "empty (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
