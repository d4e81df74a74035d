"""How long a merge of eight 405-billion-parameter models takes on 8 to 512 GPUs, on paper.

    python benchmarks/scaling.py

The plan is the real one, from headers over sparse files; the real controller hands its tasks to workers in virtual
time (`virtual_group.py`) at rates that the options name. The default rates are assumptions about a cluster, not
measurements: put in those of yours. The table of `docs/scaling.md` is this command's output.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from kept_file import Report, add_folder_options
from model_shapes import LLAMA_SHAPES, LlamaShape
from plan_scale import make_sparse_model
from virtual_group import Rates, VirtualGroup

from raymerge.cluster.campaign import plan_wave, read_recipes
from raymerge.cluster.controller import Controller
from raymerge.cluster.in_flight import InFlight
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.plan import Plan
from raymerge.merge_actors.task import TaskReport

#: Llama 3.1 405B.
LLAMA_405B = LlamaShape(
    hidden=16384, intermediate=53248, num_layers=126, num_heads=128, num_kv_heads=8, vocabulary=128256
)


@dataclass
class NoJournal:
    """Remembers what is done, and writes it nowhere."""

    done: dict[int, TaskReport] = field(default_factory=dict)

    def add(self, report: TaskReport) -> None:
        """Take a finished task."""
        self.done[report.number] = report


def make_plan(folder: Path, shape: LlamaShape, num_models: int, slice_mib: int) -> Plan:
    """Plan task arithmetic of so many models over a base, all of one shape, from sparse files."""
    names = ["base", *(f"model{i}" for i in range(1, num_models))]
    for name in names:
        make_sparse_model(folder / name, shape)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": os.fspath(folder / "base"),
        "models": [
            {"model": os.fspath(folder / name), "parameters": {"weight": 1 / num_models}}
            for name in names[1:]
        ],
        "dtype": "bfloat16",
    }
    options = MergeOptions(slice_mib=slice_mib)
    recipes, _ = read_recipes([recipe], options)
    return plan_wave(recipes, {recipes[0].name: os.fspath(folder / "out")}, options, {}).plan


def simulate(plan: Plan, num_workers: int, workers_per_node: int, rates: Rates) -> VirtualGroup:
    """Run a plan in virtual time; the group's clock then says how long it took."""
    group = VirtualGroup(num_workers, workers_per_node, rates)
    in_flight = InFlight(clock=lambda: group.now)  # what is overdue is so in virtual time as well
    controller = Controller(plan, group, NoJournal(), in_flight=in_flight)  # type: ignore[arg-type]  # no folder
    controller.run()
    return group


def main() -> None:
    """Parse the options, plan, simulate, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=["405b", *LLAMA_SHAPES], default="405b")
    parser.add_argument("--models", type=int, default=8, help="the base among them")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--slice-mib", type=int, default=256)
    parser.add_argument("--node-read", type=float, default=10.0, help="GB/s of a node's link, inputs")
    parser.add_argument("--node-write", type=float, default=5.0, help="GB/s of a node's link, outputs")
    parser.add_argument("--device", type=float, default=20.0, help="GB/s of a GPU, PCIe copies included")
    parser.add_argument("--storage", type=float, default=200.0, help="GB/s of the storage, over all nodes")
    parser.add_argument("--task-ms", type=float, default=2.0, help="milliseconds of the driver for each task")
    add_folder_options(parser)
    options = parser.parse_args()
    rates = Rates(
        node_read=options.node_read,
        node_write=options.node_write,
        device=options.device,
        storage=options.storage,
        task_seconds=options.task_ms / 1000,
    )
    folder = options.work / "scaling"
    shutil.rmtree(folder, ignore_errors=True)
    shape = LLAMA_405B if options.shape == "405b" else LLAMA_SHAPES[options.shape]
    try:
        plan = make_plan(folder, shape, options.models, options.slice_mib)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report = Report(
        "scaling",
        f"A merge of {options.models} {options.shape} models on 8 to 512 GPUs, simulated",
        {
            "task_arithmetic in bf16, tasks": f"{len(plan.tasks):,}",
            "GB read": f"{plan.read_bytes / 1e9:,.0f}",
            "GB written": f"{plan.write_bytes / 1e9:,.0f}",
            "GPUs per node": options.gpus_per_node,
            "GB/s of a node": f"{rates.node_read:g} in, {rates.node_write:g} out",
            "GB/s of a GPU": f"{rates.device:g}",
            "GB/s of the storage": f"{rates.storage:g}",
            "ms of the driver per task": f"{options.task_ms:g}",
            "slice MiB": options.slice_mib,
        },
    )
    rows = []
    for num_gpus in options.gpus:
        group = simulate(plan, num_gpus, options.gpus_per_node, rates)
        busy, nodes = group.device_seconds(), group.node_bytes()
        read = [each[0] / 1e9 for each in nodes]
        wrote = [each[1] / 1e9 for each in nodes]
        bound = _bound(plan, num_gpus, len(nodes), rates)
        rows.append(
            (
                num_gpus,
                len(nodes),
                f"{group.now:,.0f}",
                f"{bound[0]:,.0f} ({bound[1]})",
                f"{max(busy) / statistics.mean(busy):.3f}",
                f"{statistics.mean(read):,.0f} / {max(read):,.0f}",
                f"{statistics.mean(wrote):,.0f} / {max(wrote):,.0f}",
            )
        )
        report.data[str(num_gpus)] = {"seconds": group.now, "bound": bound, "busy": busy, "node_bytes": nodes}
    report.table(
        (
            "GPUs",
            "nodes",
            "seconds",
            "lower bound, and what bounds",
            "busiest GPU / mean",
            "GB read a node, mean / most",
            "GB written a node",
        ),
        rows,
    )
    report.hardware = "simulated"
    report.write(options.results)


def _bound(plan: Plan, num_gpus: int, num_nodes: int, rates: Rates) -> tuple[float, str]:
    """Return the least time that any schedule needs, and the resource that asks for it."""
    moved = plan.read_bytes + plan.write_bytes
    times = {
        "links in": plan.read_bytes / (rates.node_read * num_nodes * 1e9),
        "links out": plan.write_bytes / (rates.node_write * num_nodes * 1e9),
        "GPUs": moved / (rates.device * num_gpus * 1e9),
        "storage": moved / (rates.storage * 1e9),
        "driver": len(plan.tasks) * rates.task_seconds,
    }
    name = max(times, key=lambda each: times[each])
    return times[name], name


if __name__ == "__main__":
    main()
