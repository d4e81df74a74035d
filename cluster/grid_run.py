"""Run points over all evaluators: what is merged where, what is scored, what has been scored already.

The driver holds a point's recipe only while it is under way. A point is merged into a slot of an
evaluator; if another point had the same weights, its metrics are taken over, else the slot is scored. With
two slots per evaluator the next point is merged while one is scored. Points of an evaluator that dies are
run again; a point that raises is a row with its traceback, and the others go on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raymerge.cluster.evaluator import MergeReport, ScoreReport
from raymerge.cluster.evaluator_group import Call, EvaluatorGroup, Event, Gone, Raised, Returned
from raymerge.cluster.evaluator_place import connected_evaluators
from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.grid_points import Point
from raymerge.cluster.grid_queue import PointQueue
from raymerge.stats.evaluation.parts import ModelNeeds
from raymerge.stats.evaluation.tasks import EvaluationSpec

#: How often a point may be lost with its evaluator before it is given up.
MOST_ATTEMPTS = 4
_WAIT_SECONDS = 0.5

Row = dict[str, Any]
OnRow = Callable[[Row], None]
#: (point, share of the batches that was scored, metrics so far) -> is the rest not worth it?
ShouldStop = Callable[[Point, float, Mapping[str, float]], bool]


@contextlib.contextmanager
def open_runner(
    evaluation: EvaluationSpec,
    options: GridOptions,
    needs: Callable[[], ModelNeeds] | None = None,
    on_remark: Callable[[str], None] = lambda line: None,
) -> Iterator[Runner]:
    """Give a runner whose evaluators stay up, with what they remember, until the end of the block.

    Args:
        evaluation: the tasks.
        options: where and how to run.
        needs: says what the largest model takes of GPUs' memory; without, a model gets one GPU unless `options` says.
        on_remark: gets sentences for the user.

    Raises:
        ClusterError: the cluster cannot be reached, has no GPU when one is asked for, or none that holds the model.
    """
    with connected_evaluators(evaluation, options, needs, on_remark) as group:
        yield Runner(group)


def run_points(
    points: Sequence[Point], evaluation: EvaluationSpec, options: GridOptions, on_row: OnRow
) -> None:
    """Merge and evaluate points; see `Runner.run`."""
    with open_runner(evaluation, options) as runner:
        runner.run(points, on_row)


class Runner:
    """Runs points on a group of evaluators."""

    def __init__(self, group: EvaluatorGroup) -> None:
        self._group = group
        self._known: dict[tuple[str, str], _Known] = {}

    def run(
        self,
        points: Sequence[Point],
        on_row: OnRow,
        *,
        split: str = "validation",
        should_stop: ShouldStop | None = None,
        rungs: Sequence[float] = (),
    ) -> None:
        """Merge and evaluate points, and hand over the row of each as it is finished.

        Args:
            points: in any order; a point is made again whenever it is asked for, and not kept.
            on_row: called in this thread, one row at a time.
            split: the data to score on.
            should_stop: asked after each rung.
            rungs: shares of the batches, ascending, less than 1.

        Raises:
            ClusterError: the cluster gives no evaluators, or they die again and again.
        """
        if len(points):
            _Run(self._group, self._known, points, on_row, split, should_stop, tuple(rungs)).run()


@dataclass(frozen=True, slots=True)
class _Known:
    """Metrics of a model that was scored to the end."""

    point: int
    metrics: Mapping[str, tuple[float, float]]


@dataclass(slots=True)
class _Task:
    """A point under way."""

    index: int
    point: Point
    rung: int = 0
    """Rungs that it has passed."""
    merged: MergeReport | None = None
    num_merges: int = 0
    num_forward_passes: int = 0
    evaluate_seconds: float = 0.0


@dataclass(slots=True)
class _Evaluator:
    """What an evaluator is doing; a task is in one of these places."""

    free: deque[int]
    """Slots without a task."""
    merging: tuple[int, _Task] | None = None
    merged: deque[tuple[int, _Task]] = field(default_factory=deque)
    """Slots whose tasks wait to be scored."""
    scoring: tuple[int, _Task] | None = None

    def tasks(self) -> list[_Task]:
        """Return all tasks of the evaluator."""
        places = [self.merging, *self.merged, self.scoring]
        return [place[1] for place in places if place is not None]


class _Run:
    """One call of `Runner.run`."""

    def __init__(
        self,
        group: EvaluatorGroup,
        known: dict[tuple[str, str], _Known],
        points: Sequence[Point],
        on_row: OnRow,
        split: str,
        should_stop: ShouldStop | None,
        rungs: tuple[float, ...],
    ) -> None:
        self._group, self._known, self._points, self._on_row = group, known, points, on_row
        self._split, self._should_stop = split, should_stop
        self._steps = (*(rungs if should_stop else ()), 1.0)
        self._queue = PointQueue(points)
        self._evaluators: dict[int, _Evaluator] = {}
        self._num_open = len(points)
        self._attempts: dict[int, int] = {}
        #: digest of a model that is being scored -> tasks that were merged to the same
        self._twins: dict[str, list[_Task]] = {}

    def run(self) -> None:
        """Hand out points and take in what comes back until every point has its row."""
        self._group.start()
        while self._num_open:
            self._hand_out()
            for event in self._group.wait(_WAIT_SECONDS):
                self._take_in(event)

    def _hand_out(self) -> None:
        for number in self._group.evaluators():
            if number not in self._evaluators:
                self._evaluators[number] = _Evaluator(deque(range(self._group.num_slots)))
            evaluator = self._evaluators[number]
            if evaluator.scoring is None and evaluator.merged:
                slot, task = evaluator.merged.popleft()
                self._score(number, slot, task)
            if evaluator.merging is None and evaluator.free:
                index = self._queue.next(number)
                if index is not None:
                    self._merge(number, evaluator.free.popleft(), _Task(index, self._points[index]))

    def _merge(self, number: int, slot: int, task: _Task) -> None:
        self._evaluators[number].merging = (slot, task)
        self._group.submit(number, Call("merge", slot, (task.point.recipe, self._queue.group(task.index))))

    def _score(self, number: int, slot: int, task: _Task) -> None:
        self._evaluators[number].scoring = (slot, task)
        self._group.submit(number, Call("score", slot, (self._split, self._steps[task.rung])))

    def _take_in(self, event: Event) -> None:
        evaluator = self._evaluators.get(event.evaluator)
        if evaluator is None:
            return  # it was never given anything
        if isinstance(event, Gone):
            self._lose(event, evaluator)
        elif isinstance(event, Raised):
            self._fail(event, evaluator)
        elif isinstance(event.report, MergeReport):
            self._merged(event, evaluator, event.report)
        else:
            self._scored(event, evaluator, event.report)

    def _merged(self, event: Returned, evaluator: _Evaluator, report: MergeReport) -> None:
        """Take a merged model to where it is scored, unless another point has the same one."""
        assert evaluator.merging is not None
        slot, task = evaluator.merging
        evaluator.merging = None
        task.merged = report
        task.num_merges += 1
        known = self._known.get((report.digest, self._split))
        if known is not None:
            evaluator.free.append(slot)
            self._finish(task, known.metrics, same_as=known.point)
        elif report.digest in self._twins:
            evaluator.free.append(slot)
            self._twins[report.digest].append(task)
        else:
            self._twins[report.digest] = []
            evaluator.merged.append((slot, task))

    def _scored(self, event: Returned, evaluator: _Evaluator, report: ScoreReport) -> None:
        """Go on with the next rung, or finish the point."""
        assert evaluator.scoring is not None
        slot, task = evaluator.scoring
        task.num_forward_passes += report.num_forward_passes
        task.evaluate_seconds += report.seconds
        assert task.merged is not None
        if task.rung + 1 < len(self._steps):
            assert self._should_stop is not None
            values = {name: value for name, (value, _) in report.metrics.items()}
            if not self._should_stop(task.point, self._steps[task.rung], values):
                task.rung += 1
                self._score(event.evaluator, slot, task)
                return
            twins = self._twins.pop(task.merged.digest)
            self._finish(task, report.metrics, status="pruned")
            for twin in twins:  # whether they are worth more is asked of each
                self._queue.put_back(twin.index)
        else:
            self._known[task.merged.digest, self._split] = _Known(task.point.number, report.metrics)
            self._finish(task, report.metrics)
            for twin in self._twins.pop(task.merged.digest):
                self._finish(twin, report.metrics, same_as=task.point.number)
        evaluator.scoring = None
        evaluator.free.append(slot)

    def _fail(self, event: Raised, evaluator: _Evaluator) -> None:
        """Give the point that raised a row with its traceback."""
        place = evaluator.merging if event.call.method == "merge" else evaluator.scoring
        assert place is not None
        slot, task = place
        if event.failure.is_full and slot > 0:
            evaluator.merging = None  # and the slot is not free again
            self._queue.put_back(task.index)
            return
        if event.call.method == "merge":
            evaluator.merging = None
        else:
            evaluator.scoring = None
            self._release_twins(task)
        evaluator.free.append(slot)
        self._finish(task, {}, status="failed", error=event.failure.error)

    def _lose(self, event: Gone, evaluator: _Evaluator) -> None:
        """Hand the points of a dead evaluator out again."""
        del self._evaluators[event.evaluator]
        self._queue.leave(event.evaluator)
        for task in evaluator.tasks():
            self._release_twins(task)
            self._attempts[task.index] = self._attempts.get(task.index, 1) + 1
            if self._attempts[task.index] > MOST_ATTEMPTS:
                error = (
                    f"the point was lost with its evaluator {MOST_ATTEMPTS} times, the last time: {event.reason}; "
                    "if memory ran out, use fewer --workers"
                )
                self._finish(task, {}, status="failed", error=error)
            else:
                self._queue.put_back(task.index)

    def _release_twins(self, task: _Task) -> None:
        """Let points that waited for a task's metrics run by themselves."""
        if task.merged is not None:
            for twin in self._twins.pop(task.merged.digest, ()):
                self._queue.put_back(twin.index)

    def _finish(
        self,
        task: _Task,
        metrics: Mapping[str, tuple[float, float]],
        *,
        status: str = "ok",
        error: str | None = None,
        same_as: int | None = None,
    ) -> None:
        self._num_open -= 1
        self._attempts.pop(task.index, None)
        self._on_row(_row(task, self._split, metrics, status, error, same_as))


def _row(
    task: _Task,
    split: str,
    metrics: Mapping[str, tuple[float, float]],
    status: str,
    error: str | None,
    same_as: int | None,
) -> Row:
    merged = task.merged
    merge_seconds = merged.seconds if merged else None
    return {
        "point": task.point.number,
        "key": task.point.key,
        "split": split,
        "status": status,
        "error": error,
        "same_as": same_as,
        **{f"metric.{name}": value for name, (value, _) in metrics.items()},
        **{f"stderr.{name}": deviation for name, (_, deviation) in metrics.items()},
        "seconds": (merge_seconds or 0.0) + task.evaluate_seconds,
        "merge_seconds": merge_seconds,
        "evaluate_seconds": task.evaluate_seconds,
        "seed": merged.seed if merged else None,
        "num_merges": task.num_merges,
        "num_forward_passes": task.num_forward_passes,
        "num_statistics_passes": 0,
        "bytes_read": merged.bytes_read if merged else 0,
        **(merged.counters if merged else {}),
        "recipe_fingerprint": merged.recipe_fingerprint if merged else None,
        "remarks": "\n".join(merged.remarks) or None if merged else None,
        **_versions(),
    }


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("raymerge", "torch", "transformers")}
