"""The points of a grid: one recipe each, made when it is asked for.

A grid of 10,000 points is a list of 10,000 numbers; a point's recipe exists while somebody holds it.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import xxhash

#: Value of an axis: what a YAML file can hold.
Value = Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One merge of a grid."""

    number: int
    """Position among the grid's points, from 0; the same in every run of the same file."""
    axes: Mapping[str, Value]
    """Value of each axis, in the order of the file."""
    recipe: Mapping[str, Any]
    """The recipe as plain values, nothing left to replace; `load_recipes` reads it."""
    key: str
    """Fingerprint of recipe, inputs and evaluation: points with one key have one result."""


class PointList(Sequence[Point]):
    """Some points of a grid, each made anew whenever it is asked for."""

    def __init__(self, make: Callable[[int], Point], numbers: Sequence[int]) -> None:
        """Take the maker of a point by its number, and the numbers that belong to the list."""
        self._make = make
        self._numbers = numbers if isinstance(numbers, array | range) else array("q", numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Point: ...
    @overload
    def __getitem__(self, index: slice) -> PointList: ...
    def __getitem__(self, index: int | slice) -> Point | PointList:
        if isinstance(index, slice):
            return PointList(self._make, self._numbers[index])
        return self._make(self._numbers[index])

    def __iter__(self) -> Iterator[Point]:
        return map(self._make, self._numbers)


def fingerprint(*values: Any) -> str:
    """Return 128 bits in hex over plain values; the order of keys does not matter."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True, default=str, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def label_of(value: Value) -> str | int | float | bool | None:
    """Return an axis value as it stands in a column of the results: itself, or a text for a composite one.

    A subset of models reads "a, b"; a mapping that names a model reads as that model.
    """
    if isinstance(value, Mapping):
        model = value.get("model", value.get("path"))
        return str(label_of(model)) if model is not None else json.dumps(value, sort_keys=True, default=str)
    if isinstance(value, list | tuple):
        return ", ".join(str(label_of(each)) for each in value)
    assert value is None or isinstance(value, str | int | float)
    return value
