"""The results of a grid or a search, arranged for tables and plots."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymerge.cluster.grid_folder import BEST_NAME, RUN_NAME, GridFolder, selection_of
from raymerge.cluster.remote_grid_folder import open_grid_folder
from raymerge.cluster.results import read_results
from raymerge.cluster.select import Ranked, Selection, costs_of, pareto_front, rank
from raymerge.merge_actors.errors import OutputError

#: A text axis with so many values at most is drawn in colours of its own.
MOST_HUES = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class AxisData:
    """One axis over the points that have a result."""

    name: str
    values: tuple[Any, ...]
    """Per point: a number, or a short text."""
    is_numeric: bool
    is_log: bool
    """Are its numbers better drawn on a log scale?"""
    levels: tuple[Any, ...]
    """Distinct values: numbers ascending, texts in the order of the file."""

    def place(self, value: Any) -> float:
        """Return where a value is drawn: a text at its position."""
        return float(value) if self.is_numeric else float(self.levels.index(value))


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """All that a report shows."""

    name: str
    kind: str
    """grid or search."""
    num_points: int
    """Of the grid; `points` are those that have a result."""
    counts: Mapping[str, int]
    """Rows by status: ok, failed, pruned."""
    seconds: float
    """Over all points: work, not waiting."""
    points: tuple[int, ...]
    """Numbers of the points with a result."""
    axes: tuple[AxisData, ...]
    """Those with more than one value."""
    fixed: Mapping[str, Any]
    """Axes with one value."""
    metrics: Mapping[str, tuple[float, ...]]
    """"task.metric" -> value per point; NaN where there is none."""
    errors: Mapping[str, tuple[float, ...]]
    """Standard errors."""
    higher_is_better: Mapping[str, bool]
    selection: Selection
    objective: tuple[float, ...]
    """The first objective per point."""
    ranked: tuple[Ranked, ...]
    """The best settings, the best first."""
    front: tuple[int, ...]
    """Numbers of the points of the Pareto front, if there are several objectives."""
    winners: tuple[Mapping[str, Any], ...]
    """best.json, if it is there: with the scores on test data."""

    @property
    def label(self) -> str:
        """Name of the first objective."""
        return self.selection.objectives[0].label

    @property
    def is_max(self) -> bool:
        """Return whether a larger objective is better."""
        return self.selection.objectives[0].mode == "max"

    def axis(self, name: str) -> AxisData:
        """Return an axis by its name."""
        return next(axis for axis in self.axes if axis.name == name)

    def row_of(self, point: int) -> int:
        """Return the position of a point among those with a result."""
        return self.points.index(point)

    def tasks(self) -> list[str]:
        """Return the main metric of each task."""
        first: dict[str, str] = {}
        for name in self.metrics:
            first.setdefault(name.rpartition(".")[0], name)
        for objective in self.selection.objectives:  # what is chosen by is main
            for name, _ in objective.weights:
                first[name.rpartition(".")[0]] = name
        return list(first.values())

    def hue(self) -> AxisData | None:
        """Return the axis that points are told apart by: the method, or one of a few texts."""
        found = [axis for axis in self.axes if not axis.is_numeric and 2 <= len(axis.levels) <= MOST_HUES]
        return next((axis for axis in found if "method" in axis.name), found[0] if found else None)


def read_report(out: str, top: int = 10) -> ReportData:
    """Read the results in a folder.

    Args:
        out: of a grid or a search, which may be running.
        top: how many of the best are listed.

    Raises:
        OutputError: the folder holds no results, or no point has one yet.
    """
    folder = open_grid_folder(out)
    with folder.readable():
        description = folder.read_json(RUN_NAME)
        if description is None:
            raise OutputError(f"{folder.out} holds no results of a grid or a search: no {RUN_NAME} in it")
        rows = _validation_rows(folder)
        winners = folder.read_json(BEST_NAME) or ()
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "failed", "pruned")}
    selection = selection_of(description)
    done = [row for row in rows if row["status"] == "ok"]
    if not done:
        raise OutputError(
            f"no point in {folder.out} has a result yet: {counts['failed']} failed (the column `error` says why)"
        )
    ranked = rank(done, selection)
    axes = [_axis(name, each, done) for name, each in description["axes"].items()]
    metrics = {name: _numbers(done, f"metric.{name}") for name in description["metrics"]}
    metrics = {name: values for name, values in metrics.items() if not all(map(math.isnan, values))}
    costs = {each.point: costs_of(each, selection) for each in ranked}
    return ReportData(
        name=description["name"],
        kind=description["kind"],
        num_points=description["num_points"],
        counts=counts,
        seconds=math.fsum(row.get("seconds") or 0.0 for row in rows if row.get("same_as") is None),
        points=tuple(row["point"] for row in done),
        axes=tuple(axis for axis in axes if len(axis.levels) > 1),
        fixed={axis.name: axis.levels[0] for axis in axes if len(axis.levels) == 1},
        metrics=metrics,
        errors={name: _numbers(done, f"stderr.{name}") for name in metrics},
        higher_is_better=description["metrics"],
        selection=selection,
        objective=tuple(
            selection.objectives[0].value({name: metrics[name][i] for name in metrics})
            for i in range(len(done))
        ),
        ranked=tuple(ranked[: max(top, 1)]),
        front=tuple(pareto_front(costs)) if selection.is_pareto else (),
        winners=tuple(winners),
    )


def _validation_rows(folder: GridFolder) -> list[dict[str, Any]]:
    """Return the rows of all points, with the columns that a report needs."""
    table = read_results(folder.path)
    wanted = ("metric.", "stderr.", "axis.")
    names = [
        name
        for name in table.column_names
        if name.startswith(wanted) or name in ("point", "status", "same_as", "split", "seconds")
    ]
    return [row for row in table.select(names).to_pylist() if row.get("split", "validation") == "validation"]


def _numbers(rows: Sequence[Mapping[str, Any]], column: str) -> tuple[float, ...]:
    return tuple(math.nan if row.get(column) is None else float(row[column]) for row in rows)


def _axis(name: str, described: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> AxisData:
    values = [row.get(f"axis.{name}") for row in rows]
    is_numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if is_numeric:
        levels: list[Any] = sorted(set(values))
        span = described.get("range") or {}
        is_log = bool(span.get("is_log")) or _looks_log(levels)
        return AxisData(name=name, values=tuple(values), is_numeric=True, is_log=is_log, levels=tuple(levels))
    short = _shortened(["" if value is None else str(value) for value in values])
    found = set(short.values())
    order = [short[str(value)] for value in described.get("values") or () if str(value) in short]
    order += sorted(found - set(order))
    return AxisData(
        name=name,
        values=tuple(short["" if value is None else str(value)] for value in values),
        is_numeric=False,
        is_log=False,
        levels=tuple(dict.fromkeys(order)),
    )


def _looks_log(levels: Sequence[float]) -> bool:
    """Return whether positive numbers are spaced rather by ratios than by differences."""
    if len(levels) < 4 or levels[0] <= 0 or levels[-1] / levels[0] < 30:
        return False
    ratios = [math.log(b / a) for a, b in itertools.pairwise(levels)]
    return max(ratios) < 3 * min(ratios)


def _shortened(texts: Sequence[str]) -> dict[str, str]:
    """Return texts without the folders of paths, where they can still be told apart."""
    distinct = list(dict.fromkeys(texts))
    short = {text: ", ".join(map(_base_name, text.split(", "))) for text in distinct}
    return short if len(set(short.values())) == len(distinct) else {text: text for text in distinct}


def _base_name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path
