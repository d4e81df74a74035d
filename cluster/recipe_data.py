"""`data:` of a recipe: which data a model's statistics are measured on, on the way to the merge."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raymerge.cluster.origin import join
from raymerge.cluster.reading import Reading
from raymerge.cluster.setting import as_whole_number, shown
from raymerge.merge_actors.errors import RecipeError
from raymerge.stats.data_rows import DataSpec
from raymerge.stats.fisher_accumulator import ESTIMATORS, Estimator

_TEXTS = ("path", "config", "split", "text_column", "text_pair_column", "label_column", "image_column")
_NUMBERS = ("samples", "max_length", "batch_tokens")
_SWITCHES = ("chat_template", "packed")
_KEYS = (*_TEXTS, *_NUMBERS, *_SWITCHES, "estimator")


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredData:
    """Data to measure a model on."""

    spec: DataSpec
    """Rows, and how they become examples."""
    estimator: Estimator = "expected"
    """Of Fisher."""

    def to_mapping(self) -> dict[str, Any]:
        """Return the keys of a recipe that differ from their defaults."""
        mapping: dict[str, Any] = {"path": self.spec.source}
        for each in dataclasses.fields(DataSpec):
            value = getattr(self.spec, each.name)
            if each.name != "source" and value != each.default:
                mapping[each.name] = value
        if self.estimator != "expected":
            mapping["estimator"] = self.estimator
        return mapping


def read_data_keys(raw: Any, key: str, reading: Reading) -> dict[str, Any]:
    """Read and check the keys of one `data`; a text is short for {path: text}.

    Raises:
        RecipeError: a value breaks the rule of its key.
    """
    if raw is None:
        return {}
    if reading.method.statistic is None:
        reading.warn(key, f"has no effect: {reading.method.name} uses no statistics")
        return {}
    mapping: Mapping[str, Any] = {"path": raw} if isinstance(raw, str) else reading.require_mapping(raw, key)
    reading.check_keys(mapping, _KEYS, key)
    found = {name: _read(mapping[name], name, join(key, name), reading) for name in _KEYS if name in mapping}
    if "estimator" in found and reading.method.statistic != "fisher":
        reading.warn(join(key, "estimator"), f"has no effect: {reading.method.name} uses no Fisher values")
        del found["estimator"]
    return {name: value for name, value in found.items() if value is not None}


def make_data(keys: Mapping[str, Any], where: str, reading: Reading) -> MeasuredData | None:
    """Return the data of one model from its keys and those of the document; None if there are none.

    Raises:
        RecipeError: no path is given, or keys contradict each other.
    """
    if not keys:
        return None
    values = dict(keys)
    source, estimator = values.pop("path", None), values.pop("estimator", "expected")
    if source is None:
        raise reading.origin.error(where, "lacks 'path', the file, folder or name of the data.")
    try:
        return MeasuredData(spec=DataSpec(source=source, **values), estimator=estimator)
    except RecipeError as error:
        raise RecipeError(f"{reading.origin.at(where)}: {error}") from None


def _read(raw: Any, name: str, key: str, reading: Reading) -> Any:
    if raw is None:
        return None
    if name == "estimator":
        return reading.choice(raw, ESTIMATORS, key)
    if name in _SWITCHES:
        is_right, wanted = isinstance(raw, bool), "true or false"
    elif name in _NUMBERS:
        whole = None if isinstance(raw, bool) else as_whole_number(raw)
        is_right, wanted = whole is not None and whole > 0, "a whole number of at least 1"
        raw = whole if is_right else raw
    else:
        is_right, wanted = isinstance(raw, str) and bool(raw), "a text"
    if not is_right:
        raise reading.origin.error(key, f"is {shown(raw)}; it must be {wanted}.")
    return raw
