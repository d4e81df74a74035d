"""How many evaluators a run gets, where, and with what: a pure rule, and connecting by it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from raymerge.cluster.connect import choose_device, local_resources, ray_session
from raymerge.cluster.evaluator import EvaluatorJob
from raymerge.cluster.evaluator_gpus import Node, choose_gpus, visible_gpu_bytes
from raymerge.cluster.evaluator_group import EvaluatorGroup, ThreadEvaluators
from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.progress import gib
from raymerge.merge_actors.errors import ClusterError
from raymerge.stats.evaluation.parts import ModelNeeds
from raymerge.stats.evaluation.tasks import EvaluationSpec

#: Threads of an evaluator on a GPU: they read, launch and wait.
_CUDA_THREADS = 2


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

    @property
    def num_devices(self) -> int:
        """GPUs that a model is spread over."""
        return max(1, int(self.num_gpus))


def place_evaluators(
    nodes: Sequence[Node], options: GridOptions, needs: ModelNeeds | None = None
) -> EvaluatorPlacement:
    """Decide how many evaluators there are and what each of them gets.

    On GPUs, one for every share of one, or for as many of a node as hold the model. On CPUs one a machine with all
    of its cores: merging is bound by memory, and every further evaluator would hold another model.

    Args:
        nodes: of the cluster, or this machine alone.
        options: `workers` sets the number, `gpus_per_evaluator` and `threads_per_evaluator` what each gets.
        needs: of the largest model; None if it is not known.

    Raises:
        ClusterError: a GPU is asked for and there is none, or the model does not fit the GPUs of a node.
    """
    if choose_device(options.device, sum(node.num_gpus for node in nodes)) == "cuda":
        num_gpus = choose_gpus(nodes, options.gpus_per_evaluator, needs)
        per_gpu = max(1, math.floor(1 / num_gpus + 1e-9))
        num_devices = max(1, int(num_gpus))
        return EvaluatorPlacement(
            num_evaluators=options.workers or sum(per_gpu * (node.num_gpus // num_devices) for node in nodes),
            device="cuda",
            num_cpus=1,
            num_gpus=num_gpus,
            num_threads=_CUDA_THREADS * num_devices,
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
def connected_evaluators(
    evaluation: EvaluationSpec,
    options: GridOptions,
    needs: Callable[[], ModelNeeds] | None = None,
    on_remark: Callable[[str], None] = lambda line: None,
) -> Iterator[EvaluatorGroup]:
    """Give a group of evaluators, not started yet, and take it down at the end.

    Args:
        evaluation: the tasks.
        options: where and how to run.
        needs: says what the largest model takes of GPUs' memory; asked only where there are GPUs.
        on_remark: told when a model is spread over several GPUs though nobody asked for it.

    Raises:
        ClusterError: the cluster cannot be reached, has no GPU when one is asked for, or none that holds the model.
    """
    if options.in_process:
        placement = _place(_local_node, options, needs, on_remark)
        group: EvaluatorGroup = ThreadEvaluators(
            placement.num_evaluators, _job(evaluation, options, placement)
        )
        try:
            yield group
        finally:
            group.close()
        return
    with ray_session(options.address):
        from raymerge.cluster.evaluator_ray import RayEvaluators, nodes, wait_for_a_gpu

        # GPUs that are asked for by number may still have to be started, by a cluster that scales.
        if options.device == "cuda" and options.workers and not any(node.num_gpus for node in nodes()):
            wait_for_a_gpu(on_remark)
        placement = _place(nodes, options, needs, on_remark)
        group = RayEvaluators(
            placement.num_evaluators,
            _job(evaluation, options, placement),
            num_cpus=placement.num_cpus,
            num_gpus=placement.num_gpus,
            on_remark=on_remark,
        )
        try:
            yield group
        finally:
            group.close()


def _place(
    nodes: Callable[[bool], Sequence[Node]],
    options: GridOptions,
    needs: Callable[[], ModelNeeds] | None,
    on_remark: Callable[[str], None],
) -> EvaluatorPlacement:
    """Place evaluators on nodes; the memory of their GPUs is asked for where there are any."""
    found = nodes(False)
    device = choose_device(options.device, sum(node.num_gpus for node in found))
    if device == "cpu" and options.gpus_per_evaluator is not None:
        on_remark(
            f"note: --gpus-per-evaluator {options.gpus_per_evaluator:g} has no effect: points run on CPUs"
        )
    if needs is None or device == "cpu":
        return place_evaluators(found, options)
    needed = needs()
    placement = place_evaluators(nodes(True), options, needed)
    if placement.num_devices > 1 and options.gpus_per_evaluator is None:
        on_remark(
            f"note: the merged model takes {gib(needed.weights)}: every evaluator spreads it over "
            f"{placement.num_devices} GPUs"
        )
    return placement


def _local_node(with_memory: bool) -> list[Node]:
    num_cpus, num_gpus = local_resources()
    return [Node(num_cpus, num_gpus, visible_gpu_bytes() if with_memory else None)]


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
        num_devices=placement.num_devices,
    )
