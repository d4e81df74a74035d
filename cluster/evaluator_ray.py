"""Evaluators as Ray actors: started over the cluster, replaced when they die."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymerge.cluster import patience, signs_of_life
from raymerge.cluster.evaluator import Evaluator, EvaluatorJob, MergeReport, ScoreReport
from raymerge.cluster.evaluator_gpus import Node, visible_gpu_bytes
from raymerge.cluster.evaluator_group import Call, Event, Failure, Gone, Raised, Returned, answer
from raymerge.cluster.signs_of_life import SignsOfLife
from raymerge.merge_actors.actor_log import begin_log
from raymerge.merge_actors.errors import ClusterError, RaymergeError
from raymerge.merge_actors.place_check import check_place
from raymerge.merge_actors.ray_metrics import EvaluatorMetrics
from raymerge.merge_actors.versions import installed_versions

#: How long nodes may take to say how much memory their GPUs have.
_ASK_SECONDS = 60.0
#: Evaluators that may die one after the other, per evaluator, without an answer from any.
_LOSSES_PER_EVALUATOR = 4


# A thread for merging, one for scoring, and one of its own that says that the process lives; a point is done again
# elsewhere, so an actor is never restarted.
@ray.remote(max_concurrency=2, max_restarts=0, max_task_retries=0, concurrency_groups={"life": 1})
class RayEvaluator:
    """`Evaluator` as an actor."""

    def __init__(self, job: EvaluatorJob, versions: Mapping[str, str]) -> None:
        self._refusal: ClusterError | None = None
        try:
            check_place(versions, job.device)
        except ClusterError as error:  # told by `begin`: an actor that fails to start only says that it did
            self._refusal = error
            return
        if job.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        run = f"job {ray.get_runtime_context().get_job_id()}"
        begin_log(f"evaluator, Ray's {run}")
        self._metrics = EvaluatorMetrics(run)
        sys.setswitchinterval(2e-4)  # as for merge workers: threads hand each other the interpreter often
        self._evaluator = Evaluator(job)
        self._is_cuda = job.device == "cuda"

    def answer(self, call: Call) -> MergeReport | ScoreReport | Failure:
        """Carry out a call."""
        report = answer(self._evaluator, call)
        if isinstance(report, MergeReport):
            self._metrics.count_merge(report.seconds, report.bytes_read)
        elif isinstance(report, ScoreReport):
            self._metrics.count_score(report.seconds, report.num_forward_passes)
        elif self._is_cuda:
            _leave_if_broken()
        self._metrics.note_gpu_peak("cuda" if self._is_cuda else "cpu")
        return report

    def begin(self) -> int:
        """Return the process id.

        Raises:
            ClusterError: versions differ from the driver's, or torch cannot use the GPU.
        """
        if self._refusal is not None:
            raise self._refusal
        return os.getpid()

    @ray.method(concurrency_group="life")  # type: ignore[untyped-decorator]
    def is_alive(self) -> bool:
        """Answer, whatever the other threads do."""
        return True


def nodes(with_memory: bool = False) -> list[Node]:
    """Return the machines of the cluster.

    Args:
        with_memory: ask those with GPUs how much memory these have.
    """
    found = [node for node in ray.nodes() if node["Alive"]]
    with_gpus = [node["NodeID"] for node in found if with_memory and node["Resources"].get("GPU")]
    gpu_bytes = _ask_for_gpu_bytes(with_gpus)
    return [
        Node(
            int(each["Resources"].get("CPU", 0)),
            int(each["Resources"].get("GPU", 0)),
            gpu_bytes.get(each["NodeID"]),
        )
        for each in found
    ]


#: A process of its own, which ends: it may have opened the GPUs.
_GPU_BYTES: Any = ray.remote(num_cpus=0, max_calls=1, max_retries=0)(visible_gpu_bytes)


def _ask_for_gpu_bytes(node_ids: Sequence[str]) -> dict[str, int | None]:
    """Return the memory of the smallest GPU of each node; a node that does not answer has none that is known."""
    asked = {
        each: _GPU_BYTES.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=each, soft=False)
        ).remote()
        for each in node_ids
    }
    ready, _ = (
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ASK_SECONDS) if asked else ([], [])
    )
    answers: dict[str, int | None] = {}
    for node_id, reference in asked.items():
        if reference in ready:
            with contextlib.suppress(RayError):
                answers[node_id] = ray.get(reference)
    return answers


def wait_for_a_gpu(on_remark: Callable[[str], None]) -> None:
    """Wait until the cluster, which has none, has started a machine with a GPU; it starts one because we ask.

    Raises:
        ClusterError: none came in time.
    """
    asked = _GPU_BYTES.options(num_gpus=1).remote()
    started = said = time.monotonic()
    try:
        while not any(node.num_gpus for node in nodes()):
            time.sleep(1.0)
            now = time.monotonic()
            if now - started > patience.START_SECONDS:
                raise ClusterError(
                    f"no GPU came in {now - started:.0f} s: the cluster has {patience.resources()}"
                )
            if now - said > patience.REMARK_SECONDS:
                said = now
                on_remark(f"waiting for a machine with a GPU: the cluster has {patience.resources()}")
    finally:
        ray.cancel(asked, force=True)


class RayEvaluators:
    """Actors on a Ray cluster that this process is connected to."""

    def __init__(
        self,
        num_evaluators: int,
        job: EvaluatorJob,
        *,
        num_cpus: float,
        num_gpus: float,
        on_remark: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._on_remark, self._last_remark = on_remark, 0.0
        self.num_slots = job.num_slots
        self.pids: dict[int, int] = {}
        """Process ids of the actors that are ready."""
        self._num_evaluators, self._job = num_evaluators, job
        self._options: dict[str, Any] = {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "scheduling_strategy": "SPREAD",
        }
        self._in_store: Any = None
        self._actors: dict[int, Any] = {}
        self._starting: dict[Any, tuple[int, Any]] = {}
        self._in_flight: dict[Any, tuple[int, Call]] = {}
        self._life = SignsOfLife(lambda number: self._actors[number].is_alive.remote())
        self._next_number = 0
        self._losses_left = 0
        self._last_alive = 0.0

    def start(self) -> None:
        """Start the actors that are missing and return when one is ready; the others join as they come.

        Raises:
            ClusterError: the cluster gives none in time, or they die as they start.
        """
        if self._in_store is None:
            self._in_store = ray.put(self._job)
        self._losses_left = _LOSSES_PER_EVALUATOR * self._num_evaluators
        while len(self._actors) + len(self._starting) < self._num_evaluators:
            self._launch()
        self._last_alive = self._last_remark = time.monotonic()
        while not self._actors:
            self.wait(1.0)

    def evaluators(self) -> tuple[int, ...]:
        """Return the numbers of the actors that are ready."""
        return tuple(self._actors)

    def submit(self, evaluator: int, call: Call) -> None:
        """Send a call to an actor."""
        self._in_flight[self._actors[evaluator].answer.remote(call)] = (evaluator, call)

    def wait(self, timeout_seconds: float) -> list[Event]:
        """Return answers and losses; start a replacement for a lost actor.

        Raises:
            ClusterError: for a long time there was no evaluator at all, or too many were lost.
        """
        if self._actors:
            self._last_alive = time.monotonic()
        elif time.monotonic() - self._last_alive > self._patience():
            raise ClusterError(
                f"no evaluator could be started in {time.monotonic() - self._last_alive:.0f} s: {self._shortage()}"
            )
        elif time.monotonic() - self._last_remark > patience.REMARK_SECONDS:
            self._last_remark = time.monotonic()
            self._on_remark(f"waiting for evaluators: {self._shortage()}")
        self._life.look(self._actors.keys() & {number for number, _ in self._in_flight.values()})
        waiting = [*self._in_flight, *self._starting, *self._life.questions()]
        ready, _ = ray.wait(waiting, num_returns=1, timeout=timeout_seconds, fetch_local=True)
        if ready and len(waiting) > 1:
            ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=True)
        events: list[Event] = []
        for reference in ready:
            if reference in self._starting:
                events += self._joined(reference)
            elif reference in self._in_flight:
                self._life.heard(self._in_flight[reference][0])
                events += self._answered(reference)
            else:
                self._life.answered(reference)
        for number in self._life.silent():
            if number in self._actors:
                seconds = f"{signs_of_life.SILENT_SECONDS:g} s"
                reason = f"evaluator {number} hangs: no answer in {seconds}"
                events += self._lose(number, self._actors[number], reason)
        return events

    def close(self) -> None:
        """Kill every actor."""
        for actor in [*self._actors.values(), *(actor for _, actor in self._starting.values())]:
            ray.kill(actor)
        self._actors, self._starting, self._in_flight = {}, {}, {}
        self.pids.clear()

    def _launch(self) -> None:
        number = self._next_number
        self._next_number += 1
        skin: Any = RayEvaluator  # the decorator's type is Ray's own
        actor = skin.options(**self._options).remote(self._in_store, installed_versions())
        self._starting[actor.begin.remote()] = (number, actor)

    def _joined(self, reference: Any) -> list[Event]:
        number, actor = self._starting.pop(reference)
        try:
            self.pids[number] = ray.get(reference, timeout=30)
        except RayTaskError as error:  # of `begin`: the next one would say the same
            raise error.cause if isinstance(error.cause, RaymergeError) else error from None
        except (RayError, GetTimeoutError) as error:
            return self._lose(number, actor, f"evaluator {number} did not start: {_first_line(error)}")
        self._actors[number] = actor
        return []

    def _answered(self, reference: Any) -> list[Event]:
        number, call = self._in_flight.pop(reference)
        try:
            report = ray.get(reference, timeout=60)
        except RayTaskError as error:  # an answer that could not be carried over
            return [Raised(number, call, Failure(str(error)))]
        except (RayError, GetTimeoutError) as error:
            return self._lose(number, self._actors.get(number), _first_line(error))
        self._losses_left = _LOSSES_PER_EVALUATOR * self._num_evaluators
        if isinstance(report, Failure):
            return [Raised(number, call, report)]
        return [Returned(number, call, report)]

    def _lose(self, number: int, actor: Any, reason: str) -> list[Event]:
        """Forget a dead actor and start another."""
        self._in_flight = {
            reference: entry for reference, entry in self._in_flight.items() if entry[0] != number
        }
        self._actors.pop(number, None)
        self.pids.pop(number, None)
        if actor is not None:
            ray.kill(actor)
        self._losses_left -= 1
        if self._losses_left < 0:
            raise ClusterError(
                f"evaluators died again and again, the last one with: {reason}; see Ray's logs of the nodes; if "
                "memory ran out, use fewer --workers"
            )
        self._launch()
        return [Gone(number, reason)]

    def _patience(self) -> float:
        return patience.seconds_to_wait(
            num_cpus=self._options["num_cpus"], num_gpus=self._options["num_gpus"]
        )

    def _shortage(self) -> str:
        """Say what was asked of the cluster and what it has."""
        return (
            f"asked for {self._num_evaluators} of {self._options['num_cpus']:g} CPU and "
            f"{self._options['num_gpus']:g} GPU each, the cluster has {patience.resources()}"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _leave_if_broken() -> None:
    """End the process if its CUDA context is beyond use: every later call would fail too."""
    import torch

    try:
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.synchronize(gpu)
        torch.cuda.empty_cache()
    except RuntimeError:
        os._exit(1)
