"""The Ray skin of the merge worker: an actor class and nothing else."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ray

from raymerge.merge_actors.actor_log import begin_log
from raymerge.merge_actors.methods.prepare import TensorState
from raymerge.merge_actors.place_check import check_place
from raymerge.merge_actors.ray_metrics import ActorMetrics
from raymerge.merge_actors.task import (
    FileTask,
    MeasureReport,
    MeasureTask,
    MergeTask,
    RunContext,
    SolveTask,
    TaskReport,
)
from raymerge.merge_actors.worker import NUM_LANES, MergeWorker

R = TypeVar("R", TaskReport, MeasureReport)


# One thread a lane, and one for questions to a hosted worker; that the process lives is said by a thread of its own.
@ray.remote(max_concurrency=NUM_LANES + 1, max_restarts=0, concurrency_groups={"life": 1})
class RayMergeWorker:
    """`MergeWorker` as an actor; its tasks are idempotent, so the driver may repeat them."""

    def __init__(self) -> None:
        self._setting_up = threading.Lock()
        self._run = -1
        self._worker: MergeWorker | None = None
        self._metrics: ActorMetrics | None = None
        self._hosted: Any = None

    def setup(self, context: RunContext, run: int) -> None:
        """Become the worker of a run; see `MergeWorker.check`.

        A session may begin its next run while this actor is still starting for an earlier one:
        calls may then overlap, and the latest run counts.
        """
        with self._setting_up:
            if run > self._run:
                self._run = run
                self._begin(context)

    def _begin(self, context: RunContext) -> None:
        begin_log(f"merge worker, run {context.run_id[:12]}")
        check_place(context.versions, context.device)
        if context.device == "cpu":
            # Ray shows every GPU to an actor that asks for none. (A runtime_env would hide them
            # too, but then Ray cannot use the processes that it keeps ready.)
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if self._worker is not None:
            self._worker.close()  # an open file would keep the space of an output that was replaced
        # Lanes hand the interpreter to each other hundreds of times a second: a lane that waits for
        # it must not wait for Python's default of 5 ms.
        sys.setswitchinterval(2e-4)
        self._worker = MergeWorker(context)
        self._metrics = ActorMetrics(context.run_id)
        self._worker.check()

    def merge(self, task: MergeTask, states: Mapping[int, TensorState]) -> TaskReport:
        """See `MergeWorker.merge`."""
        return self._counted(self._ready().merge(task, states))

    def make_files(self, task: FileTask, states: Mapping[int, TensorState]) -> TaskReport:
        """See `MergeWorker.make_files`."""
        return self._counted(self._ready().make_files(task, states))

    def solve(self, task: SolveTask) -> TaskReport:
        """See `MergeWorker.solve`."""
        return self._counted(self._ready().solve(task))

    def measure(self, task: MeasureTask) -> MeasureReport:
        """See `MergeWorker.measure`."""
        return self._counted(self._ready().measure(task))

    def host(self, make: Callable[..., Any], *arguments: Any) -> tuple[int, str]:
        """Make another worker in this process, on the same device; returns the process id and the node's address."""
        self._hosted = make(*arguments)
        return os.getpid(), str(ray.util.get_node_ip_address())

    def hosted(self, method: str, *arguments: Any) -> Any:
        """Call a method of the hosted worker."""
        if self._worker is not None:
            self._worker.close()  # the hosted worker reads, maybe elsewhere, what this one has written
        return getattr(self._hosted, method)(*arguments)

    def hosted_value(self, name: str) -> Any:
        """Return an attribute of the hosted worker, also while it works."""
        return getattr(self._hosted, name)

    @ray.method(concurrency_group="life")  # type: ignore[untyped-decorator]
    def is_alive(self) -> bool:
        """Answer, whatever the other threads do."""
        return True

    def __repr__(self) -> str:
        run = self._worker.context.run_id[:12] if self._worker else "starting"
        return f"merge worker, run {run}"

    def _counted(self, report: R) -> R:
        assert self._metrics is not None
        self._metrics.count(report, self._ready().context.device)
        return report

    def _ready(self) -> MergeWorker:
        assert self._worker is not None, "instructions come after setup"
        return self._worker
