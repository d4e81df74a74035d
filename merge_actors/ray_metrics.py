"""What actors and drivers tell Ray's metrics: bytes, tasks, seconds by phase, peak of GPU memory, what was lost.

Ray serves them on each node's metrics port, with the prefix `ray_`; `deploy/grafana/raymerge.json` draws them.
"""

from __future__ import annotations

from typing import Any

from raymerge.merge_actors.task import MeasureReport, TaskReport

#: Bounds of the histogram of a task's seconds.
_SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]


class _Metrics:
    """What every actor tells: what it read, how long its phases took, and the most memory that it held of a GPU."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge, Histogram

        self._tags = {"run": run}
        self._read = self._counter("read_bytes", "Bytes of inputs that actors read.")
        self._seconds = Histogram(
            "raymerge_task_seconds",
            description="Seconds of a task, by phase.",
            boundaries=_SECONDS,
            tag_keys=("run", "phase"),
        )
        self._gpu_peak = Gauge(
            "raymerge_gpu_peak_bytes", description="Most GPU memory that an actor held.", tag_keys=("run",)
        )

    def _counter(self, name: str, description: str) -> Any:
        from ray.util.metrics import Counter

        return Counter(f"raymerge_{name}", description=description, tag_keys=("run",))

    def _took(self, phase: str, seconds: float) -> None:
        self._seconds.observe(seconds, {**self._tags, "phase": phase})

    def note_gpu_peak(self, device: str) -> None:
        """Note the most memory that this process has held of its GPU so far."""
        if device != "cpu":
            import torch

            self._gpu_peak.set(torch.cuda.max_memory_allocated(), self._tags)


class ActorMetrics(_Metrics):
    """The metrics of a merge worker's run."""

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id[:12])
        self._written = self._counter("written_bytes", "Bytes of outputs that merge workers wrote.")
        self._fetched = self._counter("fetched_bytes", "Bytes that came from object stores.")
        self._tasks = self._counter("tasks", "Tasks that merge workers finished.")

    def count(self, report: TaskReport | MeasureReport, device: str) -> None:
        """Add a finished instruction."""
        self._read.inc(report.read_bytes, self._tags)
        self._took("read", report.read_seconds)
        self._took("merge", report.merge_seconds)
        if isinstance(report, TaskReport):
            self._tasks.inc(1, self._tags)
            self._written.inc(report.write_bytes, self._tags)
            self._took("write", report.write_seconds)
        if report.fetched_bytes:
            self._fetched.inc(report.fetched_bytes, self._tags)
        self.note_gpu_peak(device)


class EvaluatorMetrics(_Metrics):
    """The metrics of an evaluator."""

    def __init__(self, run: str) -> None:
        super().__init__(run)
        self._merges = self._counter("point_merges", "Points that evaluators merged in memory.")
        self._passes = self._counter("forward_passes", "Batches that evaluators scored.")

    def count_merge(self, seconds: float, read_bytes: int) -> None:
        """Add a merged point."""
        self._merges.inc(1, self._tags)
        if read_bytes:
            self._read.inc(read_bytes, self._tags)
        self._took("merge", seconds)

    def count_score(self, seconds: float, num_forward_passes: int) -> None:
        """Add a point that was scored, or some of its batches."""
        if num_forward_passes:
            self._passes.inc(num_forward_passes, self._tags)
        self._took("score", seconds)


class ActivationMetrics(_Metrics):
    """The metrics of an activation worker."""

    def __init__(self, run: str) -> None:
        super().__init__(run)
        self._tokens = self._counter(
            "tokens", "Tokens that passed through models whose statistics are measured."
        )

    def count(self, seconds: float, num_tokens: int) -> None:
        """Add a pass of some shards."""
        if num_tokens:
            self._tokens.inc(num_tokens, self._tags)
        self._took("accumulate", seconds)


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
