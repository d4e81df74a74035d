"""A plan for people and for scripts: figures of a campaign and the treatment of each tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from raymerge.cluster.campaign import (
    PlannedWave,
    RecipeSource,
    collector_paused,
    plan_wave,
    read_recipes,
    waves,
)
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.plan import Plan, RecipePlan
from raymerge.cluster.progress import gib
from raymerge.cluster.recipe import Recipe
from raymerge.cluster.recipe_statistics import describe_missing
from raymerge.merge_actors.methods import METHODS
from raymerge.merge_actors.wording import counted, some_of

#: Tasks of a worker that hold buffers at once, as `merge_actors.worker.NUM_LANES` says.
_NUM_LANES = 2
#: A worker process with torch loaded, before any buffer (measured on Linux, CPU build).
_PROCESS_BYTES = 450 << 20


@collector_paused()
def plan_report(
    recipes: Sequence[RecipeSource], options: MergeOptions, *, strict: bool = False
) -> dict[str, Any]:
    """Plan a campaign and describe the plan in plain values.

    Recipes that need another recipe's result can only be planned when that exists: they are
    listed under "later".

    Raises:
        RaymergeError: whatever a merge would refuse before it reads a weight.
    """
    read, remarks = read_recipes(recipes, options, strict=strict)
    ordered = waves(read)
    folders = {recipe.name: f"OUT/{recipe.name}" for recipe in read}
    wave = plan_wave(ordered[0], folders, options, {}, strict=strict)
    return {
        **_figures(wave.plan),
        "recipes": [
            _recipe_report(plan, is_waiting=_is_waiting(plan.recipe, wave)) for plan in wave.plan.recipes
        ],
        "inputs": _inputs(wave),
        "to_measure": [describe_missing(each, wave.models[each.key]) for each in wave.missing],
        "later": [recipe.name for later in ordered[1:] for recipe in later],
        "remarks": [*remarks, *wave.remarks],
    }


def plan_text(report: dict[str, Any]) -> str:
    """Lay a plan report out as text."""
    lines = [
        f"{counted(report['num_tasks'], 'task')}; reads {gib(report['read_bytes'])}, "
        f"writes {gib(report['write_bytes'])}"
        + (
            f"; {report['num_measured_tensors']:,} tensors are measured first, {gib(report['measure_bytes'])} a round"
            if report["num_measured_tensors"]
            else ""
        ),
        f"memory of a worker about {gib(report['worker_bytes'])} ({gib(report['largest_task_bytes'])} buffers a task)",
        f"disk needed {gib(report['disk_bytes'])}",
    ]
    for model in report["inputs"]:
        lines.append(
            f"  input {model['model']}: {model['num_parameters']:,} parameters, {gib(model['num_bytes'])}"
        )
    for each in report["to_measure"]:
        about = "" if each["num_tokens_is_exact"] else "about "
        lines.append(
            f"  to measure {each['model']}: {each['kind']} statistics on {each['data']['path']}, {each['num_rows']:,} "
            f"rows, {about}{each['num_tokens']:,} tokens"
        )
    for recipe in report["recipes"]:
        lines.append(
            f"recipe {recipe['name']}: {recipe['method']}, {counted(len(recipe['tensors']), 'tensor')}, "
            f"{gib(recipe['write_bytes'])} in {counted(recipe['num_files'], 'file')}"
        )
        lines += _coverage_text(recipe)
        if recipe["is_waiting"]:
            lines.append("  what becomes of each tensor is known when its models are measured")
            continue
        counts = Counter((row["treatment"], row["dtype"]) for row in recipe["tensors"])
        lines += [
            f"  {count:>7,} x {treatment} -> {dtype}" for (treatment, dtype), count in counts.most_common()
        ]
    if report["later"]:
        lines.append(f"planned when their inputs exist: {', '.join(report['later'])}")
    return "\n".join(lines)


def _coverage_text(recipe: dict[str, Any]) -> list[str]:
    """Say how much of a model is merged by statistics, and which tensors are not."""
    if "coverage" not in recipe:
        return []
    coverage = recipe["coverage"]
    what = "linear maps solved" if coverage["kind"] == "gram" else "tensors merged by Fisher values"
    line = f"  {coverage['num_measured']:,} of {coverage['num_expected']:,} {what}"
    for key, words in (("excluded", "excluded"), ("fallback", "by fallback")):
        if names := coverage[key]:
            line += f", {len(names):,} {words} ({some_of(names, 5)})"
    return [line]


def _coverage(plan: RecipePlan) -> dict[str, Any]:
    """Return which tensors are merged by statistics, if the recipe's method uses any."""
    kind = METHODS[plan.recipe.merge_method].statistic
    if kind is None:
        return {}
    names: dict[str, list[str]] = {"measured": [], "excluded": [], "fallback": []}
    for tensor in plan.tensors:
        if tensor.coverage:
            names[tensor.coverage].append(tensor.name)
    return {
        "coverage": {
            "kind": kind,
            "num_expected": sum(map(len, names.values())),
            "num_measured": len(names["measured"]),
            "excluded": names["excluded"],
            "fallback": names["fallback"],
        }
    }


def _figures(plan: Plan) -> dict[str, Any]:
    measured = [piece for state in plan.states for piece in state.pieces]
    return {
        "num_tasks": len(plan.tasks),
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "num_measured_tensors": len({(p.jobs[0].recipe, p.jobs[0].tensor) for p in measured}),
        "measure_bytes": sum(piece.read_bytes for piece in measured),
        "slice_bytes": plan.slice_bytes,
        "largest_task_bytes": plan.largest_task_bytes,
        "worker_bytes": _PROCESS_BYTES + _NUM_LANES * plan.largest_task_bytes,
        "disk_bytes": sum(recipe.layout.num_bytes for recipe in plan.recipes),
    }


def _is_waiting(recipe: Recipe, wave: PlannedWave) -> bool:
    """Return whether a recipe's models have to be measured before it can be planned for good."""
    missing = {(each.key, each.data) for each in wave.missing}
    uses = [use for _, layers in recipe.slices() for use in layers.sources]
    return any((use.model.key, use.data) in missing for use in uses)


def _recipe_report(plan: RecipePlan, *, is_waiting: bool) -> dict[str, Any]:
    return {
        "name": plan.recipe.name,
        "method": plan.recipe.merge_method,
        "write_bytes": plan.layout.num_bytes,
        "num_files": len(plan.layout.files),
        "is_waiting": is_waiting,
        **({} if is_waiting else _coverage(plan)),
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "method": tensor.method,
                "models": [operand.model for operand in tensor.models],
                "base": tensor.base.model if tensor.base else None,
                "treatment": tensor.note or f"{tensor.method} of {len(tensor.models)} models",
            }
            for tensor in plan.tensors
        ],
    }


def _inputs(wave: PlannedWave) -> list[dict[str, Any]]:
    return [
        {
            "model": key,
            "fingerprint": model.checkpoint.fingerprint,
            "num_parameters": model.checkpoint.num_parameters,
            "num_bytes": model.checkpoint.num_bytes,
            "num_tensors": len(model.checkpoint.tensors),
        }
        for key, model in wave.models.items()
    ]
