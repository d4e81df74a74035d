"""Turn a value of a recipe into a `Setting`, checked against the rule of its parameter.

A setting is a value, a list of values (a gradient), or a list of {value, filter}.
Booleans count as 1 and 0; texts such as "1e-10" count as numbers where a number is due,
because YAML reads them as texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from raymerge.cluster.method_parameters import NO_SPARSIFIER, find_sparsifier
from raymerge.cluster.origin import Origin, did_you_mean, join
from raymerge.cluster.recipe import Conditional, Setting, SettingValue
from raymerge.merge_actors.errors import RecipeError
from raymerge.merge_actors.methods.interface import Parameter

_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

#: Sizes of numbers other than 0: the quotient of any two is still a float32.
LEAST_SIZE, MOST_SIZE = 1e-18, 1e18

#: Says what is wrong at a key, without failing: warn(key, "is unknown ...").
Warn = Callable[[str, str], None]


def read_setting(
    raw: Any, origin: Origin, key: str, read: Callable[[Any, str], SettingValue], warn: Warn
) -> Setting:
    """Read a setting; `read(value, key)` reads and checks one of its values.

    Raises:
        RecipeError: if a value, a filter or the shape of the setting breaks a rule.
    """
    if isinstance(raw, list) and any(isinstance(each, Mapping) for each in raw):
        entries = [(each, f"{key}[{index}]") for index, each in enumerate(raw)]
    elif isinstance(raw, Mapping) and ("value" in raw or "filter" in raw):
        entries = [(raw, key)]
    else:
        return (Conditional(value=read(raw, key)),)
    setting: list[Conditional] = []
    for entry, entry_key in entries:
        if setting and setting[-1].filter is None:
            warn(entry_key, "has no effect: the entry before it matches every tensor")
            break
        setting.append(_read_conditional(entry, origin, entry_key, read, warn))
    return tuple(setting)


def _read_conditional(
    entry: Any, origin: Origin, key: str, read: Callable[[Any, str], SettingValue], warn: Warn
) -> Conditional:
    if not isinstance(entry, Mapping) or "value" not in entry:
        raise origin.error(key, f"is {entry!r}; it must be a mapping with 'value' and maybe 'filter'.")
    for unknown in sorted(set(entry) - {"value", "filter"}):
        warn(join(key, unknown), f"is unknown and has no effect{did_you_mean(unknown, ['value', 'filter'])}")
    wanted = entry.get("filter")
    if isinstance(wanted, Mapping | list) or wanted == "":
        raise origin.error(join(key, "filter"), f"is {wanted!r}; it must be a part of a tensor's name.")
    filter_text = None if wanted is None or wanted == "*" else str(wanted)
    return Conditional(value=read(entry["value"], join(key, "value")), filter=filter_text)


def read_value(raw: Any, parameter: Parameter, origin: Origin, key: str) -> SettingValue:
    """Read one value of a parameter, or a list of them over the layers.

    Numbers of a list are interpolated; switches and names each serve a part of the layers.
    """
    if not isinstance(raw, list):
        return _read_scalar(raw, parameter, origin, key)
    if parameter.kind is int:
        raise origin.error(key, f"is a list; {parameter.name} takes one whole number, not a gradient.")
    if not raw:
        raise origin.error(key, "is an empty list; a gradient needs at least one value.")
    return tuple(_read_scalar(each, parameter, origin, f"{key}[{i}]") for i, each in enumerate(raw))


def _read_scalar(raw: Any, parameter: Parameter, origin: Origin, key: str) -> float | int | bool | str:
    value: float | int | bool | str | None
    choices = parameter.choices
    if parameter.kind is bool:
        # A switch may have named settings beside on and off: rescale is true, false or l1.
        value = raw if raw in choices else _as_switch(raw)
        wanted = f"true, false or {' or '.join(choices)}" if choices else "true or false"
    elif parameter.kind is str:
        name = _as_name(raw)
        value = name if name in choices or not choices else None
        wanted = f"one of {', '.join(choices)}" if choices else "a text"
    elif parameter.kind is int:
        value, wanted = as_whole_number(raw), "a whole number"
    else:
        value, wanted = _as_number(raw), "a number"
    if value is None:
        hint = did_you_mean(raw, choices) if isinstance(raw, str) else ""
        raise origin.error(key, f"is {shown(raw)}; it must be {wanted}{hint}.")
    if not isinstance(value, str) and not is_in_range(value, parameter):
        raise origin.error(key, f"is {shown(raw)}; it must be {range_text(parameter)}.")
    if isinstance(value, float) and value and not LEAST_SIZE <= abs(value) <= MOST_SIZE:
        raise origin.error(
            key, f"is {shown(raw)}; it must be 0, or of a size from {LEAST_SIZE:g} to {MOST_SIZE:g}."
        )
    return value


def is_in_range(value: float, parameter: Parameter) -> bool:
    """Return whether a number keeps the bounds of its parameter."""
    low, high = parameter.minimum, parameter.maximum
    if low is not None and (value < low or (parameter.exclusive_minimum and value == low)):
        return False
    return high is None or not (value > high or (parameter.exclusive_maximum and value == high))


def range_text(parameter: Parameter) -> str:
    """Return the rule of a bounded number: "in [0, 1)", "at least 0", "less than 1"."""
    low, high = parameter.minimum, parameter.maximum
    if low is not None and high is not None:
        left = "(" if parameter.exclusive_minimum else "["
        right = ")" if parameter.exclusive_maximum else "]"
        return f"in {left}{low:g}, {high:g}{right}"
    if low is not None:
        return f"{'greater than' if parameter.exclusive_minimum else 'at least'} {low:g}"
    assert high is not None
    return f"{'less than' if parameter.exclusive_maximum else 'at most'} {high:g}"


def read_sparsify(raw: Any, origin: Origin, key: str, warn: Warn) -> Mapping[str, Any]:
    """Read {method: dare, drop: 0.9, ...} into {"method": registry name, every parameter}.

    `drop` is another way to write a `density` of 1 - drop. Defaults are filled in here, so a
    resolved recipe shows them.
    """
    if raw is False or raw == NO_SPARSIFIER:
        return {"method": NO_SPARSIFIER}
    if not isinstance(raw, Mapping) or not isinstance(raw.get("method"), str):
        raise origin.error(key, f"is {shown(raw)}; it must be a mapping such as {{method: dare, drop: 0.9}}.")
    if raw["method"] == NO_SPARSIFIER:
        return {"method": NO_SPARSIFIER}
    try:
        sparsifier = find_sparsifier(raw["method"])
    except KeyError as error:
        raise RecipeError(
            f"{origin.at(join(key, 'method'))}: unknown sparsifier {raw['method']!r}; {error.args[0]}."
        ) from None
    given = _density_for_drop(raw, sparsifier.parameters, origin, key)
    by_key = {name: each for each in sparsifier.parameters for name in (each.name, *each.aliases)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in by_key:
            values[by_key[name].name] = read_value(value, by_key[name], origin, join(key, name))
        else:
            hint = did_you_mean(name, by_key)
            warn(
                join(key, name),
                f"has no effect: the sparsifier {sparsifier.name} has no parameter {name!r}{hint}",
            )
    for each in sparsifier.parameters:
        # Whoever asks for a sparsifier wants something dropped, so its default of 1 does not count.
        if each.name not in values and (each.required or each.name == "density"):
            raise origin.error(key, f"lacks {each.name!r}, which the sparsifier {sparsifier.name} needs.")
        values.setdefault(each.name, each.default)
    return {"method": sparsifier.name} | {each.name: values[each.name] for each in sparsifier.parameters}


def _density_for_drop(
    raw: Mapping[str, Any], parameters: tuple[Parameter, ...], origin: Origin, key: str
) -> dict[str, Any]:
    given = {name: value for name, value in raw.items() if name != "method"}
    density = next((each for each in parameters if each.name == "density"), None)
    if density is None or "drop" not in given:
        return given
    if "density" in given:
        raise origin.error(key, "holds both 'density' and 'drop' (which is 1 - density); keep one.")
    rule = Parameter(name="drop", minimum=0, maximum=1)
    drop = read_value(given.pop("drop"), rule, origin, join(key, "drop"))
    if isinstance(drop, tuple):
        return given | {"density": [_complement(each) for each in drop]}
    return given | {"density": _complement(drop)}


def _complement(drop: object) -> float:
    assert isinstance(drop, float)
    # 1 - 0.9 is 0.09999999999999998 in binary; the file's author means 0.1.
    return float(f"{1 - drop:.15g}")


def as_whole_number(raw: Any) -> int | None:
    """Return an integer, also from a text such as "1e3", or None."""
    if isinstance(raw, int):
        return int(raw)
    number = _as_number(raw)
    return int(number) if number is not None and number == int(number) else None


def _as_number(raw: Any) -> float | None:
    """Return a finite number, or None."""
    if not isinstance(raw, bool | int | float | str):
        return None
    try:
        number = float(raw)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _as_switch(raw: Any) -> bool | None:
    if isinstance(raw, str):
        raw = _SWITCHES.get(raw.lower(), _as_number(raw))
    return bool(raw) if isinstance(raw, bool | int | float) and raw in (0, 1) else None


def _as_name(raw: Any) -> str | None:
    if isinstance(raw, bool):
        return str(raw).lower()
    return str(raw) if isinstance(raw, str | int | float) else None


def shown(raw: Any) -> str:
    """Return a value as an error shows it: short, and in YAML's spelling."""
    if raw is None or isinstance(raw, bool):
        return {None: "null", True: "true", False: "false"}[raw]
    text = repr(raw)
    return text if len(text) <= 60 else text[:57] + "..."
