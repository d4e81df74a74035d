"""Which worker has which task since when, and which task is worth giving to a second worker.

When there is nothing left to hand out, or all waits for one answer, a task of a slow worker is given to an idle one
as well, and if that hangs too to the next. The first result counts; both write the same bytes to the same place.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

#: A task is overdue when it has taken so many times as long as tasks do ...
_TIMES_AS_LONG = 2.0
#: ... and at least this many seconds: less is not worth reading the inputs twice.
LEAST_SECONDS = 3.0
#: ... or, where no task has ended yet to compare with, this many.
UNKNOWN_SECONDS = 300.0


class InFlight:
    """Tasks under way, by number."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        #: number -> worker -> when the task was handed to it
        self._began: dict[int, dict[int, float]] = {}
        #: number -> how many times as long as other tasks it may take
        self._patience: dict[int, float] = {}
        self._done: set[int] = set()
        self._durations: list[float] = []

    def begin(self, number: int, worker: int, patience: float = 1.0) -> None:
        """Note that a worker was given a task, which may take `patience` times as long as others."""
        self._began.setdefault(number, {})[worker] = self._clock()
        self._patience[number] = patience

    def end(self, number: int, worker: int) -> None:
        """Note that a worker has done a task."""
        self._done.add(number)
        holders = self._began.get(number, {})
        if worker in holders:
            self._durations.append(self._clock() - holders.pop(worker))
        if not holders:
            self._began.pop(number, None)

    def lose(self, number: int, worker: int) -> bool:
        """Note that a worker died with a task or failed at it; return whether another worker still has it."""
        holders = self._began.get(number, {})
        holders.pop(worker, None)
        if not holders:
            self._began.pop(number, None)
        return bool(holders)

    def workers(self) -> set[int]:
        """Return the workers that have a task."""
        return {worker for holders in self._began.values() for worker in holders}

    def overdue(self, worker: int) -> int | None:
        """Return the task that other workers have had for longest, if that is too long.

        Those who have it may all hang (of a node that is lost, or stopped), so a third may take it as well; each more
        waits twice as long as the one before, from when the last of them began.
        """
        now = self._clock()
        elsewhere = {
            number: (max(holders.values()), 2.0 ** (len(holders) - 1))
            for number, holders in self._began.items()
            if number not in self._done and worker not in holders
        }
        if not elsewhere:
            return None
        usual = statistics.median(self._durations) if self._durations else None
        limit = UNKNOWN_SECONDS if usual is None else max(LEAST_SECONDS, _TIMES_AS_LONG * usual)
        overdue = [
            number
            for number, (since, times) in elsewhere.items()
            if now - since > limit * times * (1.0 if usual is None else self._patience[number])
        ]
        return min(overdue, key=lambda each: (elsewhere[each][0], each), default=None)
