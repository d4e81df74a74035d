"""Which tensors an output has and where each comes from by name: slices of layers, modules, whole models.

Only names are looked at; whether a model has the tensor, and what becomes of it, is `match.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raymerge.cluster.layers import find_stacks, is_before_layers, main_stacks, split_layer
from raymerge.cluster.matched import LoadedModel
from raymerge.cluster.recipe import LayerSlice, Module, Recipe
from raymerge.cluster.settings import layer_position
from raymerge.cluster.vocabulary_rows import find_counterpart, is_head, tensors_of
from raymerge.merge_actors.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Place:
    """An output tensor before its inputs are looked up: the source's name per use."""

    name: str
    source_names: tuple[str, ...]
    layer_t: float


def places_by_slice(
    recipe: Recipe, models: Mapping[str, LoadedModel]
) -> list[tuple[Module, LayerSlice, list[Place]]]:
    """Return the output tensors of every slice, named by the slice's first model."""
    groups = []
    claimed = [module.name for module in recipe.modules if module.name != "default"]
    for module in recipe.modules:
        next_layer = 0
        for number, layers in enumerate(module.slices):
            uses = layers.uses()
            names = [_names_of(models[use.model.key], module.name, claimed, recipe) for use in uses]
            if layers.num_layers is None:
                places = _whole_places(recipe, names)
            else:
                stacks = main_stacks(names[0], models[uses[0].model.key].checkpoint.config)
                _check_ranges(recipe, layers, models, stacks)
                places = _range_places(recipe, layers, names, stacks, next_layer, number, len(module.slices))
                next_layer += layers.num_layers
            groups.append((module, layers, places))
        if module.slices[-1].num_layers is not None and len(module.slices) > 1:
            places += _head_of_last(recipe, module, models, groups)
    return groups


def _head_of_last(
    recipe: Recipe,
    module: Module,
    models: Mapping[str, LoadedModel],
    groups: Sequence[tuple[Module, LayerSlice, list[Place]]],
) -> list[Place]:
    """Return the output layer of a stack that begins in a model with one of its own and ends in a tied one.

    The output's config says that there is one, so it must be stored: it is the last model's embedding.
    """
    first = models[module.slices[0].uses()[0].model.key]
    made = {place.name for group, _, places in groups if group is module for place in places}
    heads = [name for name in tensors_of(first) if is_head(name) and name not in made]
    last = [models[use.model.key] for use in module.slices[-1].uses()]
    found = []
    for name in heads:
        sources = [find_counterpart(model, name) for model in last]
        if all(source is not None for source in sources):
            t = layer_position(recipe, None, 1, is_after_layers=True)
            found.append(Place(name, tuple(source.name for source in sources if source is not None), t))
    return found


def _names_of(model: LoadedModel, module: str, claimed: Sequence[str], recipe: Recipe) -> list[str]:
    """Return the names of a model's tensors that belong to a module, in file order."""
    names = [*model.checkpoint.tensors]
    if model.adapter:
        names += [name for name in model.adapter.full if name not in model.checkpoint.tensors]
    if not claimed:
        return names
    if module == "default":
        return [name for name in names if not any(_is_in(name, other) for other in claimed)]
    found = [name for name in names if _is_in(name, module)]
    if not found:
        parts = sorted({part for name in names for part in name.split(".")[:2]})
        raise RecipeError(
            f"recipe {recipe.name}: no tensor of model {model.key} belongs to module {module!r}; parts of the "
            f"names there: {', '.join(parts[:12])}"
        )
    return found


#: Names that recipes in the wild give to modules -> components of tensor names.
_MODULE_PARTS = {"text_decoder": ("language_model", "text_model"), "multi_modal_projector": ("connector",)}


def _is_in(name: str, module: str) -> bool:
    wanted = {module, *_MODULE_PARTS.get(module, ())}
    return any(part in wanted for part in name.split(".")) or name.startswith(f"{module}.")


def _whole_places(recipe: Recipe, names: Sequence[Sequence[str]]) -> list[Place]:
    """Return a place for every tensor that any model has: the first model's order, then the rest."""
    union = list(dict.fromkeys(name for of_model in names for name in of_model))
    stacks = find_stacks(union)
    places = []
    for name in union:
        layer = split_layer(name)
        places.append(
            Place(
                name,
                tuple(name for _ in names),
                layer_position(
                    recipe,
                    layer.layer if layer else None,
                    stacks[layer.stack] if layer else 1,
                    is_after_layers=not layer and not is_before_layers(name),
                ),
            )
        )
    return places


def _range_places(
    recipe: Recipe,
    layers: LayerSlice,
    names: Sequence[Sequence[str]],
    stacks: Mapping[str, int],
    first_layer: int,
    slice_number: int,
    num_slices: int,
) -> list[Place]:
    """Return the places of one slice of layers, renumbered from `first_layer`.

    Tensors before the layers come with the first slice, those after them with the last. What the
    first model lacks comes after what it has.
    """
    uses = layers.uses()
    ranges = [use.layer_range for use in uses]
    assert all(each is not None for each in ranges)
    begins = [each[0] for each in ranges if each is not None]
    count = layers.num_layers or 0
    places: dict[str, Place] = {}
    for own_begin, name in ((begin, name) for begin, of in zip(begins, names, strict=True) for name in of):
        layer = split_layer(name)
        if layer and layer.stack in stacks:
            within = layer.layer - own_begin
            new_name = layer.at(first_layer + within)
            if 0 <= within < count and new_name not in places:
                sources = tuple(layer.at(begin + within) for begin in begins)
                places[new_name] = Place(new_name, sources, layer_position(recipe, within, count))
            continue
        is_before = is_before_layers(name)
        if slice_number == (0 if is_before else num_slices - 1) and name not in places:
            place_t = layer_position(recipe, None, 1, is_after_layers=not is_before)
            places[name] = Place(name, tuple(name for _ in uses), place_t)
    return [*places.values()]


def _check_ranges(
    recipe: Recipe, layers: LayerSlice, models: Mapping[str, LoadedModel], stacks: Mapping[str, int]
) -> None:
    if not stacks:
        raise RecipeError(
            f"recipe {recipe.name}: {layers.uses()[0].model.key} has no numbered layers for a range"
        )
    for use in layers.uses():
        loaded = models[use.model.key]
        own = main_stacks(loaded.checkpoint.tensors, loaded.checkpoint.config)
        count = min(own.values(), default=0)
        if use.layer_range and use.layer_range[1] > count:
            raise RecipeError(
                f"{recipe.origin.file or recipe.name}: {use.where}.layer_range is {list(use.layer_range)}, but "
                f"{use.model.key} has {count} layers; ranges are [begin, end) with end at most {count}"
            )
