"""The parameters of a method for one tensor, out of the levels of a recipe.

For each parameter the first level whose setting yields a value decides: model, slice, module,
recipe, then the method's default. A setting yields the value of its first entry whose filter is
part of the tensor's name. Values were checked when the recipe was read; this only chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from raymerge.cluster.method_parameters import NO_SPARSIFIER, MethodParameters, find_sparsifier, parameters_of
from raymerge.cluster.origin import join
from raymerge.cluster.recipe import LayerSlice, Module, Recipe, Setting, SourceUse
from raymerge.merge_actors.errors import RecipeError
from raymerge.merge_actors.methods.interface import Method, Parameter, Settings

#: Settings of one level by parameter.
Level = Mapping[str, Setting]


def layer_position(
    recipe: Recipe, layer: int | None, num_layers: int, *, is_after_layers: bool = False
) -> float:
    """Return the place t in [0, 1] at which gradients are read.

    Args:
        recipe: for its `gradient_tail`.
        layer: index of the layer within its slice; None for tensors outside the layers.
        num_layers: number of layers of the slice; a single layer takes t = 1.
        is_after_layers: does the tensor come after the layers (final norm, lm_head)?
    """
    if layer is None:
        return 1.0 if is_after_layers and recipe.gradient_tail == "last" else 0.0
    return layer / (num_layers - 1) if num_layers > 1 else 1.0


def resolve(
    recipe: Recipe, module: Module, layers: LayerSlice, method: Method, tensor_name: str, layer_t: float
) -> Settings:
    """Return the settings of one tensor; equal settings of one recipe are the same object.

    Args:
        recipe: where the module stands.
        module: where the slice stands.
        layers: the slice, with at least one merged model.
        method: the recipe's method.
        tensor_name: what filters are compared with.
        layer_t: place within the layers, from `layer_position`.

    Returns:
        shared parameters, and per merged model (`layers.sources`) its own; a model that a
        recipe sparsifies has the entry "sparsify": {"method": ..., parameters}.

    Raises:
        RecipeError: if a required parameter has no value for the tensor, or the values break a
            rule of the method.
    """
    return _resolver(_ByIdentity(recipe, module, layers, method)).resolve(tensor_name, layer_t)


def check_settings(recipe: Recipe, method: Method) -> None:
    """Check what is certain before any tensor is known.

    Raises:
        RecipeError: if a required parameter stands on no level, or if settings that are the
            same for all tensors break a rule of the method.
    """
    for module, layers in recipe.slices():
        if layers.sources:
            _resolver(_ByIdentity(recipe, module, layers, method)).check()


class _ByIdentity:
    """A key for a cache of things that are equal only if they are the same objects."""

    __slots__ = ("parts",)

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.parts)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and all(
            mine is theirs for mine, theirs in zip(self.parts, other.parts, strict=True)
        )


@lru_cache(maxsize=1024)
def _resolver(key: _ByIdentity) -> SliceResolver:
    return SliceResolver(*key.parts)


@lru_cache(maxsize=64)
def _interned(key: _ByIdentity) -> dict[Any, Settings]:
    """Return the table of one recipe: content of settings -> the one object with this content."""
    return {}


class SliceResolver:
    """Resolves the tensors of one slice, remembering every answer.

    A tensor matters only through which filters it matches and, if there are gradients, its
    place; tensors that agree in these share one answer.
    """

    def __init__(self, recipe: Recipe, module: Module, layers: LayerSlice, method: Method) -> None:
        self.recipe, self.layers, self.method = recipe, layers, method
        self.parameters: MethodParameters = parameters_of(method)
        #: levels above the models, nearest first
        self.levels: tuple[Level, ...] = (layers.parameters, module.parameters, recipe.parameters)
        everywhere = [*self.levels, *(use.parameters for use in layers.sources)]
        entries = [each for level in everywhere for setting in level.values() for each in setting]
        self.filters = tuple(dict.fromkeys(each.filter for each in entries if each.filter is not None))
        self.has_gradient = any(_has_gradient(each.value) for each in entries)
        self.by_matches: dict[tuple[tuple[bool, ...], float], Settings] = {}
        self.interned = _interned(_ByIdentity(recipe, method))

    def check(self) -> None:
        """Raise what is certain to fail for any tensor."""
        if not self.filters and not self.has_gradient:
            self.resolve("", 0.0)
            return
        for use in self.layers.sources:
            for parameter in self.parameters.per_model:
                self.check_required(parameter, (use.parameters, *self.levels), use)
        for parameter in self.parameters.shared:
            self.check_required(parameter, self.levels, None)

    def check_required(self, parameter: Parameter, levels: Sequence[Level], use: SourceUse | None) -> None:
        """Raise if a required parameter stands on no level at all."""
        if parameter.required and not any(parameter.name in level for level in levels):
            raise self.lacks(parameter, "", use)

    def resolve(self, tensor_name: str, layer_t: float) -> Settings:
        """Return the settings of one tensor."""
        matches = tuple([each in tensor_name for each in self.filters])
        key = (matches, layer_t if self.has_gradient else 0.0)
        found = self.by_matches.get(key)
        if found is None:
            found = self.by_matches[key] = self.evaluate(tensor_name, layer_t)
        return found

    def evaluate(self, tensor_name: str, layer_t: float) -> Settings:
        """Work out the settings of one tensor."""
        shared = {
            each.name: self.value(each, self.levels, tensor_name, layer_t, None)
            for each in self.parameters.shared
        }
        models = tuple(self.of_model(use, tensor_name, layer_t) for use in self.layers.sources)
        content = (_frozen(shared), tuple(map(_frozen, models)))
        if content in self.interned:
            return self.interned[content]
        settings = Settings(shared=shared, models=models)
        broken = self.method.check(settings) if self.method.check else None
        broken = broken or _broken_step(settings)
        if broken:
            at = self.recipe.origin.at(self.layers.where or "merge_method")
            where = f" for the tensor {tensor_name}" if tensor_name else ""
            raise RecipeError(f"{at}: {self.method.name}{where}: {broken.rstrip('.')}.")
        self.interned[content] = settings
        return settings

    def of_model(self, use: SourceUse, tensor_name: str, layer_t: float) -> dict[str, Any]:
        """Work out the parameters of one merged model."""
        levels = (use.parameters, *self.levels)
        values = {
            each.name: self.value(each, levels, tensor_name, layer_t, use)
            for each in self.parameters.per_model
        }
        asked = _first_value("sparsify", levels, tensor_name)
        if asked is not None and asked["method"] != NO_SPARSIFIER:
            values["sparsify"] = {name: _at(value, layer_t) for name, value in asked.items()}
        return values

    def value(
        self,
        parameter: Parameter,
        levels: Sequence[Level],
        tensor_name: str,
        layer_t: float,
        use: SourceUse | None,
    ) -> Any:
        """Return the value of the first level that has one, else the default."""
        value = _first_value(parameter.name, levels, tensor_name)
        if value is not None:
            return _at(value, layer_t)
        if parameter.required:
            raise self.lacks(parameter, tensor_name, use)
        return parameter.default

    def lacks(self, parameter: Parameter, tensor_name: str, use: SourceUse | None) -> RecipeError:
        """Return the error of a missing value."""
        whose = f" for the model {use.model}" if use else ""
        where = f" (tensor {tensor_name})" if tensor_name else ""
        at = self.recipe.origin.at(use.where if use else "parameters")
        places = f"{join(use.where, 'parameters')} or under parameters" if use and use.where else "parameters"
        return RecipeError(
            f"{at}: {self.method.name} needs {parameter.name!r}{whose}{where}; give it under {places}."
        )


def _broken_step(settings: Settings) -> str | None:
    """Return what is wrong with a sparsifying step that the recipe asks for, if anything is."""
    for model in settings.models:
        asked: Any = model.get("sparsify")
        check = find_sparsifier(asked["method"]).check if asked else None
        broken = check(asked) if check else None
        if broken:
            return f"sparsify: {broken}"
    return None


def _first_value(name: str, levels: Sequence[Level], tensor_name: str) -> Any:
    for level in levels:
        for each in level.get(name, ()):
            if each.filter is None or each.filter in tensor_name:
                return each.value
    return None


def _at(value: Any, layer_t: float) -> Any:
    """Return a value at a place: numbers are interpolated between their points, others picked."""
    if not isinstance(value, tuple):
        return value
    scaled = layer_t * (len(value) - 1)
    left = min(int(scaled), len(value) - 1)
    if not isinstance(value[left], float):
        return value[left]
    right = min(left + 1, len(value) - 1)
    fraction = scaled - left
    return value[left] if fraction == 0 else (1 - fraction) * value[left] + fraction * value[right]


def _has_gradient(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(isinstance(each, tuple) for each in value.values())
    return isinstance(value, tuple)


def _frozen(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a hashable picture of a mapping; the type tells 1.0 from True."""
    return tuple(
        (name, _frozen(value)) if isinstance(value, Mapping) else (name, type(value), value)
        for name, value in values.items()
    )
