"""What can be said of a RegMean++ merge before it runs: who takes part, and which matrices will be solved for."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from raymerge.cluster.matched import LoadedModel
from raymerge.cluster.recipe import Measurement, Recipe, SourceUse
from raymerge.cluster.vocabulary import Vocabulary
from raymerge.merge_actors.checkpoint.header import TensorInfo
from raymerge.merge_actors.errors import MismatchError, RecipeError
from raymerge.merge_actors.methods.gram_matrix import triangle_elements
from raymerge.stats.linear_maps import LinearMap
from raymerge.stats.statistics_file import Module, Statistics

#: Of a Gram that is not measured yet: it cannot be found wanting.
_MANY_ROWS = 10**12


def candidates_of(recipe: Recipe) -> tuple[SourceUse, ...]:
    """Return the models that are merged, in the order of the recipe."""
    return recipe.modules[0].slices[0].sources


def check_candidates(
    recipe: Recipe, models: Mapping[str, LoadedModel], vocabulary: Vocabulary | None
) -> None:
    """Refuse what cannot be merged layer by layer.

    Raises:
        RecipeError: statistics are given, data are not, or the recipe stacks or thins layers.
        MismatchError: a model has another vocabulary than the others.
    """
    where = recipe.origin.at("")
    if len(recipe.modules) > 1 or len(recipe.modules[0].slices) > 1 or recipe.modules[0].name != "default":
        raise RecipeError(
            f"{where}: regmean_plus merges whole models; it has no slices or modules of its own: list models."
        )
    layers = recipe.modules[0].slices[0]
    if layers.num_layers is not None or layers.base is not None:
        what = "layer_range" if layers.num_layers is not None else "sparsify"
        raise RecipeError(f"{where}: regmean_plus merges whole models as they are; leave out {what}.")
    for use in layers.sources:
        place = recipe.origin.at(use.where)
        if use.statistics is not None:
            raise RecipeError(
                f"{place}: regmean_plus takes its statistics from the layers that are merged already, so none can "
                "be measured beforehand; replace 'statistics' by 'data', or merge by regmean."
            )
        if use.data is None:
            raise RecipeError(
                f"{place}: regmean_plus needs data of {use.model.key}: data: PATH, or data: {{path: PATH, ...}}."
            )
    if vocabulary is not None:
        raise MismatchError(
            f"{where}: the models' vocabularies differ; regmean_plus feeds the merged embeddings with every model's "
            "own tokens, so all must have one vocabulary."
        )


def expected_statistics(
    recipe: Recipe, models: Mapping[str, LoadedModel], *, trust_code: bool = False
) -> dict[Measurement, Statistics]:
    """Return statistics as the run will have them if its data reach every linear map, without values.

    Args:
        recipe: of the merge.
        models: by `ModelRef.key`.
        trust_code: run code of the models where transformers has no class of its own.
    """
    from raymerge.stats.linear_maps import find_linear_maps
    from raymerge.stats.model_loading import skeleton

    found = {}
    for use in candidates_of(recipe):
        checkpoint = models[use.model.key].merged
        maps = find_linear_maps(
            skeleton(checkpoint, trust_code=trust_code), {**checkpoint.tensors, **checkpoint.tied}
        )
        modules = {tensor: _module(each, tensor) for each in maps.maps for tensor in each.tensors}
        assert use.measurement is not None
        found[use.measurement] = partial_statistics(checkpoint.path, modules, expected=modules)
    return found


def partial_statistics(path: str, modules: Mapping[str, Module], expected: Collection[str]) -> Statistics:
    """Return statistics of some of a model's linear maps.

    Args:
        path: what an error calls them.
        modules: those that were measured.
        expected: those that should have been.
    """
    coverage = {
        "linear_maps": [*expected],
        "uncovered": [name for name in expected if name not in modules],
        "tied": [],
    }
    return Statistics(
        path=path, kind="gram", modules=modules, manifest={"coverage": coverage}, fingerprint=""
    )


def _module(linear_map: LinearMap, tensor: str) -> Module:
    is_fused = linear_map.kind == "experts" and len(linear_map.tensors) == 1
    elements = triangle_elements(linear_map.in_features)
    num_experts = linear_map.num_experts if is_fused else 1
    shape = (num_experts, elements) if is_fused else (elements,)
    return Module(
        tensor=TensorInfo(tensor, "F32", shape, "", 0, 4 * num_experts * elements),
        key=tensor,
        kind="linear" if linear_map.kind == "experts" and not is_fused else linear_map.kind,
        in_features=linear_map.in_features,
        num_rows=(_MANY_ROWS,) * num_experts,
        experts_layout=linear_map.experts_shape if is_fused else "",
    )
