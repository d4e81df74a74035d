"""Progress of a run on stderr: one live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from raymerge.cluster.statistics_options import StatisticsProgress
from raymerge.cluster.totals import Totals

_LIVE_SECONDS = 0.2
_LOG_SECONDS = 15.0


class Progress:
    """Prints where a run stands."""

    def __init__(
        self,
        num_tasks: int,
        num_bytes: int,
        *,
        num_done: int = 0,
        done_bytes: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self._stream = stream or sys.stderr
        self._num_tasks, self._num_bytes = num_tasks, num_bytes
        self._num_done, self._done_bytes = num_done, done_bytes
        self._is_live = self._stream.isatty()
        self._started = self._last = time.monotonic()

    def show(self, totals: Totals) -> None:
        """Show the state of the run, if the last time is long enough ago."""
        now = time.monotonic()
        if now - self._last < (_LIVE_SECONDS if self._is_live else _LOG_SECONDS):
            return
        self._last = now
        line = self._line(totals, now)
        self._stream.write(f"\r\x1b[K{line}" if self._is_live else f"{line}\n")
        self._stream.flush()

    def clear(self) -> None:
        """Wipe the live line."""
        if self._is_live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _line(self, totals: Totals, now: float) -> str:
        seconds = max(now - self._started, 1e-9)
        moved = totals.read_bytes + totals.write_bytes
        done = totals.num_tasks + self._num_done
        left_bytes = max(0, self._num_bytes - self._done_bytes - moved)
        eta = f"{left_bytes * seconds / moved:,.0f} s" if moved else "?"
        return (
            f"task {done:,}/{self._num_tasks:,} | {gib(totals.read_bytes)} read, {gib(totals.write_bytes)} written | "
            f"{moved / seconds / 1e9:.2f} GB/s | ETA {eta}"
        )


class StatisticsLine:
    """Prints where the measuring of a model stands."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._is_live = self._stream.isatty()
        self._last = time.monotonic()

    def show(self, progress: StatisticsProgress) -> None:
        """Show the state of the run, if the last time is long enough ago."""
        now = time.monotonic()
        if now - self._last < (_LIVE_SECONDS if self._is_live else _LOG_SECONDS):
            return
        self._last = now
        total = f" of {progress.group_tokens:,}" if progress.group_tokens else ""
        line = (
            f"layer group {progress.group + 1}/{progress.num_groups} | {progress.num_tokens:,}{total} tokens | "
            f"{progress.tokens_per_second:,.0f} tokens/s"
        )
        self._stream.write(f"\r\x1b[K{line}" if self._is_live else f"{line}\n")
        self._stream.flush()

    def clear(self) -> None:
        """Wipe the live line."""
        if self._is_live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def gib(num_bytes: int) -> str:
    """Write a number of bytes for people: "3.2 GiB"."""
    amount = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:,.0f} {unit}" if unit == "B" else f"{amount:,.1f} {unit}"
        amount /= 1024
    return f"{amount:,.1f} TiB"
