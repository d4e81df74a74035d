"""What actors and drivers tell Ray's metrics: bytes, tasks, seconds by phase, peak of GPU memory, what was lost.

Ray serves them on each node's metrics port, with the prefix `ray_`; `deploy/grafana/raymerge.json` draws them.
"""

from __future__ import annotations

from typing import Any

from raymerge.merge_actors.task import MeasureReport, TaskReport

#: Bounds of the histogram of a task's seconds.
_SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]


class ActorMetrics:
    """The metrics of one actor's runs."""

    def __init__(self, run_id: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        def counter(name: str, description: str) -> Any:
            return Counter(f"raymerge_{name}", description=description, tag_keys=("run",))

        self._read = counter("read_bytes", "Bytes of inputs that merge workers read.")
        self._written = counter("written_bytes", "Bytes of outputs that merge workers wrote.")
        self._fetched = counter("fetched_bytes", "Bytes that came from object stores.")
        self._tasks = counter("tasks", "Tasks that merge workers finished.")
        self._seconds = Histogram(
            "raymerge_task_seconds",
            description="Seconds of a task, by phase.",
            boundaries=_SECONDS,
            tag_keys=("run", "phase"),
        )
        self._gpu_peak = Gauge(
            "raymerge_gpu_peak_bytes", description="Most GPU memory that a worker held.", tag_keys=("run",)
        )
        self._tags = {"run": run_id[:12]}

    def count(self, report: TaskReport | MeasureReport, gpu_peak_bytes: int | None) -> None:
        """Add a finished instruction."""
        self._read.inc(report.read_bytes, self._tags)
        phases = {"read": report.read_seconds, "merge": report.merge_seconds}
        if isinstance(report, TaskReport):
            self._tasks.inc(1, self._tags)
            self._written.inc(report.write_bytes, self._tags)
            phases["write"] = report.write_seconds
        if report.fetched_bytes:
            self._fetched.inc(report.fetched_bytes, self._tags)
        for phase, seconds in phases.items():
            self._seconds.observe(seconds, {**self._tags, "phase": phase})
        if gpu_peak_bytes is not None:
            self._gpu_peak.set(gpu_peak_bytes, self._tags)


class DriverMetrics:
    """The metrics of a driver: what it had to do again."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter

        self._lost = Counter(
            "raymerge_lost_workers", description="Merge workers that died.", tag_keys=("run",)
        )
        self._retries = Counter(
            "raymerge_retries", description="Tasks that were lost with a worker.", tag_keys=("run",)
        )

    def count_loss(self, run_id: str, num_tasks: int) -> None:
        """Add a worker that was lost, and the tasks that it had."""
        tags = {"run": run_id[:12]}
        self._lost.inc(1, tags)
        if num_tasks:
            self._retries.inc(num_tasks, tags)
