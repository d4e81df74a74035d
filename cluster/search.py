"""Search: points that are chosen by what earlier ones gave, batch by batch, on the same evaluators as a grid."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raymerge.cluster.grid import GridResult, GridRun, OpenRunner, Runner
from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.grid_plan import trusting
from raymerge.cluster.grid_points import Point, Value
from raymerge.cluster.grid_progress import GridProgress
from raymerge.cluster.grid_spec import GridSource, read_grid
from raymerge.cluster.search_spec import SearchSpec, read_search
from raymerge.cluster.search_study import Pruner, Study


def search(
    source: GridSource,
    out: str | os.PathLike[str],
    options: GridOptions | None = None,
    *,
    strict: bool = False,
    on_remark: Callable[[str], None] | None = None,
    show_progress: bool = False,
    open_runner: OpenRunner | None = None,
) -> GridResult:
    """Search a space for the best points.

    Args:
        source: the search file, YAML text or a mapping.
        out: folder for results and checkpoints.
        options: where and how to run; `seed` is the sampler's, `limit` a number of trials.
        strict: turn remarks about recipe keys into errors.
        on_remark: called with each remark as soon as it is known.
        show_progress: print progress on stderr.
        open_runner: starts the evaluators, instead of `grid_run.open_runner`.

    Raises:
        RaymergeError: with one sentence for the user; finished trials are kept.
    """
    options = options or GridOptions()
    spec = trusting(read_grid(source, is_search=True), options)
    asked = read_search(spec, options.seed)
    run = GridRun(spec, out, options, on_remark, show_progress, open_runner, kind="search")
    run.num_points = min(asked.num_trials, options.limit or asked.num_trials)
    study = Study(spec, asked)
    return run.carry_out(strict, lambda run, runner: _Trials(run, runner, asked, study).run_all())


class _Trials:
    """The trials of one search."""

    def __init__(self, run: GridRun, runner: Runner, asked: SearchSpec, study: Study) -> None:
        assert run.plan is not None
        self.run, self.runner, self.asked, self.study, self.plan = run, runner, asked, study, run.plan
        self.pruner = Pruner(asked.pruning) if asked.pruning else None
        self.axes: dict[int, dict[str, Value]] = {}
        #: number of the first trial with a key, and its row
        self.first: dict[str, int] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        #: rows that were found, until the first trial has to be run
        self.kept: list[dict[str, Any]] | None = []
        #: columns of the values at the rungs, by trial
        self.seen: dict[int, dict[str, float]] = {}
        run.point_of = self.point

    def point(self, number: int) -> Point:
        """Return the point of a trial."""
        return self.plan.point_at(number, self.axes[number])

    def run_all(self) -> None:
        """Ask, run and tell, batch after batch."""
        number = 0
        while number < self.run.num_points:
            trials = []
            for each in range(number, min(number + self.asked.batch, self.run.num_points)):
                trial, self.axes[each] = self.study.ask()
                trials.append(trial)
            points = [self.point(number + index) for index in range(len(trials))]
            rows = self.rows_of(points)
            learnt = []
            for trial, row in zip(trials, rows, strict=True):
                rungs = self.rungs_of(row)
                self.study.tell(trial, self.values(row), rungs, is_pruned=row["status"] == "pruned")
                learnt.append({rung: self.objective.cost(value) for rung, value in rungs.items()})
            for costs in learnt if self.pruner else []:
                assert self.pruner is not None
                self.pruner.learn(costs)
            number += len(trials)
        self.stop_replaying()

    def rows_of(self, points: Sequence[Point]) -> list[dict[str, Any]]:
        """Return the rows of a batch, running what no row is there of."""
        todo: dict[str, Point] = {}
        for point in points:
            first = self.first.setdefault(point.key, point.number)
            if point.key not in self.rows and point.key in self.run.earlier:
                row = self.rows[point.key] = self.run.earlier[point.key]
                self.seen[point.number] = {
                    name: value
                    for name, value in row.items()
                    if name.startswith("rung.") and value is not None
                }
            if point.key not in self.rows:
                todo.setdefault(point.key, point)
            elif self.kept is not None:
                self.kept.append(self.copied(point, first))
            else:
                self.run.writer.append(self.copied(point, first))
        if todo:
            self.stop_replaying()
            self.run_points(list(todo.values()))
            for point in points:
                if point.key in todo and todo[point.key].number != point.number:
                    self.run.num_shared += 1
                    self.run.writer.append(self.copied(point, self.first[point.key]))
        return [self.rows[point.key] for point in points]

    def copied(self, point: Point, first: int) -> dict[str, Any]:
        """Return a trial's row from the row of the same merge."""
        return self.run.row_of(point, self.rows[point.key], None if first == point.number else first)

    def stop_replaying(self) -> None:
        """Write the rows that an earlier run had: from here on trials are new."""
        if self.kept is not None:
            self.run.keep(self.kept)
            self.run.progress = GridProgress(
                self.run.num_points, self.objective, num_done=len(self.kept), is_shown=self.run.show_progress
            )
            self.kept = None

    def run_points(self, points: Sequence[Point]) -> None:
        """Run some points and take down their rows."""
        by_number = {point.number: point for point in points}
        seen = self.seen
        rungs = self.asked.pruning.rungs if self.asked.pruning else ()

        def should_stop(point: Point, fraction: float, metrics: Mapping[str, float]) -> bool:
            rung = min(range(len(rungs)), key=lambda i: abs(rungs[i] - fraction))
            value = self.objective.value(metrics)
            seen.setdefault(point.number, {})[f"rung.{rungs[rung]:g}"] = value
            assert self.pruner is not None
            return self.pruner.should_stop(rung, self.objective.cost(value))

        def on_row(row: dict[str, Any]) -> None:
            point = by_number[int(row["point"])]
            if row.get("same_as") is not None:  # not scored, and so not looked at: it is as its like
                seen[point.number] = seen.get(row["same_as"], {})
            row = row | seen.get(point.number, {})
            self.rows[point.key] = row
            self.run.add(point, row)

        if self.pruner:
            self.runner.run(points, on_row, should_stop=should_stop, rungs=rungs)
        else:
            self.runner.run(points, on_row)

    @property
    def objective(self) -> Any:
        """The first objective, by which trials are given up."""
        return self.run.spec.selection.objectives[0]

    def values(self, row: Mapping[str, Any]) -> list[float] | None:
        """Return the objectives of a finished trial; None for another one."""
        if row["status"] != "ok":
            return None
        metrics = {
            name.removeprefix("metric."): value for name, value in row.items() if name.startswith("metric.")
        }
        return [each.value(metrics) for each in self.run.spec.selection.objectives]

    def rungs_of(self, row: Mapping[str, Any]) -> dict[int, float]:
        """Return the values at the rungs that a trial came to, by number."""
        rungs = self.asked.pruning.rungs if self.asked.pruning else ()
        found = {}
        for index, rung in enumerate(rungs):
            value = row.get(f"rung.{rung:g}")
            if value is not None:
                found[index] = math.nan if value is None else float(value)
        return found
