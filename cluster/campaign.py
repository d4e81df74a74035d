"""A campaign before it runs: recipes, headers, plan. Everything that can be checked is, here.

Recipes that use another recipe's result as a model run in a later *wave*; the recipes of a
wave share one plan, so that each input slice is read once for all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from raymerge.cluster.match import match
from raymerge.cluster.matched import LoadedModel
from raymerge.cluster.opened import OpenedInputs
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.plan import Plan, RecipePlan, make_plan
from raymerge.cluster.recipe import Recipe, load_recipes
from raymerge.cluster.vocabulary import Vocabulary, plan_vocabulary
from raymerge.merge_actors.checkpoint.layout import OutputTensor, lay_out, parse_size
from raymerge.merge_actors.errors import MismatchError, RecipeError
from raymerge.merge_actors.methods import METHODS
from raymerge.merge_actors.task import HubModel
from raymerge.stats.statistics_file import Statistics

#: What a user may hand over as recipes: paths, YAML texts, mappings.
RecipeSource = str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PlannedWave:
    """Recipes that run together, with all that planning found out about them."""

    plan: Plan
    models: Mapping[str, LoadedModel]
    """By `ModelRef.key`."""
    vocabularies: tuple[Vocabulary | None, ...]
    """Per recipe."""
    remarks: tuple[str, ...]
    hub_models: tuple[HubModel, ...] = ()
    """The models, and adapters, that came from the Hub."""
    statistics: Mapping[str, Statistics] = dataclasses.field(default_factory=dict)
    """What the recipes merge by, by path."""

    @property
    def fingerprint(self) -> str:
        """128 bits in hex over recipes, inputs, and how the work was cut."""
        digest = xxhash.xxh3_128()
        for recipe in self.plan.recipes:
            digest.update(repr(recipe.recipe.to_mapping()).encode())
            digest.update(repr([(file.name, file.num_bytes) for file in recipe.layout.files]).encode())
        for key, model in sorted(self.models.items()):
            adapter = model.adapter.fingerprint if model.adapter else ""
            digest.update(f"{key}={model.checkpoint.fingerprint}+{adapter}\n".encode())
        for path, statistics in sorted(self.statistics.items()):
            digest.update(f"{path}={statistics.fingerprint}\n".encode())
        digest.update(repr(self.vocabularies).encode())
        digest.update(repr((self.plan.slice_bytes, len(self.plan.tasks))).encode())
        return digest.hexdigest()


def read_recipes(
    sources: Sequence[RecipeSource], options: MergeOptions, *, strict: bool = False
) -> tuple[list[Recipe], list[str]]:
    """Read the recipes of a campaign and apply the options that override them.

    A folder stands for its *.yaml and *.yml files, in the order of their names.

    Raises:
        RecipeError: a recipe breaks a rule, or two have one name.
    """
    recipes: list[Recipe] = []
    remarks: list[str] = []
    for source in sources:
        for one in _files_of(source):
            found, said = load_recipes(one, strict=strict)
            recipes += found
            remarks += said
    names = [recipe.name for recipe in recipes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(
            f"two recipes of the campaign are named {twice[0]!r}; give one of them another `name:`"
        )
    return [_overridden(recipe, options) for recipe in recipes], remarks


def waves(recipes: Sequence[Recipe]) -> list[list[Recipe]]:
    """Sort recipes into waves: each comes after the recipes whose results it uses."""
    depth: dict[str, int] = {}
    for recipe in recipes:  # a recipe can only depend on earlier ones
        depth[recipe.name] = max((depth[name] + 1 for name in recipe.depends_on), default=0)
    ordered: list[list[Recipe]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for recipe in recipes:
        ordered[depth[recipe.name]].append(recipe)
    return ordered


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's garbage collector, also as a decorator.

    A plan is a million small objects without a cycle; walking them again and again while they are
    made takes as long as making them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@collector_paused()
def plan_wave(
    recipes: Sequence[Recipe],
    folders: Mapping[str, str],
    options: MergeOptions,
    results: Mapping[str, str],
    opened: OpenedInputs | None = None,
) -> PlannedWave:
    """Open all models of some recipes and plan their merge, from headers alone.

    Args:
        recipes: the recipes of one wave.
        folders: where each recipe's files will be written, by name.
        options: slice and shard size.
        results: folders of earlier recipes' results, by name.
        opened: keeps what has been opened from one call to the next; None opens everything anew.

    Raises:
        RaymergeError: whatever is wrong with recipes or models.
    """
    opened = opened or OpenedInputs()
    models, hub_models = opened.open_models(recipes, results, allow_pickle=options.allow_pickle)
    plans, vocabularies, remarks = [], [], []
    all_statistics: dict[str, Statistics] = {}
    limit = parse_size(options.out_shard_size)
    for recipe in recipes:
        vocabulary = plan_vocabulary(recipe, models)
        statistics = _open_statistics(recipe, models, opened)
        all_statistics |= statistics
        tensors, said = match(recipe, models, vocabulary, statistics)
        said += vocabulary.remarks if vocabulary else ()
        remarks += [f"{recipe.name}: {remark}" for remark in said]
        layout = lay_out([OutputTensor(t.name, t.dtype, t.shape) for t in tensors], limit)
        plans.append(
            RecipePlan(recipe=recipe, tensors=tuple(tensors), layout=layout, folder=folders[recipe.name])
        )
        vocabularies.append(vocabulary)
    plan = make_plan(plans, slice_bytes=options.slice_mib << 20)
    return PlannedWave(plan, models, tuple(vocabularies), tuple(remarks), tuple(hub_models), all_statistics)


def _open_statistics(
    recipe: Recipe, models: Mapping[str, LoadedModel], opened: OpenedInputs
) -> dict[str, Statistics]:
    """Open the statistics that a recipe names, by path, and check them against their models."""
    kind = METHODS[recipe.merge_method].statistic
    found: dict[str, Statistics] = {}
    for _, layers in recipe.slices():
        for use in layers.sources:
            if kind is None:
                continue
            if use.statistics is None:
                raise RecipeError(
                    f"{recipe.origin.at(use.where)}: {recipe.merge_method} needs statistics of {use.model.key}; "
                    f"measure them with raymerge stats --kind {kind} and name their folder: statistics: PATH"
                )
            if use.model.adapter is not None:
                raise MismatchError(
                    f"{recipe.origin.at(use.where)}: {use.model.key} has an adapter, and statistics are measured on "
                    "whole checkpoints: merge the adapter into its model first (passthrough), and measure that"
                )
            statistics = opened.open_statistics(use.statistics)
            if statistics.kind != kind:
                raise MismatchError(
                    f"the statistics {use.statistics} are of kind {statistics.kind}, but {recipe.merge_method} "
                    f"needs {kind}"
                )
            statistics.check_against(models[use.model.key].checkpoint)
            found[use.statistics] = statistics
    return found


def _files_of(source: RecipeSource) -> list[RecipeSource]:
    if isinstance(source, Mapping) or not os.path.isdir(source):
        return [source]
    found = sorted(name for name in os.listdir(source) if name.endswith((".yaml", ".yml")))
    if not found:
        raise RecipeError(f"folder {os.fspath(source)} holds no recipe: no *.yaml or *.yml file")
    return [os.path.join(source, name) for name in found]


def _overridden(recipe: Recipe, options: MergeOptions) -> Recipe:
    dtype = options.output_dtype()
    if dtype is not None:
        recipe = dataclasses.replace(recipe, out_dtype=dtype)
    if options.seed is not None:
        recipe = dataclasses.replace(recipe, seed=options.seed)
    return recipe
