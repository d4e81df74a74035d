"""Read the fields of a task from plain values, with errors that carry the key path."""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal

from raymerge.merge_actors.errors import RecipeError
from raymerge.stats.evaluation.task_spec import keys_of

#: Fields that name a local file or folder, if there is one of the name.
PATHS = ("validation", "test", "head", "file", "include")


def read_fields(kind: type[Any], value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check keys and types and return the arguments of a task's class.

    Args:
        kind: a dataclass derived from `TaskSpec`.
        value: the task's mapping without `kind`.
        where: key path of the task.

    Raises:
        RecipeError: a key is unknown, or a value is not of its field's type.
    """
    hints = typing.get_type_hints(kind)
    known = keys_of(kind)
    found = {}
    for key, given in value.items():
        if key not in known:
            raise RecipeError(f"{where}.{key}: unknown key; known: {', '.join(known)}{closest(key, known)}.")
        converted = _convert(given, hints[key])
        if converted is _WRONG:
            raise RecipeError(f"{where}.{key}: {given!r} is no {_spelt(hints[key])}.")
        found[key] = _absolute(converted) if key in PATHS else converted
    if "name" in found and (not found["name"] or "/" in found["name"]):
        raise RecipeError(f"{where}.name: {found['name']!r} is no name; give letters, digits, dashes, dots.")
    return found


def closest(given: Any, known: Collection[str]) -> str:
    """Return " (did you mean ...?)" if a known name is close."""
    found = difflib.get_close_matches(str(given), list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


_WRONG = object()


def _convert(value: Any, hint: Any) -> Any:
    """Return the value as the type wants it; `_WRONG` if it is of another type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        tried = [_convert(value, each) for each in arguments]
        return next((each for each in tried if each is not _WRONG), _WRONG)
    if origin is Literal:
        return value if value in arguments else _WRONG
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            return _WRONG
        converted = tuple(_convert(each, arguments[0]) for each in items)
        return _WRONG if _WRONG in converted else converted
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            return _WRONG
        entries = {str(key): _convert(each, arguments[1]) for key, each in value.items()}
        return _WRONG if any(each is _WRONG for each in entries.values()) else entries
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)) else _WRONG


def _spelt(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spelt(each) for each in arguments if each is not types.NoneType)
    if origin is Literal:
        return f"of {', '.join(map(repr, arguments))}"
    if origin is tuple:
        return f"list of {_spelt(arguments[0])}"
    if origin is not None:
        return "mapping"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(hint, str(hint))


def _absolute(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _absolute(each) if key == "source" else each for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_absolute(each) for each in value)
    path = os.path.expanduser(value) if isinstance(value, str) else None
    return os.path.abspath(path) if path is not None and os.path.exists(path) else value
