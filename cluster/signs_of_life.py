"""Ask actors that have work and say nothing whether they are there: a slow one answers, one that hangs does not.

The answer comes from a thread of the actor that waits for nothing else, so work of any length does not delay it. A
process that was stopped, or whose node was, gives none and no error either: without asking, a run would wait for it
without end. Time in which the driver itself stood still does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

#: An actor with work that has sent nothing for so long is asked.
QUIET_SECONDS = 30.0
#: After so long without an answer it is given up. A machine that swaps may well take a minute.
SILENT_SECONDS = 90.0
#: A driver that looks less often than this was stopped, or waited for something else.
_MOST_SECONDS_BETWEEN_LOOKS = 5.0


class SignsOfLife:
    """When each actor was heard of last, and which were asked."""

    def __init__(
        self,
        ask: Callable[[int], Any],
        quiet_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Know of no actor yet.

        Args:
            ask: sends an actor, by its number, the question; returns a reference to its answer.
            quiet_seconds: ask after so long, None means `QUIET_SECONDS`.
            clock: tells seconds.
        """
        self._ask, self._quiet_seconds, self._clock = ask, quiet_seconds, clock
        #: how long this process was there to listen, and when it looked last
        self._seconds, self._last_look = 0.0, clock()
        self._heard: dict[int, float] = {}
        #: reference to an answer -> who was asked, and when
        self._asked: dict[Any, tuple[int, float]] = {}

    def look(self, busy: Collection[int]) -> None:
        """Ask those that have work and were not heard of for long; the others need not answer."""
        now = self._clock()
        self._seconds += min(now - self._last_look, _MOST_SECONDS_BETWEEN_LOOKS)
        self._last_look = now
        self._heard = {worker: self._heard.get(worker, self._seconds) for worker in busy}
        self._asked = {key: asked for key, asked in self._asked.items() if asked[0] in self._heard}
        asked_already = {worker for worker, _ in self._asked.values()}
        quiet = QUIET_SECONDS if self._quiet_seconds is None else self._quiet_seconds
        for worker, since in self._heard.items():
            if worker not in asked_already and self._seconds - since >= quiet:
                self._asked[self._ask(worker)] = (worker, self._seconds)

    def questions(self) -> list[Any]:
        """Return the references to answers that are due, to wait for them beside the work."""
        return list(self._asked)

    def answered(self, reference: Any) -> int | None:
        """Take an answer in, or the error in its place; return whose it is, None if it is none of ours."""
        worker, _ = self._asked.pop(reference, (None, 0.0))
        if worker is not None:
            self._heard[worker] = self._seconds
        return worker

    def heard(self, worker: int) -> None:
        """Note that an actor has sent something."""
        if worker in self._heard:
            self._heard[worker] = self._seconds

    def silent(self) -> list[int]:
        """Return the actors that have not answered for too long; call it when what has come was taken in."""
        return sorted(
            worker
            for worker, since in self._asked.values()
            if self._seconds - max(since, self._heard[worker]) > SILENT_SECONDS
        )
