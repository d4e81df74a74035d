"""Workers in virtual time: the real controller drives a real plan, and seconds are computed instead of spent.

Each task of a worker passes three phases, as in `merge_actors/worker.py`: its reads come through the storage and the
node's link, its bytes through the device, its writes through the link and the storage again. Every resource serves
one request after the other at its rate; a worker has two tasks under way, and the controller keeps a third at the
door.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from raymerge.cluster.worker_group import Done, Event, Instruction
from raymerge.merge_actors.methods.prepare import TensorState
from raymerge.merge_actors.task import MeasureTask, RunContext, TaskReport
from raymerge.merge_actors.worker import NUM_LANES


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the machines can do, in 10^9 bytes per second."""

    node_read: float
    """Of a node's link, inputs."""
    node_write: float
    """Of a node's link, outputs."""
    device: float
    """Of one worker's merge, over inputs and outputs together, copies to and from the device included."""
    storage: float
    """Of the storage, over all nodes."""
    task_seconds: float = 0.002
    """Of the driver and Ray for each task."""


@dataclass(slots=True)
class _Resource:
    rate: float
    free_at: float = 0.0
    moved_bytes: int = 0

    def serve(self, at: float, num_bytes: int) -> float:
        self.free_at = max(self.free_at, at) + num_bytes / (self.rate * 1e9)
        self.moved_bytes += num_bytes
        return self.free_at


@dataclass(slots=True)
class _Worker:
    node: int
    device: _Resource
    waiting: deque[Instruction] = field(default_factory=deque)
    num_running: int = 0


class VirtualGroup:
    """A group of workers that only exist in the computation."""

    def __init__(self, num_workers: int, workers_per_node: int, rates: Rates) -> None:
        num_nodes = -(-num_workers // workers_per_node)
        self._rates = rates
        self._read = [_Resource(rates.node_read) for _ in range(num_nodes)]
        self._write = [_Resource(rates.node_write) for _ in range(num_nodes)]
        self._storage = _Resource(rates.storage)
        self._workers = [_Worker(i // workers_per_node, _Resource(rates.device)) for i in range(num_workers)]
        #: (time, order, phase just ended, worker, instruction)
        self._steps: list[tuple[float, int, str, int, Instruction]] = []
        self._order = itertools.count()
        self._driver_free_at = 0.0
        self.now = 0.0

    def start(self, context: RunContext) -> None:
        """Begin; nothing has to be made ready."""

    def workers(self) -> tuple[int, ...]:
        """Return the numbers of the workers."""
        return tuple(range(len(self._workers)))

    def submit(self, worker: int, instruction: Instruction, states: Mapping[int, TensorState]) -> None:
        """Queue an instruction; the driver takes its time for each."""
        self._driver_free_at = max(self._driver_free_at, self.now) + self._rates.task_seconds
        self._push(self._driver_free_at, "arrive", worker, instruction)

    def wait(self, timeout_seconds: float) -> list[Event]:
        """Go on to the next task that ends."""
        while self._steps:
            self.now, _, phase, number, instruction = heapq.heappop(self._steps)
            worker = self._workers[number]
            if phase == "arrive":
                worker.waiting.append(instruction)
                self._begin(number)
            elif phase == "read":
                moved = instruction.read_bytes + instruction.write_bytes
                self._push(worker.device.serve(self.now, moved), "merge", number, instruction)
            elif phase == "merge":
                self._push(
                    self._through(self._write, worker, instruction.write_bytes), "write", number, instruction
                )
            else:
                worker.num_running -= 1
                self._begin(number)
                return [Done(number, instruction, _report(instruction))]
        return []

    def abandon(self, worker: int) -> None:
        """Give up what a worker does; no time passes."""

    def close(self) -> None:
        """End; nothing has to be stopped."""

    def node_bytes(self) -> list[tuple[int, int]]:
        """Return the bytes that each node read and wrote."""
        return [
            (read.moved_bytes, write.moved_bytes) for read, write in zip(self._read, self._write, strict=True)
        ]

    def device_seconds(self) -> list[float]:
        """Return how long each worker's device was busy."""
        return [worker.device.moved_bytes / (self._rates.device * 1e9) for worker in self._workers]

    def _begin(self, number: int) -> None:
        worker = self._workers[number]
        while worker.waiting and worker.num_running < NUM_LANES:
            instruction = worker.waiting.popleft()
            worker.num_running += 1
            self._push(self._through(self._read, worker, instruction.read_bytes), "read", number, instruction)

    def _through(self, links: list[_Resource], worker: _Worker, num_bytes: int) -> float:
        """Return when bytes have passed the storage and a node's link, whichever is the later."""
        return max(self._storage.serve(self.now, num_bytes), links[worker.node].serve(self.now, num_bytes))

    def _push(self, at: float, phase: str, worker: int, instruction: Instruction) -> None:
        heapq.heappush(self._steps, (at, next(self._order), phase, worker, instruction))


def _report(instruction: Instruction) -> TaskReport:
    assert not isinstance(instruction, MeasureTask), "the methods of this benchmark measure nothing"
    return TaskReport(
        number=instruction.number,
        pieces=(),
        read_bytes=instruction.read_bytes,
        write_bytes=instruction.write_bytes,
        read_seconds=0.0,
        merge_seconds=0.0,
        write_seconds=0.0,
    )
