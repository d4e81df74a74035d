"""Read `models`, `slices` and `modules` into modules of slices, with their base.

The rules of the base, in one place. For a method that takes a base (ties, slerp):

- listed among the models, it is the base and not one of the merged models;
- not listed, it joins, with the layers that the others have;
- a slice of one model is copied if that is the base, or if the method merges exactly one other
  model into the base (slerp over a stack in which some slices have one source).

A method without a base (linear) merges every model that is listed, and reads the base only if
a sparsifier thins the deltas to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raymerge.cluster.model_ref import ModelRef
from raymerge.cluster.origin import join
from raymerge.cluster.reading import Reading, has_sparsify
from raymerge.cluster.recipe import LayerSlice, Module, Setting, SourceUse
from raymerge.cluster.recipe_data import MeasuredData, make_data, read_data_keys
from raymerge.cluster.setting import as_whole_number, shown
from raymerge.merge_actors.errors import RecipeError

_FORMS = ("models", "slices", "modules")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Around:
    """What stands around a slice."""

    base_model: ModelRef | None
    """The nearest base_model that is written, if any."""
    is_sparsified: bool
    """Is there a `sparsify` on a level above the slice?"""


def read_modules(
    raw: Mapping[str, Any], base_model: ModelRef | None, parameters: Mapping[str, Setting], reading: Reading
) -> tuple[Module, ...]:
    """Read the one of models, slices and modules that a recipe holds."""
    forms = [form for form in _FORMS if raw.get(form) is not None]
    if len(forms) != 1:
        found = f"holds {' and '.join(forms)}" if forms else "holds none of them"
        raise RecipeError(
            f"{reading.origin.at(forms[-1] if forms else '')}: a recipe needs exactly one of models, "
            f"slices and modules; this one {found}."
        )
    around = _Around(base_model=base_model, is_sparsified=has_sparsify(parameters))
    if forms[0] != "modules":
        return (_read_module("default", raw, "", around, reading),)
    modules = reading.require_mapping(raw["modules"], "modules")
    if not modules:
        raise reading.origin.error("modules", "is empty; it must hold at least one module.")
    return tuple(_read_named_module(name, each, around, reading) for name, each in modules.items())


def _read_named_module(name: str, raw: Any, around: _Around, reading: Reading) -> Module:
    where = join("modules", name)
    mapping = reading.require_mapping(raw, where)
    reading.check_keys(mapping, ("models", "slices", "parameters"), where)
    if (mapping.get("models") is None) == (mapping.get("slices") is None):
        raise reading.origin.error(where, "must hold exactly one of 'models' and 'slices'.")
    parameters = reading.settings(mapping, where)
    inner = replace(around, is_sparsified=around.is_sparsified or has_sparsify(parameters))
    return replace(_read_module(name, mapping, where, inner, reading), parameters=parameters)


def _read_module(name: str, raw: Mapping[str, Any], where: str, around: _Around, reading: Reading) -> Module:
    if raw.get("models") is not None:
        place = join(where, "models")
        entries = reading.require_list(raw["models"], place)
        uses = [
            _read_use(each, f"{place}[{i}]", ("model", "statistics", "data", "parameters"), reading)
            for i, each in enumerate(entries)
        ]
        slices: tuple[LayerSlice, ...] = (_with_base(uses, {}, place, around, reading, may_copy=False),)
    else:
        place = join(where, "slices")
        entries = reading.require_list(raw["slices"], place)
        slices = tuple(_read_slice(each, f"{place}[{i}]", around, reading) for i, each in enumerate(entries))
        for each in slices:
            if len(slices) > 1 and each.num_layers is None:
                raise reading.origin.error(each.where, "lacks layer_range, which a stack of slices needs.")
    return Module(name=name, slices=slices, where=where)


def _read_slice(raw: Any, where: str, around: _Around, reading: Reading) -> LayerSlice:
    mapping = reading.require_mapping(raw, where)
    reading.check_keys(mapping, ("sources", "base_model", "parameters"), where)
    place = join(where, "sources")
    known = ("model", "layer_range", "statistics", "data", "parameters")
    entries = reading.require_list(mapping.get("sources"), place)
    uses = [_read_use(each, f"{place}[{i}]", known, reading) for i, each in enumerate(entries)]
    if mapping.get("base_model") is not None:
        base_model = reading.model(mapping["base_model"], join(where, "base_model"))
        around = replace(around, base_model=base_model)
    parameters = reading.settings(mapping, where)
    around = replace(around, is_sparsified=around.is_sparsified or has_sparsify(parameters))
    return replace(_with_base(uses, parameters, where, around, reading, may_copy=True), parameters=parameters)


def _read_use(raw: Any, where: str, known: tuple[str, ...], reading: Reading) -> SourceUse:
    if isinstance(raw, str):
        return SourceUse(
            model=reading.model(raw, where), data=make_data(reading.data, "data", reading), where=where
        )
    mapping = reading.require_mapping(raw, where)
    if mapping.get("model") is None:
        raise reading.origin.error(where, "lacks 'model', the model that it is about.")
    reading.check_keys(mapping, known, where)
    layer_range = None
    if "layer_range" in known and mapping.get("layer_range") is not None:
        layer_range = _read_range(mapping["layer_range"], join(where, "layer_range"), reading)
    statistics, samples, data = _read_statistics(mapping, where, reading)
    return SourceUse(
        model=reading.model(mapping["model"], join(where, "model")),
        statistics=statistics,
        samples=samples,
        data=data,
        parameters=reading.settings(mapping, where, of_one_model=True),
        layer_range=layer_range,
        where=where,
    )


def _read_statistics(
    mapping: Mapping[str, Any], where: str, reading: Reading
) -> tuple[str | None, int | None, MeasuredData | None]:
    """Return a model's statistics, measured already (and at how many samples) or to be measured on data."""
    statistics, samples = mapping.get("statistics"), None
    key = join(where, "statistics")
    if isinstance(statistics, Mapping):
        reading.check_keys(statistics, ("path", "samples"), key)
        samples = as_whole_number(statistics.get("samples"))
        if samples is None or samples < 1:
            raise reading.origin.error(
                join(key, "samples"),
                f"is {shown(statistics.get('samples'))}; it must be one of the numbers of --samples-at.",
            )
        statistics = statistics.get("path", "")
    if statistics is not None and not (isinstance(statistics, str) and statistics):
        raise reading.origin.error(
            key,
            f"is {shown(statistics)}; it must be the folder of a model's statistics, or {{path: FOLDER, samples: N}}.",
        )
    if statistics is not None and reading.method.statistic is None:
        reading.warn(key, f"has no effect: {reading.method.name} uses no statistics")
        statistics = None
    place = join(where, "data")
    own = read_data_keys(mapping.get("data"), place, reading)
    if statistics is not None:
        if own:
            raise reading.origin.error(place, "stands beside 'statistics'; keep one.")
        return statistics, samples, None
    return None, None, make_data({**reading.data, **own}, place if own else "data", reading)


def _read_range(raw: Any, key: str, reading: Reading) -> tuple[int, int]:
    bounds = [as_whole_number(each) for each in raw] if isinstance(raw, list | tuple) else []
    if len(bounds) == 2 and bounds[0] is not None and bounds[1] is not None and 0 <= bounds[0] < bounds[1]:
        return (bounds[0], bounds[1])
    raise reading.origin.error(key, f"is {shown(raw)}; it must be [begin, end) with 0 <= begin < end.")


def _with_base(
    uses: list[SourceUse],
    parameters: Mapping[str, Any],
    where: str,
    around: _Around,
    reading: Reading,
    *,
    may_copy: bool,
) -> LayerSlice:
    """Decide who is the base of a slice and who is merged; see the rules at the top."""
    method, base_model = reading.method, around.base_model
    is_sparsified = around.is_sparsified or any(has_sparsify(use.parameters) for use in uses)
    _check_ranges(uses, where, reading)
    if base_model is None and (method.base == "required" or is_sparsified):
        user = method.name if method.base == "required" else "sparsify"
        raise reading.origin.error(where, f"has no base: {user} needs a base_model; name it in the recipe.")
    listed = next((use for use in uses if use.model == base_model), None)
    if base_model is None or (method.base == "unused" and not is_sparsified):
        layers = LayerSlice(sources=tuple(uses), where=where)
    elif method.base == "unused":
        if not listed:
            _check_common_range(uses, base_model, where, reading)
        base = SourceUse(model=base_model, layer_range=(listed or uses[0]).layer_range, where=where)
        layers = LayerSlice(sources=tuple(uses), base=base, where=where)
    elif may_copy and len(uses) == 1 and (listed or method.num_models == (1, 1)):
        return LayerSlice(sources=(), base=_without_parameters(uses[0], reading), where=where)
    elif listed:
        base = _without_parameters(listed, reading)
        layers = LayerSlice(sources=tuple(use for use in uses if use is not listed), base=base, where=where)
    else:
        base = SourceUse(model=base_model, layer_range=uses[0].layer_range, where=where)
        _check_common_range(uses, base_model, where, reading)
        layers = LayerSlice(sources=tuple(uses), base=base, where=where)
    _check_number(layers, where, reading)
    return layers


def _without_parameters(base: SourceUse, reading: Reading) -> SourceUse:
    for name in base.parameters:
        reading.warn(
            join(join(base.where, "parameters"), name),
            f"has no effect: {base.model} is the base, which {reading.method.name} gives no parameters",
        )
    return replace(base, parameters={})


def _check_ranges(uses: Sequence[SourceUse], where: str, reading: Reading) -> None:
    lengths = [use.layer_range and use.layer_range[1] - use.layer_range[0] for use in uses]
    for use, length in zip(uses, lengths, strict=True):
        if length != lengths[0]:
            raise reading.origin.error(
                where,
                f"takes {lengths[0] or 'all'} layers of {uses[0].model} and {length or 'all'} of "
                f"{use.model}; every source of a slice must have the same number.",
            )


def _check_common_range(uses: Sequence[SourceUse], base: ModelRef, where: str, reading: Reading) -> None:
    if any(use.layer_range != uses[0].layer_range for use in uses):
        raise reading.origin.error(
            where,
            f"does not say which layers of the base {base} belong to it; list the base among its sources.",
        )


def _check_number(layers: LayerSlice, where: str, reading: Reading) -> None:
    least, most = reading.method.num_models
    number = len(layers.sources)
    if least <= number and (most is None or number <= most):
        return
    wanted = f"at least {least}" if most is None else f"{least}" if least == most else f"{least} to {most}"
    beside = " beside the base" if layers.base else ""
    raise reading.origin.error(
        where, f"lists {number} models{beside}; {reading.method.name} merges {wanted}."
    )
