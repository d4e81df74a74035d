"""What a grid would take, without running it: points, bytes, and an estimate of the time with its basis."""

from __future__ import annotations

import os
import time
from typing import Any

from raymerge.cluster.evaluator import source_budget_bytes
from raymerge.cluster.grid_axes import Axis
from raymerge.cluster.grid_folder import GridFolder
from raymerge.cluster.grid_needs import needs_of_grid
from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.grid_plan import GridPlan, plan_grid, trusting
from raymerge.cluster.grid_progress import duration
from raymerge.cluster.grid_spec import GridSource, read_grid
from raymerge.cluster.progress import gib
from raymerge.cluster.remote_grid_folder import open_grid_folder
from raymerge.cluster.results import read_rows
from raymerge.cluster.search_spec import read_search
from raymerge.cluster.search_study import Study
from raymerge.merge_actors.errors import OutputError
from raymerge.stats.evaluation.parts import RUNTIME_BYTES

#: A model that fits this is not spread over more; nor is one over more GPUs than a node usually has.
_SMALL_GPU_BYTES, _MOST_GPUS = 16 << 30, 8
#: How long each rate of this machine is measured.
_PROBE_SECONDS = 0.1


def estimate(
    source: GridSource, out: str | os.PathLike[str], options: GridOptions, *, strict: bool = False
) -> dict[str, Any]:
    """Check a grid and say what it would take, in plain values.

    Raises:
        RaymergeError: whatever a run would refuse before its first point.
    """
    spec = trusting(read_grid(source, seed=options.seed), options)
    folder = open_grid_folder(out)
    plan = plan_grid(spec, options, strict=strict)
    num_points = min(len(spec.kept), options.limit or len(spec.kept))
    keys = {plan.point(number).key for number in range(num_points)}
    done = {row["key"]: row for row in _earlier_rows(folder)}
    left = keys - set(done)
    return {
        "num_points": num_points,
        "num_combinations": spec.num_combinations,
        "num_distinct": len(keys),
        "num_done": len(keys) - len(left),
        **_of_the_plan(plan, folder, list(done.values()), num_points, len(left)),
    }


def estimate_search(
    source: GridSource, out: str | os.PathLike[str], options: GridOptions, *, strict: bool = False
) -> dict[str, Any]:
    """Check a search and say what it would take at most, if no trial is given up and no two are the same.

    Raises:
        RaymergeError: whatever a run would refuse before its first trial.
    """
    spec = trusting(read_grid(source, is_search=True), options)
    asked = read_search(spec, options.seed)
    Study(spec, asked).ask()
    folder = open_grid_folder(out)
    plan = plan_grid(spec, options, strict=strict)
    num_trials = min(asked.num_trials, options.limit or asked.num_trials)
    done = _earlier_rows(folder, ("ok", "pruned"))
    num_done = min(len(done), num_trials)
    return {
        "sampler": asked.sampler,
        "seed": asked.seed,
        "num_points": num_trials,
        "num_done": num_done,
        **_of_the_plan(plan, folder, done, num_trials, num_trials - num_done),
    }


def _of_the_plan(
    plan: GridPlan, folder: GridFolder, done: list[dict[str, Any]], num_points: int, num_left: int
) -> dict[str, Any]:
    spec = plan.spec
    seconds, basis = _seconds_per_point(plan, done, folder.out)
    return {
        "axes": {axis.name: _extent(axis) for axis in spec.axes},
        "metrics": list(spec.evaluation.metrics),
        "select": [objective.label for objective in spec.selection.objectives],
        "input_bytes": plan.input_bytes,
        "resident_bytes": min(plan.input_bytes, source_budget_bytes()),
        "model_bytes": plan.output_bytes,
        "gpu_bytes": _gpu_bytes(plan),
        "export_bytes": min(spec.top, num_points) * plan.output_bytes,
        "to_measure": [{"model": each.key, "data": each.data.to_mapping()} for each in plan.missing],
        "seconds_per_point": seconds,
        "seconds": seconds * num_left,
        "basis": basis,
        "remarks": list(plan.remarks),
    }


def _extent(axis: Axis) -> int | str:
    """Return the number of an axis' values, or its range."""
    return len(axis.values) if axis.range is None else f"{axis.range.low:g}..{axis.range.high:g}"


def estimate_text(found: dict[str, Any]) -> str:
    """Lay an estimate out as text."""
    axes = " x ".join(
        f"{name} {extent if isinstance(extent, str) else format(extent, ',')}"
        for name, extent in found["axes"].items()
    )
    if "sampler" in found:
        lines = [
            f"{found['num_points']:,} trials by {found['sampler']} with seed {found['seed']} ({axes}), none given up"
        ]
    else:
        points = f"{found['num_points']:,} points ({axes}"
        if found["num_points"] != found["num_combinations"]:
            points += f"; {found['num_combinations']:,} combinations before `where` and --limit"
        lines = [f"{points}); {found['num_distinct']:,} distinct merges"]
    if found["num_done"]:
        lines.append(f"{found['num_done']:,} of them are done")
    lines += [
        f"reads {gib(found['input_bytes'])} of models, each once per evaluator; holds {gib(found['model_bytes'])} of "
        "merged weights per evaluator",
        f"keeps {gib(found['resident_bytes'])} of the models in memory between points"
        + ("" if found["resident_bytes"] == found["input_bytes"] else ", the rest is read again by slices"),
        f"on GPUs an evaluator takes {_sizes(found['gpu_bytes'])}",
        f"writes {gib(found['export_bytes'])} of checkpoints",
        f"chooses by {' and '.join(found['select'])}; metrics: {', '.join(found['metrics'])}",
    ]
    if found["to_measure"]:
        lines.append(
            f"measures statistics first: {len(found['to_measure']):,} passes over data, whose time is not counted here"
        )
    lines.append(
        f"about {duration(found['seconds'])} for what is left, and some seconds of start; "
        f"{found['seconds_per_point']:.2g} s a point: {found['basis']}"
    )
    return "\n".join(lines)


def _gpu_bytes(plan: GridPlan) -> dict[str, int]:
    """Return how large the GPUs have to be by their number; more than one only where models are large."""
    needs = needs_of_grid(plan)
    found = {1: needs.fullest(1) + RUNTIME_BYTES}
    while found[max(found)] > _SMALL_GPU_BYTES and max(found) < _MOST_GPUS:
        found[2 * max(found)] = needs.fullest(2 * max(found)) + RUNTIME_BYTES
    return {str(number): num_bytes for number, num_bytes in found.items()}


def _sizes(gpu_bytes: dict[str, int]) -> str:
    return " or ".join(
        f"{number} {'GPU' if number == '1' else 'GPUs'} of {gib(num_bytes)}"
        for number, num_bytes in gpu_bytes.items()
    )


def _earlier_rows(folder: GridFolder, states: tuple[str, ...] = ("ok",)) -> list[dict[str, Any]]:
    try:
        with folder.readable():
            rows = read_rows(folder.path, ("key", "status", "split", "seconds", "same_as"))
    except OutputError:
        return []
    return [row for row in rows if row["status"] in states and row["split"] == "validation"]


def _seconds_per_point(plan: GridPlan, rows: list[dict[str, Any]], out: str) -> tuple[float, str]:
    """Return seconds of wall time a point and where the figure comes from."""
    measured = [row["seconds"] for row in rows if row.get("same_as") is None and row["seconds"] is not None]
    if measured:
        ahead = plan.options.workers or 1
        return sum(measured) / len(measured) / ahead, (
            f"measured on {len(measured):,} points in {out}, {ahead} at a time"
        )
    bytes_per_second, flops = _rates()
    tokens = _num_tokens(plan)
    merge_seconds = (plan.input_bytes + plan.output_bytes) / bytes_per_second
    return merge_seconds + 2 * plan.num_parameters * tokens / flops, (
        f"a rough guess from rates of this machine ({bytes_per_second / 1e9:.1f} GB/s through memory, "
        f"{flops / 1e9:,.0f} GFLOP/s, up to {tokens:,} tokens a point); --limit 1 measures it"
    )


def _num_tokens(plan: GridPlan) -> int:
    """Return the tokens of the validation data of all tasks, padding included, at most."""
    from raymerge.stats.evaluation.evaluate import prepare_task

    prepared = [
        prepare_task(task, "validation", plan.model_folders[0]) for task in plan.spec.evaluation.tasks
    ]
    return sum(each.num_batches * each.task.batch_tokens for each in prepared)


def _rates() -> tuple[float, float]:
    """Measure how fast this machine moves bytes through an addition, and multiplies matrices."""
    import torch

    a_P, b_P = torch.ones(1 << 22), torch.ones(1 << 22)
    matrix_II = torch.ones(512, 512)

    def per_second(work: Any, amount: float) -> float:
        work()
        number, started = 0, time.perf_counter()
        while time.perf_counter() - started < _PROBE_SECONDS:
            work()
            number += 1
        return number * amount / (time.perf_counter() - started)

    bytes_per_second = per_second(lambda: torch.add(a_P, b_P, out=a_P), 3 * a_P.nbytes)
    return bytes_per_second, per_second(lambda: matrix_II @ matrix_II, 2 * 512**3)
