"""A timeline of a run, for chrome://tracing or ui.perfetto.dev: which worker did what, when, and with what.

In the trace event format: one row per worker and lane, a bar for each task, in it the seconds of reading, merging and
writing. Reading and writing of a task take turns chunk by chunk; the bars show their sums one after the other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from raymerge.cluster.worker_group import Done
from raymerge.merge_actors.files import write_error
from raymerge.merge_actors.task import MeasureReport


class Trace:
    """The timeline of one run, kept in memory until it is written."""

    def __init__(self, path: str, clock: Callable[[], float] = time.perf_counter) -> None:
        """Take a path, and see whether it can be written: nobody wants to hear that after hours of merging.

        Args:
            path: of the file.
            clock: seconds from any moment on.

        Raises:
            OutputError: it cannot be written.
        """
        self._path, self._clock = path, clock
        try:
            open(path, "a").close()
        except OSError as error:
            raise write_error(path, error) from error
        self._began = clock()
        self._events: list[dict[str, Any]] = []
        #: worker -> when each of its rows is free again
        self._rows: dict[int, list[float]] = {}

    def add(self, done: Done) -> None:
        """Take in a task that has just come back."""
        report = done.report
        phases = {"read": report.read_seconds, "merge": report.merge_seconds}
        if not isinstance(report, MeasureReport):
            phases["write"] = report.write_seconds
        end = self._clock() - self._began
        begin = max(0.0, end - sum(phases.values()))
        row = self._row(done.worker, begin, end)
        name = f"task {report.number}" if not isinstance(report, MeasureReport) else f"measure {report.state}"
        arguments = {"read_bytes": done.instruction.read_bytes, "write_bytes": done.instruction.write_bytes}
        self._bar(name, done.worker, row, begin, end - begin, arguments)
        for phase, seconds in phases.items():
            self._bar(phase, done.worker, row, begin, seconds, {})
            begin += seconds

    def write(self) -> None:
        """Write the file.

        Raises:
            OutputError: it cannot be written.
        """
        names = [
            {"ph": "M", "name": "process_name", "pid": worker, "args": {"name": f"worker {worker}"}}
            for worker in sorted(self._rows)
        ]
        try:
            with open(self._path, "w", encoding="ascii") as file:
                json.dump({"traceEvents": [*names, *self._events], "displayTimeUnit": "ms"}, file)
        except OSError as error:
            raise write_error(self._path, error) from error

    def _row(self, worker: int, begin: float, end: float) -> int:
        """Return a row of a worker on which nothing else is drawn at that time."""
        rows = self._rows.setdefault(worker, [])
        row = next((number for number, free_at in enumerate(rows) if free_at <= begin), len(rows))
        rows[row : row + 1] = [end]
        return row

    def _bar(
        self, name: str, worker: int, row: int, begin: float, seconds: float, arguments: dict[str, int]
    ) -> None:
        self._events.append(
            {
                "ph": "X",
                "name": name,
                "pid": worker,
                "tid": row,
                "ts": round(begin * 1e6),
                "dur": round(seconds * 1e6),
                "args": arguments,
            }
        )
