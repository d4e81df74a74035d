"""The merge workers of an evaluator: threads that stay, with their buffers, from point to point.

A worker group like the others (`worker_group.py`), but its files are memory and a new run costs
nothing. There is no storage to overlap with, so a thread is a worker of its own with one task at a time.
"""

from __future__ import annotations

import concurrent.futures
import queue
from collections.abc import Mapping, Sequence

from raymerge.cluster.worker_group import Done, Event, Failed, Instruction, Report, carry_out
from raymerge.merge_actors.memory_files import MemoryFiles
from raymerge.merge_actors.methods.prepare import TensorState
from raymerge.merge_actors.run_memory import RunMemory
from raymerge.merge_actors.task import RunContext
from raymerge.merge_actors.worker import NUM_LANES, MergeWorker


class ResidentGroup:
    """Workers on threads of this process that share one `MemoryFiles`."""

    def __init__(self, num_workers: int, files: MemoryFiles, gpus: Sequence[int], memory: RunMemory) -> None:
        """Take what the workers share.

        Args:
            num_workers: threads.
            files: of the evaluator.
            gpus: where to merge, by number; none for the CPU. Points are merged on all of them.
            memory: of earlier points.
        """
        # A GPU does not get faster by more threads than keep its stream filled.
        self._num_workers = min(num_workers, NUM_LANES * len(gpus)) if gpus else num_workers
        self._gpus = tuple(gpus)
        self._files, self._memory = files, memory
        self._workers: list[MergeWorker] = []
        self._pools: list[concurrent.futures.ThreadPoolExecutor] = []
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._in_flight: set[concurrent.futures.Future[Report]] = set()

    def start(self, context: RunContext) -> None:
        """Begin a run; what an earlier run that failed left under way is waited for."""
        concurrent.futures.wait(self._in_flight)
        self._in_flight.clear()
        self._events = queue.SimpleQueue()
        if not self._workers:
            for number in range(self._num_workers):
                gpu = self._gpus[number % len(self._gpus)] if self._gpus else 0
                self._workers.append(MergeWorker(context, self._files, gpu, self._memory))
                self._pools.append(
                    concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=f"merge-{number}")
                )
        for worker in self._workers:
            worker.begin(context)
        self._workers[0].check()

    def workers(self) -> tuple[int, ...]:
        """Return the numbers of the workers."""
        return tuple(range(len(self._workers)))

    def submit(self, worker: int, instruction: Instruction, states: Mapping[int, TensorState]) -> None:
        """Queue an instruction on a worker's thread."""
        events = self._events
        future = self._pools[worker].submit(carry_out, self._workers[worker], instruction, states)
        self._in_flight.add(future)

        def report(done: concurrent.futures.Future[Report]) -> None:
            if done.cancelled():
                return
            error = done.exception()
            events.put(
                Done(worker, instruction, done.result())
                if error is None
                else Failed(worker, instruction, error)
            )

        future.add_done_callback(report)

    def wait(self, timeout_seconds: float) -> list[Event]:
        """Return the events that are there; wait for the first."""
        try:
            events = [self._events.get(timeout=timeout_seconds)]
        except queue.Empty:
            return []
        while not self._events.empty():
            events.append(self._events.get())
        return events

    def drop(self) -> None:
        """Cancel what waits and let what is under way end: after a failure."""
        for future in self._in_flight:
            future.cancel()
        concurrent.futures.wait(self._in_flight)
        self._in_flight.clear()

    def abandon(self, worker: int) -> None:
        """Leave a thread to its end; every task here is its own."""

    def close(self) -> None:
        """End the threads and close files."""
        self.drop()
        for pool in self._pools:
            pool.shutdown(wait=True)
        self._files.close()
        self._workers, self._pools = [], []
