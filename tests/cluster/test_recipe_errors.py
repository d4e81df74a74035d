"""Bad recipes: what is said, word for word."""

# A table of whole sentences, which are easier to compare uncut:
# ruff: noqa: E501

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raymerge.cluster.recipe import load_recipes
from raymerge.merge_actors.errors import RecipeError

pytestmark = pytest.mark.usefixtures("small_registry")

HEAD = "merge_method: ties\nbase_model: base\n"
LINEAR = "merge_method: linear\nmodels: [a]\nparameters: {weight: 1}\n"
DARE = "merge_method: linear\nbase_model: b\nmodels: [a]\nparameters:\n  weight: 1\n"

ERRORS = {
    # methods and forms
    "merge_method: tie\nmodels: [a]\n": (
        "m.yaml:1: unknown merge_method 'tie'; known: dare_ties, linear, multislerp, passthrough, slerp, ties "
        "(did you mean 'ties'?)."
    ),
    "merge_metod: ties\nmodels: [a]\n": (
        "m.yaml:1: key merge_method is missing (did you mean 'merge_metod'?); known: dare_ties, linear, "
        "multislerp, passthrough, slerp, ties."
    ),
    "- a\n- b\n": "m.yaml:1: a recipe must be a mapping with merge_method; this is ['a', 'b'].",
    "# nothing\n": "m.yaml holds no recipe.",
    HEAD: "m.yaml:1: a recipe needs exactly one of models, slices and modules; this one holds none of them.",
    f"{HEAD}models: [a]\nslices: [a]\n": (
        "m.yaml:4: a recipe needs exactly one of models, slices and modules; this one holds models and slices."
    ),
    f"{HEAD}models: []\n": "m.yaml:3: key models is []; it must be a list with at least one entry.",
    f"{HEAD}modules: {{}}\n": "m.yaml:3: key modules is empty; it must hold at least one module.",
    f"{HEAD}modules:\n  text: {{models: [a], slices: [a]}}\n": (
        "m.yaml:4: key modules.text must hold exactly one of 'models' and 'slices'."
    ),
    f"{HEAD}models:\n  - modell: a\n": "m.yaml:4: key models[0] lacks 'model', the model that it is about.",
    f"{HEAD}models:\n  - model: a@b@c\n": (
        "m.yaml:4: key models[0].model is 'a@b@c'; it names more than one revision after '@'; write "
        "{model: {path: ..., revision: ...}} if the '@' belongs to a path."
    ),
    # bases, numbers of models, layers
    "merge_method: ties\nmodels: [a]\n": (
        "m.yaml:2: key models has no base: ties needs a base_model; name it in the recipe."
    ),
    f"{HEAD}models: [base]\n": "m.yaml:3: key models lists 0 models beside the base; ties merges at least 1.",
    "merge_method: slerp\nbase_model: base\nmodels: [a, b]\nparameters: {t: 0}\n": (
        "m.yaml:3: key models lists 2 models beside the base; slerp merges 1."
    ),
    "merge_method: multislerp\nmodels: [a]\nparameters: {weight: 1}\n": (
        "m.yaml:2: key models lists 1 models; multislerp merges at least 2."
    ),
    f"{HEAD}slices:\n  - sources:\n      - {{model: a, layer_range: [4, 2]}}\n": (
        "m.yaml:5: key slices[0].sources[0].layer_range is [4, 2]; it must be [begin, end) with 0 <= begin < end."
    ),
    f"{HEAD}slices:\n  - sources:\n    - {{model: a, layer_range: [0, 2]}}\n    - {{model: b, layer_range: [0, 3]}}\n": (
        "m.yaml:4: key slices[0] takes 2 layers of a and 3 of b; every source of a slice must have the same number."
    ),
    f"{HEAD}slices:\n  - sources:\n    - {{model: a, layer_range: [0, 2]}}\n    - {{model: b, layer_range: [2, 4]}}\n": (
        "m.yaml:4: key slices[0] does not say which layers of the base base belong to it; list the base among its "
        "sources."
    ),
    f"{HEAD}parameters: {{weight: 1}}\nslices:\n  - sources: [a]\n  - sources: [b]\n": (
        "m.yaml:5: key slices[0] lacks layer_range, which a stack of slices needs."
    ),
    # values
    f"{HEAD}models:\n  - model: a\n  - model: b\n    parameters:\n      weight: 1\n      density: 1.5\n": (
        "m.yaml:8: key models[1].parameters.density is 1.5; it must be in [0, 1]."
    ),
    f"{HEAD}models: [a]\nparameters:\n  density: [0.1,\n    -2, 1]\n": (
        "m.yaml:6: key parameters.density[1] is -2; it must be in [0, 1]."
    ),
    f"{HEAD}models: [a]\nparameters:\n  density:\n  - {{filter: mlp, value: 0.1}}\n  - value: much\n": (
        "m.yaml:7: key parameters.density[1].value is 'much'; it must be a number."
    ),
    f"{HEAD}models: [a]\nparameters: {{weight: .nan}}\n": (
        "m.yaml:4: key parameters.weight is nan; it must be a number."
    ),
    f"{HEAD}models: [a]\nparameters: {{weight: 1.0e+39}}\n": (
        "m.yaml:4: key parameters.weight is 1e+39; it must be 0, or of a size from 1e-18 to 1e+18."
    ),
    f"{HEAD}models: [a]\nparameters: {{weight: 1, lambda: -1.0e-46}}\n": (
        "m.yaml:4: key parameters.lambda is -1e-46; it must be 0, or of a size from 1e-18 to 1e+18."
    ),
    f"{HEAD}models: [a]\nparameters: {{weight: null}}\n": (
        "m.yaml:4: key parameters.weight is null; it must be a number."
    ),
    f"{HEAD}models: [a]\nparameters: {{weight: []}}\n": (
        "m.yaml:4: key parameters.weight is an empty list; a gradient needs at least one value."
    ),
    f"{HEAD}models: [a]\nparameters: {{normalize: [0, 2]}}\n": (
        "m.yaml:4: key parameters.normalize[1] is 2; it must be true or false."
    ),
    "merge_method: multislerp\nmodels: [a, b]\nparameters: {weight: 1, max_iter: [1, 2]}\n": (
        "m.yaml:3: key parameters.max_iter is a list; max_iter takes one whole number, not a gradient."
    ),
    f"{HEAD}models: [a]\nparameters: {{normalize: 2}}\n": (
        "m.yaml:4: key parameters.normalize is 2; it must be true or false."
    ),
    f"{HEAD}models: [a]\nparameters: {{trim: models}}\n": (
        "m.yaml:4: key parameters.trim is 'models'; it must be one of tensor, model (did you mean 'model'?)."
    ),
    f"{HEAD}models: [a]\nparameters: {{lambda: 1, scaling: 2}}\n": (
        "m.yaml:4: key parameters.scaling says the same as 'lambda'; keep one."
    ),
    f"{HEAD}models: [a]\nparameters: {{weight: [{{filter: a}}]}}\n": (
        "m.yaml:4: key parameters.weight[0] is {'filter': 'a'}; it must be a mapping with 'value' and maybe 'filter'."
    ),
    "merge_method: multislerp\nmodels: [a, b]\nparameters: {weight: 1, max_iter: 0.5}\n": (
        "m.yaml:3: key parameters.max_iter is 0.5; it must be a whole number."
    ),
    "merge_method: multislerp\nmodels: [a, b]\nparameters: {weight: 1, max_iter: 0}\n": (
        "m.yaml:3: key parameters.max_iter is 0; it must be at least 1."
    ),
    # required values and rules across parameters
    f"{HEAD}models:\n  - model: a\n    parameters: {{weight: 1}}\n  - model: b\n": (
        "m.yaml:6: ties needs 'weight' for the model b; give it under models[1].parameters or under parameters."
    ),
    f"{HEAD}models:\n  - model: a\n    parameters: {{density: [0, 1]}}\n": (
        "m.yaml:4: ties needs 'weight' for the model a; give it under models[0].parameters or under parameters."
    ),
    "merge_method: slerp\nbase_model: base\nmodels: [a]\n": (
        "m.yaml:1: slerp needs 't'; give it under parameters."
    ),
    "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: -1}}\n": (
        "m.yaml:2: linear: the weights [1.0, -1.0] sum to 0, which normalize cannot divide by."
    ),
    # sparsify
    f"{DARE}  sparsify: dare\n": (
        "m.yaml:6: key parameters.sparsify is 'dare'; it must be a mapping such as {method: dare, drop: 0.9}."
    ),
    f"{DARE}  sparsify: {{method: dair, drop: 1}}\n": (
        "m.yaml:6: unknown sparsifier 'dair'; known: dare, magnitude, none, random, ties (did you mean 'dare'?)."
    ),
    f"{DARE}  sparsify: {{method: dare}}\n": (
        "m.yaml:6: key parameters.sparsify lacks 'density', which the sparsifier random needs."
    ),
    f"{DARE}  sparsify: {{method: dare, drop: 1, rescale: L1}}\n": (
        "m.yaml:6: key parameters.sparsify.rescale is 'L1'; it must be true, false or l1 (did you mean 'l1'?)."
    ),
    f"{DARE}  sparsify: {{method: magnitude}}\n": (
        "m.yaml:6: key parameters.sparsify lacks 'density', which the sparsifier magnitude needs."
    ),
    f"{DARE}  sparsify: {{method: dare, drop: 1.1}}\n": (
        "m.yaml:6: key parameters.sparsify.drop is 1.1; it must be in [0, 1]."
    ),
    f"{DARE}  sparsify: {{method: dare, drop: 0.9, density: 0.1}}\n": (
        "m.yaml:6: key parameters.sparsify holds both 'density' and 'drop' (which is 1 - density); keep one."
    ),
    "merge_method: linear\nmodels: [a]\nparameters: {weight: 1, sparsify: {method: dare, drop: 1}}\n": (
        "m.yaml:2: key models has no base: sparsify needs a base_model; name it in the recipe."
    ),
    # the other keys
    f"{LINEAR}dtype: bfloat\n": (
        "m.yaml:4: key dtype is 'bfloat'; it must be one of float32, bfloat16, float16, float64, float8_e4m3fn, "
        "float8_e5m2 (did you mean 'bfloat16'?)."
    ),
    f"{LINEAR}out_dtype: int8\n": (
        "m.yaml:4: key out_dtype is 'int8'; it must be one of float32, bfloat16, float16, float64, float8_e4m3fn, "
        "float8_e5m2."
    ),
    f"{LINEAR}seed: -1\n": "m.yaml:4: key seed is -1; it must be a whole number in [0, 2**64).",
    f"{LINEAR}missing: bass\n": (
        "m.yaml:4: key missing is 'bass'; it must be one of error, base, present, drop (did you mean 'base'?)."
    ),
    f"{LINEAR}name: a/b\n": (
        "m.yaml:4: key name is 'a/b'; it must be a name for a folder, without '/' or leading '.'."
    ),
    f"{LINEAR}chat_template: 3\n": "m.yaml:4: key chat_template is 3; it must be a text.",
    f"{LINEAR}tokenizer: {{}}\ntokenizer_source: base\n": (
        "m.yaml:5: key tokenizer_source stands beside 'tokenizer'; keep one."
    ),
    f"{LINEAR}tokenizer: {{pad_to_multiple_of: 0}}\n": (
        "m.yaml:4: key tokenizer.pad_to_multiple_of is 0; it must be a whole number of at least 1."
    ),
    f"{LINEAR}tokenizer:\n  tokens:\n    <s>:\n      source: {{kind: model_token, model: a}}\n": (
        "m.yaml:7: key tokenizer.tokens.<s>.source must name its row by exactly one of 'token' and 'token_id'."
    ),
    f"{LINEAR}models: [b]\n": "m.yaml:4: key models stands twice, first in line 2; keep one.",
}


@pytest.mark.parametrize(("text", "message"), ERRORS.items())
def test_errors(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipes("m.yaml")
    assert str(caught.value) == message


WARNINGS = {
    f"{LINEAR}normalize: true\n": "m.yaml:4: key normalize has no effect here; move it under 'parameters'.",
    f"{LINEAR}out_type: bfloat16\n": (
        "m.yaml:4: key out_type is unknown and has no effect (did you mean 'out_dtype'?)."
    ),
    f"{LINEAR}random_seed: 3\n": "m.yaml:4: key random_seed is unknown and has no effect (did you mean 'seed'?).",
    f"{HEAD}models: [a]\nparameters: {{weight: 1, lamda: 0.85}}\n": (
        "m.yaml:4: key parameters.lamda is unknown and has no effect (did you mean 'lambda'?)."
    ),
    "merge_method: linear\nmodels: [a]\nparameters:\n  weight: 1\n  density: 0.5\n": (
        "m.yaml:5: key parameters.density has no effect: linear has no parameter 'density'."
    ),
    f"{HEAD}parameters: {{weight: 1}}\nmodels:\n  - model: a\n    revision: main\n": (
        "m.yaml:6: key models[0].revision is unknown and has no effect (did you mean 'model: path@revision'?)."
    ),
    f"{HEAD}models:\n  - model: a\n    weight: 1\nparameters: {{weight: 1}}\n": (
        "m.yaml:5: key models[0].weight has no effect here; move it under 'parameters'."
    ),
    f"{HEAD}parameters: {{weight: 1}}\nmodels:\n  - {{model: a, parameters: {{normalize: true}}}}\n": (
        "m.yaml:5: key models[0].parameters.normalize has no effect under one model: normalize is given once, for all "
        "models."
    ),
    f"{HEAD}parameters: {{weight: 1}}\nmodels:\n  - model: a\n  - {{model: base, parameters: {{weight: 1}}}}\n": (
        "m.yaml:6: key models[1].parameters.weight has no effect: base is the base, which ties gives no parameters."
    ),
    f"{HEAD}models: [a]\nparameters:\n  weight:\n  - value: 1\n  - filter: mlp\n    value: 2\n": (
        "m.yaml:7: key parameters.weight[1] has no effect: the entry before it matches every tensor."
    ),
    f"{HEAD}models: [a]\nparameters:\n  weight:\n  - {{value: 1, filer: mlp}}\n": (
        "m.yaml:6: key parameters.weight[0].filer is unknown and has no effect (did you mean 'filter'?)."
    ),
    f"{DARE}  sparsify: {{method: dare, drop: 0.5, epsilon: 1}}\n": (
        "m.yaml:6: key parameters.sparsify.epsilon has no effect: the sparsifier random has no parameter 'epsilon'."
    ),
    f"{LINEAR}tokenizer: {{sourse: union}}\n": (
        "m.yaml:4: key tokenizer.sourse is unknown and has no effect (did you mean 'source'?)."
    ),
}


@pytest.mark.parametrize(("text", "message"), WARNINGS.items())
def test_warnings_are_errors_when_strict(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.yaml").write_text(text)
    _, warnings = load_recipes("m.yaml")
    assert warnings == [message]
    with pytest.raises(RecipeError) as caught:
        load_recipes("m.yaml", strict=True)
    assert str(caught.value) == message


def test_harmless_keys_of_other_tools_are_noted_once_and_never_an_error() -> None:
    text = (
        "merge_method: linear\nmodels: [a]\nparameters: {weight: 1, int8_mask: true}\nlazy_unpickle: true\n"
    )
    _, remarks = load_recipes(f"{text}name: x\n---\n{text}", strict=True)
    assert sorted(remarks) == [
        "note: recipe:3: key parameters.int8_mask changes nothing in the result and is ignored.",
        "note: recipe:4: key lazy_unpickle changes nothing in the result and is ignored.",
    ]


def test_strict_counts_what_else_is_wrong() -> None:
    with pytest.raises(RecipeError, match=r"key foo is unknown and has no effect\. \(and 1 more\)"):
        load_recipes(f"{LINEAR}foo: 1\nbar: 2\n", strict=True)


WHOLE = """
name: x
merge_method: ties
base_model: {model: {path: base, revision: r}, lora: l}
modules:
  text:
    parameters: {weight: [{filter: mlp, value: 0.5}, {value: [0, 1]}]}
    slices:
      - sources:
          - {model: {path: a}, layer_range: [0, 2], parameters: {sparsify: {method: dare, drop: 0.5}}}
          - {model: b, layer_range: [0, 2]}
        base_model: c
dtype: bfloat16
tokenizer:
  source: union
  tokens: {<s>: {source: {kind: model_token, model: a, token_id: 1}, force: true}}
  pad_to_multiple_of: 8
chat_template: auto
missing: base
vocabulary: union
gradient_tail: last
seed: 3
"""
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.floats()
    | st.sampled_from(["", "a@b@c", "model", "1e9999"])
)
VALUES = (
    LEAVES
    | st.lists(LEAVES, max_size=2)
    | st.dictionaries(st.sampled_from(["model", "value", "x"]), LEAVES, max_size=2)
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) of a nested value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [each for key in keys for each in places(value[key])]


def test_the_recipe_that_is_broken_below_is_sound() -> None:
    assert load_recipes(WHOLE, strict=True)[1] == []


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_at_any_place_is_read_or_refused_with_a_sentence(data: st.DataObject) -> None:
    raw = yaml.safe_load(WHOLE)
    container, key = data.draw(st.sampled_from(places(raw)))
    container[key] = data.draw(VALUES)
    try:
        (recipe,), _ = load_recipes(raw)
    except RecipeError as error:
        assert str(error).startswith("recipe: ") and str(error).endswith(".")
    else:
        assert load_recipes(recipe.to_yaml())[0] == [recipe]


def test_an_absent_file() -> None:
    with pytest.raises(RecipeError, match=r"no\.yaml cannot be read: No such file or directory\."):
        load_recipes("no.yaml")
