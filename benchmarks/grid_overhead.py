"""Run a grid of thousands of points over a tiny model: what a point costs beside its arithmetic.

    python benchmarks/grid_overhead.py

Everything a user has is on: Ray, one evaluator, results to Parquet, progress. A point's own work is some
hundred thousand parameters and one short batch, so its seconds are overhead. The driver's memory is read at the
first and at the last point.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from kept_file import Report, add_folder_options
from make_models import make_models
from model_shapes import LLAMA_SHAPES
from processes import run

#: What was promised, per point and evaluator; and how much the driver may grow meanwhile.
_MOST_MS, _MOST_GROWTH_MIB = 20.0, 64.0
_GRID = """
import json, sys, time
from raymerge.cluster import grid as grids
from raymerge.cluster.grid_options import GridOptions
import raymerge.cluster.results as results

times, memory = [], []
plain = results.ResultsWriter.append

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def append(self, row):
    plain(self, row)
    times.append(time.perf_counter())
    if len(times) % 50 == 0:
        memory.append(resident())

results.ResultsWriter.append = append
source, out, workers = sys.argv[1:]
done = grids.grid(source, out, GridOptions(workers=int(workers), device="cpu", overwrite=True))
print(json.dumps({
    "num_run": done.num_run, "num_failed": done.num_failed, "seconds": done.seconds, "times": times, "memory": memory,
}))
"""


def write_grid(file: Path, base: Path, fine_tunes: list[Path], num_points: int) -> Path:
    """Write a grid over lambda and the weight of one model, and its data."""
    rows = file.with_suffix(".jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    rows.write_text("".join(json.dumps({"text": f"text number {i} of a few"}) + "\n" for i in range(4)))
    num_scales = 50
    grid: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": os.fspath(base),
        "models": [
            {"model": os.fspath(model), "parameters": {"weight": "$w" if number == 0 else 0.3}}
            for number, model in enumerate(fine_tunes)
        ],
        "parameters": {"lambda": "$lam"},
        "dtype": "bfloat16",
        "grid": {
            "w": {"low": 0.1, "high": 1.0, "num": num_points // num_scales},
            "lam": {"low": 0.1, "high": 1.5, "num": num_scales},
        },
        "evaluate": {
            "dtype": "float32",
            "tasks": [{"name": "text", "kind": "loss", "validation": os.fspath(rows)}],
        },
        "select": {"metric": "text.loss", "mode": "min"},
        "export": {"top": 1},
    }
    file.write_text(yaml.safe_dump(grid, sort_keys=False))
    return file


def main() -> None:
    """Parse the options, measure, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--points", type=int, default=2_000, help="a multiple of 50")
    parser.add_argument("--workers", type=int, default=1)
    add_folder_options(parser)
    options = parser.parse_args()
    base, fine_tunes = make_models(options.work / "models" / "tiny", LLAMA_SHAPES["tiny"])
    out = options.work / "grid_overhead"
    source = write_grid(options.work / "grid_overhead.yaml", base, fine_tunes, options.points)
    done = run([sys.executable, "-c", _GRID, source, out, str(options.workers)])
    found = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(out)
    assert found["num_run"] == options.points and not found["num_failed"], found
    times = found["times"]
    # The first points wait for Ray, torch and the sources.
    skipped = min(len(times) // 10, 50)
    ms = (times[-1] - times[skipped]) / (len(times) - 1 - skipped) * 1e3 * options.workers
    mib = [each / 2**20 for each in found["memory"]]
    growth = mib[-1] - mib[len(mib) // 4] if len(mib) > 3 else 0.0
    report = Report(
        "grid_overhead",
        f"{options.points:,} points on a tiny model",
        {"points": options.points, "evaluators": options.workers, "model": "151,872 parameters, bf16"},
    )
    report.text(
        f"Promised: under {_MOST_MS:g} ms a point and evaluator, all its work included, and a driver that does not "
        f"grow (less than {_MOST_GROWTH_MIB:g} MiB between the first quarter and the end)."
    )
    report.table(
        ("", ""),
        [
            ("ms a point and evaluator", f"{ms:.1f}"),
            ("points a second", f"{1e3 * options.workers / ms:.0f}"),
            ("whole command, seconds", f"{done.seconds:.1f}"),
            ("driver's memory after a quarter, MiB", f"{mib[len(mib) // 4]:.0f}" if mib else "-"),
            ("at the end, MiB", f"{mib[-1]:.0f}" if mib else "-"),
        ],
    )
    report.data = {"ms_a_point": ms, "growth_mib": growth, "memory_mib": mib, "seconds": done.seconds}
    report.write(options.results)


if __name__ == "__main__":
    main()
