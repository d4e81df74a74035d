"""Axes of a grid: every way to write one becomes a list of values, or for a search a range.

lambda: [0.3, 0.5, 1]                        a list
p: {start: 0.1, stop: 0.9, step: 0.1}        both ends included, decimal arithmetic
alpha: {low: 1e-3, high: 1, num: 4, scale: log}
seeds: 3                                     an axis `seed` of 0, 1, 2
pair: {subsets: [a, b, c], sizes: 2}         (a, b), (a, c), (b, c); or {pairs: [a, b, c]}
zip: {w: [1, 2], v: [2, 1]}                  axes that change together; or a list of such mappings
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from raymerge.cluster.grid_points import Value, fingerprint
from raymerge.cluster.origin import Origin, did_you_mean, join
from raymerge.cluster.setting import as_whole_number, shown

#: What a file may call an axis.
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: A number that YAML reads as a text: "1e-4" has no dot.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
#: An axis longer than this is a mistake in a step.
_MOST_VALUES = 100_000
_FORMS = {
    "start": ("start", "stop", "step"),
    "low": ("low", "high", "num", "scale", "step", "kind"),
    "subsets": ("subsets", "sizes", "ordered"),
    "pairs": ("pairs", "ordered"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """All numbers between two ends, for a search."""

    low: float
    high: float
    is_log: bool = False
    is_int: bool = False
    step: float | None = None
    """Distance of the values; None: any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One named axis."""

    name: str
    values: tuple[Value, ...]
    """Empty if `range` is set."""
    range: Range | None = None
    key: str
    """Key path in the file."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """Axes that change together: one axis, or those of a `zip`."""

    axes: tuple[Axis, ...]
    """All with the same number of values."""

    def __len__(self) -> int:
        return len(self.axes[0].values)

    def at(self, index: int) -> dict[str, Value]:
        """Return the value of each axis at a position."""
        return {axis.name: axis.values[index] for axis in self.axes}


def read_dimensions(raw: Any, origin: Origin, *, is_search: bool) -> tuple[Dimension, ...]:
    """Read the `grid` section.

    Args:
        raw: the section.
        origin: where it was written.
        is_search: leave {low, high} without `num` a range, and refuse `seeds`.

    Raises:
        RecipeError: an axis breaks a rule, or there is none.
    """
    if not isinstance(raw, Mapping) or not raw:
        raise origin.error("grid", f"is {shown(raw)}; it must name at least one axis: {{lambda: [0.5, 1]}}.")
    dimensions: list[Dimension] = []
    for name, value in raw.items():
        key = join("grid", name)
        if name == "zip":
            groups = list(value) if isinstance(value, list | tuple) else [value]
            dimensions += [
                _read_zip(each, origin, key if len(groups) == 1 else f"{key}[{i}]")
                for i, each in enumerate(groups)
            ]
        elif name == "seeds":
            if is_search:
                raise origin.error(key, "would be searched over; give the recipe one `seed:` instead.")
            dimensions.append(Dimension((Axis(name="seed", values=_seeds(value, origin, key), key=key),)))
        else:
            dimensions.append(Dimension((_read_axis(name, value, origin, key, is_search=is_search),)))
    _check_names(dimensions, origin)
    return tuple(dimensions)


def _check_names(dimensions: Iterable[Dimension], origin: Origin) -> None:
    seen: dict[str, str] = {}
    for axis in (axis for dimension in dimensions for axis in dimension.axes):
        if not NAME.fullmatch(axis.name):
            raise origin.error(
                axis.key, "is no name for an axis: letters, digits and _ (it is used as $name)."
            )
        if axis.name in seen:
            raise origin.error(
                axis.key, f"names the axis {axis.name!r} again, after {seen[axis.name]}; keep one."
            )
        seen[axis.name] = axis.key


def _read_zip(raw: Any, origin: Origin, key: str) -> Dimension:
    if not isinstance(raw, Mapping) or len(raw) < 2:
        raise origin.error(key, f"is {shown(raw)}; it must be a mapping of axes that change together.")
    axes = tuple(
        _read_axis(name, value, origin, join(key, name), is_search=False, is_zipped=True)
        for name, value in raw.items()
    )
    for axis in axes[1:]:
        if len(axis.values) != len(axes[0].values):
            raise origin.error(
                key,
                f"holds {len(axes[0].values)} values of {axes[0].name} and {len(axis.values)} of {axis.name}; axes "
                "that change together need the same number.",
            )
    return Dimension(axes)


def _read_axis(
    name: str, raw: Any, origin: Origin, key: str, *, is_search: bool, is_zipped: bool = False
) -> Axis:
    if isinstance(raw, Mapping):
        form = next((form for form in _FORMS if form in raw), None)
        if form is None:
            raise origin.error(
                key,
                f"is {shown(raw)}; an axis is a list, {{start, stop, step}}, {{low, high, num}} or {{subsets}}.",
            )
        for unknown in (each for each in raw if each not in _FORMS[form]):
            hint = did_you_mean(unknown, _FORMS[form])
            raise origin.error(join(key, unknown), f"is unknown; known: {', '.join(_FORMS[form])}{hint}.")
        if form == "low" and is_search and "num" not in raw:
            return Axis(name=name, values=(), range=_read_range(raw, origin, key), key=key)
        values = _FORM_READERS[form](raw, origin, key)
    elif isinstance(raw, list | tuple):
        values = tuple(_plain(each) for each in raw)
    else:
        raise origin.error(
            key, f"is {shown(raw)}; an axis is a list of values: [{0.5 if raw is None else shown(raw)}]."
        )
    if not values:
        raise origin.error(key, "has no value; the grid would be empty.")
    if not is_zipped:
        _check_distinct(values, origin, key)
    return Axis(name=name, values=values, key=key)


def _check_distinct(values: Sequence[Value], origin: Origin, key: str) -> None:
    seen = set()
    for value in values:
        mark = fingerprint(type(value).__name__, value)
        if mark in seen:
            raise origin.error(key, f"holds {shown(value)} twice; each value is one row of the results.")
        seen.add(mark)


def _plain(raw: Any) -> Value:
    return float(raw) if isinstance(raw, str) and _EXPONENT.fullmatch(raw) else raw


def _seeds(raw: Any, origin: Origin, key: str) -> tuple[int, ...]:
    """Read a number of seeds, or a list of them."""
    listed = list(raw) if isinstance(raw, list | tuple) else None
    if listed is None:
        number = None if isinstance(raw, bool) else as_whole_number(raw)
        if number is None or not 1 <= number <= _MOST_VALUES:
            raise origin.error(key, f"is {shown(raw)}; it must be a number of seeds, or a list of seeds.")
        return tuple(range(number))
    seeds = [None if isinstance(each, bool) else as_whole_number(each) for each in listed]
    if not seeds or any(seed is None or not 0 <= seed < 1 << 64 for seed in seeds):
        raise origin.error(key, f"is {shown(raw)}; seeds are whole numbers in [0, 2**64).")
    _check_distinct(seeds, origin, key)
    return tuple(seed for seed in seeds if seed is not None)


def _steps(raw: Mapping[str, Any], origin: Origin, key: str) -> tuple[Value, ...]:
    """Read {start, stop, step}; the stop is included where a step lands on it."""
    start, stop, step = (_decimal(raw, name, origin, key) for name in ("start", "stop", "step"))
    if step == 0 or (stop - start) / step < 0:
        sign = "below" if stop < start else "above"
        raise origin.error(
            key, f"goes from {start} to {stop} by {step}: no step leads there; the step must be {sign} 0."
        )
    number = int((stop - start) / step) + 1
    if number > _MOST_VALUES:
        raise origin.error(key, f"has {number:,} values; an axis has at most {_MOST_VALUES:,}.")
    is_whole = all(each == each.to_integral_value() for each in (start, step))
    values = [start + index * step for index in range(number)]
    return tuple(int(value) if is_whole else float(value) for value in values)


def _spread(raw: Mapping[str, Any], origin: Origin, key: str) -> tuple[Value, ...]:
    """Read {low, high, num, scale}: both ends included."""
    if "num" not in raw:
        raise origin.error(
            key, "lacks `num`, the number of values; a range without it is for raymerge search."
        )
    for name in ("step", "kind"):
        if name in raw:
            raise origin.error(join(key, name), "has no effect beside `num`; leave one of them out.")
    low, high = _decimal(raw, "low", origin, key), _decimal(raw, "high", origin, key)
    number = None if isinstance(raw["num"], bool) else as_whole_number(raw["num"])
    if number is None or not 2 <= number <= _MOST_VALUES:
        raise origin.error(
            join(key, "num"), f"is {shown(raw['num'])}; it must be a whole number of at least 2."
        )
    is_log = _is_log(raw, low, high, origin, key)
    if not is_log:
        between = [low + (high - low) * index / (number - 1) for index in range(1, number - 1)]
        return tuple(float(f"{value:.15g}") for value in (low, *between, high))
    ratio = math.log(high / low)
    inner = [float(low) * math.exp(ratio * index / (number - 1)) for index in range(1, number - 1)]
    # Twelve digits: the ends are what the file says, and 0.01 between 0.1 and 0.001 is 0.01.
    return (float(low), *(float(f"{value:.12g}") for value in inner), float(high))


def _read_range(raw: Mapping[str, Any], origin: Origin, key: str) -> Range:
    low, high = _decimal(raw, "low", origin, key), _decimal(raw, "high", origin, key)
    is_log = _is_log(raw, low, high, origin, key)
    kind = raw.get("kind", "float")
    if kind not in ("int", "float"):
        raise origin.error(join(key, "kind"), f"is {shown(kind)}; it must be int or float.")
    step = _decimal(raw, "step", origin, key) if "step" in raw else None
    if step is not None and (step <= 0 or is_log):
        raise origin.error(join(key, "step"), f"is {step}; it must be positive, and a log scale takes none.")
    if kind == "int" and any(each is not None and each != int(each) for each in (low, high, step)):
        raise origin.error(key, "has kind: int, so low, high and step must be whole numbers.")
    return Range(
        low=float(low),
        high=float(high),
        is_log=is_log,
        is_int=kind == "int",
        step=None if step is None else float(step),
    )


def _is_log(raw: Mapping[str, Any], low: Decimal, high: Decimal, origin: Origin, key: str) -> bool:
    scale = raw.get("scale", "linear")
    if scale not in ("linear", "log"):
        hint = did_you_mean(str(scale), ("linear", "log"))
        raise origin.error(join(key, "scale"), f"is {shown(scale)}; it must be linear or log{hint}.")
    if high <= low:
        raise origin.error(key, f"has low {low} and high {high}; low must be the smaller one.")
    if scale == "log" and low <= 0:
        raise origin.error(join(key, "low"), f"is {low}; a log scale needs a positive one.")
    return bool(scale == "log")


def _decimal(raw: Mapping[str, Any], name: str, origin: Origin, key: str) -> Decimal:
    """Return a number as it was written: the shortest decimal that reads as this float."""
    if name not in raw:
        raise origin.error(key, f"lacks `{name}`.")
    value = raw[name]
    number = None
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = Decimal(str(value))
        except ArithmeticError:
            number = None
    if number is None or not number.is_finite():
        raise origin.error(join(key, name), f"is {shown(value)}; it must be a number.")
    return number


def _subsets(raw: Mapping[str, Any], origin: Origin, key: str) -> tuple[Value, ...]:
    """Read {subsets, sizes, ordered} or {pairs, ordered}."""
    form = "subsets" if "subsets" in raw else "pairs"
    members = raw[form]
    if not isinstance(members, list | tuple) or len(members) < 2:
        raise origin.error(join(key, form), f"is {shown(members)}; it must be a list of at least two models.")
    _check_distinct(members, origin, join(key, form))
    is_ordered = raw.get("ordered", False)
    if not isinstance(is_ordered, bool):
        raise origin.error(join(key, "ordered"), f"is {shown(is_ordered)}; it must be true or false.")
    sizes = _sizes(raw.get("sizes", 2), len(members), origin, join(key, "sizes"))
    if (
        sum(math.perm(len(members), n) if is_ordered else math.comb(len(members), n) for n in sizes)
        > _MOST_VALUES
    ):
        raise origin.error(key, f"has more than {_MOST_VALUES:,} subsets; give smaller `sizes`.")
    choose = itertools.permutations if is_ordered else itertools.combinations
    return tuple(list(each) for size in sizes for each in choose(members, size))


def _sizes(raw: Any, num_members: int, origin: Origin, key: str) -> list[int]:
    if raw == "all":
        return list(range(1, num_members + 1))
    sizes = [
        None if isinstance(each, bool) else as_whole_number(each)
        for each in (raw if isinstance(raw, list | tuple) else [raw])
    ]
    if not sizes or any(size is None or not 1 <= size <= num_members for size in sizes):
        raise origin.error(key, f"is {shown(raw)}; sizes are `all`, or whole numbers in [1, {num_members}].")
    return [size for size in sizes if size is not None]


_FORM_READERS = {"start": _steps, "low": _spread, "subsets": _subsets, "pairs": _subsets}
