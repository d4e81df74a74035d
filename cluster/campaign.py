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

from raymerge.cluster.heads import Heads, label_remarks, plan_heads
from raymerge.cluster.match import KnownOperands, match
from raymerge.cluster.matched import LoadedModel, MergedTensor
from raymerge.cluster.opened import OpenedInputs
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.plan import Plan, RecipePlan, make_plan
from raymerge.cluster.recipe import Measurement, Recipe, load_recipes
from raymerge.cluster.recipe_statistics import ToMeasure, find_statistics
from raymerge.cluster.regmean_plus_plan import candidates_of, check_candidates, expected_statistics
from raymerge.cluster.remarks import of_recipe
from raymerge.cluster.vocabulary import Vocabulary, plan_vocabulary
from raymerge.merge_actors.checkpoint.layout import Layout, OutputTensor, ShardLimit, lay_out, parse_size
from raymerge.merge_actors.errors import RecipeError
from raymerge.merge_actors.methods import METHODS
from raymerge.merge_actors.task import HubModel
from raymerge.stats.own_code import code_remark
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
    statistics: Mapping[Measurement, Statistics] = dataclasses.field(default_factory=dict)
    """What the recipes merge by."""
    missing: tuple[ToMeasure, ...] = ()
    """What has to be measured first; the plan is then made again, for it averages what is not measured."""
    heads: tuple[Heads | None, ...] = ()
    """Per recipe."""

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
        of_statistics = {(key, each.path): each.fingerprint for (key, _), each in self.statistics.items()}
        digest.update(repr(sorted(of_statistics.items())).encode())
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
    return [wave for together in ordered for wave in _apart(together)]


def is_sequential(recipe: Recipe) -> bool:
    """Return whether a recipe's statistics are measured while it is merged."""
    return METHODS[recipe.merge_method].is_sequential


def _apart(together: Sequence[Recipe]) -> list[list[Recipe]]:
    """Give each recipe that is merged layer by layer a wave of its own."""
    shared = [recipe for recipe in together if not is_sequential(recipe)]
    alone = [[recipe] for recipe in together if is_sequential(recipe)]
    return [shared, *alone] if shared else alone


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
    *,
    strict: bool = False,
) -> PlannedWave:
    """Open all models of some recipes and plan their merge, from headers alone.

    Args:
        recipes: the recipes of one wave.
        folders: where each recipe's files will be written, by name.
        options: slice and shard size.
        results: folders of earlier recipes' results, by name.
        opened: keeps what has been opened from one call to the next; None opens everything anew.
        strict: refuse heads that may not mean the same.

    Raises:
        RaymergeError: whatever is wrong with recipes or models.
    """
    opened = opened or OpenedInputs()
    models, hub_models = opened.open_models(recipes, results, allow_pickle=options.allow_pickle)
    trust_code = options.trust_remote_code
    statistics = find_statistics(
        recipes, models, opened, allow_pickle=options.allow_pickle, trust_remote_code=trust_code
    )
    plans, vocabularies, all_heads = [], [], []
    remarks: list[str] = []
    limit = parse_size(options.out_shard_size)
    known: KnownOperands = {}
    layouts: dict[tuple[Any, ...], Layout] = {}
    waiting = {each.name for each in recipes if _measurements(each) & {key for key, _ in statistics.missing}}
    for recipe in recipes:
        vocabulary, heads = plan_vocabulary(recipe, models), plan_heads(recipe, models)
        found: Mapping[Measurement, Statistics] = statistics.found
        if is_sequential(recipe):
            found, on_code = _to_be_measured(recipe, models, vocabulary, options)
            remarks += on_code
        tensors, said = match(recipe, models, vocabulary, found, heads, known if vocabulary is None else None)
        if recipe.name in waiting:
            said = ["note: planned as averages until its models are measured"]
        said += vocabulary.remarks if vocabulary else ()
        said += label_remarks(recipe, models, strict=strict)
        remarks += [of_recipe(recipe.name, line) for line in said]
        layout, folder = _layout_of(tensors, limit, layouts), folders[recipe.name]
        plans.append(RecipePlan(recipe=recipe, tensors=tuple(tensors), layout=layout, folder=folder))
        vocabularies.append(vocabulary)
        all_heads.append(heads)
    return PlannedWave(
        make_plan(plans, slice_bytes=options.slice_mib << 20),
        models,
        tuple(vocabularies),
        tuple(remarks),
        tuple(hub_models),
        statistics=statistics.found,
        missing=tuple(statistics.missing.values()),
        heads=tuple(all_heads),
    )


def _to_be_measured(
    recipe: Recipe, models: Mapping[str, LoadedModel], vocabulary: Vocabulary | None, options: MergeOptions
) -> tuple[Mapping[Measurement, Statistics], list[str]]:
    """Return what a sequential method will measure, and what code of their own its candidates will run."""
    check_candidates(recipe, models, vocabulary)
    remarks = []
    if options.trust_remote_code:
        folders = dict.fromkeys(models[use.model.key].checkpoint.folder for use in candidates_of(recipe))
        remarks = [line for folder in folders if (line := code_remark(folder))]
    return expected_statistics(recipe, models, trust_code=options.trust_remote_code), remarks


def _layout_of(
    tensors: Sequence[MergedTensor], limit: ShardLimit, layouts: dict[tuple[Any, ...], Layout]
) -> Layout:
    """Lay an output out, once for all recipes whose outputs are alike."""
    outputs = tuple((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)
    if outputs not in layouts:
        layouts[outputs] = lay_out([OutputTensor(*each) for each in outputs], limit)
    return layouts[outputs]


def _measurements(recipe: Recipe) -> set[Measurement]:
    uses = [use for _, layers in recipe.slices() for use in layers.sources]
    return {use.measurement for use in uses if use.measurement is not None}


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
