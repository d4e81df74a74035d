"""Recipes against the real registry: every parameter of every method can be set and arrives."""

from __future__ import annotations

from typing import Any

import pytest

from raymerge.cluster.method_parameters import parameters_of
from raymerge.cluster.recipe import load_recipes
from raymerge.cluster.settings import resolve
from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.interface import Method, Parameter


def allowed_value(parameter: Parameter) -> Any:
    """Return a value that keeps the parameter's rule: its default, or a number inside its range."""
    if parameter.default is not None:
        return parameter.default
    if parameter.kind is float:
        return 0.5
    return parameter.choices[0] if parameter.choices else 1


def recipe_of(method: Method, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe with as few models as the method allows, and a base."""
    models = [f"org/m{i}" for i in range(method.num_models[0])]
    return {"merge_method": method.name, "base_model": "org/base", "models": models, "parameters": parameters}


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_of_a_method_arrives(name: str) -> None:
    method = METHODS[name]
    table = parameters_of(method)
    given = {each.name: allowed_value(each) for each in (*table.shared, *table.per_model)}
    (recipe,), remarks = load_recipes(recipe_of(method, given), strict=True)
    assert remarks == []
    assert load_recipes(recipe.to_yaml(), strict=True) == ([recipe], [])
    module, layers = recipe.slices()[0]
    found = resolve(recipe, module, layers, method, "model.layers.0.mlp.up_proj.weight", 0.0)
    assert found.shared == {each.name: given[each.name] for each in table.shared}
    expected = {each.name: given[each.name] for each in table.per_model}
    assert found.models == (expected,) * method.num_models[0]


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_needs_is_asked_for(name: str) -> None:
    method = METHODS[name]
    required = [each.name for each in method.parameters if each.required]
    if not required:
        load_recipes(recipe_of(method, {}), strict=True)
        return
    with pytest.raises(ValueError, match=f"recipe: {name} needs '({'|'.join(required)})'"):
        load_recipes(recipe_of(method, {}))


@pytest.mark.parametrize("name", SPARSIFIERS)
def test_every_sparsifier_goes_before_a_plain_average(name: str) -> None:
    asked = {each.name: allowed_value(each) for each in SPARSIFIERS[name].parameters}
    asked["density"] = 0.5
    raw = recipe_of(METHODS["linear"], {"weight": 1, "sparsify": {"method": name, **asked}})
    (recipe,), remarks = load_recipes(raw, strict=True)
    assert remarks == []
    module, layers = recipe.slices()[0]
    (model,) = resolve(recipe, module, layers, METHODS["linear"], "x", 0.0).models
    sparsify: Any = model["sparsify"]
    assert sparsify == {"method": name, **asked}


def test_dare_is_the_random_sparsifier() -> None:
    raw = recipe_of(METHODS["linear"], {"weight": 1, "sparsify": {"method": "dare", "drop": 0.9}})
    (recipe,), _ = load_recipes(raw, strict=True)
    module, layers = recipe.slices()[0]
    (model,) = resolve(recipe, module, layers, METHODS["linear"], "x", 0.0).models
    sparsify: Any = model["sparsify"]
    assert (sparsify["method"], sparsify["density"], sparsify["rescale"]) == ("random", 0.1, True)
