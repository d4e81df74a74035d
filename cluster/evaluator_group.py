"""A group of evaluators as the runner of a grid sees it, and the in-process one.

Two backends have the same verbs, like those of merge workers (`worker_group.py`). This one runs
evaluators on threads of the driver's process.
"""

from __future__ import annotations

import concurrent.futures
import queue
import traceback
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from raymerge.cluster.evaluator import Evaluator, EvaluatorJob, MergeReport, ScoreReport
from raymerge.cluster.evaluator_slot import NoRoomError


@dataclass(frozen=True, slots=True)
class Call:
    """A call of an evaluator's method."""

    method: Literal["merge", "score"]
    slot: int
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Returned:
    """A call came back with a report."""

    evaluator: int
    call: Call
    report: MergeReport | ScoreReport


@dataclass(frozen=True, slots=True)
class Failure:
    """What a call raised."""

    error: str
    """Traceback."""
    is_full: bool = False
    """The device has no room for another model: the slot is of no use."""


@dataclass(frozen=True, slots=True)
class Raised:
    """A call raised; repeating it would raise again."""

    evaluator: int
    call: Call
    failure: Failure


@dataclass(frozen=True, slots=True)
class Gone:
    """An evaluator died, with everything in its slots."""

    evaluator: int
    reason: str


Event = Returned | Raised | Gone


class EvaluatorGroup(Protocol):
    """Evaluators that answer calls in any order."""

    num_slots: int
    """Of each evaluator."""

    def start(self) -> None:
        """Start the evaluators, if they are not there; returns when there is one."""

    def evaluators(self) -> tuple[int, ...]:
        """Return the numbers of the evaluators that are alive; a number is never used again."""

    def submit(self, evaluator: int, call: Call) -> None:
        """Send a call; returns at once. At most one call of each method is under way in an evaluator."""

    def wait(self, timeout_seconds: float) -> list[Event]:
        """Return what happened, at the latest after the time-out."""

    def close(self) -> None:
        """Stop the evaluators."""


class ThreadEvaluators:
    """Evaluators on threads of this process."""

    def __init__(self, num_evaluators: int, job: EvaluatorJob) -> None:
        self.num_slots = job.num_slots
        self._num_evaluators, self._job = num_evaluators, job
        self._evaluators: list[Evaluator] = []
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def start(self) -> None:
        """Make the evaluators."""
        if not self._evaluators:
            self._evaluators = [Evaluator(self._job, number) for number in range(self._num_evaluators)]
            self._pool = concurrent.futures.ThreadPoolExecutor(
                2 * self._num_evaluators, thread_name_prefix="evaluator"
            )

    def evaluators(self) -> tuple[int, ...]:
        """Return the numbers of the evaluators."""
        return tuple(range(len(self._evaluators)))

    def submit(self, evaluator: int, call: Call) -> None:
        """Run a call on a thread."""
        assert self._pool is not None
        self._pool.submit(self._carry_out, evaluator, call)

    def wait(self, timeout_seconds: float) -> list[Event]:
        """Return the events that are there; wait for the first."""
        try:
            events = [self._events.get(timeout=timeout_seconds)]
        except queue.Empty:
            return []
        while not self._events.empty():
            events.append(self._events.get())
        return events

    def close(self) -> None:
        """Let what is under way end."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for evaluator in self._evaluators:
            evaluator.close()
        self._evaluators, self._pool = [], None

    def _carry_out(self, number: int, call: Call) -> None:
        report = answer(self._evaluators[number], call)
        self._events.put(
            Raised(number, call, report) if isinstance(report, Failure) else Returned(number, call, report)
        )


def answer(evaluator: Evaluator, call: Call) -> MergeReport | ScoreReport | Failure:
    """Carry out a call; an error is returned as its traceback, which travels anywhere."""
    try:
        report: MergeReport | ScoreReport = getattr(evaluator, call.method)(call.slot, *call.arguments)
        return report
    except Exception as error:
        return Failure("".join(traceback.format_exception(error)), isinstance(error, NoRoomError))
