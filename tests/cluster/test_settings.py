"""Parameters of a tensor: levels, filters, gradients, and the identity of equal answers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raymerge.cluster.recipe import Recipe, load_recipes
from raymerge.cluster.settings import layer_position, resolve
from raymerge.merge_actors.errors import RecipeError
from raymerge.merge_actors.methods.interface import Method, Settings

Registry = Mapping[str, Method]


def read(raw: str | Mapping[str, Any]) -> Recipe:
    (recipe,), warnings = load_recipes(raw)
    assert warnings == []
    return recipe


def settings_of(
    recipe: Recipe, registry: Registry, tensor: str = "x", t: float = 0.0, index: int = 0
) -> Settings:
    module, layers = recipe.slices()[index]
    return resolve(recipe, module, layers, registry[recipe.merge_method], tensor, t)


def ties(**keys: Any) -> Recipe:
    return read({"merge_method": "ties", "base_model": "base", "models": ["a", "b"], **keys})


def test_defaults_of_parameters_and_of_the_method(small_registry: Registry) -> None:
    found = settings_of(ties(parameters={"weight": 0.5}), small_registry)
    assert found.shared == {"normalize": True, "lambda": 1.0, "trim": "tensor"}
    assert found.models == ({"weight": 0.5, "density": 1.0},) * 2


def test_types_follow_the_parameter(small_registry: Registry) -> None:
    parameters = {"weight": True, "normalize": 0, "lambda": "1e-10", "trim": "model", "density": 1}
    found = settings_of(ties(parameters=parameters), small_registry)
    assert repr(found.shared) == repr({"normalize": False, "lambda": 1e-10, "trim": "model"})
    assert repr(found.models[0]) == repr({"weight": 1.0, "density": 1.0})


def test_an_alias_is_the_parameter(small_registry: Registry) -> None:
    assert settings_of(ties(parameters={"weight": 1, "scaling": 0.3}), small_registry).shared["lambda"] == 0.3


LEVELS = """
merge_method: ties
base_model: base
parameters: {weight: 0.1, density: 0.1, lambda: 0.1, trim: model}
modules:
  text:
    parameters: {weight: 0.2, density: 0.2, lambda: 0.2}
    slices:
      - parameters: {weight: 0.3, density: 0.3}
        sources:
          - {model: a, layer_range: [0, 1], parameters: {weight: 0.4}}
          - {model: b, layer_range: [0, 1]}
      - sources:
          - {model: a, layer_range: [1, 2]}
"""


def test_the_nearest_level_wins(small_registry: Registry) -> None:
    recipe = read(LEVELS)
    first, second = (settings_of(recipe, small_registry, index=i) for i in (0, 1))
    assert first.models == ({"weight": 0.4, "density": 0.3}, {"weight": 0.3, "density": 0.3})
    assert second.models == ({"weight": 0.2, "density": 0.2},)
    assert first.shared == second.shared == {"normalize": True, "lambda": 0.2, "trim": "model"}


def test_the_first_matching_filter_wins_and_none_leaves_it_to_the_next_level(
    small_registry: Registry,
) -> None:
    weight = [
        {"filter": "mlp", "value": 0.1},
        {"filter": "mlp.up", "value": 0.2},
        {"filter": "attn", "value": 0.3},
    ]
    models = ["a", {"model": "b", "parameters": {"weight": weight}}]
    recipe = ties(
        models=models, parameters={"weight": [{"filter": "norm", "value": 7}, {"filter": "*", "value": 9}]}
    )

    def of_b(tensor: str) -> Any:
        return settings_of(recipe, small_registry, tensor).models[1]["weight"]

    tensors = ("layers.0.mlp.up", "layers.0.attn.q", "final_norm", "head")
    assert [of_b(tensor) for tensor in tensors] == [0.1, 0.3, 7.0, 9.0]


def test_gradients_are_interpolated_between_their_points(small_registry: Registry) -> None:
    recipe = ties(parameters={"weight": [0, 0.5, 0.3, 0.7, 1], "density": [0.5]})

    def at(t: float) -> Any:
        return settings_of(recipe, small_registry, "x", t).models[0]["weight"]

    assert [at(t) for t in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 0.3, 0.7, 1]
    assert at(0.125) == 0.25
    assert at(0.9) == pytest.approx(0.7 + 0.6 * 0.3, rel=1e-12)
    assert settings_of(recipe, small_registry, "x", 0.4).models[0]["density"] == 0.5


def test_switches_and_names_over_the_layers_are_picked(small_registry: Registry) -> None:
    recipe = ties(parameters={"weight": 1, "normalize": [True, False, True], "trim": ["tensor", "model"]})
    found = [settings_of(recipe, small_registry, "x", t).shared for t in (0, 0.4, 0.5, 0.9, 1)]
    assert [each["normalize"] for each in found] == [True, True, False, False, True]
    assert [each["trim"] for each in found] == ["tensor"] * 4 + ["model"]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    # A gradient near zero would yield numbers that are refused as too small for float32 arithmetic.
    st.lists(st.integers(0, 1000).map(lambda n: n / 1000), min_size=1, max_size=6),
    st.integers(0, 1000).map(lambda n: n / 1000),
)
def test_a_gradient_stays_between_its_points(small_registry: Registry, points: list[float], t: float) -> None:
    recipe = ties(parameters={"weight": 1, "density": points})
    value = settings_of(recipe, small_registry, "x", t).models[0]["density"]
    assert isinstance(value, float)
    left = min(int(t * (len(points) - 1)), len(points) - 1)
    ends = points[left : left + 2]
    # one rounding of each product and of the sum
    assert min(ends) * (1 - 1e-15) - 1e-300 <= value <= min(max(ends) * (1 + 1e-15), 1.0)


def test_the_place_of_a_layer(small_registry: Registry) -> None:
    recipe, old = ties(parameters={"weight": 1}), ties(parameters={"weight": 1}, gradient_tail="last")
    assert [layer_position(recipe, i, 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert layer_position(recipe, 0, 1) == 1.0
    assert layer_position(recipe, None, 5) == layer_position(old, None, 5) == 0.0
    assert layer_position(recipe, None, 5, is_after_layers=True) == 0.0
    assert layer_position(old, None, 5, is_after_layers=True) == 1.0


def test_sparsify_is_resolved_per_model(small_registry: Registry) -> None:
    dare = {"method": "dare", "drop": [0.9, 0.5], "rescale": False}
    models = ["a", {"model": "b", "parameters": {"sparsify": {"method": "none"}}}]
    sparsify = [{"filter": "mlp", "value": dare}, {"value": {"method": "magnitude", "density": 0.2}}]
    recipe = ties(models=models, parameters={"weight": 1, "sparsify": sparsify})
    models_found: Any = settings_of(recipe, small_registry, "mlp", 0.5).models
    first, second = models_found
    assert first["sparsify"] == {"method": "random", "density": pytest.approx(0.3), "rescale": False}
    assert "sparsify" not in second
    other: Any = settings_of(recipe, small_registry, "attn", 0.5).models[0]["sparsify"]
    assert other == {"method": "magnitude", "density": 0.2}


def test_parameters_of_the_sparsifier_reach_each_model(small_registry: Registry) -> None:
    raw = {"merge_method": "dare_ties", "base_model": "base", "models": ["a"]}
    found = settings_of(
        read({**raw, "parameters": {"weight": 1, "density": 0.1, "rescale": 0}}), small_registry
    )
    assert found.models == ({"weight": 1.0, "density": 0.1, "rescale": False},)
    assert found.shared == {"normalize": False, "lambda": 1.0, "rescale": False}


@pytest.mark.parametrize(("written", "value"), [("l1", "l1"), ("true", True), (0, False), ("off", False)])
def test_a_switch_may_have_named_settings(small_registry: Registry, written: Any, value: Any) -> None:
    raw = {"merge_method": "dare_ties", "base_model": "base", "models": ["a"]}
    recipe = read({**raw, "parameters": {"weight": 1, "density": 0.1, "rescale": written}})
    assert settings_of(recipe, small_registry).models[0]["rescale"] is value


def test_a_tensor_without_a_required_value_is_named(small_registry: Registry) -> None:
    recipe = ties(parameters={"weight": [{"filter": "mlp", "value": 1}]})
    assert settings_of(recipe, small_registry, "mlp").models[0]["weight"] == 1.0
    with pytest.raises(RecipeError) as caught:
        settings_of(recipe, small_registry, "norm")
    assert str(caught.value) == (
        "recipe: ties needs 'weight' for the model a (tensor norm); give it under models[0].parameters or "
        "under parameters."
    )


def test_rules_across_parameters_hold_for_every_tensor(small_registry: Registry) -> None:
    weight = [{"filter": "mlp", "value": -1}, {"value": 1}]
    models = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": weight}}]
    recipe = read({"merge_method": "linear", "models": models})
    assert settings_of(recipe, small_registry, "attn").models[1]["weight"] == 1.0
    with pytest.raises(RecipeError) as caught:
        settings_of(recipe, small_registry, "layers.0.mlp.up")
    assert str(caught.value) == (
        "recipe: linear for the tensor layers.0.mlp.up: the weights [1.0, -1.0] sum to 0, which normalize "
        "cannot divide by."
    )


def test_equal_settings_are_one_object(small_registry: Registry) -> None:
    recipe = read(LEVELS.replace("weight: 0.4", "weight: [{filter: mlp, value: 0.4}, {value: 0.4}]"))
    first = settings_of(recipe, small_registry, "layers.0.mlp", 0.0)
    assert settings_of(recipe, small_registry, "layers.0.attn", 1.0) is first
    assert settings_of(recipe, small_registry, index=1) is not first


def test_slices_of_one_recipe_share_equal_settings(small_registry: Registry) -> None:
    stack = [{"sources": [{"model": "a", "layer_range": [i, i + 1]}]} for i in range(2)]
    recipe = ties(models=None, slices=stack, parameters={"weight": [0.25, 0.75]})
    first = settings_of(recipe, small_registry, "x", 1.0, index=0)
    assert settings_of(recipe, small_registry, "y", 1.0, index=1) is first
    assert settings_of(recipe, small_registry, "y", 0.0, index=1) is not first


def test_a_switch_is_not_taken_for_a_number(small_registry: Registry) -> None:
    numbers = ties(parameters={"weight": 1, "lambda": 1})
    found = settings_of(numbers, small_registry)
    assert (type(found.shared["lambda"]), type(found.shared["normalize"])) == (float, bool)


def test_many_tensors_are_resolved_quickly(small_registry: Registry) -> None:
    weight = [
        {"filter": "self_attn", "value": [0, 0.5, 1]},
        {"filter": "mlp", "value": [1, 0]},
        {"value": 0.5},
    ]
    recipe = ties(parameters={"weight": weight})
    module, layers = recipe.slices()[0]
    begin = time.process_time()
    for layer in range(60):
        for expert in range(750):
            name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
            resolve(recipe, module, layers, small_registry["ties"], name, layer / 59)
    # 45,000 tensors take 0.1 s on the machine of the authors
    assert time.process_time() - begin < 2.0


def test_a_sparsifying_step_of_the_recipe_obeys_its_own_rule():
    text = """
merge_method: task_arithmetic
base_model: base
models:
  - model: a
    parameters: {weight: 1, sparsify: {method: della, density: 0.1}}
"""
    with pytest.raises(
        RecipeError, match=r"sparsify: density 0.1 with epsilon 0.15 gives keep probabilities"
    ):
        load_recipes(text)
