"""Recipes in the shapes that the field publishes, and the normal form they become."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raymerge.cluster.model_ref import ModelRef, parse_model
from raymerge.cluster.recipe import Conditional, LayerSlice, Recipe, load_recipes
from raymerge.cluster.tokenizer_policy import TokenizerPolicy, TokenPolicy
from raymerge.merge_actors.errors import RecipeError

pytestmark = pytest.mark.usefixtures("small_registry")


def load(source: str | Mapping[str, Any]) -> Recipe:
    """Read one recipe that has to be free of warnings, and check that its normal form reads back."""
    (recipe,), warnings = load_recipes(source)
    assert warnings == []
    assert load_recipes(recipe.to_yaml()) == ([recipe], [])
    assert load_recipes(recipe.to_mapping()) == ([recipe], [])
    return recipe


def only_slice(recipe: Recipe) -> LayerSlice:
    """Return the one slice of a recipe."""
    ((_, layers),) = recipe.slices()
    return layers


def paths(layers: LayerSlice) -> list[str]:
    """Return the keys of the merged models."""
    return [use.model.key for use in layers.sources]


TIES = """
models:
  - model: org/base
  - model: org/math@main
    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
  - model: org/code
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: org/base
parameters: {normalize: true}
dtype: float16
"""


def test_models_with_a_listed_base() -> None:
    recipe = load(TIES)
    layers = only_slice(recipe)
    assert layers.base_model == ModelRef(path="org/base")
    assert paths(layers) == ["org/math@main", "org/code"]
    assert [model.key for model in recipe.all_models()] == ["org/base", "org/math@main", "org/code"]
    assert layers.sources[0].parameters["weight"] == (Conditional(value=(0.0, 0.3, 0.7, 1.0)),)
    assert layers.sources[1].parameters["weight"] == (
        Conditional(value=0.5, filter="mlp"),
        Conditional(value=0.0),
    )
    assert (recipe.dtype, recipe.out_dtype, recipe.donor.path) == ("F16", None, "org/base")
    assert layers.num_layers is None


def test_a_base_that_is_not_listed_joins() -> None:
    without = load(TIES.replace("  - model: org/base\n", ""))
    assert without.modules == load(TIES).modules


def test_gradient_slerp_over_slices() -> None:
    recipe = load(
        """
slices:
  - sources:
      - {model: a, layer_range: [0, 40]}
      - {model: b, layer_range: [0, 40]}
merge_method: slerp
base_model: a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: bfloat16
"""
    )
    layers = only_slice(recipe)
    assert layers.base is not None
    assert (layers.base.model.key, layers.base.layer_range, paths(layers)) == ("a", (0, 40), ["b"])
    assert [each.filter for each in recipe.parameters["t"]] == ["self_attn", "mlp", None]
    assert layers.num_layers == 40


def test_slerp_may_list_only_the_other_model() -> None:
    one = load(
        {"merge_method": "slerp", "base_model": "a", "models": [{"model": "b"}], "parameters": {"t": 0.5}}
    )
    both = load(
        {"merge_method": "slerp", "base_model": "a", "models": ["a", "b"], "parameters": {"t": "5e-1"}}
    )
    assert one == both


def test_a_stack_of_layers() -> None:
    recipe = load(
        """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 24]}]
  - sources:
      - model: b
        layer_range: [20, 40]
        parameters: {scale: [{filter: o_proj, value: 0.0}, {value: 1.0}]}
"""
    )
    assert [(paths(each), each.num_layers) for _, each in recipe.slices()] == [(["a"], 24), (["b"], 20)]
    assert recipe.donor.path == "a"


def test_a_slice_of_one_model_is_copied_where_a_base_is_merged_into() -> None:
    recipe = load(
        {
            "merge_method": "slerp",
            "base_model": "a",
            "parameters": {"t": 0.3},
            "slices": [
                {"sources": [{"model": "b", "layer_range": [0, 2]}]},
                {"sources": [{"model": "a", "layer_range": [2, 4]}, {"model": "b", "layer_range": [1, 3]}]},
            ],
        }
    )
    copied, merged = (each for _, each in recipe.slices())
    assert (copied.sources, copied.base_model) == ((), ModelRef(path="b"))
    assert copied.base is not None and copied.base.layer_range == (0, 2)
    assert (paths(merged), merged.base_model) == (["b"], ModelRef(path="a"))


def test_modules_each_with_their_own_form() -> None:
    recipe = load(
        """
merge_method: ties
base_model: base
modules:
  text_decoder:
    parameters: {weight: 0.4}
    slices:
      - sources: [{model: a, layer_range: [0, 2]}, {model: base, layer_range: [0, 2]}]
        parameters: {density: 0.1}
  vision_tower:
    models: [{model: a, parameters: {weight: 1}}]
"""
    )
    decoder, tower = recipe.modules
    assert (decoder.name, tower.name) == ("text_decoder", "vision_tower")
    assert decoder.parameters == {"weight": (Conditional(value=0.4),)}
    assert decoder.slices[0].parameters == {"density": (Conditional(value=0.1),)}
    assert tower.slices[0].base_model == ModelRef(path="base")


def test_a_method_without_a_base_merges_every_listed_model() -> None:
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("a", "b")]
    recipe = load({"merge_method": "linear", "base_model": "a", "models": models})
    assert (paths(only_slice(recipe)), only_slice(recipe).base) == (["a", "b"], None)
    other = load({"merge_method": "linear", "base_model": "c", "models": models})
    assert (paths(only_slice(other)), other.donor.path) == (["a", "b"], "c")
    assert [model.path for model in other.all_models()] == ["a", "b"]


def test_sparsify_gives_an_average_a_base() -> None:
    recipe = load(
        {
            "merge_method": "linear",
            "base_model": "base",
            "models": ["a", {"model": "b", "parameters": {"sparsify": {"method": "none"}}}],
            "parameters": {"weight": 1, "sparsify": {"method": "dare", "drop": 0.9}},
        }
    )
    assert only_slice(recipe).base_model == ModelRef(path="base")
    assert recipe.parameters["sparsify"] == (
        Conditional(value={"method": "random", "density": 0.1, "rescale": True}),
    )


def test_a_listed_base_of_a_sparsified_average_is_also_merged() -> None:
    recipe = load(
        {
            "merge_method": "linear",
            "base_model": "a",
            "models": ["a", "b"],
            "parameters": {"weight": 1, "sparsify": {"method": "dare", "density": 0.5}},
        }
    )
    assert (paths(only_slice(recipe)), only_slice(recipe).base_model) == (["a", "b"], ModelRef(path="a"))


def test_tokenizer_forms() -> None:
    def tokenizer(**keys: Any) -> TokenizerPolicy | None:
        return load(
            {"merge_method": "linear", "models": ["a"], "parameters": {"weight": 1}, **keys}
        ).tokenizer

    assert tokenizer() is None
    assert tokenizer(tokenizer={}) == TokenizerPolicy(source="union")
    assert tokenizer(tokenizer_source="base") == TokenizerPolicy(source="base")
    assert tokenizer(tokenizer_source="org/x@r") == TokenizerPolicy(source=parse_model("org/x@r"))
    tokens = {
        "<|im_start|>": {"source": "chat", "force": True},
        "<a>": {"source": {"kind": "zero"}},
        "<b>": {"source": {"kind": "model_token", "model": "m", "token_id": 7}},
    }
    policy = tokenizer(tokenizer={"source": "union", "tokens": tokens, "pad_to_multiple_of": 64})
    assert policy == TokenizerPolicy(
        tokens={
            "<|im_start|>": TokenPolicy(source=ModelRef(path="chat"), force=True),
            "<a>": TokenPolicy(source="zero"),
            "<b>": TokenPolicy(source=ModelRef(path="m"), token_id=7),
        },
        pad_to_multiple_of=64,
    )
    assert policy is not None and [model.path for model in policy.models()] == ["chat", "m"]


def test_other_keys_of_a_recipe() -> None:
    recipe = load(
        """
merge_method: linear
models: [{model: a+lora@v1, parameters: {weight: true}}]
chat_template: chatml
dtype: bf16
out_dtype: torch.float32
seed: 18446744073709551615
missing: present
vocabulary: pad
gradient_tail: last
name: my-merge
"""
    )
    assert (recipe.chat_template, recipe.dtype, recipe.out_dtype) == ("chatml", "BF16", "F32")
    assert (recipe.seed, recipe.missing, recipe.vocabulary) == (2**64 - 1, "present", "pad")
    assert (recipe.gradient_tail, recipe.name) == ("last", "my-merge")
    (use,) = only_slice(recipe).sources
    assert use.model.adapter == ModelRef(path="lora", revision="v1")
    assert use.parameters["weight"] == (Conditional(value=1.0),)


def test_anchors_and_templates() -> None:
    recipe = load(
        """
x-half: &half {weight: 0.5}
merge_method: linear
models:
  - {model: a, parameters: *half}
  - model: b
    parameters: {<<: *half}
"""
    )
    first, second = only_slice(recipe).sources
    assert first.parameters == second.parameters == {"weight": (Conditional(value=0.5),)}


CAMPAIGN = """
name: first
merge_method: linear
models: [a, b]
parameters: {weight: 1}
---
name: second
merge_method: slerp
base_model: first
models: [c]
parameters: {t: 0.5}
"""


def test_a_later_document_uses_an_earlier_one() -> None:
    recipes, warnings = load_recipes(CAMPAIGN)
    assert warnings == []
    assert [(recipe.name, recipe.depends_on) for recipe in recipes] == [("first", ()), ("second", ("first",))]
    assert load_recipes([recipe.to_mapping() for recipe in recipes]) == (recipes, [])


def test_a_folder_of_that_name_is_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first").mkdir()
    assert [recipe.depends_on for recipe in load_recipes(CAMPAIGN)[0]] == [(), ()]


def test_documents_must_not_use_later_ones_or_share_a_name() -> None:
    first, second = CAMPAIGN.split("---\n")
    with pytest.raises(
        RecipeError, match="recipe:1: the recipe 'second' uses the model 'first', which is made by"
    ):
        load_recipes(second.lstrip() + "---" + first)
    with pytest.raises(RecipeError, match="recipe:7: key name is 'first', the name of an earlier recipe"):
        load_recipes(CAMPAIGN.replace("name: second", "name: first"))


def test_names_come_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(TIES)
    assert [recipe.name for recipe in load_recipes(path)[0]] == ["mix"]
    path.write_text(f"{TIES}\n---\n{TIES}")
    assert [recipe.name for recipe in load_recipes(str(path))[0]] == ["mix-1", "mix-2"]


# Never zero: weights that sum to zero are another test.
NUMBERS = st.floats(0.1, 1) | st.sampled_from([1, True, "1e-10", "0.25"])
VALUES = NUMBERS | st.lists(NUMBERS, min_size=1, max_size=4)
FILTERS = st.sampled_from(["mlp", "self_attn", "*", "layers.3."])
SETTINGS = VALUES | st.builds(
    lambda entries, last: [*entries, {"value": last}],
    st.lists(
        st.fixed_dictionaries({"filter": FILTERS.filter(lambda text: text != "*"), "value": VALUES}),
        max_size=2,
    ),
    VALUES,
)
SPARSIFY = st.fixed_dictionaries({"method": st.sampled_from(["dare", "magnitude"]), "density": VALUES})
MODELS = st.sampled_from(["a", "org/b@main", "c+l", "base", "s3://x@y/z"])


def levels(**settings_of: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=settings_of)


OF_MODEL = levels(weight=SETTINGS, density=SETTINGS, sparsify=SPARSIFY)
OF_SLICE = levels(weight=SETTINGS, density=SETTINGS, normalize=st.booleans(), **{"lambda": SETTINGS})


@st.composite
def slices_of_layers(draw: st.DrawFn) -> dict[str, Any]:
    begin, length = draw(st.integers(0, 5)), draw(st.integers(1, 4))
    entry = {"model": MODELS, "layer_range": st.just([begin, begin + length]), "parameters": OF_MODEL}
    sources = draw(st.lists(st.fixed_dictionaries(entry), min_size=1, max_size=3))
    own = draw(levels(base_model=st.just("base"), parameters=OF_SLICE))
    return {"sources": sources, **own}


WHOLE_MODELS = st.lists(
    st.fixed_dictionaries({"model": MODELS.filter(lambda name: name != "base"), "parameters": OF_MODEL}),
    min_size=1,
    max_size=3,
)
FORMS = (
    st.fixed_dictionaries({"models": WHOLE_MODELS})
    | st.fixed_dictionaries({"slices": st.lists(slices_of_layers(), min_size=1, max_size=3)})
    | st.fixed_dictionaries(
        {
            "modules": st.dictionaries(
                st.sampled_from(["text", "vision"]),
                st.fixed_dictionaries({"models": WHOLE_MODELS, "parameters": OF_SLICE}),
                min_size=1,
            )
        }
    )
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    FORMS,
    st.sampled_from(["ties", "dare_ties", "linear"]),
    OF_SLICE,
    levels(
        dtype=st.sampled_from(["bfloat16", "F32"]),
        seed=st.integers(0, 2**64 - 1),
        missing=st.sampled_from(["error", "drop"]),
        tokenizer=st.sampled_from([{}, {"source": "base"}, "union"]),
        chat_template=st.sampled_from(["auto", "{{ messages }}\n"]),
    ),
)
def test_the_normal_form_reads_back(form: Any, method: str, parameters: Any, others: Any) -> None:
    """Whatever a recipe holds, its normal form is an equal recipe and has nothing to warn of."""
    shared = {"weight": 0.5, "density": 0.5, "normalize": False, **parameters}
    raw = {"merge_method": method, "base_model": "base", **form, "parameters": shared, **others}
    (recipe,), _ = load_recipes(raw)
    assert load_recipes(recipe.to_yaml(), strict=True) == ([recipe], [])
