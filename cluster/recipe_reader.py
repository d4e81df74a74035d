"""Read recipe files: documents in, recipes in their normal form and remarks out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from raymerge.cluster.method_parameters import find_method
from raymerge.cluster.model_ref import ModelRef
from raymerge.cluster.origin import Origin, did_you_mean, join
from raymerge.cluster.reading import Reading, fail_if_strict
from raymerge.cluster.recipe import Recipe
from raymerge.cluster.recipe_data import read_data_keys
from raymerge.cluster.recipe_policies import read_policies
from raymerge.cluster.recipe_sources import read_modules
from raymerge.cluster.setting import as_whole_number, shown
from raymerge.cluster.settings import check_settings
from raymerge.cluster.tokenizer_policy import TokenizerPolicy, TokenPolicy
from raymerge.cluster.yaml_source import Document, parse_documents, read_documents
from raymerge.merge_actors.dtypes import FLOATS, from_torch_name
from raymerge.merge_actors.errors import RecipeError
from raymerge.merge_actors.methods.interface import Method

#: Keys of a document, besides those that begin with "x-".
KEYS = (
    "merge_method base_model models slices modules parameters dtype out_dtype tokenizer tokenizer_source "
    "chat_template name seed missing vocabulary gradient_tail data exclude fallback heads"
).split()
_CHOICES: dict[str, tuple[str, ...]] = {
    "missing": ("error", "base", "present", "drop"),
    "vocabulary": ("union", "base", "pad", "truncate"),
    "gradient_tail": ("first", "last"),
}
_SHORT_DTYPES = {"bf16": "BF16", "fp16": "F16", "half": "F16", "fp32": "F32", "float": "F32", "fp64": "F64"}


def read_recipes(
    source: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]], *, strict: bool
) -> tuple[list[Recipe], list[str]]:
    """Read recipes; see `recipe.load_recipes`."""
    documents, stem = _documents(source)
    if not documents:
        raise RecipeError(f"{source if stem != 'merge' else 'the text'} holds no recipe.")
    warnings: list[str] = []
    notes: dict[str, str] = {}
    recipes = []
    for index, document in enumerate(documents):
        default = stem if len(documents) == 1 else f"{stem}-{index + 1}"
        recipe, reading = _read_recipe(document, default)
        recipes.append(recipe)
        warnings += reading.warnings
        notes = reading.notes | notes
    fail_if_strict(warnings, strict)
    return _link(recipes), warnings + list(notes.values())


def read_document(document: Document, default_name: str, *, strict: bool) -> tuple[Recipe, list[str]]:
    """Read the one recipe of a document that was parsed, or made, before: a point of a grid.

    Args:
        document: plain values, and where they were written.
        default_name: of the recipe, if it has none.
        strict: turn warnings into errors.

    Returns:
        the recipe, and remarks as from `recipe.load_recipes`.

    Raises:
        RecipeError: a value breaks a rule.
    """
    recipe, reading = _read_recipe(document, default_name)
    fail_if_strict(reading.warnings, strict)
    return recipe, reading.warnings + list(reading.notes.values())


def _documents(
    source: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]],
) -> tuple[list[Document], str]:
    """Return the documents, and the name of a recipe that has none."""
    if isinstance(source, Mapping):
        return [Document(value=source, origin=Origin())], "merge"
    if isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{")):
        return parse_documents(source, "recipe"), "merge"
    if isinstance(source, str | os.PathLike):
        return read_documents(source), PurePath(source).stem
    return [Document(value=each, origin=Origin()) for each in source], "merge"


def _read_recipe(document: Document, default_name: str) -> tuple[Recipe, Reading]:
    origin, raw = document.origin, document.value
    if not isinstance(raw, Mapping):
        raise RecipeError(
            f"{origin.at()}: a recipe must be a mapping with merge_method; this is {shown(raw)}."
        )
    reading = Reading(origin=origin, method=_read_method(raw, origin))
    reading.check_keys(raw, KEYS, "")
    base_model = reading.model(raw["base_model"], "base_model") if raw.get("base_model") is not None else None
    parameters = reading.settings(raw, "")
    reading.data = read_data_keys(raw.get("data"), "data", reading)
    recipe = Recipe(
        name=_read_name(raw, default_name, origin),
        merge_method=reading.method.name,
        base_model=base_model,
        modules=read_modules(raw, base_model, parameters, reading),
        parameters=parameters,
        dtype=_read_dtype(raw, "dtype", origin),
        out_dtype=_read_dtype(raw, "out_dtype", origin),
        tokenizer=_read_tokenizer(raw, reading),
        chat_template=_read_text(raw, "chat_template", origin),
        seed=_read_seed(raw, origin),
        origin=origin,
    )
    choices: Mapping[str, Any] = {
        key: reading.choice(raw[key], names, key)
        for key, names in _CHOICES.items()
        if raw.get(key) is not None
    }
    recipe = replace(recipe, **choices)
    recipe = replace(recipe, **read_policies(raw, base_model, recipe.all_models(), reading))
    check_settings(recipe, reading.method)
    return recipe, reading


def _read_method(raw: Mapping[str, Any], origin: Origin) -> Method:
    name = raw.get("merge_method")
    try:
        return find_method(name if isinstance(name, str) else "")
    except KeyError as error:
        if "merge_method" in raw:
            raise RecipeError(
                f"{origin.at('merge_method')}: unknown merge_method {shown(name)}; {error.args[0]}."
            ) from None
        near = did_you_mean("merge_method", (key for key in raw if key not in KEYS))
        raise RecipeError(f"{origin.at()}: key merge_method is missing{near}; {error.args[0]}.") from None


def _read_name(raw: Mapping[str, Any], default: str, origin: Origin) -> str:
    name = raw.get("name")
    if name is None:
        return default
    if not isinstance(name, str) or not name.strip() or "/" in name or name.startswith("."):
        raise origin.error(
            "name", f"is {shown(name)}; it must be a name for a folder, without '/' or leading '.'."
        )
    return name


def _read_dtype(raw: Mapping[str, Any], key: str, origin: Origin) -> str | None:
    name = raw.get(key)
    if name is None:
        return None
    text = str(name)
    found = text if text in FLOATS else from_torch_name(text) or _SHORT_DTYPES.get(text.lower())
    if found not in FLOATS:
        known = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2")
        raise origin.error(
            key, f"is {shown(name)}; it must be one of {', '.join(known)}{did_you_mean(text, known)}."
        )
    return found


def _read_text(raw: Mapping[str, Any], key: str, origin: Origin) -> str | None:
    text = raw.get(key)
    if text is not None and (not isinstance(text, str) or not text):
        raise origin.error(key, f"is {shown(text)}; it must be a text.")
    return text


def _read_seed(raw: Mapping[str, Any], origin: Origin) -> int:
    if raw.get("seed") is None:
        return 0
    seed = None if isinstance(raw["seed"], bool) else as_whole_number(raw["seed"])
    if seed is None or not 0 <= seed < 1 << 64:
        raise origin.error("seed", f"is {shown(raw['seed'])}; it must be a whole number in [0, 2**64).")
    return seed


def _read_tokenizer(raw: Mapping[str, Any], reading: Reading) -> TokenizerPolicy | None:
    source, policy = raw.get("tokenizer_source"), raw.get("tokenizer")
    if source is not None and policy is not None:
        raise reading.origin.error("tokenizer_source", "stands beside 'tokenizer'; keep one.")
    if source is not None:
        return TokenizerPolicy(source=_read_vocabulary_source(source, "tokenizer_source", reading))
    if policy is None:
        return None
    if isinstance(policy, str):
        return TokenizerPolicy(source=_read_vocabulary_source(policy, "tokenizer", reading))
    mapping = reading.require_mapping(policy, "tokenizer")
    reading.check_keys(mapping, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
    tokens = reading.require_mapping(mapping.get("tokens") or {}, "tokenizer.tokens")
    multiple = mapping.get("pad_to_multiple_of")
    if multiple is not None and ((whole := as_whole_number(multiple)) is None or whole < 1):
        raise reading.origin.error(
            "tokenizer.pad_to_multiple_of", f"is {shown(multiple)}; it must be a whole number of at least 1."
        )
    return TokenizerPolicy(
        source=_read_vocabulary_source(mapping.get("source") or "union", "tokenizer.source", reading),
        tokens={
            str(name): _read_token(each, f"tokenizer.tokens.{name}", reading) for name, each in tokens.items()
        },
        pad_to_multiple_of=as_whole_number(multiple) if multiple is not None else None,
    )


def _read_vocabulary_source(raw: Any, key: str, reading: Reading) -> Any:
    return raw if raw in ("union", "base") else reading.model(raw, key)


def _read_token(raw: Any, key: str, reading: Reading) -> TokenPolicy:
    mapping = reading.require_mapping({} if raw is None else raw, key)
    reading.check_keys(mapping, ("source", "force"), key)
    force = mapping.get("force", False)
    if not isinstance(force, bool):
        raise reading.origin.error(join(key, "force"), f"is {shown(force)}; it must be true or false.")
    source = mapping.get("source")
    place = join(key, "source")
    if source is None:
        return TokenPolicy(force=force)
    if not isinstance(source, Mapping) or "kind" not in source:
        return TokenPolicy(source=reading.model(source, place), force=force)
    if reading.choice(source["kind"], ("zero", "model_token"), join(place, "kind")) == "zero":
        return TokenPolicy(source="zero", force=force)
    token, token_id = source.get("token"), source.get("token_id")
    if (token is None) == (token_id is None) or (token_id is not None and as_whole_number(token_id) is None):
        raise reading.origin.error(place, "must name its row by exactly one of 'token' and 'token_id'.")
    return TokenPolicy(
        source=reading.model(source.get("model"), join(place, "model")),
        token=None if token is None else str(token),
        token_id=None if token_id is None else as_whole_number(token_id),
        force=force,
    )


def _link(recipes: list[Recipe]) -> list[Recipe]:
    """Find which recipes use the result of an earlier one as a model."""
    position: dict[str, int] = {}
    for index, recipe in enumerate(recipes):
        if recipe.name in position:
            raise recipe.origin.error(
                "name", f"is {recipe.name!r}, the name of an earlier recipe; names must differ."
            )
        position[recipe.name] = index
    if len(recipes) == 1:
        return recipes
    return [
        replace(recipe, depends_on=_depends_on(recipe, index, position))
        for index, recipe in enumerate(recipes)
    ]


def _depends_on(recipe: Recipe, index: int, position: Mapping[str, int]) -> tuple[str, ...]:
    used: list[ModelRef] = [*recipe.all_models(), *(recipe.tokenizer.models() if recipe.tokenizer else ())]
    if recipe.base_model:
        used.append(recipe.base_model)
    names = [each.path for each in used if each.path in position and not os.path.isdir(each.path)]
    for name in names:
        if position[name] >= index:
            raise RecipeError(
                f"{recipe.origin.at()}: the recipe {recipe.name!r} uses the model {name!r}, which is made by "
                "itself or by a later document; put that document first."
            )
    return tuple(dict.fromkeys(names))
