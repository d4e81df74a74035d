"""Plan the merge of four 671-billion-parameter mixtures of experts from their headers alone.

    python benchmarks/plan_scale.py

Each model is 45,395 tensors in about 160 safetensors files with true headers over sparse data: an
`ls` shows 1.3 TB, the disk holds megabytes. Planning runs in a fresh process each time; its wall
clock and greatest resident set are kept, once with the imports and once without.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from kept_file import Report, Spread, add_folder_options
from make_models import write_small_files
from model_shapes import MoeShape
from processes import run
from recipes import write_recipe

from raymerge.merge_actors.checkpoint.layout import lay_out

_SHARD_BYTES = 8_600_000_000
#: Limits that were promised.
_MAX_SECONDS, _MAX_GIB = 10.0, 1.0

_PLAN = """
import json, resource, sys, time
begin = time.perf_counter()
import raymerge
plan = raymerge.plan(sys.argv[1])
seconds = time.perf_counter() - begin
print(json.dumps({
    "seconds": seconds,
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "imports_torch": "torch" in sys.modules,
    "imports_ray": "ray" in sys.modules,
}))
"""


def make_sparse_model(folder: Path, shape: MoeShape, shard_bytes: int = _SHARD_BYTES) -> int:
    """Write headers and sparse data; returns the number of files."""
    layout = lay_out(shape.tensors(), shard_bytes)
    folder.mkdir(parents=True)
    for file in layout.files:
        with open(folder / file.name, "wb") as out:
            out.write(file.header)
            out.truncate(file.num_bytes)
    write_small_files(folder, shape.config(), layout)
    return len(layout.files)


def main() -> None:
    """Parse the options, measure, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, default=256, help="per layer; fewer for a quick trial")
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties"])
    parser.add_argument("--runs", type=int, default=5)
    add_folder_options(parser)
    options = parser.parse_args()
    shape = MoeShape(num_experts=options.experts)
    num_tensors = len(shape.tensors())
    folder = options.work / "plan_scale"
    shutil.rmtree(folder, ignore_errors=True)
    models = [folder / name for name in ("base", "one", "two", "three")]
    num_files = sum(make_sparse_model(model, shape) for model in models) // len(models)
    report = Report(
        "plan_scale",
        "Planning a 671B mixture of experts from headers",
        {
            "models": len(models),
            "tensors per model": f"{num_tensors:,}",
            "files per model": num_files,
            "parameters": f"{sum(tensor.num_elements for tensor in shape.tensors()):,}",
            "runs": options.runs,
            "page cache": "warm",
        },
    )
    rows = []
    for method in options.methods:
        recipe = write_recipe(folder / f"{method}.yaml", method, models[0], models[1:])
        done = [run([sys.executable, "-c", _PLAN, os.fspath(recipe)]) for _ in range(options.runs)]
        plans = [json.loads(each.stdout) for each in done]
        peak_gib = max(plan["peak_bytes"] for plan in plans) / 2**30
        seconds = Spread.of([plan["seconds"] for plan in plans])
        process = Spread.of([each.seconds for each in done])
        imported = [name for name in ("torch", "ray") if any(plan[f"imports_{name}"] for plan in plans)]
        rows.append((method, seconds, process, f"{peak_gib:.2f}", ", ".join(imported) or "neither"))
        report.data[method] = {"plan": seconds, "process": process, "peak_gib": peak_gib, "runs": plans}
    shutil.rmtree(folder)
    report.text(
        f"Promised: under {_MAX_SECONDS:g} s and {_MAX_GIB:g} GiB. Seconds, least / median / greatest."
    )
    report.table(("method", "import and plan", "whole process", "peak GiB", "torch, ray imported"), rows)
    report.write(options.results)


if __name__ == "__main__":
    main()
