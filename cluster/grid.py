"""Run a grid: plan it, run its points, keep their results, export the winners.

The one way from a grid file to results; the command line and `raymerge.grid` call it. How points
are merged and evaluated is grid_run.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from raymerge.cluster.grid_export import describe, export
from raymerge.cluster.grid_folder import BEST_NAME, RUN_NAME, run_description
from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.grid_plan import GridPlan, plan_grid, trusting
from raymerge.cluster.grid_points import Point, label_of
from raymerge.cluster.grid_progress import GridProgress
from raymerge.cluster.grid_spec import GridSource, GridSpec, read_grid
from raymerge.cluster.remote_grid_folder import open_grid_folder
from raymerge.cluster.results import ResultsWriter, metric_columns, read_results, read_rows
from raymerge.cluster.select import Ranked, rank
from raymerge.stats.evaluation.parts import ModelNeeds
from raymerge.stats.evaluation.tasks import EvaluationSpec

#: Takes the row of a finished point.
OnRow = Callable[[dict[str, Any]], None]
#: (point, fraction of the batches that were seen, metrics on them) -> is it not worth going on?
ShouldStop = Callable[[Point, float, Mapping[str, float]], bool]
#: Columns that say which point a row belongs to, and are written anew when a grid has changed.
_OF_THE_POINT = ("point", "same_as")


class Runner(Protocol):
    """Evaluators, started, that take one set of points after another."""

    def run(
        self,
        points: Sequence[Point],
        on_row: OnRow,
        *,
        split: str = "validation",
        should_stop: ShouldStop | None = None,
        rungs: Sequence[float] = (),
    ) -> None:
        """Merge and evaluate points, and hand over the row of each as it is finished."""


#: Starts evaluators for some tasks.
OpenRunner = Callable[
    [EvaluationSpec, GridOptions, Callable[[], ModelNeeds], Callable[[str], None]],
    AbstractContextManager[Runner],
]


@dataclass(frozen=True, slots=True, kw_only=True)
class GridResult:
    """What a grid or a search did."""

    out: str
    num_points: int
    """Of the grid, or trials of the search."""
    num_run: int
    """Points that were merged and evaluated now."""
    num_resumed: int
    """Points whose rows an earlier run had written."""
    num_shared: int
    """Points that gave the same model as another one, which alone was evaluated."""
    num_failed: int
    num_pruned: int
    best: tuple[dict[str, Any], ...]
    """The winners, the best first, with their metrics on both splits."""
    outputs: tuple[str, ...]
    """Folders of the checkpoints."""
    seconds: float
    remarks: tuple[str, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def grid(
    source: GridSource,
    out: str | os.PathLike[str],
    options: GridOptions | None = None,
    *,
    strict: bool = False,
    on_remark: Callable[[str], None] | None = None,
    show_progress: bool = False,
    open_runner: OpenRunner | None = None,
) -> GridResult:
    """Run every point of a grid.

    Args:
        source: the grid file, YAML text or a mapping.
        out: folder for results and checkpoints.
        options: where and how to run.
        strict: turn remarks about recipe keys into errors.
        on_remark: called with each remark as soon as it is known.
        show_progress: print progress on stderr.
        open_runner: starts the evaluators, instead of `grid_run.open_runner`.

    Raises:
        RaymergeError: with one sentence for the user; finished points are kept.
    """
    options = options or GridOptions()
    spec = trusting(read_grid(source, seed=options.seed), options)
    run = GridRun(spec, out, options, on_remark, show_progress, open_runner, kind="grid")
    return run.carry_out(strict, _all_points)


def _all_points(run: GridRun, runner: Runner) -> None:
    assert run.plan is not None
    run.run_numbers(runner, run.plan.point)


class GridRun:
    """One run of a grid or a search, up to the checkpoints."""

    def __init__(
        self,
        spec: GridSpec,
        out: str | os.PathLike[str],
        options: GridOptions,
        on_remark: Callable[[str], None] | None,
        show_progress: bool,
        open_runner: OpenRunner | None,
        *,
        kind: str,
    ) -> None:
        self.spec, self.options, self.kind = spec, options, kind
        self.folder = open_grid_folder(out)
        self.remarks: dict[str, None] = {}
        self._on_remark, self.show_progress = on_remark, show_progress
        self._open_runner = open_runner
        self.plan: GridPlan | None = None
        self.num_points = len(spec.kept) if kind == "grid" else 0
        if options.limit is not None:
            self.num_points = min(self.num_points, options.limit)
        #: rows of an earlier run by key, one each
        self.earlier: dict[str, dict[str, Any]] = {}
        #: key of each point that an earlier run had finished, by its number there
        self.earlier_keys: dict[int, str] = {}
        self.earlier_tests: dict[str, dict[str, Any]] = {}
        #: axes of the points of a search, by number
        self.point_of: Callable[[int], Point] | None = None
        self.num_resumed = self.num_shared = 0

    def remark(self, line: str) -> None:
        """Tell the user something, once."""
        if line not in self.remarks:
            self.remarks[line] = None
            if self._on_remark is not None:
                self._on_remark(line)

    def carry_out(self, strict: bool, run_points: Callable[[GridRun, Runner], None]) -> GridResult:
        """Plan, run the points as `run_points` says, and export."""
        started = time.monotonic()
        decided = {"resume": self.options.resume, "overwrite": self.options.overwrite}
        self.folder.check_free(**decided)
        self.plan = plan_grid(self.spec, self.options, strict=strict)
        for line in self.plan.remarks:
            self.remark(line)
        with self.folder.locked():
            self.folder.check_free(**decided)  # another run may have come and gone while we planned
            if self.options.overwrite:
                self.folder.clear()
            self.writer = ResultsWriter(self.folder.path)
            try:
                if self.options.resume:
                    self._read_earlier()
                self._begin()
                self._measure()
                first = self.spec.selection.objectives[0]
                self.progress = GridProgress(self.num_points, first, is_shown=self.show_progress)
                best, outputs = self._run(run_points)
            finally:
                self.writer.close()
        return GridResult(
            out=self.folder.out,
            num_points=self.num_points,
            num_run=self.progress.num_run,
            num_resumed=self.num_resumed,
            num_shared=self.num_shared + self.progress.num_same,
            num_failed=self.progress.num_failed,
            num_pruned=self.progress.num_pruned,
            best=tuple(best),
            outputs=tuple(outputs),
            seconds=time.monotonic() - started,
            remarks=tuple(self.remarks),
        )

    def _begin(self) -> None:
        description = run_description(self.spec, kind=self.kind, num_points=self.num_points)
        self.folder.write_json(RUN_NAME, description)

    def _measure(self) -> None:
        """Measure the statistics that points ask for by naming data."""
        assert self.plan is not None
        if not self.plan.missing:
            return
        from raymerge.cluster.recipe_statistics import measure_missing

        where = {name: getattr(self.options, name) for name in ("address", "in_process", "workers", "device")}
        measure_missing(
            self.plan.missing, where=where, on_remark=self.remark, on_progress=lambda progress: None
        )

    def _run(self, run_points: Callable[[GridRun, Runner], None]) -> tuple[list[dict[str, Any]], list[str]]:
        opener = self._open_runner or _default_runner()
        with opener(self.spec.evaluation, self.options, self._needs, self.remark) as runner:
            try:
                run_points(self, runner)
            finally:
                self.progress.clear()
            self.writer.compact()
            winners = self.winners()
            self._score_test(winners, runner)
        assert self.point_of is not None
        rows = {(row["split"], row["point"]): row for row in read_rows(self.folder.path)} if winners else {}
        best = describe(winners, self.point_of, self.spec.selection, rows)
        outputs = []
        if self.spec.top and best:
            outputs = export(best, self.folder, self.options, self.remark, show_progress=self.show_progress)
        self.folder.write_json(BEST_NAME, best)
        return best, outputs

    def _needs(self) -> ModelNeeds:
        """Say what the largest merged model takes of GPUs' memory."""
        from raymerge.cluster.grid_needs import needs_of_grid

        assert self.plan is not None
        return needs_of_grid(self.plan)

    def run_numbers(self, runner: Runner, point_of: Callable[[int], Point]) -> None:
        """Run the points of a grid that no earlier run has finished, each distinct merge once."""
        assert self.plan is not None
        self.point_of = point_of
        first_of: dict[str, int] = {}
        twins: dict[int, list[int]] = {}
        todo: list[int] = []
        kept: list[dict[str, Any]] = []
        same: list[int | None] = []
        # Rows beyond --limit stay; only what is within it is run.
        for number in range(len(self.spec.kept) if self.earlier else self.num_points):
            point = point_of(number)
            first = first_of.setdefault(point.key, number)
            if point.key in self.earlier:
                kept.append(self.row_of(point, self.earlier[point.key], None if first == number else first))
                same.append(self.earlier[point.key]["same_as"])
            elif number >= self.num_points:
                continue
            elif first == number:
                todo.append(number)
            else:
                twins.setdefault(first, []).append(number)
        for row, other in zip(kept, same, strict=True):
            found = first_of.get(self.earlier_keys.get(other, "")) if other is not None else None
            if row["same_as"] is None and found != row["point"]:
                row["same_as"] = found
        self.keep(kept)
        # Those whose originals are done were rows already; the others follow their originals.
        self.progress = GridProgress(
            self.num_points,
            self.spec.selection.objectives[0],
            num_done=sum(row["point"] < self.num_points for row in kept),
            is_shown=self.show_progress,
        )

        def on_row(row: dict[str, Any]) -> None:
            self.add(point_of(int(row["point"])), row)
            for number in twins.pop(int(row["point"]), ()):
                self.num_shared += 1
                self.writer.append(self.row_of(point_of(number), row, int(row["point"])))

        if todo:
            runner.run(self.plan.points(todo), on_row)

    def add(self, point: Point, row: dict[str, Any]) -> None:
        """Write the row of a point that was run just now."""
        self.folder.check()
        self.writer.append(self.row_of(point, row, row.get("same_as")))
        self.progress.add(row)

    def row_of(self, point: Point, row: Mapping[str, Any], same_as: int | None) -> dict[str, Any]:
        """Return the row of a point, from what was measured on it or on its like."""
        axes = {f"axis.{name}": label_of(value) for name, value in point.axes.items()}
        measured = {
            name: value
            for name, value in row.items()
            if name not in _OF_THE_POINT and not name.startswith("axis.")
        }
        return {"point": point.number, **axes, "same_as": same_as, **measured, "key": point.key}

    def _read_earlier(self) -> None:
        """Read what an earlier run has finished; failed points are run again."""
        for row in read_rows(self.folder.path):
            if row["status"] != "failed":
                table = self.earlier if row["split"] == "validation" else self.earlier_tests
                table.setdefault(row["key"], row)
                self.earlier_keys[row["point"]] = row["key"]

    def keep(self, kept: Sequence[dict[str, Any]]) -> None:
        """Let the rows that still belong to the file be the results."""
        if not self.options.resume:
            return
        num_lost = len(self.earlier) - len({row["key"] for row in kept})
        if num_lost:
            name = self.folder.keep_aside()
            self.remark(
                f"note: {num_lost:,} results of the earlier run belong to no point of the file and its inputs as they "
                f"are now; they are kept in {name}"
            )
        self.num_resumed = len(kept)
        self.writer.replace(kept)

    def winners(self) -> list[Ranked]:
        """Return the best settings: as many as are exported, at least one."""
        table = read_results(self.folder.path)
        if not table.num_rows:
            return []
        rows = table.select(metric_columns(table.column_names)).to_pylist()
        ranked = rank((row for row in rows if row["split"] == "validation"), self.spec.selection)
        if not ranked:
            self.remark("no point has a result to choose by; the column `error` of the results says why")
        return ranked[: max(1, self.spec.top)]

    def _score_test(self, winners: Sequence[Ranked], runner: Runner) -> None:
        """Score the winners on the test split, those that have not been before."""
        if not any(task.test is not None for task in self.spec.evaluation.tasks):
            return
        assert self.point_of is not None
        points = [self.point_of(each.point) for each in winners]
        known = [point for point in points if point.key in self.earlier_tests]
        for point in known:
            self.writer.append(self.row_of(point, self.earlier_tests[point.key], None))
        by_number = {point.number: point for point in points if point.key not in self.earlier_tests}

        def on_row(row: dict[str, Any]) -> None:
            if row["status"] == "failed":
                reason = (row["error"] or "").strip().rpartition("\n")[2]
                self.remark(f"point {row['point']} could not be scored on the test split: {reason}")
            point = by_number[int(row["point"])]
            self.writer.append(self.row_of(point, {**row, "split": "test"}, row.get("same_as")))

        if by_number:
            runner.run(list(by_number.values()), on_row, split="test")
        self.writer.compact()


def _default_runner() -> OpenRunner:
    from raymerge.cluster.grid_run import open_runner

    return open_runner
