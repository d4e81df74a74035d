"""A group of merge workers as the controller sees it, and the in-process one.

Two backends have the same four verbs: `start`, `submit`, `wait`, `close`. This one runs the
workers on threads of the driver's process: for tests, debugging and merges too small to be
worth a start of Ray.
"""

from __future__ import annotations

import concurrent.futures
import queue
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from raymerge.merge_actors.methods.prepare import TensorState
from raymerge.merge_actors.storage.storage_files import StorageFiles
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

Instruction = MergeTask | SolveTask | FileTask | MeasureTask
Report = TaskReport | MeasureReport
#: Tasks in flight per worker: its lanes, and one more on the doorstep.
DEPTH = NUM_LANES + 1


@dataclass(frozen=True, slots=True)
class Done:
    """A worker finished an instruction."""

    worker: int
    instruction: Instruction
    report: Report


@dataclass(frozen=True, slots=True)
class Failed:
    """An instruction raised; repeating it would raise again."""

    worker: int
    instruction: Instruction
    error: BaseException


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker died; its instructions have to be done again."""

    worker: int
    instructions: tuple[Instruction, ...]
    reason: str


Event = Done | Failed | Lost


class WorkerGroup(Protocol):
    """Workers that carry out instructions in any order."""

    def start(self, context: RunContext) -> None:
        """Make the workers ready for a run, and check that each sees its paths."""

    def workers(self) -> tuple[int, ...]:
        """Return the numbers of the workers that are alive."""

    def submit(self, worker: int, instruction: Instruction, states: Mapping[int, TensorState]) -> None:
        """Hand an instruction to a worker; returns at once."""

    def wait(self, timeout_seconds: float) -> list[Event]:
        """Return what happened, at the latest after the time-out; an instruction has one event."""

    def abandon(self, worker: int) -> None:
        """Give up what a worker is doing: the run is over, and another has done it."""

    def close(self) -> None:
        """Stop the workers; instructions under way are given up."""


class InProcessGroup:
    """Workers on threads of this process."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._workers: list[MergeWorker] = []
        self._pools: list[concurrent.futures.ThreadPoolExecutor] = []
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def start(self, context: RunContext) -> None:
        """Make the workers anew."""
        self.close()
        files = StorageFiles(context.stage)
        num_gpus = _num_gpus() if context.device == "cuda" else 1
        for number in range(self._num_workers):
            self._workers.append(MergeWorker(context, files, gpu=number % num_gpus))
            self._pools.append(
                concurrent.futures.ThreadPoolExecutor(NUM_LANES, thread_name_prefix=f"merge-{number}")
            )
        self._workers[0].check()

    def workers(self) -> tuple[int, ...]:
        """Return the numbers of the workers."""
        return tuple(range(len(self._workers)))

    def submit(self, worker: int, instruction: Instruction, states: Mapping[int, TensorState]) -> None:
        """Queue an instruction on a worker's threads."""
        future = self._pools[worker].submit(carry_out, self._workers[worker], instruction, states)
        future.add_done_callback(lambda done: self._report(worker, instruction, done))

    def wait(self, timeout_seconds: float) -> list[Event]:
        """Return the events that are there; wait for the first."""
        try:
            events = [self._events.get(timeout=timeout_seconds)]
        except queue.Empty:
            return []
        while not self._events.empty():
            events.append(self._events.get())
        return events

    def abandon(self, worker: int) -> None:
        """Leave a thread to its end, which the next start waits for: it writes what is there already."""

    def close(self) -> None:
        """Drop what is queued, let what is under way end, close files."""
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._workers, self._pools = [], []
        self._events = queue.SimpleQueue()  # what ended after a failure is no news to the next run

    def _report(self, worker: int, instruction: Instruction, done: concurrent.futures.Future[Report]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        self._events.put(
            Done(worker, instruction, done.result()) if error is None else Failed(worker, instruction, error)
        )


def _num_gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def carry_out(worker: MergeWorker, instruction: Instruction, states: Mapping[int, TensorState]) -> Report:
    """Let a worker do what an instruction says."""
    if isinstance(instruction, MeasureTask):
        return worker.measure(instruction)
    if isinstance(instruction, SolveTask):
        return worker.solve(instruction)
    if isinstance(instruction, FileTask):
        return worker.make_files(instruction, states)
    return worker.merge(instruction, states)
