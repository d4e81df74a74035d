"""Merge workers as Ray actors: started on the cluster, replaced when they die."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from raymerge.cluster import patience, signs_of_life
from raymerge.cluster.signs_of_life import SignsOfLife
from raymerge.cluster.worker_group import Done, Event, Failed, Instruction, Lost
from raymerge.merge_actors.errors import ClusterError
from raymerge.merge_actors.methods.prepare import TensorState
from raymerge.merge_actors.ray_metrics import DriverMetrics
from raymerge.merge_actors.ray_worker import RayMergeWorker
from raymerge.merge_actors.task import FileTask, MeasureTask, MergeTask, RunContext, SolveTask

#: How long to wait for any worker from a cluster that has not enough for one, before saying what is missing.
START_SECONDS = patience.START_SECONDS
#: How long to wait for any worker from a cluster that is busy with other work.
BUSY_SECONDS = patience.BUSY_SECONDS
#: How long to wait for the last of them, where a run needs to know how many there are.
GATHER_SECONDS = 60.0
#: How often to say that we wait, and how often to look for nodes that have joined.
_REMARK_SECONDS, _GROW_SECONDS = 60.0, 5.0
#: What Ray says of a worker that was killed for its memory.
_MEMORY = re.compile(r"out of memory|OutOfMemory|\bOOM\b|low on memory", re.IGNORECASE)
#: How much is repeated of what Ray says.
_MOST_LETTERS = 800
#: Losses of workers that a run survives, per worker asked for.
LOSSES_PER_WORKER = 3


class RayGroup:
    """Actors on a Ray cluster that this process is connected to."""

    def __init__(
        self,
        num_workers: int,
        *,
        num_cpus: float,
        num_gpus: float,
        how_many: Callable[[], int] | None = None,
        on_remark: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Describe the actors.

        Args:
            num_workers: how many; those that the cluster cannot place yet join when it can.
            num_cpus: of each.
            num_gpus: of each.
            how_many: says how many the cluster has room for by now; None keeps to `num_workers`.
            on_remark: told what a user who waits should know.
        """
        self._num_workers = num_workers
        self._options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self._how_many, self._on_remark = how_many, on_remark
        self._run_context: RunContext | None = None
        #: the same in Ray's store
        self._context: Any = None
        self._actors: dict[int, Any] = {}
        self._starting: dict[Any, tuple[int, Any]] = {}
        #: those of the starting actors that have worked before: they answer while they begin the next run
        self._called_again: set[int] = set()
        self._in_flight: dict[Any, tuple[int, Instruction]] = {}
        self._life = SignsOfLife(lambda worker: self._all_actors()[worker].is_alive.remote())
        self._next_number = 0
        self._metrics: DriverMetrics | None = None
        self._run = -1
        self._losses_left = LOSSES_PER_WORKER * num_workers
        #: when there was a worker last, when the user was told that there is none, when we looked for new nodes
        self._last_alive = self._last_remark = self._last_look = 0.0

    def start(self, context: RunContext) -> None:
        """Set all actors up and return when the first is ready; the others join as they come.

        Actors of an earlier run are used again; missing ones are started.

        Raises:
            ClusterError: no worker came up in time, or a node does not see a path.
        """
        self._run_context, self._context = context, ray.put(context)
        self._run += 1
        self._losses_left = LOSSES_PER_WORKER * self._num_workers
        actors = self._all_actors()
        self._called_again |= self._actors.keys()
        self._actors, self._starting = {}, {}
        for number, actor in actors.items():
            self._set_up(number, actor)
        while len(self._starting) < self._num_workers:
            self._launch()
        self._last_alive = self._last_remark = self._last_look = time.monotonic()
        while not self._actors:
            for event in self.wait(1.0):
                if isinstance(event, Failed):
                    raise event.error

    def hosts(self) -> list[Any]:
        """Wait until the actors are ready and return them: for what else is to run on their devices.

        Those that the cluster does not give soon are given up: two runs that hold half of a cluster each must not wait
        for each other.
        """
        deadline = time.monotonic() + GATHER_SECONDS
        while self._starting and time.monotonic() < deadline:
            for event in self.wait(1.0):
                if isinstance(event, Failed):
                    raise event.error
        for _, actor in self._starting.values():
            ray.kill(actor)
        self._starting.clear()
        self._num_workers = len(self._actors)
        return [self._actors[number] for number in sorted(self._actors)]

    def workers(self) -> tuple[int, ...]:
        """Return the numbers of the actors that are ready."""
        return tuple(self._actors)

    def submit(self, worker: int, instruction: Instruction, states: Mapping[int, TensorState]) -> None:
        """Send an instruction to an actor."""
        actor = self._actors[worker]
        if isinstance(instruction, MeasureTask):
            reference = actor.measure.remote(instruction)
        elif isinstance(instruction, SolveTask):
            reference = actor.solve.remote(instruction)
        elif isinstance(instruction, FileTask):
            reference = actor.make_files.remote(instruction, states)
        else:
            reference = actor.merge.remote(instruction, states)
        self._in_flight[reference] = (worker, instruction)

    def wait(self, timeout_seconds: float) -> list[Event]:
        """Return finished, failed and lost instructions; start a replacement for a lost actor.

        Raises:
            ClusterError: for a long time there was no worker at all, or too many were lost.
        """
        self._look_after_the_cluster()
        busy = {worker for worker, _ in self._in_flight.values()} | self._called_again
        self._life.look(self._all_actors().keys() & busy)
        waiting = [*self._in_flight, *self._starting, *self._life.questions()]
        ready, _ = ray.wait(waiting, num_returns=1, timeout=timeout_seconds, fetch_local=True)
        if ready:  # everything else that is there already, in one sweep
            ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=True)
        events: list[Event] = []
        for reference in ready:
            if reference in self._starting:
                events += self._joined(reference)
            elif reference in self._in_flight:
                self._life.heard(self._in_flight[reference][0])
                events += self._finished(reference)
            else:
                self._life.answered(reference)
        for worker in self._life.silent():
            if worker in self._all_actors():
                reason = f"worker {worker} hangs: no answer in {signs_of_life.SILENT_SECONDS:g} s"
                self._on_remark(f"{reason}; another takes its place")
                events += self._lose(worker, reason)
        return events

    def abandon(self, worker: int) -> None:
        """Kill an actor that is too slow to be waited for; the next start replaces it."""
        actor = self._actors.pop(worker, None)
        if actor is not None:
            ray.kill(actor)
        self._in_flight = {
            reference: entry for reference, entry in self._in_flight.items() if entry[0] != worker
        }

    def close(self) -> None:
        """Kill every actor."""
        for actor in self._all_actors().values():
            ray.kill(actor)
        self._actors, self._starting, self._in_flight = {}, {}, {}

    def _look_after_the_cluster(self) -> None:
        """Complain if there has been no worker for long, and start more where nodes have joined."""
        now = time.monotonic()
        if self._actors:
            self._last_alive = now
            if self._how_many is not None and now - self._last_look > _GROW_SECONDS:
                self._last_look = now
                # No more than there is room for: an actor that waits is a demand by which a cluster grows.
                missing = self._how_many() - self._num_workers
                for _ in range(min(missing, _room(self._options)) if missing > 0 else 0):
                    self._num_workers += 1
                    self._launch()
        elif now - self._last_alive > (BUSY_SECONDS if _fits(self._options) else START_SECONDS):
            raise ClusterError(
                f"no worker could be started in {now - self._last_alive:.0f} s: "
                + _shortage(self._options, self._num_workers)
            )
        elif now - self._last_remark > _REMARK_SECONDS:
            self._last_remark = now
            self._on_remark(f"waiting for workers: {_shortage(self._options, self._num_workers)}")

    def _launch(self) -> None:
        number = self._next_number
        self._next_number += 1
        skin: Any = RayMergeWorker  # the decorator's type is Ray's own
        actor = skin.options(**self._options).remote()
        self._set_up(number, actor)

    def _set_up(self, number: int, actor: Any) -> None:
        self._starting[actor.setup.remote(self._context, self._run)] = (number, actor)

    def _all_actors(self) -> dict[int, Any]:
        """Return the actors that are ready and those that are starting."""
        return {**self._actors, **dict(self._starting.values())}

    def _joined(self, reference: Any) -> list[Event]:
        number, actor = self._starting[reference]
        try:
            ray.get(reference, timeout=30)
        except RayTaskError as error:
            del self._starting[reference]
            return [Failed(number, MergeTask(number=-1, pieces=()), _cause(error))]
        except RayError as error:  # it died, hangs, or its environment cannot be made on its node
            return self._lose(number, f"worker {number} did not start: {_in_one_line(error)}")
        del self._starting[reference]
        self._called_again.discard(number)
        self._actors[number] = actor
        return []

    def _finished(self, reference: Any) -> list[Event]:
        worker, instruction = self._in_flight.pop(reference)
        try:
            return [Done(worker, instruction, ray.get(reference, timeout=60))]
        except RayTaskError as error:
            cause = _cause(error)
            if not _is_memory(cause):
                return [Failed(worker, instruction, cause)]
            self._in_flight[reference] = (worker, instruction)
            return self._lose(worker, f"out of memory: {cause}")
        except RayError as error:  # it died, or its node did before we had what it sent
            self._in_flight[reference] = (worker, instruction)
            return self._lose(worker, _first_line(error))

    def _count_loss(self, num_tasks: int) -> None:
        """Tell Ray's metrics that a worker was lost with its tasks."""
        self._metrics = self._metrics or DriverMetrics()
        self._metrics.count_loss(self._run_context.run_id if self._run_context else "", num_tasks)

    def _lose(self, worker: int, reason: str) -> list[Event]:
        """Forget a dead actor, start another, and hand its instructions back."""
        lost = tuple(instruction for number, instruction in self._in_flight.values() if number == worker)
        self._in_flight = {
            reference: entry for reference, entry in self._in_flight.items() if entry[0] != worker
        }
        actor = self._all_actors().get(worker)
        if actor is not None:  # it may only be slow, and must not hold what its replacement needs
            ray.kill(actor)
        self._actors.pop(worker, None)
        self._starting = {
            reference: entry for reference, entry in self._starting.items() if entry[0] != worker
        }
        self._called_again.discard(worker)
        if _MEMORY.search(reason):
            # Kernel or Ray took the memory back; the next one makes do with less.
            assert self._run_context is not None
            self._run_context = dataclasses.replace(self._run_context, thrift=self._run_context.thrift + 1)
            self._context = ray.put(self._run_context)
            self._on_remark("a worker ran out of memory: its successor holds less of the inputs at once")
        self._count_loss(len(lost))
        self._losses_left -= 1
        if self._losses_left < 0:
            raise ClusterError(
                f"workers died too often, the last one with: {reason}; see Ray's logs of the nodes, and use a "
                "smaller --slice-mib if memory ran out"
            )
        self._launch()
        return [Lost(worker, lost, reason)]


def _cause(error: RayTaskError) -> BaseException:
    """Return the worker's own exception."""
    cause = error.cause
    return cause if isinstance(cause, BaseException) else error


def _first_line(error: RayError) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _in_one_line(error: RayError) -> str:
    """Return what Ray says of an actor that did not start, without the pages it writes about memory."""
    if _MEMORY.search(_first_line(error)):
        return _first_line(error)
    words = " ".join(str(error).split())
    return words if len(words) <= _MOST_LETTERS else f"{words[:_MOST_LETTERS]} ..."


def _is_memory(error: BaseException) -> bool:
    """Return whether an error says that the host's or the device's memory is used up."""
    is_allocation = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or is_allocation


def _shortage(options: Mapping[str, Any], num_workers: int) -> str:
    """Say what was asked of the cluster and what it has."""
    total, free = ray.cluster_resources(), ray.available_resources()
    asked = f"{num_workers} workers of {options['num_cpus']:g} CPU and {options['num_gpus']:g} GPU each"
    have = ", ".join(
        f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind} free" for kind in ("CPU", "GPU")
    )
    return f"asked for {asked}, the cluster has {have}"


def _room(options: Mapping[str, Any]) -> int:
    """Return how many workers could start now."""
    free = ray.available_resources()
    asked = {"CPU": options["num_cpus"], "GPU": options["num_gpus"]}
    return int(min(free.get(name, 0) // number for name, number in asked.items() if number))


def _fits(options: Mapping[str, Any]) -> bool:
    """Return whether the cluster has what one worker needs, be it busy or not."""
    total = ray.cluster_resources()
    return bool(total.get("CPU", 0) >= options["num_cpus"] and total.get("GPU", 0) >= options["num_gpus"])
