"""The Ray skin of the activation worker: an actor class and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

import ray

from raymerge.merge_actors.actor_log import begin_log
from raymerge.merge_actors.place_check import check_place
from raymerge.merge_actors.ray_metrics import ActivationMetrics
from raymerge.stats.activation_worker import ActivationWorker
from raymerge.stats.exchange import TorchExchange, join_store, make_store
from raymerge.stats.layer_groups import LayerGroup
from raymerge.stats.measure_job import Description, Entry, GroupReport, MeasureJob, PassSettings


# A second thread answers questions about progress. Sums live in the actor, so it is never restarted:
# the driver replaces the whole group.
@ray.remote(max_concurrency=2, max_restarts=0, max_task_retries=0)
class RayActivationWorker:
    """`ActivationWorker` as an actor of a group."""

    def __init__(self, job: MeasureJob, rank: int, versions: Mapping[str, str]) -> None:
        self._versions = versions
        if job.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        begin_log(f"activation worker {rank}, run in {job.work_folder}")
        self._metrics = ActivationMetrics(f"job {ray.get_runtime_context().get_job_id()}")
        self._worker = ActivationWorker(job, rank)

    def describe(self) -> Description:
        """See `ActivationWorker.describe`."""
        return self._worker.describe()

    def open_store(self, num_workers: int) -> tuple[str, int]:
        """Open the meeting place of the group; return its host and port."""
        host = ray.util.get_node_ip_address()
        self._store = make_store(host, num_workers)
        return host, self._store.port

    def join(self, host: str, port: int, num_workers: int) -> None:
        """Join the group; returns when all have."""
        job, rank = self._worker.job, self._worker.rank
        store = self._store if rank == 0 else join_store(host, port, num_workers)
        self._worker.exchange = TorchExchange(rank, num_workers, store, job.device)

    def accumulate(self, group: LayerGroup, shards: Sequence[int], settings: PassSettings) -> GroupReport:
        """See `ActivationWorker.accumulate`."""
        begin, before = time.perf_counter(), self._worker.num_tokens
        report = self._worker.accumulate(group, shards, settings)
        self._metrics.count(time.perf_counter() - begin, self._worker.num_tokens - before)
        self._metrics.note_gpu_peak(self._worker.job.device)
        return report

    def write(self, entries: Sequence[Entry], file: str, num_examples: int) -> str | None:
        """See `ActivationWorker.write`."""
        return self._worker.write(entries, file, num_examples)

    def sum_squares(self) -> dict[str, float]:
        """See `ActivationWorker.sum_squares`."""
        return self._worker.sum_squares()

    def num_tokens(self) -> int:
        """Return how many tokens have passed."""
        return self._worker.num_tokens

    def begin(self) -> int:
        """Return the process id.

        Raises:
            ClusterError: versions differ from the driver's, or torch cannot use the GPU.
        """
        check_place(self._versions, self._worker.job.device)
        return os.getpid()
