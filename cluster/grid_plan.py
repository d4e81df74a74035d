"""A grid before it runs: everything that can be checked is, and each point gets its fingerprint.

Each method is read with each value of every axis, and each structure (what remains of a recipe
without its `parameters`) is planned once, from headers alone. So 10,000 points over two methods
and six models are checked by a few dozen recipes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymerge.cluster.campaign import PlannedWave, is_sequential, plan_wave
from raymerge.cluster.grid_axes import Axis, Dimension
from raymerge.cluster.grid_inputs import GridInputs, path_fingerprint, texts
from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.grid_points import Point, PointList, Value, fingerprint
from raymerge.cluster.grid_references import references
from raymerge.cluster.grid_spec import GridSpec, of_tasks
from raymerge.cluster.opened import OpenedInputs
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.recipe import Recipe
from raymerge.cluster.recipe_reader import read_document
from raymerge.cluster.recipe_statistics import ToMeasure
from raymerge.cluster.remarks import as_note, without_recipe
from raymerge.cluster.yaml_source import Document
from raymerge.merge_actors.errors import RecipeError
from raymerge.merge_actors.storage.uris import is_remote
from raymerge.stats.evaluation.spec_reader import PATHS
from raymerge.stats.evaluation.tasks import EvaluationSpec
from raymerge.stats.own_code import code_remark
from raymerge.stats.remote_data import local_data

_UNKNOWN_KEY = "is unknown and has no effect"


@dataclass(frozen=True, kw_only=True)
class GridPlan:
    """A checked grid."""

    spec: GridSpec
    options: GridOptions
    inputs: GridInputs
    """Fingerprints of models, statistics and data."""
    evaluation: str
    """Fingerprint of the tasks and of the files that they name."""
    input_bytes: int
    """Of all models together."""
    output_bytes: int
    """Of the largest merged model."""
    largest: PlannedWave
    """How the largest merged model is made."""
    num_parameters: int
    """Of the largest merged model."""
    model_folders: tuple[str, ...]
    """Where config and tokenizer of the merged models come from."""
    missing: tuple[ToMeasure, ...]
    """Statistics that have to be measured before the points can be merged."""
    remarks: tuple[str, ...]

    def points(self, numbers: Sequence[int] | None = None) -> PointList:
        """Return the points, or those with some numbers, in this order."""
        return PointList(self.point, range(len(self.spec.kept)) if numbers is None else numbers)

    def point(self, number: int) -> Point:
        """Return a point of the grid."""
        return self.point_at(number, self.spec.combination(self.spec.kept[number]))

    def point_at(self, number: int, axes: Mapping[str, Value]) -> Point:
        """Return the point with some values of the axes."""
        recipe = self.spec.recipe(axes)
        return Point(
            number=number, axes=axes, recipe=recipe | {"name": f"point-{number}"}, key=self.key(recipe)
        )

    def key(self, recipe: Mapping[str, Any]) -> str:
        """Return the fingerprint of a recipe, its inputs and the tasks."""
        unnamed = {name: value for name, value in recipe.items() if name != "name"}
        return fingerprint(unnamed, self.inputs.of(recipe), self.evaluation)


def trusting(spec: GridSpec, options: GridOptions) -> GridSpec:
    """Return a grid whose tasks may run code of the models, if the options say so."""
    return dataclasses.replace(spec, evaluation=spec.evaluation.trusting(options.trust_remote_code))


def plan_grid(spec: GridSpec, options: GridOptions, *, strict: bool = False) -> GridPlan:
    """Check a grid, from headers alone.

    Args:
        spec: the file.
        options: of the run.
        strict: turn remarks about recipe keys into errors.

    Raises:
        RaymergeError: whatever some point's merge would refuse before it begins.
    """
    checker = _Checker(spec, options, strict)
    checker.check_all(_with_ends(spec))
    for folder in checker.model_folders:
        if options.trust_remote_code and (line := code_remark(folder)):
            checker.remarks.append(line)
        try:
            checker.remarks += _check_tasks(spec.evaluation, folder)
        except RecipeError as error:
            raise of_tasks(error, spec.origin) from error
    if spec.search is None and spec.top > len(spec.kept):
        checker.remarks.append(
            f"note: export.top is {spec.top:,}, but the grid has {len(spec.kept):,} points, and so no more checkpoints"
        )
    tasks = spec.evaluation.to_mapping()
    assert checker.largest is not None
    return GridPlan(
        spec=spec,
        options=options,
        inputs=checker.inputs,
        evaluation=fingerprint(tasks, _file_fingerprints(tasks["tasks"])),
        input_bytes=sum(each.num_bytes for each in checker.opened.checkpoints.values()),
        output_bytes=checker.output_bytes,
        largest=checker.largest,
        num_parameters=checker.num_parameters,
        model_folders=tuple(checker.model_folders),
        missing=tuple(checker.missing.values()),
        remarks=tuple(dict.fromkeys(checker.remarks)),
    )


def _check_tasks(evaluation: EvaluationSpec, model_folder: str) -> list[str]:
    """Check that every task can be scored, on validation data and on the test data that there are."""
    from raymerge.stats.evaluation.evaluate import expect_fit

    remarks = list(expect_fit(evaluation, model_folder))
    tested = tuple(task for task in evaluation.tasks if task.test is not None)
    if tested:
        remarks += expect_fit(dataclasses.replace(evaluation, tasks=tested), model_folder, splits=("test",))
    return [as_note(line) for line in remarks]


def _with_ends(spec: GridSpec) -> GridSpec:
    """Return a spec in which a range is its ends and middle: what can be checked of a search."""
    if not any(axis.range for axis in spec.axes):
        return spec

    def listed(axis: Axis) -> Axis:
        if axis.range is None:
            return axis
        low, high = axis.range.low, axis.range.high
        middle = axis.range.low + (high - low) // 2 if axis.range.is_int else (low + high) / 2
        values: list[Value] = [low, middle, high]
        if axis.range.is_int:
            values = [int(value) for value in values]
        return dataclasses.replace(axis, values=tuple(dict.fromkeys(values)), range=None)

    dimensions = tuple(Dimension(tuple(map(listed, dimension.axes))) for dimension in spec.dimensions)
    return dataclasses.replace(spec, dimensions=dimensions)


class _Checker:
    """Reads and plans recipes, and remembers what was opened."""

    def __init__(self, spec: GridSpec, options: GridOptions, strict: bool) -> None:
        self.spec, self.options, self.strict = spec, options, strict
        self.merge_options = MergeOptions(
            slice_mib=options.slice_mib,
            allow_pickle=options.allow_pickle,
            trust_remote_code=options.trust_remote_code,
        )
        self.opened = OpenedInputs()
        self.inputs = GridInputs()
        self.missing: dict[tuple[str, str], ToMeasure] = {}
        self.remarks: list[str] = []
        self.output_bytes = self.num_parameters = 0
        self.largest: PlannedWave | None = None
        self.model_folders: dict[str, None] = {}

    def check_all(self, spec: GridSpec) -> None:
        """Check a cover of the points."""
        of_method = _dimensions_of_method(spec)
        seen: set[tuple[tuple[int, ...], int, int]] = set()
        structures: set[str] = set()
        for combination in spec.kept:
            positions = spec.positions(combination)
            method = tuple(positions[i] for i in of_method)
            marks = {(method, i, position) for i, position in enumerate(positions)}
            recipe = spec.recipe(spec.combination(combination))
            structure = fingerprint(_without_parameters(recipe))
            if structure in structures and marks <= seen:
                continue
            read = self.read(recipe)
            if structure not in structures:
                self.plan(read)
            seen |= marks
            structures.add(structure)

    def read(self, recipe: Mapping[str, Any]) -> Recipe:
        """Read a recipe; a key that no method knows is an error in a file of ours."""
        document = Document(value=recipe, origin=self.spec.origin)
        read, said = read_document(document, self.spec.name, strict=self.strict)
        for line in said:
            if _UNKNOWN_KEY in line:
                raise RecipeError(line)
        self.remarks += said
        if is_sequential(read):
            raise self.spec.origin.error(
                "merge_method",
                f"is {read.merge_method}, which measures models while it merges them, and points are merged in memory; "
                "merge each setting with raymerge merge and score it with raymerge evaluate, or use regmean here.",
            )
        return read

    def plan(self, recipe: Recipe) -> None:
        """Plan a recipe, and take down what it needs."""
        wave = plan_wave([recipe], {recipe.name: "OUT"}, self.merge_options, {}, self.opened)
        self.remarks += [without_recipe(recipe.name, line) for line in wave.remarks]
        for each in wave.missing:
            self.missing[each.key, repr((each.kind, each.data))] = each
        self.inputs.note(recipe, wave, self.opened)
        donor = wave.models[recipe.donor.key].checkpoint
        self.num_parameters = max(self.num_parameters, donor.num_parameters)
        if self.largest is None or wave.plan.write_bytes > self.output_bytes:
            self.output_bytes, self.largest = wave.plan.write_bytes, wave
        self.model_folders[donor.folder] = None


def _dimensions_of_method(spec: GridSpec) -> list[int]:
    """Return the dimensions that the merge method comes from, as the file says."""
    names = {name for name, _ in references(spec.template.get("merge_method"))}
    for name in reversed(list(spec.lets)):
        if name in names:
            names |= spec.lets[name].names
    return [
        i for i, dimension in enumerate(spec.dimensions) if any(axis.name in names for axis in dimension.axes)
    ]


def _without_parameters(value: Any) -> Any:
    """Return a recipe without the settings of its method: what its plan depends on."""
    if isinstance(value, Mapping):
        return {
            name: _without_parameters(each)
            for name, each in value.items()
            if name not in ("parameters", "seed", "name")
        }
    return [_without_parameters(each) for each in value] if isinstance(value, list) else value


def _file_fingerprints(tasks: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the fingerprint of every local file that the tasks name, and of every folder of data or code.

    Elsewhere a text that names a folder is none: a stop text "." is not the working folder. Data in a store count
    by their content as well.
    """
    named = {
        text
        for task in tasks
        for key, value in task.items()
        for text in texts(value)
        if os.path.isfile(path := os.path.expanduser(text))
        or (key in PATHS and os.path.exists(path))
        or (key in ("validation", "test") and is_remote(text))
    }
    return {text: path_fingerprint(local_data(text)) for text in sorted(named)}
