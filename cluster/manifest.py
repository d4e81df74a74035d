"""The manifest of an output: what was done to each tensor, from what, and how to check it.

`raymerge_manifest.json` lies in the output folder. `verify` reads it back.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from raymerge.cluster.matched import LoadedModel, MergedTensor
from raymerge.cluster.plan import RecipePlan
from raymerge.cluster.plan_solves import chunk_bytes_of
from raymerge.cluster.recipe import Measurement
from raymerge.cluster.run_folder import MANIFEST_NAME
from raymerge.merge_actors.checksum import add_checksums
from raymerge.merge_actors.task import PieceReport
from raymerge.stats.statistics_file import Statistics

FORMAT_VERSION = 1
#: Figures of a solve -> how those of several parts of a tensor are summed up.
_FIGURES: Mapping[str, Callable[[list[float]], float]] = {
    "condition": max,
    "rank": min,
    "num_dead_inputs": max,
    "jitter": max,
}
_PACKAGES = ("raymerge", "torch", "ray", "safetensors", "numpy")


def make_manifest(
    plan: RecipePlan,
    models: Mapping[str, LoadedModel],
    statistics: Mapping[Measurement, Statistics],
    reports: Sequence[PieceReport],
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the manifest of one recipe's output.

    Args:
        plan: the recipe and what it was matched with.
        models: by `ModelRef.key`; at least its models.
        statistics: at least those that it merges by.
        reports: what came out of all its pieces.
        run: figures of the run that are not the recipe's own (bytes read, seconds, device).
    """
    pieces: dict[str, list[PieceReport]] = {}
    for report in reports:
        pieces.setdefault(report.tensor, []).append(report)
    files = {name: file.name for file in plan.layout.files for name in file.tensors}
    return {
        "format_version": FORMAT_VERSION,
        "recipe": plan.recipe.to_mapping(),
        "seed": plan.recipe.seed,
        "versions": {"python": platform.python_version(), **versions(*_PACKAGES)},
        "inputs": {
            key: {
                "fingerprint": model.checkpoint.fingerprint,
                "num_parameters": model.checkpoint.num_parameters,
                **({"adapter_fingerprint": model.adapter.fingerprint} if model.adapter else {}),
            }
            for key, model in sorted((key, models[key]) for key in _used(plan))
        },
        **_statistics(plan, statistics),
        "files": {file.name: file.num_bytes for file in plan.layout.files},
        "tensors": {
            tensor.name: _row(tensor, files[tensor.name], pieces[tensor.name]) for tensor in plan.tensors
        },
        "run": dict(run),
    }


def _used(plan: RecipePlan) -> set[str]:
    """Return the keys of the models that a recipe lists, or takes a tensor from."""
    listed = {ref.key for ref in plan.recipe.all_models()}
    return listed | {operand.model for tensor in plan.tensors for operand in tensor.operands}


def _statistics(plan: RecipePlan, statistics: Mapping[Measurement, Statistics]) -> dict[str, Any]:
    """Return by which statistics a recipe was merged."""
    uses = [use for _, layers in plan.recipe.slices() for use in layers.sources]
    rows = []
    for measurement in dict.fromkeys(use.measurement for use in uses if use.measurement is not None):
        found = statistics.get(measurement)
        if found is not None:
            rows.append(
                {
                    "model": measurement[0],
                    "path": found.path,
                    "kind": found.kind,
                    "fingerprint": found.fingerprint,
                    "num_tokens": found.num_tokens,
                    "data_fingerprint": found.manifest.get("data", {}).get("fingerprint"),
                    **({"code": found.manifest["code"]} if "code" in found.manifest else {}),
                }
            )
    return {"statistics": rows} if rows else {}


def write_manifest(folder: str, manifest: Mapping[str, Any]) -> None:
    """Write the manifest into an output folder."""
    with open(os.path.join(folder, MANIFEST_NAME), "w", encoding="utf-8") as file:
        file.write(_text(manifest))


def _text(manifest: Mapping[str, Any]) -> str:
    """Return a manifest as JSON, a line for each tensor: indented they take ten times as long to write."""
    parts = []
    for name, value in manifest.items():
        if name == "tensors":
            rows = [f"  {json.dumps(tensor)}: {json.dumps(row)}" for tensor, row in value.items()]
            text = "{\n" + ",\n".join(rows) + "\n }"
        else:
            text = json.dumps(value, indent=1).replace("\n", "\n ")
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _row(tensor: MergedTensor, file: str, reports: Sequence[PieceReport]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "file": file,
        "method": tensor.method,
        "models": [operand.model for operand in tensor.models],
        "base": tensor.base.model if tensor.base else None,
        "checksum": f"{add_checksums(*(report.checksum for report in reports)):016x}",
        "checksum_chunk_bytes": chunk_bytes_of(tensor),
    }
    if tensor.method != "copy":
        # Six digits: pieces are summed in the order of the cut, which may differ between runs.
        row["norm"] = float(f"{math.sqrt(math.fsum(r.sum_squares for r in reports)):.6g}")
        row["num_nonfinite"] = sum(report.num_nonfinite for report in reports)
    for name, combine in _FIGURES.items():  # experts of one tensor are solved one by one: the worst counts
        if found := [report.figures[name] for report in reports if name in report.figures]:
            row[name] = combine(found)
    if tensor.note:
        row["note"] = tensor.note
    return row


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of some packages; what is not installed is left out."""
    return {package: found for package in packages if (found := _version(package)) is not None}


@functools.cache  # each is a search over all that is installed, and a campaign has many manifests
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
