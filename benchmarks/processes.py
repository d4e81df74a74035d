"""Run a command to its end with its wall-clock time and the peak memory of every process in it.

The kernel keeps each process's greatest resident set (VmHWM), so sampling cannot miss a peak,
only what a process adds between its last sample and its end. `/proc` alone is needed.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_INTERVAL_SECONDS = 0.2
#: Thread counts that a developer's shell may set; every command here chooses its own.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class CommandError(RuntimeError):
    """A measured command failed."""


@dataclass(slots=True)
class ProcessPeak:
    """What one process needed."""

    pid: int
    role: str
    """"driver" is the command itself, "actor" a Ray worker that held an actor, "idle worker",
    or the program's name for the rest (raylet, gcs_server, ...)."""
    peak_bytes: int = 0
    """Greatest resident set, with shared libraries and shared memory."""
    peak_private_bytes: int = 0
    """Greatest sampled anonymous part of it: what would be freed if the process ended."""


@dataclass(slots=True)
class Run:
    """A finished command."""

    seconds: float
    stdout: str
    peaks: list[ProcessPeak] = field(default_factory=list)

    def peak_bytes(self, role: str) -> int:
        """Return the greatest resident set of any process of a role; 0 if there was none."""
        return max((peak.peak_bytes for peak in self.peaks if peak.role == role), default=0)


def run(
    command: Sequence[str | os.PathLike[str]],
    *,
    variables: Mapping[str, str] | None = None,
    other_roots: Iterable[int] = (),
) -> Run:
    """Run `command`, wait for it, and watch it and all its descendants.

    Args:
        command: program and arguments.
        variables: environment variables to add.
        other_roots: processes that work for the command without being its children (a running
            cluster); they and their descendants are watched as well.

    Raises:
        CommandError: it did not exit with 0; the message holds the end of its output.
    """
    words = [os.fspath(word) for word in command]
    kept = {name: value for name, value in os.environ.items() if name not in _THREAD_VARIABLES}
    begin = time.perf_counter()
    process = subprocess.Popen(
        words, env={**kept, **(variables or {})}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    watch = _Watch(process.pid, tuple(other_roots))
    watch.start()
    stdout, stderr = process.communicate()
    seconds = time.perf_counter() - begin
    watch.stop()
    if process.returncode != 0:
        tail = "\n".join((stdout + stderr).splitlines()[-30:])
        raise CommandError(f"{' '.join(words)} exited with {process.returncode}:\n{tail}")
    return Run(seconds, stdout, list(watch.peaks.values()))


class _Watch(threading.Thread):
    def __init__(self, driver: int, other_roots: tuple[int, ...]) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[int, ProcessPeak] = {}
        self._driver = driver
        self._roots = {driver, *other_roots}
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(_INTERVAL_SECONDS):
            for pid in descendants(self._roots):
                self._look_at(pid)

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def _look_at(self, pid: int) -> None:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
        except (FileNotFoundError, ProcessLookupError):
            return  # it ended meanwhile
        lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        if "VmHWM" not in lines:
            return  # a zombie has no memory left
        peak = self.peaks.setdefault(pid, ProcessPeak(pid, "unknown"))
        # A worker is a nameless Python first, then idle, then an actor: which it stays.
        if peak.role != "actor":
            peak.role = "driver" if pid == self._driver else _role(command)
        peak.peak_bytes = max(peak.peak_bytes, _kib(lines["VmHWM"]))
        peak.peak_private_bytes = max(peak.peak_private_bytes, _kib(lines["RssAnon"]))


def descendants(roots: Iterable[int]) -> set[int]:
    """Return the living processes among `roots` and everything they have started."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                # The name may hold spaces and brackets: the parent's id is the second word after it.
                parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(parent, []).append(int(entry))
    found: set[int] = set()
    waiting = [root for root in roots if os.path.exists(f"/proc/{root}")]
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting.extend(children.get(pid, []))
    return found


def _role(command: str) -> str:
    # Ray's workers name themselves: ray::IDLE, then ray::Class.method once they hold an actor.
    if command.startswith("ray::"):
        name = command.removeprefix("ray::").split(" ")[0].split(".")[0]
        if name.startswith("IDLE"):
            return "idle worker"
        return name if name.endswith("Agent") else "actor"
    program, *words = command.split(" ")
    if os.path.basename(program).startswith("python"):
        program = next((word for word in words if not word.startswith("-")), program)
    return os.path.basename(program) or "unknown"


def _kib(text: str) -> int:
    return int(text.split()[0]) * 1024
