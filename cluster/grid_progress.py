"""Progress of a grid on stderr: one live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from raymerge.cluster.select import Objective

_LIVE_SECONDS = 0.2
_LOG_SECONDS = 15.0


class GridProgress:
    """Counts finished points and prints where a run stands."""

    def __init__(
        self,
        num_points: int,
        objective: Objective,
        *,
        num_done: int = 0,
        is_shown: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self._stream = stream or sys.stderr
        self._num_points, self._objective, self._num_before = num_points, objective, num_done
        self._is_live = self._stream.isatty()
        self._is_shown = is_shown
        self._started = self._last = time.monotonic()
        self._best = math.nan
        self._best_point = -1
        self.num_run = self.num_failed = self.num_pruned = self.num_same = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a finished point, and show the state if the last time is long enough ago."""
        self.num_run += 1
        self.num_failed += row["status"] == "failed"
        self.num_pruned += row["status"] == "pruned"
        self.num_same += row.get("same_as") is not None
        if row["status"] == "ok":
            names = (name for name, _ in self._objective.weights)
            value = self._objective.value({name: row.get(f"metric.{name}") for name in names})
            if not math.isnan(value) and not self._objective.cost(value) >= self._objective.cost(self._best):
                self._best, self._best_point = value, int(row["point"])
        now = time.monotonic()
        if self._is_shown and now - self._last >= (_LIVE_SECONDS if self._is_live else _LOG_SECONDS):
            self._last = now
            line = self.line(now)
            self._stream.write(f"\r\x1b[K{line}" if self._is_live else f"{line}\n")
            self._stream.flush()

    def clear(self) -> None:
        """Wipe the live line."""
        if self._is_live and self._is_shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def line(self, now: float) -> str:
        """Return the state in one line."""
        done = self._num_before + self.num_run
        seconds = (now - self._started) / max(1, self.num_run)
        parts = [f"point {done:,}/{self._num_points:,}"]
        if not math.isnan(self._best):
            parts.append(f"best {self._objective.label} {self._best:.4g} (point {self._best_point})")
        parts.append(f"{seconds:.3g} s a point")
        for number, what in ((self.num_failed, "failed"), (self.num_pruned, "pruned")):
            if number:
                parts.append(f"{number:,} {what}")
        left = max(0, self._num_points - done)
        parts.append(f"ETA {duration(left * seconds)}")
        return " | ".join(parts)


def duration(seconds: float) -> str:
    """Write seconds for people: "38 s", "12 min", "3 h 20 min"."""
    if seconds < 99.5:
        return f"{seconds:,.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"
