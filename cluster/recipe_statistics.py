"""Find the statistics that recipes merge by: named folders, or cached ones of the data that they name.

What a recipe wants measured and the cache does not hold is returned, not measured: planning reads
headers, data and tokenizers only. `measure_missing` then measures it on the cluster of the merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raymerge.cluster.matched import LoadedModel
from raymerge.cluster.model_ref import ModelRef
from raymerge.cluster.opened import OpenedInputs
from raymerge.cluster.recipe import Measurement, Recipe, SourceUse
from raymerge.cluster.recipe_data import MeasuredData
from raymerge.cluster.statistics_cache import cached_statistics, count_tokens, find_cached
from raymerge.cluster.statistics_options import StatisticsOptions, StatisticsProgress
from raymerge.merge_actors.errors import MismatchError, RaymergeError, RecipeError
from raymerge.merge_actors.methods import METHODS
from raymerge.merge_actors.storage.uris import absolute
from raymerge.stats.statistics_file import Statistics, StatisticsKind


@dataclass(frozen=True, slots=True, kw_only=True)
class ToMeasure:
    """A model that has to be measured before a recipe can be merged."""

    key: str
    """`ModelRef.key`, as the recipe calls it."""
    model: ModelRef
    """Where workers find it."""
    kind: StatisticsKind
    data: MeasuredData
    allow_pickle: bool
    trust_remote_code: bool
    recipe: int
    """Number of a recipe that asks for it."""

    def options(self, **where: Any) -> StatisticsOptions:
        """Return what `collect_statistics` is told; `where` says on what it runs."""
        return StatisticsOptions(
            kind=self.kind,
            data=self.data.spec,
            estimator=self.data.estimator,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
            **where,
        )


@dataclass(slots=True)
class FoundStatistics:
    """The statistics of some recipes."""

    found: dict[Measurement, Statistics] = field(default_factory=dict)
    missing: dict[tuple[Measurement, StatisticsKind], ToMeasure] = field(default_factory=dict)


def find_statistics(
    recipes: Sequence[Recipe],
    models: Mapping[str, LoadedModel],
    opened: OpenedInputs,
    *,
    allow_pickle: bool,
    trust_remote_code: bool = False,
) -> FoundStatistics:
    """Open all statistics of some recipes and check them against their models.

    Args:
        recipes: recipes of one wave.
        models: by `ModelRef.key`.
        opened: keeps what has been opened.
        allow_pickle: read PyTorch `.bin` files.
        trust_remote_code: run code of a model that is measured, where transformers has no class of its own.

    Raises:
        RecipeError: a model has neither statistics nor data, or the data do not fit it.
        MismatchError: statistics of another kind or of another model.
        CheckpointError: statistics are absent or cannot be read.
    """
    both = FoundStatistics()
    for number, recipe in enumerate(recipes):
        method = METHODS[recipe.merge_method]
        kind = method.statistic
        if kind is None or method.is_sequential:  # measured while merging
            continue
        for use in (use for _, layers in recipe.slices() for use in layers.sources):
            measurement = use.measurement
            _check_use(recipe, use, kind)
            assert measurement is not None
            path = use.statistics
            if use.data is not None:
                wanted = ToMeasure(
                    key=use.model.key,
                    model=_place(use, models[use.model.key], opened),
                    kind=kind,
                    data=use.data,
                    allow_pickle=allow_pickle,
                    trust_remote_code=trust_remote_code,
                    recipe=number,
                )
                path = opened.cached_statistics.get((measurement, kind)) or find_cached(
                    models[use.model.key].merged, wanted.options()
                )
                if path is None:
                    both.missing[measurement, kind] = wanted
                    continue
                opened.cached_statistics[measurement, kind] = path
            assert path is not None
            statistics = opened.open_statistics(path, use.samples)
            if statistics.kind != kind:
                raise MismatchError(
                    f"the statistics {path} are of kind {statistics.kind}, but {recipe.merge_method} needs {kind}"
                )
            statistics.check_against(models[use.model.key].merged)
            both.found[measurement] = statistics
    return both


def measure_missing(
    missing: Sequence[ToMeasure],
    *,
    where: Mapping[str, Any],
    on_remark: Callable[[str], None],
    on_progress: Callable[[StatisticsProgress], None],
) -> None:
    """Measure models into the cache, one after the other, each on all workers.

    Args:
        missing: what `find_statistics` did not find.
        where: `workers`, `device` and `in_process` of `StatisticsOptions`.
        on_remark: gets sentences for the user.
        on_progress: called about twice a second.

    Raises:
        RaymergeError: a model cannot be measured; it names a recipe that asks for it.
    """
    for number, each in enumerate(missing):
        of_all = f" ({number + 1} of {len(missing)})" if len(missing) > 1 else ""
        on_remark(f"note: measuring {each.key}{of_all}: {each.kind} statistics on {each.data.spec.source}")
        try:
            cached_statistics(each.model, each.options(**where), on_remark=on_remark, on_progress=on_progress)
        except RaymergeError as error:
            error.recipe = each.recipe
            raise


def describe_missing(each: ToMeasure, model: LoadedModel) -> dict[str, Any]:
    """Return what measuring would take, for a plan: rows and tokens of the data."""
    rows, tokens, is_exact = count_tokens(model.merged, each.data.spec, trust_code=each.trust_remote_code)
    return {
        "model": each.key,
        "kind": each.kind,
        "data": each.data.to_mapping(),
        "num_rows": rows,
        "num_tokens": tokens,
        "num_tokens_is_exact": is_exact,
    }


def _check_use(recipe: Recipe, use: SourceUse, kind: StatisticsKind) -> None:
    at = recipe.origin.at(use.where)
    if use.measurement is None:
        raise RecipeError(
            f"{at}: {recipe.merge_method} needs statistics of {use.model.key}; measure them with raymerge stats "
            f"--kind {kind} and name their folder: statistics: PATH, or name data to measure it on: data: PATH"
        )


def _place(use: SourceUse, model: LoadedModel, opened: OpenedInputs) -> ModelRef:
    """Name the model as workers find it: by its folder, or on the Hub."""
    adapter = None
    if use.model.adapter is not None:
        assert model.adapter is not None
        adapter = _found_place(use.model.adapter, model.adapter.path, opened)
    return replace(_found_place(use.model, model.checkpoint.path, opened), adapter=adapter)


def _found_place(ref: ModelRef, path: str, opened: OpenedInputs) -> ModelRef:
    """Return a model or an adapter by its place on the Hub, else by its absolute path."""
    if (ref.path, ref.revision) in opened.hub_models:
        return ModelRef(path=ref.path, revision=ref.revision)
    return ModelRef(path=absolute(path))
