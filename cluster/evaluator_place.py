"""How many evaluators a run gets, where, and with what: a pure rule, and connecting by it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from raymerge.cluster.connect import choose_device, local_resources, ray_session
from raymerge.cluster.evaluator import EvaluatorJob
from raymerge.cluster.evaluator_group import EvaluatorGroup, ThreadEvaluators
from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.options import MergeOptions
from raymerge.merge_actors.errors import ClusterError
from raymerge.stats.evaluation.tasks import EvaluationSpec

#: Threads of an evaluator on a GPU: they read, launch and wait.
_CUDA_THREADS = 2


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster."""

    num_cpus: int
    num_gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatorPlacement:
    """The evaluators of a run."""

    num_evaluators: int
    device: Literal["cpu", "cuda"]
    num_cpus: int
    """CPUs that Ray is asked for, per evaluator."""
    num_gpus: float
    """GPUs, per evaluator."""
    num_threads: int
    num_slots: int
    """Models that an evaluator holds: on a GPU one is merged while the other is scored, if both fit."""
    share: float
    """Share of a machine's memory, or of a GPU, per evaluator."""

    def describe(self) -> str:
        """Say it in a line."""
        if self.device == "cuda":
            return f"{self.num_evaluators} evaluators of {self.num_gpus:g} GPU each"
        return f"{self.num_evaluators} evaluators of {self.num_threads} threads each"


def place_evaluators(nodes: Sequence[Node], options: GridOptions) -> EvaluatorPlacement:
    """Decide how many evaluators there are and what each of them gets.

    On GPUs, one for every share of one. On CPUs one a machine with all of its cores: merging is bound
    by memory, and every further evaluator would hold another model.

    Args:
        nodes: of the cluster, or this machine alone.
        options: `workers` sets the number, `gpus_per_evaluator` and `threads_per_evaluator` what each gets.

    Raises:
        ClusterError: a GPU is asked for and there is none.
    """
    if choose_device(options.device, sum(node.num_gpus for node in nodes)) == "cuda":
        per_gpu = math.floor(1 / options.gpus_per_evaluator + 1e-9)
        return EvaluatorPlacement(
            num_evaluators=options.workers or per_gpu * sum(node.num_gpus for node in nodes),
            device="cuda",
            num_cpus=1,
            num_gpus=options.gpus_per_evaluator,
            num_threads=_CUDA_THREADS,
            num_slots=2,
            share=1 / per_gpu,
        )
    machines = [node.num_cpus for node in nodes if node.num_cpus > 0]
    if not machines:
        raise ClusterError(
            "the cluster has no CPU to run an evaluator on; add a node, or use another cluster"
        )
    num_evaluators = options.workers or len(machines)
    per_machine = math.ceil(num_evaluators / len(machines))
    num_threads = options.threads_per_evaluator or max(1, min(machines) // per_machine)
    return EvaluatorPlacement(
        num_evaluators=num_evaluators,
        device="cpu",
        num_cpus=min(num_threads, max(1, max(machines) // per_machine)),
        num_gpus=0,
        num_threads=num_threads,
        num_slots=1,
        share=1 / per_machine,
    )


@contextlib.contextmanager
def connected_evaluators(evaluation: EvaluationSpec, options: GridOptions) -> Iterator[EvaluatorGroup]:
    """Give a group of evaluators, not started yet, and take it down at the end.

    Raises:
        ClusterError: the cluster cannot be reached, or has no GPU when one is asked for.
    """
    if options.in_process:
        placement = place_evaluators([Node(*local_resources())], options)
        group: EvaluatorGroup = ThreadEvaluators(
            placement.num_evaluators, _job(evaluation, options, placement)
        )
        try:
            yield group
        finally:
            group.close()
        return
    with ray_session(options.address):
        from raymerge.cluster.evaluator_ray import RayEvaluators, nodes

        placement = place_evaluators(nodes(), options)
        group = RayEvaluators(
            placement.num_evaluators,
            _job(evaluation, options, placement),
            num_cpus=placement.num_cpus,
            num_gpus=placement.num_gpus,
        )
        try:
            yield group
        finally:
            group.close()


def _job(evaluation: EvaluationSpec, options: GridOptions, placement: EvaluatorPlacement) -> EvaluatorJob:
    return EvaluatorJob(
        evaluation=evaluation,
        merge=MergeOptions(
            slice_mib=options.slice_mib,
            seed=options.seed,
            allow_nan=options.allow_nan,
            allow_pickle=options.allow_pickle,
            trust_remote_code=options.trust_remote_code,
        ),
        device=placement.device,
        num_threads=placement.num_threads,
        num_slots=placement.num_slots,
        share=placement.share,
    )
