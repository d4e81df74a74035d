"""What a grid or a search file says, read and checked; no model is opened.

A grid file is a recipe plus these keys:

    grid       axes, see grid_axes.py
    let        names for expressions over axes: {rest: 1 - w}
    where      an expression, or a list of them: points for which one is false are left out
    evaluate   tasks, see stats/evaluation
    select     what is best, see select.py
    export     {top: 3}: how many winners become checkpoints
    search     of a search file: sampler, number of trials, pruning
"""

from __future__ import annotations

import dataclasses
import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any

from raymerge.cluster.grid_axes import NAME, Axis, Dimension, read_dimensions
from raymerge.cluster.grid_expressions import Expression
from raymerge.cluster.grid_points import Value
from raymerge.cluster.grid_references import references, replace
from raymerge.cluster.origin import Origin, did_you_mean, join
from raymerge.cluster.reading import HARMLESS_KEYS
from raymerge.cluster.recipe_reader import KEYS as RECIPE_KEYS
from raymerge.cluster.select import Selection, read_selection
from raymerge.cluster.setting import as_whole_number, shown
from raymerge.cluster.yaml_source import Document, parse_documents, read_documents
from raymerge.merge_actors.errors import RecipeError
from raymerge.stats.evaluation.tasks import EvaluationSpec, parse_evaluation

#: What a user may hand over: a file, a text or a mapping.
GridSource = str | os.PathLike[str] | Mapping[str, Any]
GRID_KEYS = ("grid", "let", "where", "evaluate", "select", "export")
#: More combinations than this are a mistake: nobody evaluates them, and a search needs no grid.
_MOST_COMBINATIONS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class GridSpec:
    """A grid file."""

    template: Mapping[str, Any]
    """The recipe with its references."""
    dimensions: tuple[Dimension, ...]
    """In the order of the file; the last one changes fastest."""
    lets: Mapping[str, Expression]
    """Names for expressions, each over axes and earlier names."""
    where: tuple[Expression, ...]
    """A point has to satisfy all of them."""
    evaluation: EvaluationSpec
    """The tasks."""
    selection: Selection
    top: int
    """How many winners are written as checkpoints."""
    search: Any
    """The `search` section, not read yet; None in a grid file."""
    origin: Origin
    name: str
    """Of the grid: from its file."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Every axis, in order."""
        return tuple(axis for dimension in self.dimensions for axis in dimension.axes)

    @property
    def num_combinations(self) -> int:
        """Number of points before `where`."""
        product = 1
        for dimension in self.dimensions:
            product *= len(dimension)
        return product

    @cached_property
    def kept(self) -> array[int]:
        """Numbers of the combinations that `where` lets through.

        Raises:
            RecipeError: none is left, or an expression fails.
        """
        if not self.where:
            return array("q", range(self.num_combinations))
        kept = array("q")
        for index in range(self.num_combinations):
            if self.holds(self.combination(index)):
                kept.append(index)
        if not kept:
            raise self.origin.error(
                "where",
                f"lets none of {self.num_combinations:,} combinations through; the grid would be empty.",
            )
        return kept

    def combination(self, index: int) -> dict[str, Value]:
        """Return the axis values of a combination."""
        parts = []
        for dimension in reversed(self.dimensions):
            index, position = divmod(index, len(dimension))
            parts.append(dimension.at(position))
        values: dict[str, Value] = {}
        for part in reversed(parts):
            values |= part
        return values

    def positions(self, index: int) -> tuple[int, ...]:
        """Return the position of a combination in each dimension."""
        found = []
        for dimension in reversed(self.dimensions):
            index, position = divmod(index, len(dimension))
            found.append(position)
        return tuple(reversed(found))

    def named_values(self, axes: Mapping[str, Value]) -> dict[str, Value]:
        """Return the values of all axes and names at a point."""
        values = dict(axes)
        for name, expression in self.lets.items():
            values[name] = self._evaluated(expression, values, join("let", name))
        return {name: replace(value, values) for name, value in values.items()}

    def holds(self, axes: Mapping[str, Value]) -> bool:
        """Return whether `where` lets a point through."""
        if not self.where:
            return True
        values = self.named_values(axes)
        return all(self._evaluated(each, values, "where") for each in self.where)

    def recipe(self, axes: Mapping[str, Value]) -> dict[str, Any]:
        """Return the recipe of a point as plain values."""
        try:
            recipe = replace(self.template, self.named_values(axes))
        except IndexError as error:
            raise RecipeError(f"{self.origin.at()}: the recipe {error}.") from None
        assert isinstance(recipe, dict)
        return recipe

    def _evaluated(self, expression: Expression, values: Mapping[str, Value], key: str) -> Any:
        try:
            return expression.evaluate(values)
        except ValueError as error:
            raise self.origin.error(key, f"{error}.") from None


def read_grid(source: GridSource, *, is_search: bool = False, seed: int | None = None) -> GridSpec:
    """Read a grid or a search file.

    Args:
        source: path of a YAML file; YAML text (a string with a line break); a mapping.
        is_search: ranges are allowed, and a `search` section.
        seed: takes the place of the recipe's seed.

    Raises:
        RecipeError: with one sentence that names file, line, key, value and rule.
    """
    document, name = _document(source)
    origin, raw = document.origin, document.value
    if not isinstance(raw, Mapping):
        raise RecipeError(
            f"{origin.at()}: a grid must be a mapping with grid and evaluate; this is {shown(raw)}."
        )
    _check_keys(raw, origin, is_search=is_search)
    dimensions = read_dimensions(raw["grid"], origin, is_search=is_search)
    axes = {axis.name: axis for dimension in dimensions for axis in dimension.axes}
    lets = _read_lets(raw.get("let"), origin, axes)
    dimensions = _with_constants(dimensions, lets, origin)
    axes = {axis.name: axis for dimension in dimensions for axis in dimension.axes}
    names = [*axes, *lets]
    template = {
        key: value for key, value in raw.items() if key not in (*GRID_KEYS, "search") and key[:2] != "x-"
    }
    if seed is not None:
        template["seed"] = seed
    _set_seed_axis(template, axes, origin)
    _check_references(template, axes, lets, origin)
    combinations = 1
    for dimension in dimensions:
        combinations *= max(1, len(dimension))
    if combinations > _MOST_COMBINATIONS:
        raise origin.error(
            "grid", f"has {combinations:,} combinations; at most {_MOST_COMBINATIONS:,} are expanded."
        )
    evaluation = _read_evaluation(raw["evaluate"], origin)
    _check_splits(evaluation, origin)
    return GridSpec(
        template=template,
        dimensions=dimensions,
        lets=lets,
        where=_read_where(raw.get("where"), origin, names),
        evaluation=evaluation,
        selection=read_selection(
            raw.get("select"), origin, evaluation.metrics, axes, evaluation.higher_is_better
        ),
        top=_read_top(raw.get("export"), origin),
        search=raw.get("search"),
        origin=origin,
        name=name,
    )


def _document(source: GridSource) -> tuple[Document, str]:
    if isinstance(source, Mapping):
        return Document(value=source, origin=Origin(file="grid")), "grid"
    if isinstance(source, str) and "\n" in source:
        documents, file, name = parse_documents(source, "grid"), "the text", "grid"
    else:
        documents, file, name = read_documents(source), os.fspath(source), PurePath(source).stem
    if len(documents) != 1:
        raise RecipeError(f"{file} holds {len(documents)} YAML documents; a grid is one.")
    return documents[0], name


def _check_keys(raw: Mapping[str, Any], origin: Origin, *, is_search: bool) -> None:
    known = [*RECIPE_KEYS, *GRID_KEYS, *(["search"] if is_search else [])]
    for key in raw:
        if key == "search" and not is_search:
            raise origin.error(
                key, "has no effect on a grid; run the file with raymerge search, or leave it out."
            )
        if key not in known and key not in HARMLESS_KEYS and not key.startswith("x-"):
            raise origin.error(key, f"is unknown{did_you_mean(key, known)}.")
    for key in ("grid", "evaluate"):
        if raw.get(key) is None:
            near = did_you_mean(key, (each for each in raw if each not in known))
            what = "axes: {lambda: [0.5, 1]}" if key == "grid" else "tasks: {tasks: [...]}"
            raise RecipeError(f"{origin.at()}: key {key} is missing{near}; it holds the {what}.")


def _read_lets(raw: Any, origin: Origin, axes: Mapping[str, Axis]) -> dict[str, Expression]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise origin.error("let", f"is {shown(raw)}; it must be a mapping of names to expressions.")
    lets: dict[str, Expression] = {}
    for name, text in raw.items():
        key = join("let", name)
        if not NAME.fullmatch(name) or name in axes:
            reason = "is an axis already" if name in axes else "is no name: letters, digits and _"
            raise origin.error(key, f"{reason}; choose another name.")
        lets[name] = _expression(text, [*axes, *lets], origin, key, later=list(raw)[len(lets) + 1 :])
    return lets


def _with_constants(
    dimensions: tuple[Dimension, ...], lets: Mapping[str, Expression], origin: Origin
) -> tuple[Dimension, ...]:
    """Put names that depend on no axis in place: `[0, 0.5, $rule]` becomes a list of numbers."""
    constants: dict[str, Value] = {}
    for name, expression in lets.items():
        if expression.names <= set(constants):
            try:
                constants[name] = expression.evaluate(constants)
            except ValueError as error:
                raise origin.error(join("let", name), f"{error}.") from None

    def placed(axis: Axis) -> Axis:
        return dataclasses.replace(axis, values=tuple(replace(value, constants) for value in axis.values))

    return tuple(Dimension(tuple(map(placed, dimension.axes))) for dimension in dimensions)


def _read_where(raw: Any, origin: Origin, names: Sequence[str]) -> tuple[Expression, ...]:
    if raw is None:
        return ()
    if isinstance(raw, list | tuple):
        return tuple(_expression(each, names, origin, f"where[{i}]") for i, each in enumerate(raw))
    return (_expression(raw, names, origin, "where"),)


def _expression(
    raw: Any, names: Sequence[str], origin: Origin, key: str, later: Sequence[str] = ()
) -> Expression:
    """Read an expression over some names; `later` ones are known, but only below."""
    if isinstance(raw, bool | None) or not isinstance(raw, str | int | float):
        raise origin.error(key, f"is {shown(raw)}; it must be an expression over axes, such as lambda <= 1.")
    try:
        return Expression(str(raw), names)
    except LookupError as error:
        name = error.args[0]
        if name in later:
            raise origin.error(
                key, f"uses {name!r}, which is not known yet; write it below that name."
            ) from None
        raise origin.error(
            key,
            f"uses {name!r}, which is neither axis nor `let`; known: {', '.join(names)}{did_you_mean(name, names)}.",
        ) from None
    except ValueError as error:
        raise origin.error(key, f"{error}.") from None


def _set_seed_axis(template: dict[str, Any], axes: Mapping[str, Axis], origin: Origin) -> None:
    """Let an axis of seeds that nothing refers to be the seed of the recipe."""
    seeds = axes.get("seed")
    if seeds is None or any(name == "seed" for name, _ in references(template)):
        return
    if "seed" in template:
        raise origin.error(
            seeds.key,
            "gives seeds, but the recipe (or --seed) has one seed already; leave that out, or write seed: $seed.",
        )
    template["seed"] = "$seed"


def _check_references(
    template: Mapping[str, Any], axes: Mapping[str, Axis], lets: Mapping[str, Expression], origin: Origin
) -> None:
    """Refuse unknown names, and axes that nothing uses."""
    known = [*axes, *lets]
    places = [*references(template)]
    for axis in axes.values():
        places += references(list(axis.values), axis.key)
    used: set[str] = set()
    for name, key in places:
        if name not in known:
            raise origin.error(
                key,
                f"refers to ${name}, which is neither axis nor `let`; known: {', '.join(known)}"
                f"{did_you_mean(name, known)}; $$ is a dollar sign.",
            )
        used.add(name)
    for name in reversed(list(lets)):
        if name in used:
            used |= lets[name].names
    for name, axis in axes.items():
        if name not in used:
            raise origin.error(
                axis.key, f"is never used: write ${name} in the recipe, or leave the axis out."
            )


def _read_evaluation(raw: Any, origin: Origin) -> EvaluationSpec:
    try:
        return parse_evaluation(raw)
    except RecipeError as error:
        raise of_tasks(error, origin) from error


def of_tasks(error: RecipeError, origin: Origin) -> RecipeError:
    """Return an error about the tasks with the file and line that it is about."""
    key, colon, sentence = str(error).partition(": ")
    if not colon or not key.startswith("evaluate") or " " in key:
        return RecipeError(f"{origin.at('evaluate')}: {error}")
    return RecipeError(f"{origin.at(key)}: key {key}: {sentence}")


def _check_splits(evaluation: EvaluationSpec, origin: Origin) -> None:
    """Refuse a task that would choose by its test data, or that has nothing to choose by."""
    for index, task in enumerate(evaluation.tasks):
        # A folder or a data set may hold both splits; a file is one.
        is_one = isinstance(task.test, Mapping) or (task.test is not None and os.path.isfile(task.test))
        if is_one and task.test == task.validation:
            raise origin.error(
                f"evaluate.tasks[{index}].test",
                f"is {shown(task.test)}, the data of `validation`, by which points are chosen; a test needs others.",
            )


def _read_top(raw: Any, origin: Origin) -> int:
    if raw is None:
        return 0
    if not isinstance(raw, Mapping) or set(raw) != {"top"}:
        raise origin.error(
            "export", f"is {shown(raw)}; it must be {{top: 3}}, the number of checkpoints to write."
        )
    top = None if isinstance(raw["top"], bool) else as_whole_number(raw["top"])
    if top is None or not 0 <= top <= 1000:
        raise origin.error("export.top", f"is {shown(raw['top'])}; it must be a whole number in [0, 1000].")
    return top
