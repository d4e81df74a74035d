"""References to axes in a recipe: `$name` as a value, `$name` or `${name}` inside a text, `$name[0]` of a list.

A value that is one reference takes the axis value as it is, of any type; a list in a list is
taken apart (`models: [general, $skills]`). `$$` is a dollar sign.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from raymerge.cluster.grid_points import Value, label_of
from raymerge.cluster.origin import join

_REFERENCE = re.compile(
    r"\$(?:(?P<dollar>\$)|(?P<name>[A-Za-z_]\w*)(?:\[(?P<index>\d+)\])?|"
    r"\{(?P<braced>[A-Za-z_]\w*)(?:\[(?P<braced_index>\d+)\])?\})"
)


def references(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name, key path) of every reference in a value."""
    if isinstance(value, str):
        for found in _REFERENCE.finditer(value):
            name = found["name"] or found["braced"]
            if name:
                yield name, key
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from references(each, join(key, name))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from references(each, f"{key}[{index}]")


def replace(value: Any, values: Mapping[str, Value]) -> Any:
    """Return a value with every reference replaced.

    Args:
        value: plain values.
        values: by name; a reference to another name stays as it is.

    Raises:
        IndexError: `$name[i]` of a list that is shorter, with half a sentence.
    """
    if isinstance(value, str):
        whole = _REFERENCE.fullmatch(value)
        if whole and not whole["dollar"]:
            return _value_of(whole, values)
        return _REFERENCE.sub(lambda found: _text_of(found, values), value) if "$" in value else value
    if isinstance(value, Mapping):
        return {name: replace(each, values) for name, each in value.items()}
    if isinstance(value, list | tuple):
        result: list[Any] = []
        for each in value:
            new = replace(each, values)
            if isinstance(each, str) and isinstance(new, list | tuple):
                result.extend(new)
            else:
                result.append(new)
        return result
    return value


def _value_of(found: re.Match[str], values: Mapping[str, Value]) -> Value:
    name = found["name"] or found["braced"]
    index = found["index"] or found["braced_index"]
    if name not in values:
        return found[0]
    value = values[name]
    if index is None:
        return value
    if not isinstance(value, list | tuple) or int(index) >= len(value):
        count = f"{len(value)} values" if isinstance(value, list | tuple) else "no list"
        raise IndexError(f"refers to {found[0]}, but ${name} holds {count} at a point of the grid")
    return value[int(index)]


def _text_of(found: re.Match[str], values: Mapping[str, Value]) -> str:
    if found["dollar"]:
        return "$"
    value = _value_of(found, values)
    return str(value).lower() if isinstance(value, bool) else str(label_of(value))
